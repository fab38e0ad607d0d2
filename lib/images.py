"""Reading and writing images, grids and animations. Arrays are float32 [h, w, c] in [-1, 1], files are uint8 RGB."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lib.process import UserError
from lib.run import write_bytes

STILLS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
ENDINGS = (*STILLS, ".gif")
MAX_PIXELS = 170_000_000  # just below the limit of Pillow, so that it is this one that is told
GREY_LEVEL = 2 / 255  # of pixels in [-1, 1]
_LONGEST_PX = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}  # what their encoders take
# What Pillow raises for damaged files, apart from its own: OSError where it looked, the others where it did not.
_DAMAGED = (SyntaxError, OSError, EOFError, ValueError, struct.error, MemoryError)


def files(folder: Path, endings: tuple[str, ...] = ENDINGS) -> list[Path]:
    """The images in a folder and its subfolders, in the order of their names; hidden ones are left out.

    Raises UserError where there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder" if folder.exists() else f"{folder}: no such folder")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file()]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise UserError(f"{folder} holds no images ({', '.join(endings)})")
    return sorted(found)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The file as Pillow has it, pixels not yet read; of an animation the first frame.

    Raises UserError, also from what is done inside, for what is missing, not an image, truncated or larger than
    MAX_PIXELS.
    """
    try:
        # A file, not its name: Pillow maps files that it knows by name, and confuses height and width of turned ones.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, and of half of the largest size
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{path}: {image.width} x {image.height} pixels are too many, reduce it")
                yield image
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} cannot be read as an image: it is of no known format") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than {MAX_PIXELS:,} pixels are too many, reduce it") from None
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read as an image: {str(error) or type(error).__name__}") from None


def read(path: Path) -> np.ndarray:
    """An image file as float32 [h, w, 3] in [-1, 1], upright (EXIF), in sRGB, without transparency (on white).

    Grey files of 16 bits and of floats, which must lie in [0, 1], are rounded to 8 bits.
    Raises UserError as `opened` does, and for numbers that are out of range.
    """
    pixels = np.asarray(_read_rgb(path, "white"), np.float32)
    pixels /= 127.5
    pixels -= 1
    return pixels


def read_mask(path: Path, height: int, width: int) -> np.ndarray:
    """An image file as float32 [height, width] in [0, 1]: white is 1, black and what is transparent 0.

    Colours count by their mean. Stretched to the size (bilinear) where it has another. Raises UserError as `read` does.
    """
    grey = np.asarray(_read_rgb(path, "black"), np.float32).mean(-1, keepdims=True) / 255
    return _resampled(grey, height, width, Image.Resampling.BILINEAR)[..., 0].clip(0, 1)


def _read_rgb(path: Path, background: str) -> Image.Image:
    with opened(path) as image:
        # Pillow cuts 16-bit colours to 8 bits but not the transparent one, and tells only here.
        if "transparency" in image.info and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
            raise UserError(f"{path} has a transparent colour of 16 bits: convert it to 8 bits")
        image.load()
        upright = _eight_bits(ImageOps.exif_transpose(image), path)
        return _in_srgb(_flat(upright, background), image.info.get("icc_profile"))


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Grey images of integers (of 16 bits) and of floats in [0, 1], rounded; all others as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    high = 1 if image.mode == "F" else 65535
    grey = np.asarray(image, np.float32)
    if not ((grey >= -1e-3 * high) & (grey <= 1.001 * high)).all():  # NaN too
        raise UserError(f"{path}: its pixels must lie between 0 and {high}, rescale them")
    return Image.fromarray(np.uint8(np.round(grey.clip(0, high) / high * 255)))


def _flat(image: Image.Image, background: str) -> Image.Image:
    """CMYK as it is, all else as L or RGB: palettes looked up, transparent pixels on `background`."""
    mode = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("1", "L", "LA") else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    whole = image.convert("RGBA")
    flat = Image.new(mode, image.size, background)
    flat.paste(whole.convert(mode), mask=whole.getchannel("A"))
    return flat


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """L, RGB or CMYK as RGB, through the embedded ICC profile unless that is broken or of another kind of image."""
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
    assert converted is not None  # it is None only where the image itself is changed
    return converted


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, c] in [-1, 1] as float32 [height, width, c], antialiased (Lanczos); the same numbers at the same size."""
    if image.shape[:2] == (height, width):
        return np.asarray(image, np.float32)
    return _resampled(image, height, width, Image.Resampling.LANCZOS).clip(-1, 1)


