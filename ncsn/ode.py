"""The probability-flow ODE dx/dsigma = -sigma score(x, sigma), by fixed steps and by diffrax with adaptive ones.

It carries data + N(0, sigma^2 I) from one sigma to another without noise (EDM, arXiv 2206.00364, eq. 1; SDE, arXiv
2011.13456, eq. 13), so it also maps data to latents and back. VP and sub-VP have the same ODE in the coordinates
x / scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr

from lib.process import UserError
from ncsn.noise import expand
from ncsn.samplers import (
    NOISE,
    Info,
    Linear,
    Point,
    Sampler,
    Start,
    batch_norm,
    descending,
    gaussian,
    info,
    linear,
    normal,
)
from ncsn.sde import Score


def euler(score_fn: Score, sigmas: Any, *, start: Start | None = None) -> Sampler:
    """Order 1, one evaluation per step: x <- x + sigma (sigma - sigma') score; `sigmas` [steps + 1] fall, maybe to 0.

    The step to sigma' = 0 is x + sigma^2 score = E[clean | x]. Starts from N(0, sigmas[0]^2 I).
    """
    levels = descending(sigmas)
    drift = -levels[:-1] * np.diff(levels)
    return linear(score_fn, Linear(levels, np.ones_like(drift), drift, np.zeros_like(drift)), start)


class Churn(NamedTuple):
    """EDM's noise on top of the ODE, its algorithm 2; the defaults are none. CIFAR-10: none; ImageNet-64: 40, .05, 50,
    1.003."""

    S_churn: float = 0.0
    S_tmin: float = 0.0
    S_tmax: float = float("inf")
    S_noise: float = 1.0


NO_CHURN = Churn()


def heun(score_fn: Score, sigmas: Any, churn: Churn = NO_CHURN, *, start: Start | None = None) -> Sampler:
    """EDM algorithm 2: Heun's method, order 2, with the noise of `churn` before every step.

    `sigmas` [N + 1] fall, to 0 in EDM (`karras(...)` and a 0). Two evaluations per step, one in a step to 0: 2 N - 1.
    Starts from N(0, sigmas[0]^2 I). Raises UserError where the sigmas do not fall or churn is negative.
    """
    if min(churn) < 0:
        raise UserError(f"{churn}: no part of it may be negative")
    levels = descending(sigmas)
    steps = len(levels) - 1
    inside = (levels[:-1] >= churn.S_tmin) & (levels[:-1] <= churn.S_tmax)
    gamma = np.where(inside, min(churn.S_churn / steps, np.sqrt(2) - 1), 0.0)
    raised = levels[:-1] * (1 + gamma)
    added = churn.S_noise * np.sqrt(raised**2 - levels[:-1] ** 2)
    t, t_hat, extra = (jnp.asarray(a, jnp.float32) for a in (levels, raised, added))
    begin = gaussian(float(levels[0])) if start is None else start

    def init(keys: jax.Array, shape: tuple[int, ...]) -> Point:
        return Point(begin(keys, shape))

    def step(keys: jax.Array, i: jax.Array, state: Point) -> tuple[Point, Info]:
        x = state.x
        if added.any():
            x = x + extra[i] * normal(keys, x.shape[1:], NOISE, i)
        score = score_fn(x, t_hat[i, None])
        slope = -t_hat[i] * score
        width = t[i + 1] - t_hat[i]

        def corrected(x_next: jax.Array) -> jax.Array:
            slope_next = -t[i + 1] * score_fn(x_next, t[i + 1, None])
            return x + width * (slope + slope_next) / 2

        x_next = x + width * slope
        if levels[-1] > 0:
            return Point(corrected(x_next)), info(score, -width, 2)
        last = i == steps - 1
        x_next = jax.lax.cond(last, lambda x: x, corrected, x_next)
        return Point(x_next), info(score, -width, jnp.where(last, 1, 2))

    return Sampler(init, step, levels.astype(np.float32))


class Multistep(NamedTuple):
    """The state of a two-step method."""

    x: jax.Array  # [b, ...]
    denoised: jax.Array  # [b, ...], of the step before


def dpm_solver(score_fn: Score, sigmas: Any, *, start: Start | None = None) -> Sampler:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), order 2 with one evaluation per step.

    In lambda = -log sigma, x' = (sigma'/sigma) x + (1 - sigma'/sigma) D, where D is extrapolated from the denoised x
    of this step and of the one before. The first step, and a last one to sigma 0, are of order 1. `sigmas` [N + 1]
    fall; starts from N(0, sigmas[0]^2 I).
    """
    levels = descending(sigmas)
    keep = levels[1:] / levels[:-1]
    with np.errstate(divide="ignore"):
        widths = -np.log(keep)  # infinite in a step to 0
    ahead = np.zeros_like(widths)
    ahead[1:] = np.where(np.isfinite(widths[1:]), widths[1:] / (2 * widths[:-1]), 0.0)
    t, kept, extrapolate, fall = (jnp.asarray(a, jnp.float32) for a in (levels, keep, ahead, -np.diff(levels)))
    begin = gaussian(float(levels[0])) if start is None else start

    def init(keys: jax.Array, shape: tuple[int, ...]) -> Multistep:
        x = begin(keys, shape)
        return Multistep(x, jnp.zeros_like(x))

    def step(keys: jax.Array, i: jax.Array, state: Multistep) -> tuple[Multistep, Info]:
        del keys
        score = score_fn(state.x, t[i, None])
        denoised = state.x + t[i] ** 2 * score
        extrapolated = denoised + extrapolate[i] * (denoised - state.denoised)
        x = kept[i] * state.x + (1 - kept[i]) * extrapolated
        return Multistep(x, denoised), info(score, fall[i], 1)

    return Sampler(init, step, levels.astype(np.float32))


class Adaptive(NamedTuple):
    """How an ODE is solved; each sample chooses its own steps."""

    rtol: float = 1e-5
    atol: float = 1e-5
    sigma_data: float = 0.5
    """standard deviation of the data: the unknown is x / sqrt(sigma^2 + sigma_data^2), of size 1 at every sigma"""
    max_steps: int = 1000
    """accepted and rejected, per solve; a sample that needs more becomes inf"""
    solver: Any = None
    """an explicit Runge-Kutta method of diffrax with an error estimate; None: Tsit5"""


ADAPTIVE = Adaptive()


class Solved(NamedTuple):
    y: Any  # the tree of y0, at the end
    steps: jax.Array  # int32 [b], accepted
    nfe: jax.Array  # int32 [b], evaluations of the field


def size(sigma: jax.Array | float, sigma_data: float) -> jax.Array:
    """What x is divided by: the standard deviation of data of size sigma_data after noise."""
    return jnp.sqrt(jnp.square(sigma) + sigma_data**2)


def scaled_field(score_fn: Score, y: jax.Array, log_sigma: jax.Array, sigma_data: float) -> jax.Array:
    """dy/d(log sigma) of y = x / sqrt(sigma^2 + sigma_data^2), for y [b, ...] and log_sigma [b].

    It is 0 for data N(0, sigma_data^2 I): the solver only has to follow what is not Gaussian.
    """
    sigma = jnp.exp(log_sigma)
    scale = size(sigma, sigma_data)
    score = score_fn(expand(scale, y) * y, sigma)
    return -expand(sigma**2 / scale, y) * (score + y / expand(scale, y))


def solve(field: Callable[..., Any], y0: Any, args: Any, log_sigma0: Any, log_sigma1: Any, how: Adaptive) -> Solved:
    """Solves y' = field(y, log_sigma, args) for a batch: trees of [b, ...], log_sigma [b]; every sample by itself.

    `field` must treat its rows independently. Rows whose solve is done wait for the others, unchanged.
    """
    import diffrax

    times = jnp.broadcast_to(jnp.asarray(log_sigma0, jnp.float32), len(jax.tree.leaves(y0)[0]))
    one = mapped_together(field, y0, times, args)
    solver = diffrax.Tsit5() if how.solver is None else how.solver

    def solve_one(y0: Any, args: Any) -> Solved:
        solution: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: one(y, t, args)),
            solver,
            t0=log_sigma0,
            t1=log_sigma1,
            dt0=None,
            y0=y0,
            args=args,
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=diffrax.PIDController(rtol=how.rtol, atol=how.atol),
            adjoint=diffrax.ForwardMode(),
            max_steps=how.max_steps,
            throw=False,
        )
        stages = solver.tableau.num_stages
        tried = solution.stats["num_steps"]
        # FSAL: the last stage of a step is the first of the next.
        nfe = tried * (stages - 1) + 1 if solver.tableau.fsal else tried * stages
        y1 = jax.tree.map(lambda y: y[0], solution.ys)
        return Solved(y1, solution.stats["num_accepted_steps"], nfe)

    return jax.vmap(solve_one)(y0, args)


