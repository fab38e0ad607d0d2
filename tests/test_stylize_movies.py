"""stylize/movies.py: what is written has the frames, size, rate, time stamps and sound of what was read, or nothing."""

import contextlib
import dataclasses
import errno
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from lib.process import UserError
from stylize import movies
from stylize.writer import Writer

NTSC = Fraction(30000, 1001)
FFV1 = {"codec": "ffv1", "pix_fmt": "bgr0"}  # lossless, as png is, which Matroska does not take


def pictures(count, height, width):
    """uint8 [count, h, w, 3], all different: smooth colours that drift."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(0.1 * x + 0.3 * t), np.cos(0.1 * y - 0.2 * t), np.sin(0.05 * (x + y) + 0.5 * t)]
    return np.uint8(np.round(127.5 + 100 * np.stack(waves, -1)))


def scaled(pixels):
    return np.float32(pixels) / 127.5 - 1


def add_track(container, codec="aac", rate=44100):
    track = container.add_stream(codec, rate=rate)
    track.codec_context.layout = "mono"
    return track


def add_sound(container, track, seconds, start_s=Fraction(0)):
    rate, size = track.codec_context.sample_rate, 1024
    for i in range(round(seconds * rate / size)):
        wave = 0.3 * np.sin(np.arange(i * size, (i + 1) * size) * 0.05)
        name = track.codec_context.format.name
        samples = np.float32(wave)[None] if name == "fltp" else np.uint8(128 + wave * 127)[None]
        frame = av.AudioFrame.from_ndarray(samples, format=name, layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start_s * rate) + i * size
        container.mux(track.encode(frame))
    container.mux(track.encode(None))


def film(
    path,
    pixels,
    *,
    rate=Fraction(25),
    stamps=None,
    codec="png",
    pix_fmt="rgb24",
    placing=None,
    tracks=(),
    start_s=Fraction(0),
    aspect=None,
):
    """A movie that stylize/movies.py has no part in. `stamps` are in units of 1 / rate; `tracks` are lengths in s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, pix_fmt=pix_fmt)
        stream.height, stream.width = pixels.shape[1:3]
        stream.codec_context.time_base = 1 / rate
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if placing:
            stream.set_display_rotation(*placing)
        sounds = [add_track(container) for _ in tracks]
        for i, image in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (i if stamps is None else stamps[i]) + round(start_s * rate), 1 / rate
            frame.duration = 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for track, seconds in zip(sounds, tracks, strict=True):
            add_sound(container, track, seconds, start_s)
    return path


def packets(path, track=0):
    with av.open(str(path)) as container:
        return [(p.pts * p.time_base, bytes(p)) for p in container.demux(audio=track) if p.pts is not None]


def copied(source, target, count=None):
    """`source` read and written as a command would; also its frames."""
    clip, frames = movies.probe(source), []
    with Writer(target, clip) as writer:
        for frame in movies.read(source):
            if len(frames) == count:
                break
            frames.append(frame)
            writer.write(frame.image, frame.time_s, frame.duration_s)
    return frames


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_probe(tmp_path):
    clip = movies.probe(film(tmp_path / "x.mov", pictures(7, 17, 31), rate=NTSC, tracks=[0.3]))
    assert (clip.height, clip.width, clip.frames_per_s, clip.frames) == (17, 31, NTSC, 7)
    assert clip.has_audio and clip.duration_s == pytest.approx(7 / NTSC) and clip.start_s == 0
    clip = movies.probe(film(tmp_path / "x.mkv", pictures(5, 6, 8), **FFV1))
    assert (clip.height, clip.width, clip.frames_per_s, clip.frames, clip.has_audio) == (6, 8, 25, None, False)


def test_how_many_frames_are_to_come(tmp_path):
    clip = dataclasses.replace(movies.probe(film(tmp_path / "x.mov", pictures(7, 6, 8), rate=Fraction(10))), frames=7)
    untold = dataclasses.replace(clip, frames=None, duration_s=1.2)
    nothing = dataclasses.replace(untold, duration_s=None)
    assert [c.frames_within(None) for c in (clip, untold, nothing)] == [7, 12, None]
    assert [c.frames_within(0.25) for c in (clip, untold, nothing)] == [3, 3, 3]
    assert [c.frames_within(float("inf")) for c in (clip, untold, nothing)] == [7, 12, None]