def _resampled(image: np.ndarray, height: int, width: int, how: Image.Resampling) -> np.ndarray:
    """[h, w, c] as float32 [height, width, c]; floats all the way, Pillow has them for one channel at a time."""
    channels = np.moveaxis(np.asarray(image, np.float32), -1, 0)
    return np.stack([np.asarray(Image.fromarray(c).resize((width, height), how)) for c in channels], -1)


def fit_within(height: int, width: int, longest_px: int | None) -> tuple[int, int]:
    """(height, width) of the same shape, to the nearest pixel, whose longer side is `longest_px` (None: as it is).

    Raises UserError for a side shorter than a pixel.
    """
    if longest_px is None:
        return height, width
    if longest_px < 1:
        raise UserError(f"an image cannot be {longest_px} pixels long: give at least 1")
    longest = max(height, width)
    new_height, new_width = (max(1, (2 * side * longest_px + longest) // (2 * longest)) for side in (height, width))
    return new_height, new_width


def resize_longest(image: np.ndarray, longest_px: int | None) -> np.ndarray:
    """`resize` of [h, w, c] to the size that `fit_within` gives."""
    height, width = image.shape[:2]
    return resize(image, *fit_within(height, width, longest_px))


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, rounded to nearest, clipped."""
    return np.uint8(np.round((np.asarray(images, np.float32).clip(-1, 1) + 1) * 127.5))


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """Levels 0..255 of any shape as float32 in [-1, 1]."""
    return np.float32(pixels) / 127.5 - 1


def _as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def check_size(path: Path, height: int, width: int) -> None:
    """Raises UserError where the format that the file's ending gives cannot hold an image of this size."""
    most_px = _LONGEST_PX.get(path.suffix.lower())
    if most_px is not None and max(height, width) > most_px:
        raise UserError(f"{path}: a side of {max(height, width)} pixels is more than the {most_px} of this format")


def write(path: Path, image: np.ndarray) -> Path:
    """Writes one image [h, w, 1 | 3] in [-1, 1], all of it or nothing; the file's ending gives the format.

    Raises UserError where the format cannot hold it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()
    try:
        _as_image(to_uint8(image)).save(encoded, format=Image.registered_extensions()[path.suffix.lower()])
    except (ValueError, OSError) as error:  # of the encoder: nothing has touched the disk
        h, w = image.shape[:2]
        raise UserError(f"{path}: an image of {w} x {h} pixels cannot be encoded in this format ({error})") from None
    write_bytes(path, encoded.getvalue())
    return path


def grid(images: np.ndarray, *, columns: int | None = None, gap_px: int = 2, least_height_px: int = 48) -> np.ndarray:
    """[n, h, w, c] side by side, row by row, on white; as square as can be unless `columns` is given.

    Pixels of images lower than `least_height_px` become squares of a whole number of pixels: they are to be looked at.
    """
    zoom = max(1, -(-least_height_px // images.shape[1]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.ones((rows * (height + gap_px) + gap_px, columns * (width + gap_px) + gap_px, channels), np.float32)
    for i, image in enumerate(images):
        top, left = gap_px + i // columns * (height + gap_px), gap_px + i % columns * (width + gap_px)
        sheet[top : top + height, left : left + width] = image
    return sheet


def write_set(out: Path, images: np.ndarray) -> None:
    """[n, h, w, c] in [-1, 1] as a grid (.png), as uint8 "images" (.npz), or as one file per image in a folder."""
    if out.suffix == ".npz":
        np.savez_compressed(out, images=to_uint8(images))
    elif out.suffix == ".png":
        write(out, grid(images))
    else:
        digits = len(str(len(images) - 1))
        for i, image in enumerate(images):
            write(out / f"{i:0{digits}}.png", image)


def write_gif(path: Path, frames: np.ndarray, *, frames_per_s: float = 20.0) -> Path:
    """An endless animation of [t, h, w, c] in [-1, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [_as_image(frame) for frame in to_uint8(frames)]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / frames_per_s), loop=0)
    return path
