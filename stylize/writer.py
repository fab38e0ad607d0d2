"""Writing movies, one frame at a time, with the sound of the clip that they are made from."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.error import FFmpegError
from av.filter import Graph

from lib import images, run
from lib.process import UserError
from stylize.movies import EXACT, FORMATS, MATRICES, Clip, film_of, open_movie, packets_of

X264 = {"crf": "16"}  # 0 is lossless, 51 the worst
_LAG_S = 10  # in a file, sound is at most so far behind the pictures that it belongs to


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
            with contextlib.suppress(BlockingIOError, EOFError):
                while True:
                    self._container.mux(self._stream.encode(self._palette.pull()))
        elif frame:
            matrix = MATRICES[self._stream.codec_context.colorspace]
            chroma = self._stream.codec_context.pix_fmt
            yuv = frame.reformat(format=chroma, dst_colorspace=matrix, dst_color_range=1, interpolation=EXACT)
            self._container.mux(self._stream.encode(yuv))
        if frame is None:
            self._container.mux(self._stream.encode())


class _Sound:
    """The packets of all sound tracks of `clip`, copied as they are into `container`."""

    def __init__(self, container: OutputContainer, clip: Clip, path: Path):
        self._container, self._start_s = container, clip.start_s
        self._source = open_movie(clip.path)
        film, tracks = film_of(self._source, clip.path), self._source.streams.audio
        self._film = film.index
        try:
            self._copies = {track.index: container.add_stream_from_template(track) for track in tracks}
        except ValueError:
            names = ", ".join(track.codec_context.name if track.codec_context else "unknown" for track in tracks)
            raise UserError(f"{path} cannot hold sound as in {clip.path} ({names}): try .mp4, .mov and .mkv") from None
        self._packets = packets_of(self._source, film, *tracks)
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