def test_read_is_exact(tmp_path):
    pixels = pictures(6, 17, 31)
    frames = list(movies.read(film(tmp_path / "x.mov", pixels, rate=NTSC)))
    assert all(frame.image.dtype == np.float32 for frame in frames)
    np.testing.assert_array_equal([frame.image for frame in frames], scaled(pixels))
    assert [frame.time_s for frame in frames] == [i / NTSC for i in range(6)]
    assert {frame.duration_s for frame in frames} == {1 / NTSC}


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("size", [(18, 32), (17, 31), (16, 31), (17, 32), (1, 1), (2, 2), (101, 7)])
def test_round_trip(tmp_path, size, suffix):
    source, target = film(tmp_path / "x.mov", pictures(12, *size), rate=NTSC), tmp_path / f"y{suffix}"
    frames = copied(source, target)
    clip, got = movies.probe(target), list(movies.read(target))
    assert (clip.height, clip.width, clip.frames_per_s) == (*size, NTSC)
    assert clip.frames == (None if suffix == ".mkv" else 12) and len(got) == 12
    tick = clip.time_base_s if suffix == ".mkv" else 0  # Matroska holds milliseconds
    assert all(abs(a.time_s - b.time_s) <= tick for a, b in zip(frames, got, strict=True))
    error = np.abs(np.stack([a.image - b.image for a, b in zip(frames, got, strict=True)]))
    assert error.mean() * 127.5 < 4
    with av.open(str(target)) as container:  # others agree about the size
        assert {(f.height, f.width) for f in container.decode(video=0)} == {size}
    assert names(tmp_path) == sorted(["x.mov", target.name])


def test_without_a_source(tmp_path):
    with Writer(tmp_path / "a:b %03d.mp4", size=(6, 8), frames_per_s=12.5) as writer:
        for image in scaled(pictures(5, 6, 8)):
            writer.write(image)
    clip = movies.probe(tmp_path / "a:b %03d.mp4")
    assert (clip.frames_per_s, clip.frames, clip.duration_s, clip.has_audio) == (Fraction(25, 2), 5, 0.4, False)
    assert clip.colour == (1, 1, 1)


def test_another_size_and_one_frame(tmp_path):
    clip = movies.probe(film(tmp_path / "x.mov", pictures(3, 6, 8)))
    with Writer(tmp_path / "y.mp4", clip, size=(12, 16)) as writer:
        with pytest.raises(ValueError, match=r"a frame of shape \(6, 8, 3\) in a movie of 12 x 16"):
            writer.write(np.zeros((6, 8, 3), np.float32))
        writer.write(np.zeros((12, 16, 3), np.float32))
    assert (movies.probe(tmp_path / "y.mp4").width, len(list(movies.read(tmp_path / "y.mp4")))) == (16, 1)
    with pytest.raises(ValueError, match="size and frames_per_s are needed"):
        Writer(tmp_path / "z.mp4", size=(6, 8))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_keeps_its_time_stamps(tmp_path, suffix):
    stamps = [0, 1, 2, 5, 6, 20, 21, 29]
    source = film(tmp_path / "x.mov", pictures(8, 6, 8), rate=Fraction(50), stamps=stamps)
    copied(source, tmp_path / f"y{suffix}")
    assert [frame.time_s for frame in movies.read(tmp_path / f"y{suffix}")] == [Fraction(s, 50) for s in stamps]


def test_times_that_matroska_rounded_are_exact_again(tmp_path):
    source = film(tmp_path / "x.mkv", pictures(40, 6, 8), rate=NTSC, **FFV1)
    assert [frame.time_s for frame in movies.read(source)][1] == Fraction(33, 1000)
    copied(source, tmp_path / "y.mp4")
    assert movies.probe(tmp_path / "y.mp4").frames_per_s == NTSC
    assert [frame.time_s for frame in movies.read(tmp_path / "y.mp4")] == [i / NTSC for i in range(40)]


def test_time_stamps_that_stand_still_are_moved_on(tmp_path):
    clip = movies.probe(film(tmp_path / "x.mov", pictures(3, 6, 8)))
    with Writer(tmp_path / "y.mp4", clip) as writer:
        for image in scaled(pictures(4, 6, 8)):
            writer.write(image, Fraction(0))
    times = [frame.time_s for frame in movies.read(tmp_path / "y.mp4")]
    assert len(times) == 4 and times == sorted(set(times))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_sound_packets_are_copied(tmp_path, suffix):
    source = film(tmp_path / "x.mov", pictures(50, 6, 8), tracks=[2.3, 1.2])  # one longer than the film, one shorter
    copied(source, tmp_path / f"y{suffix}")
    for track in (0, 1):
        (times, data), (old_times, old_data) = (
            zip(*packets(path, track), strict=True) for path in (tmp_path / f"y{suffix}", source)
        )
        assert data == old_data and len(data) > 40
        np.testing.assert_allclose(np.float64(times), np.float64(old_times), atol=0 if suffix != ".mkv" else 6e-4)


