"""lib/metrics/images.py: whatever images come in, the same pixels come out, or one clear line."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from metrics_cases import pixels
from PIL import Image

from lib.metrics.images import of_array, open_images
from lib.process import UserError

RGB = pixels(5, shape=(6, 7, 3))


def everything(images, size=3):
    return np.concatenate(list(images.batches(size)))


def png(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def folder(path, images=RGB):
    for i, image in enumerate(images):
        png(path / f"{i:03}.png", image.squeeze())
    return path


# Folders


def test_a_folder_in_the_order_of_names(tmp_path):
    folder(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    images = open_images(str(tmp_path))
    assert (images.count, images.shape, images.label) == (5, (6, 7, 3), str(tmp_path))
    np.testing.assert_array_equal(everything(images), RGB)
    np.testing.assert_array_equal(everything(images), RGB)  # and again from the start


def test_folders_of_classes_and_grey_images(tmp_path):
    grey = RGB[..., :1]
    folder(tmp_path / "a", grey[:2])
    folder(tmp_path / "b", grey[2:])
    np.testing.assert_array_equal(everything(open_images(str(tmp_path))), grey)


def test_palettes_and_black_and_white_are_exact(tmp_path):
    few = np.repeat(np.repeat(RGB[0, :2, :2], 3, 0), 3, 1)
    Image.fromarray(few).quantize(8).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
    np.testing.assert_array_equal(everything(open_images(str(tmp_path)))[0], few)
    (tmp_path / "a.png").unlink()
    Image.fromarray(few[..., 0] > 99).save(tmp_path / "b.png")
    np.testing.assert_array_equal(everything(open_images(str(tmp_path)))[0, ..., 0], 255 * (few[..., 0] > 99))


def colour_png_of_16_bits(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def spoil(path, kind):
    """Puts one image that must be refused beside good ones."""
    last = path / "zzz.png"
    if kind == "other size":
        png(last, RGB[0, :5])
    elif kind == "other channels":
        png(last, RGB[0, ..., 0])
    elif kind == "transparent":
        png(last, np.concatenate([RGB[0], RGB[0, ..., :1]], -1))
    elif kind == "grey and transparent":
        png(last, RGB[0, ..., :2])
    elif kind == "transparent colour":
        png(last, RGB[0], transparency=(1, 2, 3))
    elif kind == "16-bit grey":
        png(last, RGB[0, ..., 0].astype(np.uint16) * 257)
    elif kind == "16-bit colour":
        colour_png_of_16_bits(last)
    elif kind == "float":
        Image.fromarray(RGB[0, ..., 0].astype(np.float32)).save(path / "zzz.tif")
    elif kind == "cmyk":
        Image.fromarray(RGB[0]).convert("CMYK").save(path / "zzz.jpg")
    elif kind == "truncated":
        last.write_bytes((path / "000.png").read_bytes()[:-40])
    elif kind == "empty file":
        last.write_bytes(b"")
    elif kind == "text":
        last.write_text("not an image")


REFUSED = {
    "other size": "zzz.png has 7 x 5 pixels and 3 channel(s), the first image has 7 x 6",
    "other channels": "zzz.png has 7 x 6 pixels and 1 channel(s)",
    "transparent": "zzz.png has transparency: flatten it",
    "grey and transparent": "zzz.png has transparency: flatten it",
    "transparent colour": "zzz.png has transparency: flatten it",
    "16-bit grey": "zzz.png has more than 8 bits per channel",
    "16-bit colour": "zzz.png has more than 8 bits per channel",
    "float": "zzz.tif has more than 8 bits per channel",
    "cmyk": "zzz.jpg is CMYK, neither grey nor RGB",
    "truncated": "zzz.png cannot be read as an image",
    "empty file": "zzz.png cannot be read as an image",
    "text": "zzz.png cannot be read as an image",
}


@pytest.mark.parametrize(
    ("kind", "alone"), [(k, alone) for k in REFUSED for alone in (False, True) if not (alone and k.startswith("other"))]
)
def test_images_that_are_refused(tmp_path, kind, alone):
    folder(tmp_path)
    spoil(tmp_path, kind)
    if alone:
        for path in tmp_path.glob("0*.png"):
            path.unlink()
    with pytest.raises(UserError) as error:
        everything(open_images(str(tmp_path)))
    assert REFUSED[kind] in str(error.value) and "\n" not in str(error.value)


def test_an_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(UserError, match="holds no images"):
        open_images(str(tmp_path))


# Arrays and .npz files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["images", "image", "arr_0", "whatever"])
def test_npz(tmp_path, save, name):
    many = pixels(700, shape=(3, 2, 3))
    extra = {} if name == "whatever" else {"labels": np.arange(700)}
    save(tmp_path / "x.npz", **{name: many}, **extra)
    images = open_images(str(tmp_path / "x.npz"))
    assert (images.count, images.shape, images.rounding) == (700, (3, 2, 3), "uint8 as given")
    np.testing.assert_array_equal(everything(images, 64), many)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_rounded_to_nearest(tmp_path, dtype):
    exact = (np.arange(256).reshape(4, 8, 8, 1) + np.linspace(-0.3, 0.3, 8)) / 127.5 - 1
    exact = exact[..., [0]].clip(-1, 1).astype(dtype)
    np.savez(tmp_path / "x.npz", exact)
    images = open_images(str(tmp_path / "x.npz"))
    assert "[-1, 1] rounded" in images.rounding
    np.testing.assert_array_equal(everything(images).ravel(), np.arange(256))
    np.testing.assert_array_equal(everything(of_array(exact)), everything(images))


def test_grey_without_a_channel_axis(tmp_path):
    np.savez(tmp_path / "x.npz", RGB[..., 0])
    np.testing.assert_array_equal(everything(open_images(str(tmp_path / "x.npz"))), RGB[..., :1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 4, 4, 4), np.uint8)}, "must have 1 or 3 channels, these have 4"),
        ({"x": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no images"),
        ({"x": np.zeros((2, 4, 4, 3), np.int64)}, "must be uint8, or float in [-1, 1], not int64"),
        ({"x": np.zeros((2, 4, 4, 3), np.uint16)}, "must be uint8, or float in [-1, 1], not uint16"),
        ({"x": np.full((2, 4, 4, 3), 1.5)}, "must lie in [-1, 1]"),
        ({"x": np.full((2, 4, 4, 3), np.nan)}, "must lie in [-1, 1]"),
        ({"x": np.zeros((4, 4), np.uint8)}, "expected [n, h, w, c]"),
        ({"x": RGB, "y": RGB}, "which are images?"),
        ({"x": np.asfortranarray(RGB)}, "Fortran order"),
        ({"x": np.array([None, "text"])}, "expected [n, h, w, c]"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError) as error:
        everything(open_images(str(tmp_path / "x.npz")))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["text", "torn", "flipped", "no array", "pickled"])
def test_damaged_npz(tmp_path, damage):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, pixels(300, shape=(8, 8, 3)))
    data = bytearray(path.read_bytes())
    if damage == "text":
        data = b"not a zip file"
    elif damage == "torn":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 255
    elif damage == "no array":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.txt", "text")
        data = file.getvalue()
    elif damage == "pickled":
        file = io.BytesIO()
        np.savez(file, np.full((2, 4, 4, 3), object))
        data = file.getvalue()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.npz") as error:
        everything(open_images(str(path)))
    assert "\n" not in str(error.value)


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such folder or file; a TFDS set is written NAME:SPLIT"),
        ("mnist:", "no such folder or file"),
        ("../mnist:test", "no such folder or file"),
        ("nothing:test", "no prepared TFDS data set"),
    ],
)
def test_names_that_are_nothing(tmp_path, monkeypatch, name, message):
    (tmp_path / "tfds").mkdir()
    monkeypatch.setenv("GRADIENT_FIELDS_DATA", str(tmp_path))
    with pytest.raises(UserError, match=message):
        open_images(name)


def test_a_file_that_is_no_set(tmp_path):
    with pytest.raises(UserError, match="expected a folder of images"):
        open_images(str(png(tmp_path / "x.png", RGB[0])))


def test_tfds_by_name_and_part(data_folder):
    if not (data_folder / "tfds" / "mnist").is_dir():
        pytest.skip("no prepared MNIST here")
    some, tail = open_images("mnist:test[:300]"), open_images("mnist:test[9700:]")
    assert (some.count, some.shape, some.label) == (300, (28, 28, 1), "mnist:test[:300]")
    assert open_images("mnist:test").count == 10_000
    assert everything(some, 128).shape == everything(tail, 128).shape == (300, 28, 28, 1)
    assert some.sha256() != tail.sha256()
    for wrong, message in (("mnist:nothing", "no split"), ("mnist:test[5:3]", "no part"), ("mnist:test[x]", "part")):
        with pytest.raises(UserError, match=message):
            open_images(wrong)