def mapped_together(field: Callable[..., Any], *like: Any) -> Callable[..., Any]:
    """A function of one sample, (y, *args) -> a tree like y, that under `jax.vmap` is `field` of the whole batch.

    `like`: the arguments of `field` for a batch, or their shapes. So a solver can be written, and mapped, for one
    sample with steps of its own, while networks and conditions see the batch as it is. It must be mapped: alone it
    only has the right shapes.
    """
    # What the field has closed over (weights, labels) may be traced, and a custom rule must be given such things.
    closed, out = jax.make_jaxpr(field, return_shape=True)(*like)

    @jax.custom_batching.custom_vmap
    def one(known: Any, *args: Any) -> Any:
        del known, args
        return jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), out)

    @one.def_vmap
    def _(b: int, mapped: Any, known: Any, *args: Any) -> tuple[Any, Any]:
        full = lambda a, is_mapped: a if is_mapped else jnp.broadcast_to(a, (b, *a.shape))  # noqa: E731
        flat = jax.tree.leaves(jax.tree.map(full, args, tuple(mapped[1:])))
        slope = jax.tree.unflatten(jax.tree.structure(out), eval_jaxpr(closed.jaxpr, known, *flat))
        return slope, jax.tree.map(lambda _: True, slope)

    return functools.partial(one, closed.consts)