def test_sound_ends_with_the_frames_that_are_written(tmp_path):
    source = film(tmp_path / "x.mov", pictures(50, 6, 8), tracks=[2.3, 0.3])
    copied(source, tmp_path / "y.mp4", count=20)  # 0.8 s
    whole, part = packets(source), packets(tmp_path / "y.mp4")
    assert part == [packet for packet in whole if packet[0] < Fraction(20, 25)]
    assert packets(tmp_path / "y.mp4", 1) == packets(source, 1)
    assert movies.probe(tmp_path / "y.mp4").duration_s == pytest.approx(0.8)


def test_a_late_start_is_taken_off_pictures_and_sound_alike(tmp_path):
    source = film(
        tmp_path / "x.ts", pictures(25, 16, 16), codec="libx264", pix_fmt="yuv420p", tracks=[1.0], start_s=Fraction(9)
    )
    clip = movies.probe(source)
    assert clip.start_s > 8.9
    frames = copied(source, tmp_path / "y.mp4")
    assert 0 <= frames[0].time_s < 0.2
    assert [frame.time_s for frame in movies.read(tmp_path / "y.mp4")] == [frame.time_s for frame in frames]
    (old_s, old), (new_s, new) = packets(source)[5], packets(tmp_path / "y.mp4")[5]
    assert new_s == pytest.approx(old_s - clip.start_s, abs=1e-4) and new == old[7:]  # but for the header of a stream


