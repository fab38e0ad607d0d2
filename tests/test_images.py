"""lib/images.py: every kind of file becomes the same float32 [h, w, 3] in [-1, 1], or a UserError."""

import contextlib
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lib import images
from lib.process import UserError

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


@pytest.mark.parametrize(("name", "most_px"), [("x.webp", 16383), ("x.jpg", 65500)])
def test_sides_that_a_format_cannot_hold(tmp_path, name, most_px):
    path, image = tmp_path / name, np.zeros((1, most_px, 3), np.float32)
    images.check_size(path, 1, most_px)
    assert images.read(images.write(path, image)).shape == image.shape
    path.unlink()
    with pytest.raises(UserError, match=f"a side of {most_px + 1} pixels is more than the {most_px} of this format"):
        images.check_size(path, most_px + 1, 1)
    with pytest.raises(UserError, match=f"an image of {most_px + 1} x 1 pixels cannot be encoded in this format"):
        images.write(path, np.zeros((1, most_px + 1, 3), np.float32))
    assert not list(tmp_path.iterdir())
    images.check_size(tmp_path / "x.png", 1, 10**6)


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


def upright(pixels, orientation):
    """Exif 2.3, table 6: where row 0 and column 0 of the file are seen."""
    seen = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],  # top right
        3: lambda x: x[::-1, ::-1],  # bottom right
        4: lambda x: x[::-1],  # bottom left
        5: lambda x: x.swapaxes(0, 1),  # left top
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],  # right top
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],  # right bottom
        8: lambda x: x.swapaxes(0, 1)[::-1],  # left bottom
    }
    return seen[orientation](pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif", "grey.tif"])
def test_all_orientations(tmp_path, name, orientation):
    blocks = np.uint8([[0, 50, 100], [150, 200, 250]]).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(blocks if name == "grey.tif" else blocks[..., None].repeat(3, -1))
    options = {"quality": 95} if name == "x.jpg" else {"lossless": True} if name == "x.webp" else {}
    got = saved(tmp_path, image, name, exif=exif, **options)
    wanted = upright(blocks, orientation)[..., None].repeat(3, -1)
    np.testing.assert_allclose(got, scaled(wanted), atol=2.01 / 127.5 if name == "x.jpg" else 0)


@pytest.mark.parametrize("size", [(1, 1), (1001, 7), (7, 1001), (16, 64)])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.gif", "x.tif", "x.bmp", "x.ppm"])
def test_sizes(tmp_path, name, size):
    got = saved(tmp_path, Image.fromarray(np.full((*size, 3), 77, np.uint8)), name)
    assert got.shape == (*size, 3) and got.dtype == np.float32
    np.testing.assert_allclose(got, scaled(77), atol=1.01 / 127.5)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.gif"])
def test_one_bit(tmp_path, name):
    black = RGB[..., 0] > 99
    got = saved(tmp_path, Image.fromarray(black), name)
    np.testing.assert_array_equal(got, np.float32(black)[..., None].repeat(3, -1) * 2 - 1)


def test_grey_with_half_alpha(tmp_path):
    got = saved(tmp_path, Image.fromarray(np.uint8([[[0, 255], [0, 51], [200, 255]]])))
    np.testing.assert_array_equal(got[..., 0], scaled(np.array([[0, 204, 200]])))


def test_palette_with_alpha(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    image.putdata([0, 1, 2])
    got = saved(tmp_path, image, transparency=bytes([255, 0, 51]))
    np.testing.assert_array_equal(got, scaled(np.array([[[255, 0, 0], [255, 255, 255], [204, 204, 204]]])))


def test_a_transparent_colour(tmp_path):
    got = saved(tmp_path, Image.fromarray(RGB), transparency=tuple(int(v) for v in RGB[2, 3]))
    wanted = RGB.copy()
    wanted[2, 3] = 255
    np.testing.assert_array_equal(got, scaled(wanted))


def png(path, width, height, depth, kind, rows, *chunks):
    """Any PNG at all: `kind` 0 is grey, 2 RGB, 3 a palette, 4 and 6 with alpha; `rows` begin with a filter byte."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = b"".join(chunk(*more) for more in chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    return path


def test_sixteen_bit_colours(tmp_path):
    path = png(tmp_path / "x.png", 2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 257, 65535, 32896, 512, 1))
    np.testing.assert_array_equal(images.read(path), scaled(np.array([[[0, 1, 255], [128, 2, 0]]])))
    path = png(tmp_path / "x.png", 2, 1, 16, 6, b"\0" + struct.pack(">8H", 0, 257, 65535, 65535, 1, 2, 3, 0))
    np.testing.assert_array_equal(images.read(path), scaled(np.array([[[0, 1, 255], [255, 255, 255]]])))


@pytest.mark.parametrize(("kind", "values"), [(0, (1, 2)), (2, (1, 2, 3, 4, 5, 6))])
def test_a_transparent_colour_of_sixteen_bits_is_refused(tmp_path, kind, values):
    key = (b"tRNS", struct.pack(f">{len(values) // 2}H", *values[: len(values) // 2]))
    path = png(tmp_path / "x.png", 2, 1, 16, kind, b"\0" + struct.pack(f">{len(values)}H", *values), key)
    with pytest.raises(UserError, match="transparent colour of 16 bits"):
        images.read(path)


def test_sixteen_bit_tiff_and_pgm(tmp_path):
    grey = np.array([[0, 32896, 65535]], np.uint16)
    for order in "<>":
        got = saved(tmp_path, Image.fromarray(grey.astype(f"{order}u2")), "x.tif")
        np.testing.assert_array_equal(got[..., 0], scaled(np.array([[0, 128, 255]])))
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 65535\n" + grey.astype(">u2").tobytes())
    np.testing.assert_array_equal(images.read(tmp_path / "x.pgm")[..., 0], scaled(np.array([[0, 128, 255]])))


def test_floats(tmp_path):
    got = saved(tmp_path, Image.fromarray(np.float32([[0, 0.2, 0.4999, 1]])), "x.tif")
    np.testing.assert_array_equal(got, scaled(np.array([[0, 51, 127, 255]])[..., None].repeat(3, -1)))


@pytest.mark.parametrize("value", [255.0, -0.5, 1.1, np.nan, np.inf])
def test_floats_out_of_range(tmp_path, value):
    with pytest.raises(UserError, match="must lie between 0 and 1, rescale"):
        saved(tmp_path, Image.fromarray(np.float32([[0, value]])), "x.tif")


@pytest.mark.parametrize("value", [-100, 70_000])
def test_integers_out_of_range(tmp_path, value):
    with pytest.raises(UserError, match="must lie between 0 and 65535"):
        saved(tmp_path, Image.fromarray(np.int32([[0, value]])), "x.tif")


def test_cmyk(tmp_path):
    flat = np.zeros((16, 16, 4), np.uint8)
    flat[..., 0] = 255  # full cyan
    got = saved(tmp_path, Image.fromarray(flat, "CMYK"), "x.jpg", quality=100)
    np.testing.assert_allclose(got, np.broadcast_to([-1, 1, 1], got.shape), atol=0.05)


def app14(path, transform):
    """Sets the transform in Adobe's marker of a JPEG file, or takes the marker away (None)."""
    data = path.read_bytes()
    at = data.index(b"\xff\xee\x00\x0eAdobe")
    new = b"" if transform is None else data[at : at + 15] + bytes([transform])
    path.write_bytes(data[:at] + new + data[at + 16 :])
    return path


# Cyan, no magenta, half of yellow, a fifth of black, and what they are in RGB where there is no profile.
INK = (255, 0, 128, 51)
INKED = np.broadcast_to(scaled([(255 - ink) * (255 - INK[3]) / 255 for ink in INK[:3]]), (16, 16, 3))


def test_cmyk_with_and_without_the_marker_of_adobe(tmp_path):
    """Both are taken to be stored as 255 - ink."""
    path = tmp_path / "x.jpg"
    Image.fromarray(np.full((16, 16, 4), INK, np.uint8), "CMYK").save(path, quality=100)
    np.testing.assert_allclose(images.read(path), INKED, atol=0.03)
    np.testing.assert_allclose(images.read(app14(path, None)), INKED, atol=0.03)


def test_ycck(tmp_path):
    """255 - ink as before, of that the first three channels as YCbCr (transform 2 of the marker)."""
    path = tmp_path / "x.jpg"
    ycc = Image.new("RGB", (16, 16), INK[:3]).convert("YCbCr")  # libjpeg makes of it 255 - RGB
    planes = np.dstack([np.asarray(ycc), np.full((16, 16), 255 - INK[3], np.uint8)])
    Image.fromarray(255 - planes, "CMYK").save(path, quality=100)  # Pillow writes 255 - that
    np.testing.assert_allclose(images.read(app14(path, 2)), INKED, atol=0.03)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"XXXX", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"XXXX", b"gXYZ", 1)
LINEAR_GREY = SRGB.replace(b"RGB ", b"GRAY", 1).replace(b"rTRC", b"kTRC", 1)
_AT = LINEAR_GREY.index(b"para")
LINEAR_GREY = LINEAR_GREY[: _AT + 8] + struct.pack(">HHi", 0, 0, 65536) + LINEAR_GREY[_AT + 16 :]  # a gamma of 1


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_icc_profiles_are_applied(tmp_path, name):
    """In the first profile red and green are exchanged."""
    options = {"lossless": True} if name == "x.webp" else {}
    got = saved(tmp_path, Image.fromarray(RGB), name, icc_profile=SWAPPED, **options)
    np.testing.assert_allclose(got, scaled(RGB[..., [1, 0, 2]]), atol=1.01 / 127.5)
    got = saved(tmp_path, Image.fromarray(RGB), name, icc_profile=SRGB, **options)
    np.testing.assert_array_equal(got, scaled(RGB))


def test_icc_profiles_with_transparency_palette_and_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.concatenate([RGB, np.full((5, 7, 1), 255, np.uint8)], -1)
    rgba[0, 0] = 0
    got = saved(tmp_path, Image.fromarray(rgba), icc_profile=SWAPPED, exif=exif)
    wanted = RGB[..., [1, 0, 2]].copy()
    wanted[0, 0] = 255
    np.testing.assert_allclose(got, scaled(np.rot90(wanted, -1)), atol=1.01 / 127.5)
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    got = saved(tmp_path, image, icc_profile=SWAPPED)
    np.testing.assert_allclose(got, [[[-1, 1, -1], [-1, -1, 1]]], atol=1.01 / 127.5)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_icc_profiles_of_grey_images(tmp_path, mode):
    grey = np.uint8([[0, 55, 128, 255]])
    pixels = {"L": grey, "LA": np.dstack([grey, grey * 0 + 255]), "I;16": np.uint16(grey) * 257}[mode]
    linear = np.array([0, 55, 128, 255]) / 255
    encoded = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    got = saved(tmp_path, Image.fromarray(pixels), icc_profile=LINEAR_GREY)
    np.testing.assert_allclose(got[0], (2 * encoded - 1)[:, None].repeat(3, -1), atol=1.01 / 127.5)


@pytest.mark.parametrize("profile", [b"junk", SWAPPED[:200], SWAPPED[:-80], bytes(600), LINEAR_GREY])
def test_icc_profiles_that_are_broken_or_of_other_images_are_ignored(tmp_path, profile):
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(RGB), icc_profile=profile), scaled(RGB))


