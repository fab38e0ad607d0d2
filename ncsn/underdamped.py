"""Underdamped Langevin dynamics, annealed, by the solvers that diffrax has for it.

dx = v dt, dv = -gamma v dt + score dt + sqrt(2 gamma) dw has exp(log p(x) - v^2 / 2) as its equilibrium. Momentum
carries x across a level in fewer steps than the random walk of Langevin steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib.process import UserError
from ncsn.ode import mapped_together
from ncsn.samplers import BROWNIAN, VELOCITY, Info, Sampler, Start, batch_norm, descending, gaussian, normal
from ncsn.sde import Score


class Moving(NamedTuple):
    """Position and velocity; in units of time in which velocities are N(0, I) at every noise level."""

    x: jax.Array  # [b, ...]
    v: jax.Array  # [b, ...]


def underdamped_langevin(
    score_fn: Score,
    sigmas: np.ndarray | list[float],
    step_size: float,
    steps: int,
    *,
    friction: float = 1.0,
    solver: Any = None,
    start: Start | None = None,
    denoise: bool = True,
) -> Sampler:
    """`steps` steps of underdamped Langevin dynamics at each of the falling `sigmas` [L].

    At level i time is counted in units of sigma_i: a step takes the time step_size * sigma_i, and gamma is
    friction / sigma_i, so every level is treated as the others are, relative to its noise. `solver` is one of
    diffrax's `QUICSORT()` (the default: order 3, two evaluations per step), `ALIGN()` (2, one) or `ShOULD()` (3, two).
    Each step of the sampler is one level. It ends with an evaluation of the score, which in the last level, with
    `denoise`, takes x to x + sigma_L^2 score. Starts from N(0, sigma_1^2 I).

    Raises UserError unless the sigmas fall and all are positive.
    """
    import diffrax

    levels = descending(sigmas, to_zero=False) if len(sigmas) != 1 else np.asarray(sigmas, np.float64)
    if not (min(step_size, friction, levels[-1]) > 0 and steps >= 1):
        raise UserError(f"step_size {step_size:g}, steps {steps}, friction {friction:g}: all must be positive")
    how = diffrax.QUICSORT() if solver is None else solver
    fresh = {diffrax.ALIGN: 1, diffrax.ShOULD: 2, diffrax.QUICSORT: 2}[type(how)]  # evaluations per step
    nfe = steps * fresh + (not isinstance(how, diffrax.QUICSORT)) + 1  # the others begin with one of their own
    t = jnp.asarray(levels, jnp.float32)
    begin = gaussian(float(levels[0])) if start is None else start

    def init(keys: jax.Array, shape: tuple[int, ...]) -> Moving:
        return Moving(begin(keys, shape), normal(keys, shape, VELOCITY))

    def descent(y: jax.Array, sigma: jax.Array) -> jax.Array:
        """Minus the score of y = x / sigma."""
        sigma = sigma.reshape(-1, *(1,) * (y.ndim - 1))
        return -sigma * score_fn(sigma * y, sigma.ravel())

    def level(one: Any, y: jax.Array, w: jax.Array, key: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One sample through one level. Time runs in whole numbers of steps, so that all have exactly one length."""
        gamma, u = friction * step_size, step_size**2
        noise = diffrax.UnsafeBrownianPath(y.shape, key, levy_area=diffrax.SpaceTimeTimeLevyArea)
        terms = diffrax.MultiTerm(
            diffrax.UnderdampedLangevinDriftTerm(gamma, u, one),
            diffrax.UnderdampedLangevinDiffusionTerm(gamma, u, noise),
        )
        solution: Any = diffrax.diffeqsolve(
            terms,
            how,
            t0=0.0,
            t1=float(steps),
            dt0=1.0,
            y0=(y, w),
            args=sigma,
            saveat=diffrax.SaveAt(t1=True),
            adjoint=diffrax.ForwardMode(),
            max_steps=steps,
            throw=False,
        )
        y, w = solution.ys
        return y[0], w[0]

    def step(keys: jax.Array, i: jax.Array, state: Moving) -> tuple[Moving, Info]:
        fold = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, BROWNIAN), i))
        # In time counted in steps the velocity is step_size v.
        y0 = state.x / t[i]
        one = mapped_together(descent, y0, jnp.full(len(y0), t[i]))
        y, w = jax.vmap(partial(level, one), (0, 0, 0, None))(y0, step_size * state.v, fold(keys), t[i])
        x, b = t[i] * y, state.x.shape[:1]
        score = score_fn(x, t[i, None])
        if denoise:
            x = x + jnp.where(i == len(levels) - 1, t[i] ** 2, 0.0) * score
        told = Info(batch_norm(score), jnp.full(b, step_size * t[i]), jnp.full(b, nfe, jnp.int32))
        return Moving(x, w / step_size), told

    return Sampler(init, step, np.append(levels, 0.0 if denoise else levels[-1]).astype(np.float32))
