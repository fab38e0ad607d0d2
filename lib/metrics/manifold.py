"""Neighbourhoods in feature space: precision, recall, density, coverage, and who is a copy of whom.

Pairwise distances are float64 and exist only in blocks of BLOCK rows, so memory is BLOCK x n.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BLOCK = 512


class Manifold(NamedTuple):
    """Per-image verdicts; their means are the metrics, their spread the uncertainty."""

    precision: np.ndarray  # bool [generated], lies within the k-th neighbour's distance of some real image
    recall: np.ndarray  # bool [real], the same with the sets exchanged (Kynkäänniemi et al. 2019)
    density: np.ndarray  # float [generated], how many real balls hold it, over their k (Naeem et al. 2020)
    coverage: np.ndarray  # bool [real], whose ball holds a generated image
    copying: np.ndarray  # bool [generated], nearer to its nearest real image than that is to any other real one


def compare(real: np.ndarray, generated: np.ndarray, *, k: int = 3, k_density: int = 5) -> Manifold:
    """Features [n, d] and [m, d]. Balls are closed for precision and recall, open for density and coverage, as in
    torch-fidelity and prdc. Needs more than k images (more than k_density for density and coverage) per set.
    """
    centre = np.asarray(real, np.float64).mean(0)  # small numbers: less is lost in |x|² + |y|² - 2xy
    x, y = np.asarray(real, np.float64) - centre, np.asarray(generated, np.float64) - centre
    k_last = min(max(k, k_density), len(x) - 1)
    radii = neighbour_distances2(x, k_last)  # [n, k_last], ascending
    real_ball, density_ball, nearest_other = radii[:, min(k, k_last) - 1], radii[:, k_last - 1], radii[:, 0]
    generated_ball = neighbour_distances2(y, min(k, len(y) - 1))[:, -1]
    precision, density, copying = (np.empty(len(y), kind) for kind in (bool, float, bool))
    recall, coverage = np.zeros(len(x), bool), np.zeros(len(x), bool)
    for rows, distances2 in _blocks(y, x):
        precision[rows] = (distances2 <= real_ball).any(1)
        inside = distances2 < density_ball
        density[rows] = inside.sum(1) / k_last
        coverage |= inside.any(0)
        recall |= (distances2 <= generated_ball[rows, None]).any(0)
        nearest = distances2.argmin(1)
        copying[rows] = distances2[np.arange(len(nearest)), nearest] < nearest_other[nearest]
    return Manifold(precision, recall, density, coverage, copying)


def neighbour_distances2(rows: np.ndarray, k: int) -> np.ndarray:
    """Squared distances [n, k], ascending, to the k nearest *other* rows of [n, d]."""
    out = np.empty((len(rows), k))
    for where, distances2 in _blocks(rows, rows):
        distances2[np.arange(len(distances2)), np.arange(where.start, where.stop)] = np.inf  # not to itself
        out[where] = np.sort(np.partition(distances2, k - 1, axis=1)[:, :k], axis=1)
    return out


def nearest(real: np.ndarray, generated: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest real rows of every generated one: indices and distances [m, k], nearest first.

    Distances are taken again from the differences, so that of a copy is exactly 0.
    """
    centre = np.asarray(real, np.float64).mean(0)
    x, y = np.asarray(real, np.float64) - centre, np.asarray(generated, np.float64) - centre
    indices = np.empty((len(y), k), np.int64)
    for where, distances2 in _blocks(y, x):
        indices[where] = np.argpartition(distances2, k - 1, axis=1)[:, :k]
    distances = np.linalg.norm(y[:, None] - x[indices], axis=-1)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(indices, order, 1), np.take_along_axis(distances, order, 1)


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, squared distances [len(rows), m]) of all x to all y, a block at a time."""
    x2, y2 = np.sum(x**2, 1), np.sum(y**2, 1)
    for first in range(0, len(x), BLOCK):
        rows = slice(first, min(first + BLOCK, len(x)))
        distances2 = x[rows] @ y.T
        distances2 *= -2
        distances2 += x2[rows, None]
        distances2 += y2
        yield rows, np.maximum(distances2, 0, out=distances2)