def test_sound_that_the_format_cannot_hold(tmp_path):
    with av.open(str(tmp_path / "x.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, pix_fmt="yuv420p")
        stream.height, stream.width = 16, 16
        track = add_track(container, "pcm_u8")
        for image in pictures(5, 16, 16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
        add_sound(container, track, 0.3)
    with pytest.raises(UserError, match=r"y.mp4 cannot hold sound as in .*x.avi \(pcm_u8\): try .mp4, .mov and .mkv"):
        copied(tmp_path / "x.avi", tmp_path / "y.mp4")
    assert len(copied(tmp_path / "x.avi", tmp_path / "y.mkv")) == 5
    assert [data for _, data in packets(tmp_path / "y.mkv")] == [data for _, data in packets(tmp_path / "x.avi")]
    assert names(tmp_path) == ["x.avi", "y.mkv"]


def test_gif(tmp_path):
    source, target = film(tmp_path / "x.mov", pictures(7, 17, 31), rate=Fraction(20), tracks=[0.3]), tmp_path / "y.gif"
    frames = copied(source, target)
    with Image.open(target) as image:
        assert (image.n_frames, image.size, image.info["loop"], image.info["duration"]) == (7, (31, 17), 0, 50)
    clip, got = movies.probe(target), list(movies.read(target))
    assert clip.frames_per_s == 20 and not clip.has_audio
    assert [frame.time_s for frame in got] == [Fraction(i, 20) for i in range(7)]
    error = np.abs(np.stack([a.image - b.image for a, b in zip(frames, got, strict=True)]))
    assert error.mean() * 127.5 < 4
    copied(target, tmp_path / "z.mp4")
    assert (movies.probe(tmp_path / "z.mp4").frames, movies.probe(tmp_path / "z.mp4").frames_per_s) == (7, 20)


@pytest.mark.parametrize(("rate", "stamps"), [(NTSC, [0, 3, 7, 10, 13]), (60, [0, 2, 4, 6, 8])])
def test_gif_holds_hundredths_of_a_second_two_at_least(tmp_path, rate, stamps):
    with Writer(tmp_path / "x.gif", size=(1, 1), frames_per_s=rate) as writer:
        for _ in range(5):  # frames that are alike stay frames
            writer.write(np.zeros((1, 1, 3), np.float32))
    assert [frame.time_s * 100 for frame in movies.read(tmp_path / "x.gif")] == stamps


def test_gif_of_few_colours_is_exact(tmp_path):
    colours = np.uint8([[[255, 0, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255]]]).repeat(8, 0).repeat(8, 1)
    with Writer(tmp_path / "x.gif", size=(16, 16), frames_per_s=10) as writer:
        for turns in range(4):
            writer.write(scaled(np.rot90(colours, turns)))
    for turns, frame in enumerate(movies.read(tmp_path / "x.gif")):
        np.testing.assert_array_equal(frame.image, scaled(np.rot90(colours, turns)))


def test_transparent_is_put_on_white(tmp_path):
    picture = Image.new("P", (4, 2), 0)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.paste(1, (0, 0, 2, 2))
    picture.save(tmp_path / "x.gif", transparency=0)
    (frame,) = movies.read(tmp_path / "x.gif")
    np.testing.assert_array_equal(frame.image[:, 2:], 1)
    np.testing.assert_array_equal(frame.image[:, :2], np.broadcast_to(scaled([200, 100, 50]), (2, 2, 3)))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_phones_turn_and_mirror(tmp_path, degrees, mirrored):
    pixels = pictures(2, 6, 10)
    source = film(tmp_path / "x.mov", pixels, placing=(degrees, mirrored), aspect=Fraction(4, 3))
    clip, frames = movies.probe(source), list(movies.read(source))
    upright = np.rot90(pixels, degrees // 90, (1, 2))  # anticlockwise
    upright = upright[:, :, ::-1] if mirrored else upright
    assert (clip.height, clip.width) == upright.shape[1:3]
    assert clip.pixel_aspect == (Fraction(3, 4) if degrees % 180 else Fraction(4, 3))
    np.testing.assert_array_equal([frame.image for frame in frames], scaled(upright))
    copied(source, tmp_path / "y.mp4")
    assert movies.probe(tmp_path / "y.mp4").pixel_aspect == clip.pixel_aspect
    assert next(movies.read(tmp_path / "y.mp4")).image.shape == upright.shape[1:]


@pytest.mark.parametrize("matrix", [1, 5, 9])
@pytest.mark.parametrize("size", [(32, 32), (31, 31)])
def test_colours_survive_and_are_tagged(tmp_path, matrix, size):
    colours = [[200, 30, 60], [20, 220, 90], [30, 60, 250], [128, 128, 128], [255, 255, 255], [0, 0, 0]]
    clip = movies.probe(film(tmp_path / "x.mov", pictures(1, *size)))
    clip = dataclasses.replace(clip, colour=(matrix, 2, 2))
    with Writer(tmp_path / "y.mp4", clip) as writer:
        for colour in colours:
            writer.write(np.broadcast_to(scaled(colour), (*size, 3)))
    for colour, frame in zip(colours, movies.read(tmp_path / "y.mp4"), strict=True):
        np.testing.assert_allclose(frame.image * 127.5 + 127.5, np.broadcast_to(colour, (*size, 3)), atol=2.01)
    assert movies.probe(tmp_path / "y.mp4").colour == (matrix, 2, 2)


def sound_only(path):
    with av.open(str(path), "w", format="mp4") as container:
        add_sound(container, add_track(container), 0.3)


def sound_with_a_cover(path):
    with av.open(str(path), "w", format="mp4") as container:
        track, cover = add_track(container), container.add_stream("mjpeg", rate=25, pix_fmt="yuvj420p")
        cover.height, cover.width, cover.disposition = 16, 16, Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(pictures(1, 16, 16)[0], format="rgb24")))
        container.mux(cover.encode(None))
        add_sound(container, track, 0.3)


def without_frames(path):
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("libx264", rate=25, pix_fmt="yuv420p")
        stream.height, stream.width = 16, 16
        container.start_encoding()


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("absent.mp4", lambda path: None, "absent.mp4: no such movie"),
        ("file/x.mp4", lambda path: path.parent.write_text(""), "no such movie"),
        ("x.mp4", Path.mkdir, "x.mp4 is a folder, not a movie"),
        ("x.mp4", lambda path: path.write_text("no movie"), "x.mp4 cannot be read as a movie"),
        ("x.mp4", lambda path: path.write_text(""), "x.mp4 cannot be read as a movie"),
        ("x.txt", lambda path: path.write_text("no movie\n" * 500), "x.txt is not a movie"),
        ("x.png", lambda path: Image.new("RGB", (4, 4)).save(path), "x.png is not a movie"),
        ("x.mp4", sound_only, "x.mp4 holds no moving pictures"),
        ("x.mp4", sound_with_a_cover, "x.mp4 holds no moving pictures"),
        ("x.avi", without_frames, "x.avi: no frame of it can be decoded"),
    ],
)
def test_what_is_no_movie(tmp_path, name, make, message):
    make(tmp_path / name)
    for use in (movies.probe, lambda path: next(movies.read(path))):
        with pytest.raises(UserError, match=message) as error:
            use(tmp_path / name)
        assert "\n" not in str(error.value)


