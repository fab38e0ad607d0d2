"""What is kept of a set of images: moments and Inception sums of all of them, features of a bounded sample.

Memory does not grow with the number of images beyond one index per image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from lib.features.net import FeatureNet, outputs
from lib.metrics.images import Images
from lib.metrics.inception_score import InceptionSums
from lib.process import UserError
from lib.shard import make_mesh

SPLITS = 10
SAMPLE_SEED = 0
_ROWS_PER_MERGE = 1024


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one set of images under one net; float64 but for `features`."""

    count: int
    mean: np.ndarray  # [d]
    covariance: np.ndarray  # [d, d], divisor count - 1
    rows: np.ndarray  # int64 [m], which images `features` are of, ascending
    features: np.ndarray  # float32 [m, d]
    scores: np.ndarray  # [SPLITS], the Inception score of every split; NaN below SPLITS images


class Moments:
    """Mean and covariance of a stream of rows [b, d], merged block by block (Chan, Golub and LeVeque 1979).

    Blocks have a fixed number of rows, so the result does not depend on how the stream was cut.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))
        self._pending = np.empty((_ROWS_PER_MERGE, dimension))
        self._filled = 0

    def add(self, rows: np.ndarray) -> None:
        while len(rows):
            taken = min(len(rows), _ROWS_PER_MERGE - self._filled)
            self._pending[self._filled : self._filled + taken] = rows[:taken]
            self._filled += taken
            rows = rows[taken:]
            if self._filled == _ROWS_PER_MERGE:
                self._merge()

    def _merge(self) -> None:
        block = self._pending[: self._filled]
        if not len(block):
            return
        mean = block.mean(0)
        centred = block - mean
        delta = mean - self.mean
        total = self.count + len(block)
        self._scatter += centred.T @ centred + np.outer(delta, delta) * (self.count * len(block) / total)
        self.mean = self.mean + delta * (len(block) / total)
        self.count, self._filled = total, 0

    def covariance(self) -> np.ndarray:
        """[d, d] with divisor n - 1, of at least two rows."""
        self._merge()
        return self._scatter / (self.count - 1)


def sample_rows(count: int, max_features: int) -> np.ndarray:
    """Which images' features are kept: all, or `max_features` of them, drawn evenly with a fixed seed."""
    if count <= max_features:
        return np.arange(count)
    rng = np.random.Generator(np.random.Philox(SAMPLE_SEED))
    return np.sort(rng.choice(count, max_features, replace=False))


def summarize(
    images: Images,
    net: FeatureNet,
    *,
    max_features: int = 10_000,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Statistics:
    """One pass over `images`, batches spread over the devices of `mesh` (default: all).

    `progress(b)` is called after every batch. Raises UserError for images that the net does not take and for features
    that are not finite.
    """
    check_fits(images, net)
    mesh = mesh or make_mesh()
    if batch_size is None:
        # A net that resizes does it to hundreds of pixels; the small ones would be held up by small batches.
        batch_size = 256 if net.sizes_px is not None else 16 * mesh.size
    moments = Moments(net.dimension)
    sums = InceptionSums(images.count, SPLITS, net.classes) if images.count >= SPLITS else None
    rows = sample_rows(images.count, max_features)
    kept = np.empty((len(rows), net.dimension), np.float32)
    done = filled = 0
    for pool, logits in outputs(net, images.batches(batch_size), batch_size=batch_size, mesh=mesh):
        finite = np.isfinite(pool).all(1) & np.isfinite(logits).all(1)
        if not finite.all():
            first = done + int(np.argmin(finite))
            raise UserError(f"{net.name}: features of image {first} of {images.label} are not finite: wrong weights?")
        moments.add(pool)
        if sums is not None:
            sums.add(logits)
        here = rows[filled : np.searchsorted(rows, done + len(pool))] - done
        kept[filled : filled + len(here)] = pool[here]
        filled += len(here)
        done += len(pool)
        progress(len(pool))
    covariance = moments.covariance()
    scores = np.full(SPLITS, np.nan) if sums is None else sums.scores()
    return Statistics(done, moments.mean, covariance, rows, kept, scores)


def check_fits(images: Images, net: FeatureNet) -> None:
    """Raises UserError where the net does not take such images, or where they are too few to have a covariance."""
    height, width, channels = images.shape
    if images.count < 2:
        raise UserError(f"{images.label} has {images.count} image: at least 2 are needed")
    if channels not in (net.channels, 1):
        raise UserError(
            f"{net.name} takes images of {net.channels} channel(s), those of {images.label} have {channels}"
        )
    if net.sizes_px is not None and not (height == width and height in net.sizes_px):
        sizes = " or ".join(f"{s} x {s}" for s in net.sizes_px)
        raise UserError(f"{net.name} takes {sizes} pixels, the images of {images.label} have {height} x {width}")
