"""The lines benchmark of ACAI (Berthelot et al. 2018, arXiv 1807.07543, section 3.1): data and scores.

An image shows one line from its centre towards an angle in [0, 2 pi), white (1) on black (-1). A perfect interpolation
of two such images turns the line evenly from one angle to the other, so that how well an autoencoder interpolates is a
number: the distance of its frames to true lines, and how unevenly the angle of the nearest ones moves.

Rasterisation and scores are those of the published benchmark, whose numbers they are compared with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gan.acai import interpolate
from lib.shard import DATA

SIZE_PX = 32
WIDTH_PX = 2.0
CLASSES = 10
"""labels are tenths of the circle"""
REFERENCE_LINES = 10_000
INTERPOLATIONS = 256
FRAMES = 16
LAST = 20
"""evaluations, a median of which is the published number; they are 65,536 images apart"""
_SAME_ANGLE = 1e-4  # radians between the ends, below which the smoothness of an interpolation is undefined
_ROWS = 512  # frames compared at a time


def draw(angle: Any, size_px: int = SIZE_PX) -> Any:
    """Lines at these angles, radians [n], counter-clockwise from the right -> [n, size_px, size_px, 1] in [-1, 1].

    From the centre to one pixel before the border, two pixels wide. NumPy arrays give NumPy arrays in their own
    precision, JAX arrays give JAX arrays.

    Along the axis nearer to the line, "row" below, a pixel is white by the part of it that a band of 2 px covers; the
    bands are those of the line half a pixel before their rows begin. Of the line's two ends, only the one with the
    smaller row is antialiased. Both are properties of the published benchmark.
    """
    xp = angle.__array_namespace__()
    centre, length = size_px / 2, size_px / 2 - 1
    x, y = centre + length * xp.cos(angle), centre - length * xp.sin(angle)
    steep = xp.abs(y - centre) >= xp.abs(x - centre)
    row, column = xp.where(steep, y, x), xp.where(steep, x, y)
    forward = row >= centre
    first, last = xp.where(forward, centre, row), xp.where(forward, row, centre)
    begin = xp.where(forward, centre, column)
    slope = (column - centre) / (row - centre)  # columns per row
    pixel = xp.arange(size_px, dtype=angle.dtype)
    inside = (pixel >= xp.floor(first)[:, None]) & (pixel < xp.ceil(last)[:, None])
    weight = xp.where(pixel < xp.ceil(first)[:, None], (xp.ceil(first) - first)[:, None], 1)
    left = (begin - WIDTH_PX / 2)[:, None] + (pixel - first[:, None] - 0.5) * slope[:, None]
    left = left[:, :, None]  # [n, row, 1], of the band in each row
    covered = xp.minimum(pixel + 1, left + WIDTH_PX) - xp.maximum(pixel, left)
    image = 2 * xp.clip(covered, 0, 1) * xp.where(inside, weight, 0)[:, :, None] - 1
    return xp.where(steep[:, None, None], image, xp.swapaxes(image, 1, 2))[..., None]


def labelled(angle: jax.Array, size_px: int = SIZE_PX) -> dict[str, jax.Array]:
    """A batch of the lines at these angles [b], with the tenths of the circle that they are in as labels."""
    label = jnp.clip(jnp.floor(angle * (CLASSES / (2 * math.pi))), 0, CLASSES - 1).astype(jnp.int32)
    return {"image": draw(angle, size_px), "label": label}


def batch(key: jax.Array, count: int, size_px: int = SIZE_PX) -> dict[str, jax.Array]:
    """Random lines: {"image": float32 [count, size_px, size_px, 1], "label": int32 [count]}."""
    return labelled(jax.random.uniform(key, (count,), maxval=2 * math.pi), size_px)


@dataclasses.dataclass(frozen=True)
class Lines:
    """A source of batches (see `lib.data`) of lines that nobody has seen before.

    The angles of a step depend on the seed and the step alone; the images are drawn where the training runs.
    """

    batch_size: int
    seed: int = 0
    size_px: int = SIZE_PX
    constant: tuple = ()
    constant_spec: P = P()
    per_step_spec: P = P(None, DATA)

    def per_step(self, first: int, count: int) -> np.ndarray:
        """Angles in radians, float32 [count, batch_size]."""
        generators = (np.random.Generator(np.random.Philox(key=[self.seed, first + i])) for i in range(count))
        return np.stack([2 * np.pi * g.random(self.batch_size) for g in generators]).astype(np.float32)

    def select(self, constant: tuple, x: jax.Array) -> dict[str, jax.Array]:
        del constant
        return labelled(x, self.size_px)


class Score(NamedTuple):
    """Smaller is better."""

    distance: float
    """mean cosine distance of frames to the nearest of 10,000 lines, between which a true line is 2e-7 away"""
    smoothness: float
    """mean of the largest step of the angle, as a part of the whole turn, beyond 1 / 15. An interpolation between equal
    angles has none and counts as 0; NaN where all are such"""
    undefined: float
    """the part of interpolations that have no smoothness"""


@functools.lru_cache(maxsize=2)
def _reference(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles [REFERENCE_LINES], and the pixels of their lines as unit vectors, float64."""
    angles = 2 * np.pi / REFERENCE_LINES * np.arange(REFERENCE_LINES)
    pixels = draw(angles, size_px).reshape(REFERENCE_LINES, -1)
    return angles, pixels / np.linalg.norm(pixels, axis=1, keepdims=True)


