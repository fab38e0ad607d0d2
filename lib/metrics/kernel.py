"""Maximum mean discrepancies: the kernel distance on features, and a Gaussian kernel for points in the plane.

Both are the unbiased U-statistic of Gretton et al. (2012, equation 3), which may be negative.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SEED = 2020  # torch-fidelity's, so that its subsets are ours
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x·y / d + 1)³ of Bińkowski et al. (2018): [n, d], [m, d] -> [n, m]."""
    z = x @ y.T / x.shape[1] + 1
    return z * z * z  # ten times as fast as a power


def gaussian_kernel(bandwidths: np.ndarray) -> Kernel:
    """The mean of exp(-|x - y|² / 2 s²) over bandwidths s."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squared = np.maximum(np.sum(x**2, 1)[:, None] + np.sum(y**2, 1) - 2 * x @ y.T, 0)
        return np.mean([np.exp(-squared / (2 * s**2)) for s in bandwidths], axis=0)

    return kernel


def mmd2(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    """Unbiased squared discrepancy of [n, d] and [m, d]; the diagonals of the within-terms are left out."""
    n, m = len(x), len(y)
    within_x, within_y = kernel(x, x), kernel(y, y)
    first = (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
    second = (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(first + second - 2 * kernel(x, y).mean())


def kid(real: np.ndarray, generated: np.ndarray, subsets: int = 100, subset_size: int = 1000) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of features [n, d] and [m, d].

    A subset is never larger than the smaller set. Generator and seed are torch-fidelity's, so the subsets are too.
    """
    rng = np.random.RandomState(SEED)
    size = min(subset_size, len(real), len(generated))
    found = []
    for _ in range(subsets):
        y = generated[rng.choice(len(generated), size, replace=False)]
        x = real[rng.choice(len(real), size, replace=False)]
        found.append(mmd2(np.asarray(x, np.float64), np.asarray(y, np.float64), polynomial_kernel))
    return float(np.mean(found)), float(np.std(found))
