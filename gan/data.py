"""Sources of images and points, and the few facts about them that a run keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gan.config import Config
from lib.process import UserError
from lib.sources import Dataset, load_images

# 25 Gaussians on a grid, scaled to about unit variance, as in gan_toy.py of Gulrajani et al. 2017.
_SCALE = 1 / 2.828
MODES = _SCALE * np.stack(np.meshgrid(*[np.arange(-4.0, 5.0, 2.0)] * 2), axis=-1).reshape(-1, 2)
MODE_STD = 0.05 * _SCALE
_POINTS = 100_000


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of the training data. A run keeps them, and samples without its data."""

    shape: tuple[int, ...]
    """of one example: (h, w, c) or (d,)"""
    count: int
    classes: int
    """0: there are no labels"""


def load(config: Config) -> Dataset:
    """Training and test data of a configuration.

    Raises UserError for data that are missing, damaged, too small, mixed in size, or without the labels that the
    networks are to be told.
    """
    if config.data.source == "gaussians":
        found = Dataset({"x": gaussians(_POINTS, config.seed)}, {"x": gaussians(_POINTS, config.seed + 1)})
    else:
        found = load_images(config.data.source, config.data.size_px, labels=config.data.labels, others=("gaussians",))
    rows = next(iter(found.train.values()))
    if config.optim.batch_size > len(rows):
        raise UserError(f"optim.batch_size is {config.optim.batch_size}, but there are only {len(rows)} examples")
    if config.classes_known and "label" not in found.train:
        raise UserError(f"{config.data.source} has no labels: set network.conditioning to none")
    return found


def gaussians(count: int, seed: int) -> np.ndarray:
    """float32 [count, 2] of the 25 Gaussians."""
    rng = np.random.Generator(np.random.Philox(seed))
    centres = MODES[rng.integers(len(MODES), size=count)]
    return np.float32(centres + MODE_STD * rng.standard_normal((count, 2)))


def facts(data: Dataset) -> Facts:
    labels = data.train.get("label")
    rows = data.train["image"] if "image" in data.train else data.train["x"]
    return Facts(tuple(rows.shape[1:]), len(rows), 0 if labels is None else int(labels.max()) + 1)


def used(config: Config, data: Dataset) -> dict[str, Any]:
    """Without the labels where nobody reads them."""
    return {name: rows for name, rows in data.train.items() if name != "label" or config.classes_known}
