"""Samples of which something is known: inpainting and colourisation, as wrappers of any sampler.

After every step the known coordinates are set to what they are at the noise level that the step has reached (NCSN,
appendix B.3; SDE, arXiv 2011.13456, appendix I.2). The end result has them exactly. What is sampled is the conditional
distribution only in the limit of many steps per level: Langevin steps move towards it, a pure predictor or ODE step
does not make up for what it decided at higher noise. `guidance.reconstruction` is the way of few steps: the score then
knows, and the known coordinates are set after the last step only.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ncsn.samplers import CONSTRAINT, Info, Sampler, normal

GREY_MASK = np.asarray([True, False, False])
GREY = np.asarray([[1, 1, 1], [1, -1, 0], [1, 1, -2]], np.float64)
GREY = (GREY / np.linalg.norm(GREY, axis=1, keepdims=True)).astype(np.float32).T
"""[3, 3], orthonormal: the first coordinate of rgb @ GREY, the one in GREY_MASK, is sqrt(3) times the channels' mean"""


def inpaint(
    sampler: Sampler,
    known: jax.Array,
    mask: jax.Array | np.ndarray,
    *,
    redraw: bool = True,
    every_step: bool = True,
    basis: np.ndarray | None = None,
) -> Sampler:
    """`sampler`, given that x is `known` where `mask` (bool) is true; both broadcast to x [b, ...].

    `known` is clean data; what is inserted at level sigma is known + sigma z. z is drawn anew for every step as in
    NCSNv2, or with `redraw=False` once per noise level as in NCSN. `every_step=False`: only after the last step.
    `basis`: orthonormal [c, c], mask and known are then those of x @ basis, and hold up to rounding.
    """
    levels = jnp.asarray(sampler.levels)
    steps = len(sampler.levels) - 1
    changes = np.diff(sampler.levels, prepend=sampler.levels[0]) != 0
    draws = jnp.asarray(np.arange(steps + 1) if redraw else np.cumsum(changes))
    turn = lambda x: x if basis is None else jnp.matmul(x, basis, precision="highest")  # noqa: E731
    back = lambda x: x if basis is None else jnp.matmul(x, basis.T, precision="highest")  # noqa: E731

    def insert(keys: jax.Array, i: jax.Array | int, state: Any) -> Any:
        """The state after i steps."""
        shape = state.x.shape[1:]
        noisy = known + levels[i] * normal(keys, shape, CONSTRAINT, draws[i])
        last = jnp.equal(i, steps)
        noisy = jnp.where(last, jnp.broadcast_to(known, noisy.shape), noisy)
        inserted = back(jnp.where(mask, noisy, turn(state.x)))
        return state._replace(x=jnp.where(every_step | last, inserted, state.x))

    def init(keys: jax.Array, shape: tuple[int, ...]) -> Any:
        return insert(keys, 0, sampler.init(keys, shape))

    def step(keys: jax.Array, i: jax.Array, state: Any) -> tuple[Any, Info]:
        state, told = sampler.step(keys, i, state)
        return insert(keys, i + 1, state), told

    return Sampler(init, step, sampler.levels)


def known_grey(grey: Any) -> Any:
    """The mean of rgb images' channels, [b, h, w, 1], as what is known [b, h, w, 3] in the basis GREY."""
    return math.sqrt(3) * jnp.broadcast_to(grey, (*grey.shape[:-1], 3))  # only the first channel of it counts
