"""Sets of images to learn from, by the name that a configuration gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib.data import load_labelled
from lib.images import STILLS, files, opened
from lib.metrics.images import Images, open_images
from lib.process import UserError

LABELLED = ("digits", "mnist", "cifar10")
_SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
_HELD_OUT = 10  # one of so many images of a folder is for testing


@dataclasses.dataclass(frozen=True)
class Dataset:
    """{"image": uint8 [n, h, w, c], "label": int32 [n] where there are labels}, or {"x": float32 [n, d]}."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def load_images(source: str, size_px: int | None, *, labels: Sequence[int] = (), others: Sequence[str] = ()) -> Dataset:
    """One of LABELLED, a folder of images, or a .npz file of them; a tenth of the images of a user's own is for tests.

    `size_px`: images of a folder are cropped to the square in their middle and resized. `labels`: only images of these
    classes, whose numbers become 0, 1, ... in this order. `others`: what else the caller's `source` may be. Raises
    UserError for what is missing, damaged, too small or mixed in size, and for classes that there are not.
    """
    if source in LABELLED:
        if size_px is not None:
            raise UserError(f"data.size_px is for folders of images: {source} has its own size")
        return Dataset(*(_of_classes(load_labelled(source, part), labels) for part in ("train", "test")))
    if labels:
        raise UserError(f"{source} has no labels: leave --data.labels out")
    path = Path(source)
    if not path.exists():
        known = ", ".join([*others, *LABELLED])
        raise UserError(f"{source}: no such folder or file; data.source is {known}, a folder of images or a .npz file")
    pixels = _squares(path, size_px) if path.is_dir() and size_px else _as_they_are(open_images(str(path)))
    if len(pixels) < 2 * _HELD_OUT:
        raise UserError(f"{source} holds {len(pixels)} images: at least {2 * _HELD_OUT} are needed")
    order = np.random.Generator(np.random.Philox(0)).permutation(len(pixels))
    test, train = np.split(order, [len(pixels) // _HELD_OUT])
    return Dataset({"image": pixels[train]}, {"image": pixels[test]})


def shape_of(source: str, size_px: int | None, labels: Sequence[int] = ()) -> tuple[tuple[int, ...], int]:
    """(shape of an image, number of classes), without the images. Raises UserError where only they tell."""
    if source in LABELLED:
        return _SHAPES[source], len(labels) or 10
    if size_px is None:
        raise UserError(f"how large are the images of {source}? Set --data.size-px")
    return (size_px, size_px, 3), 0


def _of_classes(rows: dict[str, np.ndarray], labels: Sequence[int]) -> dict[str, np.ndarray]:
    if not labels:
        return rows
    if len(set(labels)) < len(labels):
        raise UserError("data.labels: a class is named twice")
    strange = [label for label in labels if label not in rows["label"]]
    if strange:
        raise UserError(f"data.labels: there is no class {strange[0]}")
    numbers = np.full(rows["label"].max() + 1, -1, np.int32)
    numbers[list(labels)] = np.arange(len(labels))
    kept = numbers[rows["label"]] >= 0
    return {"image": rows["image"][kept], "label": numbers[rows["label"][kept]]}


def _as_they_are(images: Images) -> np.ndarray:
    return np.concatenate(list(images.batches(1000)))


def _squares(folder: Path, size_px: int) -> np.ndarray:
    """All images of a folder, cropped to the square in their middle and resized, uint8 [n, size_px, size_px, 3]."""
    names = files(folder, STILLS)
    out = np.empty((len(names), size_px, size_px, 3), np.uint8)
    for i, path in enumerate(names):
        with opened(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            out[i] = np.asarray(ImageOps.fit(upright, (size_px, size_px), Image.Resampling.LANCZOS))
    return out
