"""lib/images.py: every kind of file becomes the same float32 [h, w, 3] in [-1, 1], or a UserError."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from lib import images
from lib.run import UserError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def scaled(pixels):
    return np.float32(pixels) / 127.5 - 1


def saved(folder, image, name="x.png", **options):
    image.save(folder / name, **options)
    return images.read(folder / name)


def test_round_trip_is_exact(tmp_path):
    path = images.write(tmp_path / "new" / "x.png", scaled(RGB))
    got = images.read(path)
    assert got.dtype == np.float32 and got.shape == (5, 7, 3)
    np.testing.assert_array_equal(got, scaled(RGB))
    np.testing.assert_array_equal(images.to_uint8(got), RGB)


def test_values_outside_are_clipped():
    np.testing.assert_array_equal(images.to_uint8(np.array([-3.0, -1.0, 0.0, 1.0, 2.0])), [0, 0, 128, 255, 255])


def test_one_channel_is_written_as_grey(tmp_path):
    path = images.write(tmp_path / "x.png", scaled(RGB[..., :1]))
    with Image.open(path) as image:
        assert image.mode == "L"
    np.testing.assert_array_equal(images.read(path), scaled(np.repeat(RGB[..., :1], 3, -1)))


def test_grey(tmp_path):
    got = saved(tmp_path, Image.fromarray(RGB[..., 0]))
    np.testing.assert_array_equal(got, scaled(np.repeat(RGB[..., :1], 3, -1)))


def test_transparent_is_put_on_white(tmp_path):
    alpha = np.zeros((5, 7, 1), np.uint8)
    alpha[:2], alpha[2] = 255, 128
    got = saved(tmp_path, Image.fromarray(np.concatenate([RGB, alpha], -1)))
    np.testing.assert_array_equal(got[:2], scaled(RGB[:2]))
    half = 128 / 255
    np.testing.assert_allclose(got[2], half * scaled(RGB[2]) + (1 - half), atol=1.01 / 127.5)
    np.testing.assert_array_equal(got[3:], 1)


def test_grey_with_alpha(tmp_path):
    pixels = np.stack([RGB[..., 0], np.full((5, 7), 0, np.uint8)], -1)
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(pixels)), 1)


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    np.testing.assert_array_equal(saved(tmp_path, image), [[[1, -1, -1], [-1, -1, 1]]])
    np.testing.assert_array_equal(saved(tmp_path, image, transparency=1), [[[1, -1, -1], [1, 1, 1]]])


def test_sixteen_bit(tmp_path):
    grey = np.array([[0, 32896, 65535]], np.uint16)
    got = saved(tmp_path, Image.fromarray(grey))
    np.testing.assert_array_equal(got[..., 0], scaled(np.array([[0, 128, 255]])))


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (6, -1), (3, 2), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = saved(tmp_path, Image.fromarray(RGB), exif=exif)
    np.testing.assert_array_equal(got, scaled(np.rot90(RGB, turn)))


def test_cmyk(tmp_path):
    flat = np.zeros((16, 16, 4), np.uint8)
    flat[..., 0] = 255  # full cyan
    got = saved(tmp_path, Image.fromarray(flat, "CMYK"), "x.jpg", quality=100)
    np.testing.assert_allclose(got, np.broadcast_to([-1, 1, 1], got.shape), atol=0.05)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_truncated(tmp_path, name, part):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match="cannot be read as an image") as error:
        images.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_bytes_never_give_a_traceback(tmp_path):
    rng = np.random.default_rng(2)
    for name in ("x.png", "x.jpg"):
        path = tmp_path / name
        Image.fromarray(RGB).save(path)
        whole = path.read_bytes()
        for _ in range(100):
            torn = bytearray(whole)
            torn[rng.integers(len(torn))] = rng.integers(256)
            path.write_bytes(torn)
            with contextlib.suppress(UserError):  # a pixel may be wrong without anybody being able to know
                assert images.read(path).shape[-1] == 3


def test_text_named_jpg(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_text("not a picture")
    with pytest.raises(UserError, match="cannot be read as an image"):
        images.read(path)


@pytest.mark.parametrize("name", ["absent.png", "", "file/x.png"])
def test_missing(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no such image"):
        images.read(tmp_path / name)


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 34)
    with pytest.raises(UserError, match="7 x 5 pixels are too many"):
        saved(tmp_path, Image.fromarray(RGB))


def test_grid_layout():
    cells = np.stack([np.full((2, 3, 1), i / 10, np.float32) for i in range(5)])
    sheet = images.grid(cells, gap_px=1, least_height_px=1)  # 3 columns, 2 rows
    assert sheet.shape == (2 * 3 + 1, 3 * 4 + 1, 1)
    for i in range(5):
        top, left = 1 + i // 3 * 3, 1 + i % 3 * 4
        np.testing.assert_array_equal(sheet[top : top + 2, left : left + 3], cells[i])
    assert np.sum(sheet == 1) == sheet.size - 5 * 6  # the rest is white
    assert images.grid(cells, columns=5, gap_px=0, least_height_px=1).shape == (2, 15, 1)
    assert images.grid(cells, columns=1, gap_px=2, least_height_px=1).shape == (5 * 4 + 2, 7, 1)
    plain, enlarged = (images.grid(cells, columns=5, gap_px=0, least_height_px=h) for h in (1, 5))
    np.testing.assert_array_equal(enlarged, plain.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_gif(tmp_path, channels):
    frames = np.random.default_rng(3).uniform(-1, 1, (6, 8, 9, channels))
    path = images.write_gif(tmp_path / "new" / "x.gif", frames, frames_per_s=25)
    with Image.open(path) as animation:
        assert (animation.n_frames, animation.size, animation.info["loop"]) == (6, (9, 8), 0)
        durations = []
        for i in range(6):
            animation.seek(i)
            durations.append(animation.info["duration"])
    assert durations == [40] * 6


def test_gif_of_still_frames_keeps_its_duration(tmp_path):
    path = images.write_gif(tmp_path / "x.gif", np.zeros((5, 4, 4, 3)), frames_per_s=10)
    with Image.open(path) as animation:
        total = 0
        for i in range(getattr(animation, "n_frames", 1)):
            animation.seek(i)
            total += animation.info["duration"]
    assert total == 500