def test_cut_off(tmp_path):
    whole = film(tmp_path / "x.mov", pictures(20, 32, 48)).read_bytes()  # its table of frames is at the end
    (tmp_path / "x.mov").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="x.mov cannot be read as a movie"):
        movies.probe(tmp_path / "x.mov")
    whole = film(tmp_path / "x.mkv", pictures(20, 32, 48), tracks=[0.8], **FFV1).read_bytes()
    (tmp_path / "x.mkv").write_bytes(whole[: len(whole) // 2])
    count = len(copied(tmp_path / "x.mkv", tmp_path / "y.mp4"))
    assert 5 < count < 15 and len(list(movies.read(tmp_path / "y.mp4"))) == count
    assert 0 < float(packets(tmp_path / "y.mp4")[-1][0]) < 0.7


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.gif"])
def test_damaged_bytes_never_give_a_traceback(tmp_path, name):
    with Writer(tmp_path / name, size=(16, 16), frames_per_s=25) as writer:
        for image in scaled(pictures(4, 16, 16)):
            writer.write(image)
    whole = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(2)
    for _ in range(40):
        torn = bytearray(whole)
        for at in rng.integers(len(torn), size=4):
            torn[at] = rng.integers(256)
        (tmp_path / name).write_bytes(torn)
        with contextlib.suppress(UserError):  # a pixel may be wrong without anybody being able to know
            for frame in movies.read(tmp_path / name):
                assert frame.image.shape[-1] == 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif"])
def test_after_an_exception_the_older_file_is_left_and_nothing_else(tmp_path, suffix):
    target = tmp_path / f"x{suffix}"
    target.write_text("older")
    with pytest.raises(KeyError):  # noqa: PT012, SIM117
        with Writer(target, size=(6, 8), frames_per_s=25) as writer:
            for image in scaled(pictures(60, 6, 8)):
                writer.write(image)
            assert names(tmp_path) == [target.name, f"{target.name}.partial"]
            raise KeyError
    assert names(tmp_path) == [target.name] and target.read_text() == "older"
    with (
        pytest.raises(UserError, match="there was no frame to write"),
        Writer(target, size=(6, 8), frames_per_s=25),
    ):
        pass
    assert names(tmp_path) == [target.name] and target.read_text() == "older"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.avi", "must end in .mp4 or .mov or .mkv or .gif"),
        ("x", "must end in .mp4"),
        ("absent/x.mp4", "there is no folder"),
        ("folder.mp4", "is a folder"),
        ("/proc/x.mp4", "cannot be written"),
    ],
)
def test_where_nothing_can_be_written(tmp_path, name, message):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=message):
        Writer(tmp_path / name, size=(6, 8), frames_per_s=25)


def test_too_large_to_be_encoded(tmp_path):
    with (
        pytest.raises(UserError, match=r"x.mp4: frames of 20000 x 2 px cannot be encoded: choose a smaller size"),
        Writer(tmp_path / "x.mp4", size=(2, 20000), frames_per_s=25),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".gif"])
def test_full_disk(tiny_disk, suffix):
    noise = np.float32(np.random.default_rng(0).choice([-1, 1], (384, 512, 3)))
    with pytest.raises(OSError, match="No space left on device") as error:  # noqa: PT012, SIM117
        with Writer(tiny_disk / f"x{suffix}", size=(384, 512), frames_per_s=25) as writer:
            for i in range(20):
                writer.write(np.roll(noise, 37 * i, 1))
    assert error.value.errno == errno.ENOSPC and str(tiny_disk) in error.value.filename
    assert names(tiny_disk) == []


def test_real_clips(data_folder, tmp_path):
    clip = movies.probe(data_folder / "video" / "bikes.mp4")
    assert (clip.width, clip.height, clip.frames_per_s, clip.frames, clip.duration_s) == (640, 272, 25, 250, 10)
    assert not clip.has_audio
    source = data_folder / "video" / "bigbuckbunny.mp4"
    clip = movies.probe(source)
    assert (clip.width, clip.height, clip.frames, clip.has_audio) == (1280, 720, 132, True)
    with Writer(tmp_path / "x.mp4", clip, size=(72, 128)) as writer:
        for frame, _ in zip(movies.read(source), range(10), strict=False):
            writer.write(frame.image[::10, ::10], frame.time_s, frame.duration_s)
    part = packets(tmp_path / "x.mp4")
    assert part == [packet for packet in packets(source) if packet[0] < Fraction(10, 25)] and len(part) == 19