def test_a_profile_of_colours_in_a_grey_image_is_ignored(tmp_path):
    got = saved(tmp_path, Image.fromarray(RGB[..., 0]), icc_profile=SWAPPED)
    np.testing.assert_array_equal(got, scaled(RGB[..., :1].repeat(3, -1)))


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png"])
def test_animations_give_their_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (9, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "x.webp" else {}
    got = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], duration=50, **options)
    np.testing.assert_array_equal(got, np.broadcast_to([1, -1, -1], (8, 9, 3)))


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.webp", "x.tif", "x.bmp", "x.ppm"])
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
    for name in ("x.png", "x.jpg", "x.gif", "x.webp", "x.tif", "x.bmp", "x.ppm"):
        path = tmp_path / name
        Image.fromarray(RGB).save(path)
        whole = path.read_bytes()
        for _ in range(100):
            torn = bytearray(whole)
            torn[rng.integers(len(torn))] = rng.integers(256)
            path.write_bytes(torn)
            with contextlib.suppress(UserError):  # a pixel may be wrong without anybody being able to know
                assert images.read(path).shape[-1] == 3


def test_damaged_metadata_do_no_harm_and_say_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a description that is longer than the file says"
    path = tmp_path / "x.jpg"
    Image.fromarray(RGB).save(path, exif=exif)
    whole = path.read_bytes()
    at = whole.index(b"Exif") + 20  # the length of the first entry
    path.write_bytes(whole[:at] + b"\xff" * 4 + whole[at + 4 :])
    assert images.read(path).shape == RGB.shape


