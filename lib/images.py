"""Reading and writing images, grids and animations. Arrays are float32 [h, w, c] in [-1, 1], files are uint8 RGB."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lib.run import UserError

MAX_PIXELS = 256 * 2**20


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The file as Pillow has it, pixels not yet read.

    Raises UserError, also from what is done inside, for what is missing, not an image, truncated or larger than
    MAX_PIXELS.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels are too many")
            yield image
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such image") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None


def read(path: Path) -> np.ndarray:
    """An image file as float32 [h, w, 3] in [-1, 1], upright (EXIF), without transparency (on white).

    Raises UserError as `opened` does.
    """
    with opened(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I;16", "I;16B", "I"):
            grey = np.asarray(upright, np.float32) / 65535
            upright = Image.fromarray(np.uint8(np.round(grey.clip(0, 1) * 255)))
        if upright.has_transparency_data:
            flat = Image.new("RGBA", upright.size, "white")
            flat.alpha_composite(upright.convert("RGBA"))
            upright = flat
        pixels = np.asarray(upright.convert("RGB"), np.float32)
    return pixels / 127.5 - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, rounded to nearest, clipped."""
    return np.uint8(np.round((np.asarray(images, np.float32).clip(-1, 1) + 1) * 127.5))


def _as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def write(path: Path, image: np.ndarray) -> Path:
    """Writes one image [h, w, 1 | 3] in [-1, 1]; the file's ending gives the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _as_image(to_uint8(image)).save(path)
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


def write_gif(path: Path, frames: np.ndarray, *, frames_per_s: float = 20.0) -> Path:
    """An endless animation of [t, h, w, c] in [-1, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [_as_image(frame) for frame in to_uint8(frames)]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / frames_per_s), loop=0)
    return path
