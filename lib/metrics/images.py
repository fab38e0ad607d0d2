"""Sets of images to be measured: arrays, generators, folders, .npz files and TFDS names, all as uint8 batches."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from lib.data import tfds_rows
from lib.images import STILLS, files, opened, to_uint8
from lib.process import UserError

ALREADY_WHOLE = "uint8 as given"
ROUNDED = "[-1, 1] rounded to the nearest of 256"
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Images:
    """`count` images of one `shape` (h, w, c), read again from the start by every call of `chunks()`.

    `chunks()` yields uint8 [b, h, w, c] with any b. It is wrong for it to yield more or fewer than `count` rows in
    all, and `batches` raises UserError then: no image is lost or measured twice in silence.
    """

    label: str
    """what it is, for the protocol: a name and split, a file, a run"""
    count: int
    shape: tuple[int, int, int]
    chunks: Callable[[], Iterable[np.ndarray]]
    rounding: str = ALREADY_WHOLE

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [size, h, w, c]; the last one may be shorter."""
        held: list[np.ndarray] = []
        n_held = seen = 0
        for chunk in self.chunks():
            if chunk.shape[1:] != self.shape or chunk.dtype != np.uint8:
                raise UserError(
                    f"{self.label}: expected uint8 images {self.shape}, got {chunk.dtype} {chunk.shape[1:]}"
                )
            seen += len(chunk)
            while n_held + len(chunk) >= size:
                taken = size - n_held
                yield np.concatenate([*held, chunk[:taken]])
                held, n_held, chunk = [], 0, chunk[taken:]
            if len(chunk):
                held, n_held = [*held, chunk], n_held + len(chunk)
        if n_held:
            yield np.concatenate(held)
        if seen != self.count:
            raise UserError(f"{self.label}: {self.count} images were announced, {seen} came")

    def sha256(self) -> str:
        """Of shape and pixels in order: the same images have the same, whatever they are stored in."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for batch in self.batches(_CHUNK):
            digest.update(np.ascontiguousarray(batch))
        return digest.hexdigest()


def of_array(pixels: np.ndarray, label: str = "an array") -> Images:
    """uint8 [n, h, w, c], or float in [-1, 1], which is rounded chunk by chunk."""
    if pixels.ndim != 4:
        raise UserError(f"{label}: expected [n, h, w, c], got an array of shape {pixels.shape}")
    parts = lambda: (pixels[i : i + _CHUNK] for i in range(0, len(pixels), _CHUNK))  # noqa: E731
    return _of_numbers(label, pixels.shape, pixels.dtype, parts)


def _of_numbers(
    label: str, shape: tuple[int, ...], dtype: np.dtype, parts: Callable[[], Iterable[np.ndarray]]
) -> Images:
    count, *image = shape
    if image[2] not in (1, 3):
        raise UserError(f"{label}: images must have 1 or 3 channels, these have {image[2]}: flatten transparency first")
    if count == 0:
        raise UserError(f"{label} holds no images")
    if dtype == np.uint8:
        return Images(label, count, tuple(image), parts)
    if not np.issubdtype(dtype, np.floating):
        raise UserError(f"{label}: images must be uint8, or float in [-1, 1], not {dtype}")
    return Images(label, count, tuple(image), lambda: (_whole(part, label) for part in parts()), ROUNDED)


def _whole(part: np.ndarray, label: str) -> np.ndarray:
    if not np.abs(part).max() <= 1 + 1e-3:  # NaN too
        raise UserError(f"{label}: floating-point images must lie in [-1, 1]")
    return to_uint8(part)


def open_images(name: str) -> Images:
    """`name` is a folder of images, a .npz file, or a TFDS name with a split (`mnist:test`, `cifar10:train[:10000]`).

    Raises UserError in one line for what is not there, empty, mixed in size or kind, damaged, transparent or deeper
    than 8 bits: silently flattening or truncating would change every score.
    """
    path = Path(name)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        if path.suffix == ".npz":
            return _of_npz(path)
        raise UserError(f"{name}: expected a folder of images, a .npz file or a TFDS name with a split")
    found = re.fullmatch(r"(\w+):(\w+(?:\[[^\]]*\])?)", name)
    if found is None:
        raise UserError(f"{name}: no such folder or file; a TFDS set is written NAME:SPLIT, e.g. mnist:test")
    return _of_tfds(*found.groups())


def _of_tfds(name: str, split: str) -> Images:
    rows = tfds_rows(name, split)
    label = f"{name}:{split}"
    if not len(rows):
        raise UserError(f"{label} holds no images")
    if "image" not in rows[0]:
        raise UserError(f"{label} has no images, only {', '.join(rows[0])}")

    def chunks() -> Iterator[np.ndarray]:
        for first in range(0, len(rows), _CHUNK):
            numbers = range(first, min(first + _CHUNK, len(rows)))
            yield _stacked((rows[i]["image"] for i in numbers), (f"{label}, image {i}" for i in numbers), shape)

    shape = rows[0]["image"].shape
    return Images(label, len(rows), shape, chunks)


def _stacked(pictures: Iterable[np.ndarray], names: Iterable[str], shape: tuple[int, ...]) -> np.ndarray:
    found = []
    for picture, name in zip(pictures, names, strict=True):
        if picture.shape != shape:
            raise UserError(f"{name} has {_size(picture.shape)}, the first image has {_size(shape)}: make them equal")
        found.append(picture)
    return np.stack(found)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels and {shape[2]} channel(s)"


def _of_folder(folder: Path) -> Images:
    paths = files(folder, STILLS)
    shape = _read_exactly(paths[0]).shape

    def chunks() -> Iterator[np.ndarray]:
        for first in range(0, len(paths), _CHUNK):
            some = paths[first : first + _CHUNK]
            yield _stacked(map(_read_exactly, some), map(str, some), shape)

    return Images(str(folder), len(paths), shape, chunks)


def _read_exactly(path: Path) -> np.ndarray:
    """uint8 [h, w, 1 | 3], upright, with no value changed; UserError where that is impossible."""
    with opened(path) as image:
        # Pillow cuts 16-bit colours to 8 bits and tells only here.
        deep = image.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        if deep:
            raise UserError(
                f"{path} has more than 8 bits per channel: convert it to 8 bits, stating how it was rounded"
            )
        if image.has_transparency_data:
            raise UserError(f"{path} has transparency: flatten it onto a background first")
        if image.mode not in ("1", "L", "P", "RGB"):
            raise UserError(f"{path} is {image.mode}, neither grey nor RGB: convert it first")
        image.load()
        upright: Image.Image = ImageOps.exif_transpose(image)
        pixels = np.asarray(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _of_npz(path: Path) -> Images:
    """The file's only array, or that named images, image or arr_0; read in parts, so of any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
            wanted = names if len(names) == 1 else [n for n in ("images", "image", "arr_0") if n in names]
            if not wanted:
                raise UserError(
                    f"{path} holds {', '.join(names) or 'nothing'}: which are images? name the array images"
                )
            with archive.open(wanted[0] + ".npy") as file:
                shape, in_fortran_order, dtype = _npy_header(file)
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is not a whole .npz file: {error}") from None
    if len(shape) == 3:
        shape = (*shape, 1)
    if len(shape) != 4:
        raise UserError(f"{path}: expected [n, h, w, c], got an array of shape {shape}")
    if in_fortran_order:
        raise UserError(f"{path}: the array is in Fortran order: save np.ascontiguousarray of it")
    return _of_numbers(str(path), shape, dtype, lambda: _npz_parts(path, wanted[0] + ".npy", shape, dtype))


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type from the head of a .npy stream, which is left at the first number. No pickles."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _npz_parts(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            _npy_header(file)
            for first in range(0, shape[0], _CHUNK):
                count = min(_CHUNK, shape[0] - first)
                data = file.read(count * row_bytes)
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