@pytest.mark.parametrize("text", ["not a picture", ""])
def test_text_named_jpg(tmp_path, text):
    path = tmp_path / "x.jpg"
    path.write_text(text)
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


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (2**31 - 1, 1), (13_100, 13_100)])
def test_decompression_bombs(tmp_path, width, height):
    path = png(tmp_path / "x.png", width, height, 8, 2, bytes(1000))
    begun = time.perf_counter()
    with pytest.raises(UserError, match="pixels are too many") as error:
        images.read(path)
    assert time.perf_counter() - begun < 1
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_below_the_largest_size_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # Pillow warns from here to twice as many
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(RGB)), scaled(RGB))


def test_a_mask_of_its_own_size_is_exact(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(8, 32)
    Image.fromarray(grey).save(tmp_path / "x.png")
    mask = images.read_mask(tmp_path / "x.png", 8, 32)
    assert mask.dtype == np.float32
    np.testing.assert_allclose(mask, grey / 255, atol=1e-7)
    assert mask.min() == 0 and mask.max() == 1


def test_masks_are_resized_bilinearly(tmp_path):
    Image.fromarray(np.uint8([[0, 255], [0, 255]])).save(tmp_path / "x.png")
    mask = images.read_mask(tmp_path / "x.png", 3, 8)
    np.testing.assert_allclose(mask, np.float32([[0, 0, 1, 3, 5, 7, 8, 8]]).repeat(3, 0) / 8, atol=1e-6)
    assert images.read_mask(tmp_path / "x.png", 1, 1) == pytest.approx(0.5)
    assert images.read_mask(tmp_path / "x.png", 301, 7).shape == (301, 7)


@pytest.mark.parametrize("white", [True, False])
def test_what_is_transparent_in_a_mask_is_not_white(tmp_path, white):
    rgba = np.uint8([[[255 * white] * 3 + [255], [255] * 3 + [0]]])
    Image.fromarray(rgba).save(tmp_path / "x.png")
    np.testing.assert_array_equal(images.read_mask(tmp_path / "x.png", 1, 2), [[white, 0]])


def test_masks_in_colour_and_in_black_and_white(tmp_path):
    Image.fromarray(np.uint8([[[255, 0, 0], [255, 255, 255]]])).save(tmp_path / "x.png")
    np.testing.assert_allclose(images.read_mask(tmp_path / "x.png", 1, 2), [[1 / 3, 1]], atol=1e-7)
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "x.png")
    np.testing.assert_array_equal(images.read_mask(tmp_path / "x.png", 1, 2), [[1, 0]])


