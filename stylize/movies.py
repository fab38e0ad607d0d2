"""Movies in and out, one frame at a time: memory does not depend on the length of the clip.

What is written has the frame count, size, frame rate, time stamps and sound of what was read. Frames are float32
[h, w, 3] RGB in [-1, 1]; times and durations are Fractions of a second since the start of the clip.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition, Stream
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from lib.images import from_uint8
from lib.process import UserError

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}

# The defaults of swscale darken 4:2:0 by 1.3 of 255 levels; with these a flat colour comes back within one level.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
EXACT |= Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
# YUV matrices by their number in ITU-T H.273, to that in swscale: BT.709, FCC, BT.601 (twice), SMPTE 240M, BT.2020.
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
_FALLBACK_RATE = Fraction(25)
_MAX_RATE = 1000  # FFmpeg reports nonsense above it for streams that it did not look far enough into


@dataclass(frozen=True)
class Clip:
    """What the header and the first frame of a movie say."""

    path: Path
    width: int  # of the upright image, px
    height: int
    frames_per_s: Fraction  # on average
    frames: int | None  # None where the container does not say
    has_audio: bool
    duration_s: float | None
    time_base_s: Fraction  # time stamps are multiples of it
    start_s: Fraction  # of the earliest stream, which `Frame.time_s` counts from
    pixel_aspect: Fraction  # width of a pixel over its height
    colour: tuple[int, int, int]  # matrix, primaries and transfer by their numbers in ITU-T H.273

    def frames_within(self, longest_s: float | None) -> int | None:
        """How many frames, about, there are in the first `longest_s` or in all; None where nothing tells."""
        frames = self.frames
        if frames is None and self.duration_s is not None:
            frames = round(self.duration_s * self.frames_per_s)
        if longest_s is None or longest_s == math.inf:
            return frames
        most = math.ceil(longest_s * self.frames_per_s)
        return most if frames is None else min(frames, most)


@dataclass(frozen=True)
class Frame:
    image: np.ndarray  # float32 [h, w, 3] in [-1, 1]
    time_s: Fraction
    duration_s: Fraction | None


def probe(path: Path) -> Clip:
    """Raises UserError for what is missing, a folder, no movie, without a video stream or without one whole frame."""
    with open_movie(path) as container:
        stream = film_of(container, path)
        first = next(_decoded(container, stream), None)
        if first is None:
            raise UserError(f"{path}: no frame of it can be decoded: is it empty or cut off?")
        time_base_s = stream.time_base or 1 / _FALLBACK_RATE
        starts_s = [s.start_time * s.time_base for s in (stream, *container.streams.audio) if s.start_time is not None]
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        duration_s = stream.duration * time_base_s if stream.duration else (container.duration or 0) / av.time_base
        pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
        turned = _placing(first)[0]
        return Clip(
            path=path,
            width=first.height if turned else first.width,
            height=first.width if turned else first.height,
            frames_per_s=next((rate for rate in rates if rate and 0 < rate <= _MAX_RATE), _FALLBACK_RATE),
            frames=stream.frames or None,
            has_audio=len(container.streams.audio) > 0,
            duration_s=float(duration_s) or None,
            time_base_s=time_base_s,
            start_s=max(Fraction(0), min(starts_s, default=Fraction(0))),
            pixel_aspect=1 / pixel_aspect if turned else pixel_aspect,
            colour=(_matrix(first), first.color_primaries, first.color_trc),
        )


def read(path: Path) -> Iterator[Frame]:
    """The frames, upright, all of the size of the first, without transparency (on white).

    Packets that cannot be decoded are left out, as players do: the count then falls short of `Clip.frames`.
    Raises UserError as `probe` does, at the first frame.
    """
    clip = probe(path)
    with open_movie(path) as container:
        stream = film_of(container, path)
        stream.thread_type = "AUTO"
        time_s = -1 / clip.frames_per_s
        for frame in _decoded(container, stream):
            time_s += 1 / clip.frames_per_s
            if frame.pts is not None:
                time_s = frame.pts * clip.time_base_s - clip.start_s
            pixels = _upright(frame, clip.height, clip.width)
            yield Frame(from_uint8(pixels), time_s, frame.duration * clip.time_base_s or None)


def open_movie(path: Path) -> InputContainer:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a movie")
    # A playlist that calls itself a movie may not reach into the network; a gif of large frames needs a long look.
    options = {"protocol_whitelist": "file", "probesize": str(2**26)}
    try:
        return av.open(f"file:{path}", options=options, metadata_errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such movie") from None
    except FFmpegError as error:
        raise UserError(f"{path} cannot be read as a movie: {error.strerror}") from None


def film_of(container: InputContainer, path: Path) -> VideoStream:
    name = container.format.name
    if name in ("image2", "tty") or name.endswith("_pipe"):  # FFmpeg makes movies of images and of texts
        raise UserError(f"{path} is not a movie")
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            return stream
    raise UserError(f"{path} holds no moving pictures")


def packets_of(container: InputContainer, *streams: Stream) -> Iterator[av.Packet]:
    packets = container.demux(*streams)
    with contextlib.suppress(av.error.InvalidDataError):  # of a file that is cut off, what came before is still good
        yield from packets


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    for packet in packets_of(container, stream):
        with contextlib.suppress(FFmpegError):
            yield from packet.decode()


def _matrix(frame: av.VideoFrame) -> int:
    """The YUV matrix as tagged, or else as players guess it: BT.709 for high definition, BT.601 below."""
    if frame.colorspace in MATRICES:
        return frame.colorspace
    return 1 if frame.format.is_rgb or frame.width >= 1280 or frame.height > 576 else 6


def _placing(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """What showing the stored image takes: swap its axes?, then mirror it top to bottom?, and left to right?"""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)


def _upright(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]."""
    turned, upside_down, mirrored = _placing(frame)
    stored = (height, width) if turned else (width, height)
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    matrix, kind = MATRICES[_matrix(frame)], "rgba" if alpha else "rgb24"
    pixels = frame.reformat(*stored, kind, src_colorspace=matrix, interpolation=EXACT).to_ndarray()
    if alpha:
        opacity = np.float32(pixels[..., 3:]) / 255
        pixels = (opacity * pixels[..., :3] + (1 - opacity) * 255).round().astype(np.uint8)
    pixels = pixels.swapaxes(0, 1) if turned else pixels
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
