"""The Fréchet distance between two Gaussians (Heusel et al. 2017, equation 6), by two routes in float64.

d² = |μ1 - μ2|² + Tr S1 + Tr S2 - 2 Tr (S1 S2)^½. The trace of the root is the nuclear norm of A Bᵀ for any factors
AᵀA = S1 and BᵀB = S2. With fewer images than dimensions the centred features are such factors, and nothing is lost
to the square root of rounding errors in null directions; with many images the covariances' own roots are cheaper.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from lib.metrics.statistics import Statistics


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """From means [d] and covariances [d, d], by eigenvalues of √S1 S2 √S1 (symmetric, so real)."""
    root = _root(cov1)
    inner = root @ cov2 @ root
    values = scipy.linalg.eigvalsh((inner + inner.T) / 2)
    return _assemble(mean1, np.trace(cov1), mean2, np.trace(cov2), float(np.sqrt(_significant(values)).sum()))


def frechet_distance_of_factors(
    mean1: np.ndarray, factor1: np.ndarray, mean2: np.ndarray, factor2: np.ndarray
) -> float:
    """From means [d] and factors [r, d] with factorᵀ factor = covariance, by the nuclear norm."""
    cross = float(np.sum(scipy.linalg.svdvals(factor1 @ factor2.T)))
    return _assemble(mean1, np.sum(factor1**2), mean2, np.sum(factor2**2), cross)


def factor_of_rows(rows: np.ndarray) -> np.ndarray:
    """The exact factor of the covariance (divisor n - 1) of `rows` [n, d]."""
    rows = np.asarray(rows, np.float64)
    return (rows - rows.mean(0)) / np.sqrt(len(rows) - 1)


def fid(real: Statistics, generated: Statistics) -> float:
    """Chooses the route: the nuclear norm where either set has no more images than dimensions."""
    if min(real.count, generated.count) > real.mean.size:
        return frechet_distance(real.mean, real.covariance, generated.mean, generated.covariance)
    return frechet_distance_of_factors(real.mean, _factor(real), generated.mean, _factor(generated))


def bootstrap_fid(real: Statistics, generated: Statistics, resamples: int, seed: int) -> float:
    """Standard deviation of the distance when both sets are drawn again, with replacement, from their stored features.

    As many are drawn as the sets have images, so it is that of the full sets where these hold more than was stored.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    sets = [(np.asarray(s.features, np.float64), s.count) for s in (real, generated)]
    singular = min(len(rows) for rows, _ in sets) <= real.mean.size
    found = []
    for _ in range(resamples):
        (mean1, factor1), (mean2, factor2) = (_resampled(rows, count, rng) for rows, count in sets)
        if singular:
            found.append(frechet_distance_of_factors(mean1, _short(factor1), mean2, _short(factor2)))
        else:
            found.append(frechet_distance(mean1, factor1.T @ factor1, mean2, factor2.T @ factor2))
    return float(np.std(found, ddof=1))


def _resampled(rows: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean and factor of `count` draws. A row drawn c times is one row of weight √c, which is a third cheaper."""
    times = np.bincount(rng.integers(0, len(rows), count), minlength=len(rows))
    kept = times > 0
    mean = times[kept] @ rows[kept] / count
    return mean, np.sqrt(times[kept, None] / (count - 1)) * (rows[kept] - mean)


def _short(factor: np.ndarray) -> np.ndarray:
    """The same covariance from no more rows than dimensions."""
    return factor if len(factor) <= factor.shape[1] else scipy.linalg.qr(factor, mode="r")[0][: factor.shape[1]]


def _factor(statistics: Statistics) -> np.ndarray:
    if statistics.count <= statistics.mean.size and len(statistics.features) == statistics.count:
        return factor_of_rows(statistics.features)
    values, vectors = scipy.linalg.eigh(statistics.covariance)
    return np.sqrt(_significant(values))[:, None] * vectors.T


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = scipy.linalg.eigh(cov)
    return (vectors * np.sqrt(_significant(values))) @ vectors.T


def _significant(values: np.ndarray) -> np.ndarray:
    """Eigenvalues of a positive semi-definite matrix without those that are only rounding errors of zero."""
    floor = len(values) * np.finfo(np.float64).eps * max(values.max(), 0)
    return np.where(values > floor, values, 0)


def _assemble(mean1: np.ndarray, trace1: float, mean2: np.ndarray, trace2: float, cross: float) -> float:
    return float(np.sum((mean1 - mean2) ** 2) + trace1 + trace2 - 2 * cross)