def test_masks_that_cannot_be_read(tmp_path):
    (tmp_path / "x.png").write_text("not a mask")
    for name in ("x.png", "absent.png", ""):
        with pytest.raises(UserError):
            images.read_mask(tmp_path / name, 2, 2)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_resize(channels):
    image = np.random.default_rng(5).uniform(-1, 1, (12, 10, channels)).astype(np.float32)
    np.testing.assert_array_equal(images.resize(image, 12, 10), image)
    for size in ((6, 5), (31, 7), (1, 1), (1, 40)):
        got = images.resize(image, *size)
        assert got.shape == (*size, channels) and got.dtype == np.float32 and np.abs(got).max() <= 1
    flat = np.full_like(image, -0.3)
    np.testing.assert_allclose(images.resize(flat, 25, 4), -0.3, atol=1e-6)


def test_resize_is_antialiased_keeps_places_and_clips():
    stripes = np.float32([-1, 1])[np.arange(64) % 2][None, :, None].repeat(8, 0)
    assert np.abs(images.resize(stripes, 8, 16)[:, 2:-2]).max() < 0.1  # finer than the new pixels: grey
    ramp = np.linspace(-0.5, 0.5, 40, dtype=np.float32)[None, :, None].repeat(4, 0)
    twice = images.resize(ramp, 4, 80)[0, 8:-8, 0]
    step = 1 / 39 / 2
    np.testing.assert_allclose(twice, -0.5 - step / 2 + step * np.arange(8, 72), atol=1e-3)
    edge = np.where(np.arange(20) < 10, -1, 1).astype(np.float32)[None, :, None].repeat(20, 0)
    assert np.abs(images.resize(edge, 90, 90)).max() == 1  # Lanczos goes beyond; clipped


