"""Points in the plane against a known distribution: discrepancy, and which of its modes are found."""

from __future__ import annotations

import numpy as np
import scipy.spatial.distance

from lib.metrics.kernel import gaussian_kernel, mmd2
from lib.metrics.result import Protocol, Result

BLOCKS = 10
RESAMPLES = 200


def _protocol(n_real: int, n_generated: int, settings: str) -> Protocol:
    return Protocol(
        features="coordinates",
        weights_sha256="",
        preprocessing="none",
        real="given points",
        generated="given points",
        n_real=n_real,
        n_generated=n_generated,
        rounding="none",
        settings=settings,
    )


def mmd(real: np.ndarray, generated: np.ndarray) -> Result:
    """The squared discrepancy of [n, d] and [m, d] under a Gaussian kernel of three bandwidths.

    Bandwidths are a half, one and two times the median distance of (at most 1000) real points. The value is over all
    points in blocks of equal size, the uncertainty the standard error over blocks. Raises ValueError below 2 * BLOCKS
    points.
    """
    if min(len(real), len(generated)) < 2 * BLOCKS:
        raise ValueError(f"at least {2 * BLOCKS} points of each are needed")
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    rng = np.random.Generator(np.random.Philox(0))
    some = real[rng.permutation(len(real))[:1000]]
    kernel = gaussian_kernel(np.median(scipy.spatial.distance.pdist(some)) * np.array([0.5, 1, 2]))
    parts = zip(
        np.array_split(real[rng.permutation(len(real))], BLOCKS),
        np.array_split(generated[rng.permutation(len(generated))], BLOCKS),
        strict=True,
    )
    found = [mmd2(x, y, kernel) for x, y in parts]
    return Result(
        float(np.mean(found)),
        float(np.std(found, ddof=1) / np.sqrt(BLOCKS)),
        f"standard error over {BLOCKS} blocks",
        _protocol(len(real), len(generated), "Gaussian kernel, bandwidths 0.5, 1, 2 x median distance of real points"),
    )


def mode_coverage(
    generated: np.ndarray, modes: np.ndarray, sigma: float, *, within_sigmas: float = 3.0
) -> dict[str, Result]:
    """How samples [n, d] meet modes [k, d] that are Gaussians of standard deviation `sigma`.

    A sample is of the nearest mode, and good within `within_sigmas` of it. "modes": the modes with at least one good
    sample; "good": the share of good samples; "kl_from_uniform": KL, in nats, of the good samples' modes from the
    uniform distribution (NaN without good samples).
    """
    distances = scipy.spatial.distance.cdist(generated, modes)
    nearest = distances.argmin(1)
    good = distances[np.arange(len(generated)), nearest] <= within_sigmas * sigma
    counts = np.append(np.bincount(nearest[good], minlength=len(modes)), np.sum(~good))
    rng = np.random.Generator(np.random.Philox(0))
    draws = np.array([_mode_numbers(c) for c in rng.multinomial(len(generated), counts / counts.sum(), RESAMPLES)])
    protocol = _protocol(len(modes), len(generated), f"good within {within_sigmas:g} sigma = {within_sigmas * sigma:g}")
    kind = f"bootstrap over samples, {RESAMPLES} resamples"
    names = ("modes", "good", "kl_from_uniform")
    spread = draws.std(0, ddof=1)
    return {
        name: Result(value, float(sd), kind, protocol)
        for name, value, sd in zip(names, _mode_numbers(counts), spread, strict=True)
    }


def _mode_numbers(counts: np.ndarray) -> tuple[float, float, float]:
    """Of counts [k + 1], the last of them samples that are not good."""
    good = counts[:-1]
    if not good.sum():
        return 0.0, 0.0, float("nan")
    share = good[good > 0] / good.sum()
    return float((good > 0).sum()), float(good.sum() / counts.sum()), float((share * np.log(share * len(good))).sum())
