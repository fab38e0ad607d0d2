"""Sources of images and points, and the few facts about them that recipes need."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from lib.process import UserError
from lib.sources import Dataset, load_images
from ncsn.config import Config
from ncsn.noise import largest_distance
from ncsn.toys import NCSN_TOY

_TOY_POINTS = 50_000
_DISTANCES = 20_000  # images whose distances are looked at: a matter of seconds


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of the training data: points as they are, images in [0, 1]. A run keeps them, and samples without its data."""

    shape: tuple[int, ...]
    """of one example: (h, w, c) or (d,)"""
    count: int
    classes: int
    """0: there are no labels"""
    mean: float
    """over examples and coordinates"""
    std: float
    largest_distance: float
    """between two examples (NCSNv2's technique 1; of the first 20,000)"""

    @property
    def dimension(self) -> int:
        return math.prod(self.shape)

    def in_range(self, low: float, high: float) -> Facts:
        """The same facts where black is `low` and white `high`."""
        unit = high - low
        moved = {"mean": low + unit * self.mean, "std": unit * self.std}
        return dataclasses.replace(self, **moved, largest_distance=unit * self.largest_distance)

    @property
    def size(self) -> float:
        """Standard deviation about zero: EDM's sigma_data."""
        return math.hypot(self.mean, self.std)


def load(config: Config) -> Dataset:
    """Training and test data of a configuration.

    Raises UserError for data that are missing, damaged, too small, mixed in size, or without the labels that the
    network is to be told.
    """
    data = config.data
    if data.source == "toy_mixture":
        found = _toy(config.seed)
    else:
        found = load_images(data.source, data.size_px, others=("toy_mixture",))
    rows = next(iter(found.train.values()))
    if config.optim.batch_size > len(rows):
        raise UserError(f"optim.batch_size is {config.optim.batch_size}, but there are only {len(rows)} examples")
    if config.network.class_conditional and "label" not in found.train:
        raise UserError(f"{data.source} has no labels: set network.class_conditional to false")
    return found


def facts(data: Dataset) -> Facts:
    labels = data.train.get("label")
    rows = data.train["image"] if "image" in data.train else data.train["x"]
    unit = 1 / 255 if rows.dtype == np.uint8 else 1.0
    mean, std = float(rows.mean(dtype=np.float64)), float(rows.std(dtype=np.float64))
    return Facts(
        shape=tuple(rows.shape[1:]),
        count=len(rows),
        classes=0 if labels is None else int(labels.max()) + 1,
        mean=unit * mean,
        std=unit * std,
        largest_distance=largest_distance(rows[:_DISTANCES]),
    )


def _toy(seed: int) -> Dataset:
    sample = jax.jit(NCSN_TOY.sample)
    train, test = (jax.random.split(key, _TOY_POINTS) for key in jax.random.split(jax.random.key(seed)))
    return Dataset({"x": np.asarray(sample(train))}, {"x": np.asarray(sample(test))})