def nearest(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, size, size, 1] -> cosine distance to the nearest line [n], and its angle in radians [n]."""
    angles, lines = _reference(images.shape[1])
    pixels = np.asarray(images, np.float64).reshape(len(images), -1)
    pixels = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    distances, found = [], []
    for start in range(0, len(pixels), _ROWS):
        distance = 1 - pixels[start : start + _ROWS] @ lines.T
        found.append(np.argmin(distance, axis=1))
        distances.append(np.min(distance, axis=1))
    return np.concatenate(distances), angles[np.concatenate(found)]


def unevenness(angles: np.ndarray) -> np.ndarray:
    """Angles of frames, radians [n, frames] -> the largest step over the whole turn, less that of an even turn [n].

    NaN where the ends have the same angle.
    """
    angles = np.unwrap(np.asarray(angles, np.float64), axis=1)
    turn = np.abs(angles[:, -1] - angles[:, 0])
    step = np.max(np.abs(np.diff(angles, axis=1)), axis=1)
    defined = turn >= _SAME_ANGLE
    return np.where(defined, step / np.where(defined, turn, 1), np.nan) - 1 / (angles.shape[1] - 1)


def score(frames: np.ndarray) -> Score:
    """Frames of interpolations, [n, frames, size, size, 1] with pixels in [-1, 1]."""
    n, length = frames.shape[:2]
    distance, angles = nearest(frames.reshape(n * length, *frames.shape[2:]))
    smoothness = unevenness(angles.reshape(n, length))
    undefined = np.isnan(smoothness)
    mean = np.nan if undefined.all() else float(np.sum(smoothness[~undefined])) / n
    return Score(float(np.mean(distance)), mean, float(np.mean(undefined)))


Function = Callable[[jax.Array], jax.Array]


def interpolations(encode: Function, decode: Function, key: jax.Array, count: int = INTERPOLATIONS) -> jax.Array:
    """Frames [count, FRAMES, 32, 32, 1] between random lines, by way of the latents of `encode`. Pure: jit it."""
    ends = encode(batch(key, 2 * count)["image"])
    latents = interpolate(ends[:count], ends[count:], FRAMES)
    frames = jax.lax.map(decode, latents)  # one frame of all at a time, lest a laptop's memory be full
    return jnp.swapaxes(frames, 0, 1)


def final(values: list[float], last: int = LAST) -> float:
    """What the benchmark reports of a training: the median of its last evaluations, oldest first."""
    return float(np.median(values[-last:]))