@pytest.mark.parametrize(
    ("size", "longest_px", "wanted"),
    [
        ((480, 640), 320, (240, 320)),
        ((640, 480), 320, (320, 240)),
        ((480, 640), 1280, (960, 1280)),
        ((480, 640), None, (480, 640)),
        ((480, 640), 640, (480, 640)),
        ((338, 640), 500, (264, 500)),
        ((1, 1000), 10, (1, 10)),
        ((7, 1001), 100, (1, 100)),
        ((1, 1), 5, (5, 5)),
        ((3, 2), 1, (1, 1)),
    ],
)
def test_fit_within(size, longest_px, wanted):
    assert images.fit_within(*size, longest_px) == wanted


def test_fit_within_nothing():
    for longest_px in (0, -5):
        with pytest.raises(UserError, match="at least 1"):
            images.fit_within(3, 4, longest_px)


def test_files(tmp_path):
    wanted = ["a.JPG", "b/c.png", "b/d/e.webp", "f.gif", "g.jpeg", "h.tif", "i.tiff", "j.bmp", "k.ppm"]
    for name in [*wanted, "notes.txt", ".hidden.png", ".cache/x.png", "png", "b/x.mp4"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "folder.png").mkdir()
    assert images.files(tmp_path) == [tmp_path / name for name in sorted(wanted)]
    assert tmp_path / "f.gif" not in images.files(tmp_path, images.STILLS)


def test_files_of_a_hidden_folder(tmp_path):
    (tmp_path / ".run").mkdir()
    (tmp_path / ".run" / "a.png").write_text("")
    assert images.files(tmp_path / ".run") == [tmp_path / ".run" / "a.png"]


def test_files_where_there_are_none(tmp_path):
    (tmp_path / "x.txt").write_text("")
    for name, message in (("", "holds no images"), ("absent", "no such folder"), ("x.txt", "is not a folder")):
        with pytest.raises(UserError, match=message):
            images.files(tmp_path / name)


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
