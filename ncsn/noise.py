"""Noise levels: the ladders that samplers descend, computed from data as NCSNv2 says, and the levels of training.

Ladders are float32 [levels], descending and positive; samplers that end on the data append 0 themselves. NCSNv2 is
"Improved techniques for training score-based generative models" (arXiv 2006.09011), EDM is arXiv 2206.00364.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib.process import UserError

Draw = Callable[[jax.Array], jax.Array]  # the key of one example -> its sigma, []

# The one value that gives all five published ladders: any of 0.56664 to 0.56691 does. The paper says "about 0.5".
OVERLAP = 0.5668


def expand(sigma: jax.Array, x: jax.Array) -> jax.Array:
    """sigma [b] as [b, 1, ..., 1] beside x [b, ...]; a scalar stays one."""
    sigma = jnp.asarray(sigma)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - 1)) if sigma.ndim else sigma


def geometric(sigma_max: float, sigma_min: float, levels: int) -> np.ndarray:
    """sigma_1 = sigma_max > ... > sigma_L = sigma_min with a constant ratio. UserError unless this is possible."""
    _check_range(sigma_max, sigma_min, levels)
    return np.geomspace(sigma_max, sigma_min, levels).astype(np.float32)


def karras(sigma_max: float, sigma_min: float, levels: int, rho: float = 7.0) -> np.ndarray:
    """EDM eq. 5 without its final 0: equal steps in sigma^(1 / rho). UserError unless this is possible."""
    _check_range(sigma_max, sigma_min, levels)
    if not rho > 0:
        raise UserError(f"rho is {rho:g}: it must be positive")
    steps = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), levels) ** rho
    return steps.astype(np.float32)


def uniform_level(sigmas: np.ndarray) -> Draw:
    """Every level of a ladder equally often (NCSN)."""

    def draw(key: jax.Array) -> jax.Array:
        index = jnp.floor(jax.random.uniform(key) * len(sigmas)).astype(jnp.int32)  # a third of randint's work
        return jnp.asarray(sigmas, jnp.float32)[index]

    return draw


def log_normal(P_mean: float = -1.2, P_std: float = 1.2) -> Draw:
    """log sigma ~ N(P_mean, P_std^2) (EDM, table 1)."""
    return lambda key: jnp.exp(P_mean + P_std * jax.random.normal(key))


def largest_distance(x: Any, block: int = 1024) -> float:
    """Technique 1: the largest Euclidean distance between two of x [n, ...], which sigma_max should match.

    uint8 counts as [0, 1], the range of NCSN. Exact up to float32 rounding, over all pairs, in blocks of `block` x
    `block` on the device: rows are sorted by their distance from the mean, and a block of pairs is left out where
    the two longest of these distances add up to less than what was found already. UserError without examples.
    """
    if not len(x):
        raise UserError("there are no examples to measure distances between")
    rows = jnp.asarray(x).reshape(len(x), -1)
    block = min(block, len(rows))
    unit = 1 / 255 if rows.dtype == jnp.uint8 else 1.0
    centre = jnp.mean(rows, axis=0, dtype=jnp.float32)
    radii = np.concatenate([_radii(rows[i : i + block], centre) for i in range(0, len(rows), block)])
    order = np.argsort(-radii, kind="stable")
    # The last block is filled with the first row: its pairs are pairs of the data too.
    order = np.concatenate([order, np.full(-len(order) % block, order[0])]).astype(np.int32)
    starts = range(0, len(order), block)
    radii = radii[order[starts]]  # the longest of each block
    largest = 0.0
    for i, first in enumerate(starts):
        for j in range(i, len(starts)):
            if radii[i] + radii[j] <= largest:
                break
            second = starts[j]
            found = _farthest(rows, centre, order[first : first + block], order[second : second + block])
            largest = max(largest, float(found))
    return largest * unit


@jax.jit
def _radii(rows: jax.Array, centre: jax.Array) -> jax.Array:
    return jnp.linalg.norm(rows - centre, axis=1)


@jax.jit
def _farthest(rows: jax.Array, centre: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    a, b = rows[first] - centre, rows[second] - centre
    # HIGHEST, because the default on GPUs and TPUs keeps 10 bits or fewer of the factors
    products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1) - 2 * products
    return jnp.sqrt(jnp.maximum(jnp.max(squares), 0))


def overlap(ratio: float, dimension: int) -> float:
    """Technique 2: how much of level i + 1 lies where level i puts its mass, for sigma_i / sigma_(i+1) = `ratio`.

    The norm of N(0, sigma^2 I) in many dimensions is N(sqrt(D) sigma, sigma^2 / 2): this is the probability that the
    narrower one's is within three standard deviations of the wider one's (NCSNv2, proposition 2 and section 3.2).
    """
    shift = math.sqrt(2 * dimension) * (ratio - 1)
    return _normal_cdf(shift + 3 * ratio) - _normal_cdf(shift - 3 * ratio)


def ratio_for(target: float, dimension: int) -> float:
    """The ratio > 1 of neighbouring levels whose `overlap` is `target`.

    UserError in fewer than five dimensions, where every ratio overlaps nearly whole, and for targets that no
    ratio reaches.
    """
    from scipy.optimize import brentq

    if dimension < 5:
        raise UserError(f"data of {dimension} dimensions: the overlap of levels decides nothing below 5; give levels")
    most = overlap(1.0, dimension)
    if not 0 < target < most:
        raise UserError(f"the overlap of levels is {target:g}: it must be above 0 and below {most:.4f}")
    slope = math.sqrt(2 * dimension)
    widest = (slope + 40) / (slope - 3)  # 40 standard deviations apart
    return float(brentq(lambda ratio: overlap(ratio, dimension) - target, 1.0, widest, xtol=1e-14))


def levels_for(sigma_max: float, sigma_min: float, dimension: int, target: float = OVERLAP) -> int:
    """Technique 2: how many geometric levels make neighbours overlap by `target`, to the nearest whole number."""
    _check_range(sigma_max, sigma_min, 2)
    return max(2, round(1 + math.log(sigma_max / sigma_min) / math.log(ratio_for(target, dimension))))


def variance_ratio(step_size: float, sigma_min: float, ratio: float, steps: int) -> float:
    """Technique 4: the variance that `steps` Langevin steps at one level leave, over sigma^2 of that level.

    For data that are one point, starting from the level above (NCSNv2, proposition 3). Always above 1.
    """
    step = step_size / sigma_min**2
    stationary = 1 / (1 - step / 2)  # the excess over 1 is the discretisation's bias
    return (1 - step) ** (2 * steps) * (ratio**2 - stationary) + stationary


def step_size_for(sigma_min: float, ratio: float, steps: int) -> float:
    """Technique 4: the step size at sigma_min that brings `variance_ratio` nearest to 1.

    The step at level i is this times (sigma_i / sigma_min)^2, in x += step s + sqrt(2 step) z.
    """
    from scipy.optimize import minimize_scalar

    if steps < 1:
        raise UserError(f"steps per level are {steps}: at least 1 is needed")
    # The excess is (1 - step)^2T (ratio^2 - 1) + (1 - (1 - step)^2T) (stationary - 1): falls, then rises, on (0, 1).
    excess = lambda step: variance_ratio(step, 1.0, ratio, steps)  # noqa: E731
    found: Any = minimize_scalar(excess, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-10})
    return float(found.x) * sigma_min**2


class Annealing(NamedTuple):
    """What annealed Langevin sampling needs to know."""

    sigmas: np.ndarray  # [levels], descending
    steps: int  # per level
    step_size: float  # at the last level
    variance_ratio: float  # what is left at each level, see there; 1 is ideal


def annealing(
    sigma_max: float, sigma_min: float, dimension: int, *, evaluations: int, target: float = OVERLAP
) -> Annealing:
    """Techniques 2 and 4: the ladder, then as many steps per level as `evaluations` of the network pay for.

    UserError where they do not pay for one step per level.
    """
    levels = levels_for(sigma_max, sigma_min, dimension, target)
    if evaluations < levels:
        raise UserError(f"{evaluations} evaluations are fewer than the {levels} noise levels: allow at least {levels}")
    steps = evaluations // levels
    ratio = (sigma_max / sigma_min) ** (1 / (levels - 1))
    step_size = step_size_for(sigma_min, ratio, steps)
    left = variance_ratio(step_size, sigma_min, ratio, steps)
    return Annealing(geometric(sigma_max, sigma_min, levels), steps, step_size, left)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _check_range(sigma_max: float, sigma_min: float, levels: int) -> None:
    if not (math.isfinite(sigma_max) and sigma_max > sigma_min > 0):
        raise UserError(f"noise levels from {sigma_max:g} down to {sigma_min:g}: needed are sigma_max > sigma_min > 0")
    if levels < 2:
        raise UserError(f"levels is {levels}: at least 2 are needed")
