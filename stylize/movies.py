"""Movies in and out, one frame at a time: memory does not depend on the length of the clip.

What is written has the frame count, size, frame rate, time stamps and sound of what was read. Frames are float32
[h, w, 3] RGB in [-1, 1]; times and durations are Fractions of a second since the start of the clip.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.stream import Disposition, Stream
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from lib import images, run
from lib.run import UserError

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}
X264 = {"crf": "16"}  # 0 is lossless, 51 the worst

# The defaults of swscale darken 4:2:0 by 1.3 of 255 levels; with these a flat colour comes back within one level.
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
_EXACT |= Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
# YUV matrices by their number in ITU-T H.273, to that in swscale: BT.709, FCC, BT.601 (twice), SMPTE 240M, BT.2020.
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
_FALLBACK_RATE = Fraction(25)
_MAX_RATE = 1000  # FFmpeg reports nonsense above it for streams that it did not look far enough into
_LAG_S = 10  # in a file, sound is at most so far behind the pictures that it belongs to


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


@dataclass(frozen=True)
class Frame:
    image: np.ndarray  # float32 [h, w, 3] in [-1, 1]
    time_s: Fraction
    duration_s: Fraction | None


def probe(path: Path) -> Clip:
    """Raises UserError for what is missing, a folder, no movie, without a video stream or without one whole frame."""
    with _opened(path) as container:
        stream = _film(container, path)
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
    with _opened(path) as container:
        stream = _film(container, path)
        stream.thread_type = "AUTO"
        time_s = -1 / clip.frames_per_s
        for frame in _decoded(container, stream):
            time_s += 1 / clip.frames_per_s
            if frame.pts is not None:
                time_s = frame.pts * clip.time_base_s - clip.start_s
            pixels = _upright(frame, clip.height, clip.width)
            yield Frame(np.float32(pixels) / 127.5 - 1, time_s, frame.duration * clip.time_base_s or None)


def _opened(path: Path) -> InputContainer:
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


def _film(container: InputContainer, path: Path) -> VideoStream:
    name = container.format.name
    if name in ("image2", "tty") or name.endswith("_pipe"):  # FFmpeg makes movies of images and of texts
        raise UserError(f"{path} is not a movie")
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            return stream
    raise UserError(f"{path} holds no moving pictures")


def _packets(container: InputContainer, *streams: Stream) -> Iterator[av.Packet]:
    packets = container.demux(*streams)
    with contextlib.suppress(av.error.InvalidDataError):  # of a file that is cut off, what came before is still good
        yield from packets


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    for packet in _packets(container, stream):
        with contextlib.suppress(FFmpegError):
            yield from packet.decode()


def _matrix(frame: av.VideoFrame) -> int:
    """The YUV matrix as tagged, or else as players guess it: BT.709 for high definition, BT.601 below."""
    if frame.colorspace in _MATRICES:
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
    matrix, kind = _MATRICES[_matrix(frame)], "rgba" if alpha else "rgb24"
    pixels = frame.reformat(*stored, kind, src_colorspace=matrix, interpolation=_EXACT).to_ndarray()
    if alpha:
        opacity = np.float32(pixels[..., 3:]) / 255
        pixels = (opacity * pixels[..., :3] + (1 - opacity) * 255).round().astype(np.uint8)
    pixels = pixels.swapaxes(0, 1) if turned else pixels
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


class Writer:
    """A context in which `write` adds frames to a movie; a successful end of it puts the file in its place.

    Until then, and where the end is an exception, an older file stays as it was; the partial one is removed.
    .mp4, .mov and .mkv are H.264: 4:2:0, or where a side is odd 4:4:4, which fewer players know, because H.264 can crop
    4:2:0 to even sizes only. .gif repeats for ever, has a palette per frame, at most 50 frames per second and no sound.
    `like` gives size, frame rate, shape of the pixels, colour tags and the sound, whose packets are copied. The sound
    ends with the last frame that is written where the clip has more of them, and is whole otherwise.
    Raises UserError for another suffix, a folder that cannot be written, a size or a sound that the format cannot hold,
    no frame at all; OSError, with errno, while writing (a full disk).
    """

    def __init__(
        self,
        path: Path,
        like: Clip | None = None,
        *,
        size: tuple[int, int] | None = None,
        frames_per_s: Fraction | float | None = None,
    ):
        """`size` is (h, w) in px, by default that of `like`; `frames_per_s` is needed without `like` only."""
        if like is not None:
            size, frames_per_s = size or (like.height, like.width), like.frames_per_s
        if size is None or frames_per_s is None:
            raise ValueError("without `like`, size and frames_per_s are needed")
        run.check_out(path, *FORMATS)
        self._path, self._like, self._is_gif = path, like, path.suffix == ".gif"
        self._partial = path.with_name(path.name + ".partial")
        self._height, self._width = size
        self._rate = Fraction(frames_per_s).limit_denominator(100_000)
        self._time_base_s = Fraction(1, 100) if self._is_gif else _time_base_s(self._rate, like)
        self._frames, self._pts, self._first_s = 0, 0, Fraction(0)
        self._palette = _palette(self._height, self._width) if self._is_gif else None
        self._sound: _Sound | None = None

    def __enter__(self) -> Writer:
        like = self._like
        kind = FORMATS[self._path.suffix]
        # Sound often starts a packet before zero: Matroska would move the pictures to make up for it.
        options = {"gif": {"loop": "0"}, "matroska": {"avoid_negative_ts": "disabled"}}.get(kind)
        if options is None:  # streams of an mp4 start at whole milliseconds, unless it is told to count finer
            per_s = self._time_base_s.denominator
            options = {"movflags": "+faststart", "movie_timescale": str(per_s * math.ceil(90_000 / per_s))}
        self._container = av.open(f"file:{self._partial}", "w", format=kind, container_options=options)
        self._stream = self._container.add_stream("gif" if self._is_gif else "libx264", rate=self._rate)
        context = self._stream.codec_context
        context.width, context.height, context.time_base = self._width, self._height, self._time_base_s
        context.sample_aspect_ratio = like.pixel_aspect if like else Fraction(1)
        if self._is_gif:
            context.pix_fmt = "pal8"
        else:
            context.options = dict(X264)
            context.pix_fmt = "yuv444p" if self._height % 2 or self._width % 2 else "yuv420p"
            context.colorspace, context.color_primaries, context.color_trc = like.colour if like else (1, 1, 1)
            context.color_range = 1
        try:
            context.open()
        except FFmpegError:
            size = f"{self._width} x {self._height}"
            raise UserError(f"{self._path}: frames of {size} px cannot be encoded: choose a smaller size") from None
        if like and like.has_audio and not self._is_gif:
            self._sound = _Sound(self._container, like, self._path)
        return self

    def write(self, image: np.ndarray, time_s: Fraction | None = None, duration_s: Fraction | None = None) -> None:
        """Adds [h, w, 3] in [-1, 1]; `time_s` and `duration_s` as read, or else as the constant frame rate has it."""
        if image.shape != (self._height, self._width, 3):
            raise ValueError(f"a frame of shape {image.shape} in a movie of {self._height} x {self._width} px")
        frame = av.VideoFrame.from_ndarray(images.to_uint8(image), format="rgb24")
        frame.pts, frame.time_base = self._next_pts(time_s), self._time_base_s
        frame.duration = max(1, round((duration_s or 1 / self._rate) / self._time_base_s))
        self._frames, self._pts, self._ticks = self._frames + 1, frame.pts, frame.duration
        with _explained(self._path):
            self._encode(frame)
            if self._sound:
                self._sound.copy((self._pts + self._ticks) * self._time_base_s)

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with contextlib.suppress(FFmpegError):
                self._container.close()
            if self._sound:
                self._sound.close()
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self._frames:
            raise UserError(f"{self._path}: there was no frame to write")
        with _explained(self._path):
            self._encode(None)
            if self._sound:
                self._sound.finish(self._pts * self._time_base_s, self._ticks * self._time_base_s)
            self._container.close()
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        self._partial.replace(self._path)

    def _next_pts(self, time_s: Fraction | None) -> int:
        """Time stamps rise, and those of a constant rate that the source had to round (Matroska: to ms) are exact."""
        even_s = self._first_s + self._frames / self._rate
        tick_s = self._like.time_base_s if self._like else Fraction(0)
        if not self._frames:
            self._first_s = even_s = time_s or Fraction(0)
        if time_s is None or (tick_s <= Fraction(1, 1000) and abs(time_s - even_s) < tick_s):
            time_s = even_s
        pts = round(time_s / self._time_base_s)
        return max(pts, self._pts + (2 if self._is_gif else 1)) if self._frames else pts

    def _encode(self, frame: av.VideoFrame | None) -> None:
        """None ends the movie."""
        if self._palette:
            self._palette.push(frame)
            with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
                while True:
                    self._container.mux(self._stream.encode(self._palette.pull()))
        elif frame:
            matrix = _MATRICES[self._stream.codec_context.colorspace]
            chroma = self._stream.codec_context.pix_fmt
            yuv = frame.reformat(format=chroma, dst_colorspace=matrix, dst_color_range=1, interpolation=_EXACT)
            self._container.mux(self._stream.encode(yuv))
        if frame is None:
            self._container.mux(self._stream.encode())


class _Sound:
    """The packets of all sound tracks of `clip`, copied as they are into `container`."""

    def __init__(self, container: OutputContainer, clip: Clip, path: Path):
        self._container, self._start_s = container, clip.start_s
        self._source = _opened(clip.path)
        film, tracks = _film(self._source, clip.path), self._source.streams.audio
        self._film = film.index
        try:
            self._copies = {track.index: container.add_stream_from_template(track) for track in tracks}
        except ValueError:
            names = ", ".join(track.codec_context.name if track.codec_context else "unknown" for track in tracks)
            raise UserError(f"{path} cannot hold sound as in {clip.path} ({names}): try .mp4, .mov and .mkv") from None
        self._packets = _packets(self._source, film, *tracks)
        self._ahead: list[tuple[av.Packet, Fraction]] = []
        self._newest_s = {stream.index: Fraction(-1) for stream in (film, *tracks)}

    def copy(self, until_s: Fraction) -> None:
        """What starts before `until_s`. The file is read little further than that: films are long."""
        ahead, self._ahead = self._ahead, []
        for packet, time_s in ahead:
            self._place(packet, time_s, until_s)
        while self._newest_s[self._film] < until_s + _LAG_S and min(self._newest_s.values()) < until_s:
            packet = next(self._packets, None)
            if packet is None:
                return
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None:  # it is None where a stream ends
                time_s, index = stamp * packet.time_base - self._start_s, packet.stream_index
                self._newest_s[index] = max(self._newest_s[index], time_s)
                if index in self._copies:
                    self._place(packet, time_s, until_s)

    def finish(self, last_s: Fraction, duration_s: Fraction) -> None:
        """`last_s`: when the last frame starts. If nothing of the film follows, then the rest of the sound does."""
        self.copy(last_s + duration_s)
        if self._newest_s[self._film] < last_s + duration_s / 2:  # and so the file has been read to its end
            for packet, _ in self._ahead:
                self._mux(packet)

    def _place(self, packet: av.Packet, time_s: Fraction, until_s: Fraction) -> None:
        if time_s >= until_s:
            self._ahead.append((packet, time_s))
        else:
            self._mux(packet)

    def _mux(self, packet: av.Packet) -> None:
        shift = round(self._start_s / packet.time_base)
        packet.stream = self._copies[packet.stream_index]
        packet.pts = None if packet.pts is None else packet.pts - shift
        packet.dts = None if packet.dts is None else packet.dts - shift
        self._container.mux(packet)

    def close(self) -> None:
        self._source.close()


def _time_base_s(rate: Fraction, like: Clip | None) -> Fraction:
    """The longest that both the frames of a constant rate and the time stamps of `like` are multiples of."""
    if like is None:
        return 1 / rate
    ticks = like.time_base_s
    both = Fraction(math.gcd(ticks.numerator * rate.numerator, rate.denominator * ticks.denominator))
    both /= ticks.denominator * rate.numerator
    return both if both.denominator <= 10**7 else ticks  # containers have 32 bits for it


def _palette(height: int, width: int) -> Graph:
    """RGB frames in, frames with 256 colours of their own out. Dots of a fixed pattern do not flicker."""
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 100))
    split, colours = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=5"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(colours, 1, 0)
    colours.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of FFmpeg as those that the command line can put into one line."""
    try:
        yield
    except FFmpegError as error:
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