def transport(
    score_fn: Score,
    x: jax.Array,
    sigma0: jax.Array | float,
    sigma1: jax.Array | float,
    how: Adaptive = ADAPTIVE,
) -> Solved:
    """x [b, ...] at noise sigma0, carried by the ODE to noise sigma1, both positive; either may be the larger."""

    def field(y: jax.Array, log_sigma: jax.Array, args: Any) -> jax.Array:
        del args
        return scaled_field(score_fn, y, log_sigma, how.sigma_data)

    solved = solve(field, x / size(sigma0, how.sigma_data), (), jnp.log(sigma0), jnp.log(sigma1), how)
    return solved._replace(y=solved.y * size(sigma1, how.sigma_data))


def encode(score_fn: Score, x: jax.Array, sigma_min: float, sigma_max: float, how: Adaptive = ADAPTIVE) -> Solved:
    """Data [b, ...], taken as being at sigma_min, to latents of size sigma_max; `decode` is the inverse."""
    return transport(score_fn, x, sigma_min, sigma_max, how)


def decode(score_fn: Score, z: jax.Array, sigma_min: float, sigma_max: float, how: Adaptive = ADAPTIVE) -> Solved:
    """Latents [b, ...] of size sigma_max to data at sigma_min."""
    return transport(score_fn, z, sigma_max, sigma_min, how)


def probability_flow(
    score_fn: Score,
    sigmas: Any,
    how: Adaptive = ADAPTIVE,
    *,
    start: Start | None = None,
) -> Sampler:
    """The ODE solved to a tolerance between neighbouring `sigmas` [N + 1], which fall; two of them are enough.

    More give more frames, or more moments at which a constraint acts. A last sigma 0 asks for one step from the one
    before to E[clean | x]. Starts from N(0, sigmas[0]^2 I). `score_norm` is that at the end of a step; its evaluation
    is counted. `step_size` is the mean decrease of sigma in the solver's accepted steps.
    """
    levels = descending(sigmas)
    if len(levels) < 3 and levels[-1] == 0:
        raise UserError("between the first and the last noise level 0 another one is needed, where the ODE ends")
    ends = levels[:-1] if levels[-1] == 0 else levels
    steps = len(ends) - 1
    t = jnp.asarray(ends, jnp.float32)
    begin = gaussian(float(levels[0])) if start is None else start

    def init(keys: jax.Array, shape: tuple[int, ...]) -> Point:
        return Point(begin(keys, shape))

    def step(keys: jax.Array, i: jax.Array, state: Point) -> tuple[Point, Info]:
        del keys
        solved = transport(score_fn, state.x, t[i], t[i + 1], how)
        x = solved.y
        score = score_fn(x, t[i + 1, None])
        if levels[-1] == 0:
            x = x + jnp.where(i == steps - 1, t[-1] ** 2, 0.0) * score
        return Point(x), Info(batch_norm(score), (t[i] - t[i + 1]) / solved.steps, solved.nfe + 1)

    return Sampler(init, step, np.append(ends[:-1], levels[-1]).astype(np.float32))
