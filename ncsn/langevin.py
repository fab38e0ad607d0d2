"""Samplers that take one evaluation of the score per step and add noise: Langevin, and predictor-corrector.

NCSN is arXiv 1907.05600, NCSNv2 arXiv 2006.09011, and "SDE" Song et al., arXiv 2011.13456.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib.process import UserError
from ncsn.noise import expand
from ncsn.samplers import (
    CORRECTION,
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
    linear_step,
    normal,
)
from ncsn.sde import Process, Score

Rule = Literal["code", "paper"]


def langevin(
    score_fn: Score, sigma: float, step_size: float, steps: int, *, start: Start, denoise: bool = False
) -> Sampler:
    """x <- x + step_size score(x, sigma) + sqrt(2 step_size) z, at one noise level.

    Its stationary variance along an axis of variance v is v / (1 - step_size / 2v). With `denoise` a last step takes
    x to E[clean | x] = x + sigma^2 score.
    """
    return annealed_langevin(score_fn, [sigma], step_size, steps, start=start, denoise=denoise)


def annealed_langevin(
    score_fn: Score,
    sigmas: np.ndarray | list[float],
    step_size: float,
    steps: int,
    *,
    start: Start | None = None,
    rule: Rule = "code",
    denoise: bool = True,
) -> Sampler:
    """NCSN's algorithm 1: `steps` Langevin steps at each of the falling `sigmas` [L].

    At level i, alpha = step_size (sigma_i / sigma_L)^2 and x <- x + alpha score + sqrt(2 alpha) z, as in the
    published code; the "paper" writes alpha / 2 and sqrt(alpha), which is half the step. With `denoise` a last step
    takes x to x + sigma_L^2 score (NCSNv2). Evaluations: L steps, and one for the last step. Starts from
    N(0, sigma_1^2 I); NCSN's own start is `uniform(0, 1)`.

    Raises UserError unless the sigmas fall and stay positive, and step_size and steps are positive.
    """
    ladder = descending(sigmas, to_zero=False) if len(sigmas) != 1 else np.asarray(sigmas, np.float64)
    if not (step_size > 0 and steps >= 1 and ladder[-1] >= 0):
        raise UserError(f"step_size {step_size:g}, steps {steps}: both must be positive")
    per_step = np.repeat(ladder, steps)
    # A plain chain on clean data has the single level 0.
    growth = (per_step / ladder[-1]) ** 2 if ladder[-1] else np.ones_like(per_step)
    alpha = step_size * growth / (2 if rule == "paper" else 1)
    drift, noise = alpha, np.sqrt(2 * alpha)
    levels = np.append(per_step, ladder[-1])
    if denoise:
        levels, drift, noise = np.append(levels, 0), np.append(drift, ladder[-1] ** 2), np.append(noise, 0)
    return linear(score_fn, Linear(levels, np.ones_like(drift), drift, noise), start)


class Discretization(NamedTuple):
    """A process on a grid of times that fall: x(t) / scale(t) is data plus noise of sigma(t)."""

    sigmas: np.ndarray  # [N + 1], falling; the last is 0 where the chain is to end on the data
    scales: np.ndarray  # [N + 1]
    shrink: np.ndarray  # [N]: d(log scale)/dt times the length of the step
    spread: np.ndarray  # [N]: d(sigma^2)/dt times the length of the step


def ladder(sigmas: np.ndarray | list[float]) -> Discretization:
    """The variance-exploding process on any falling `sigmas` [N + 1]; equal steps of time are equal ratios."""
    levels = descending(sigmas)
    with np.errstate(divide="ignore"):  # of a last level 0, whose step is not one of the process
        spread = 2 * levels[:-1] ** 2 * np.log(levels[:-1] / levels[1:])
    return Discretization(levels, np.ones_like(levels), np.zeros_like(spread), spread)


def discretize(process: Process, steps: int) -> Discretization:
    """`steps` steps: from t = 1 down to t_min in steps - 1 equal ones, and a last one from there to the data."""
    if steps < 2:
        raise UserError(f"steps is {steps}: at least 2 are needed")
    with jax.ensure_compile_time_eval():  # numbers, also where the sampler is built inside a compiled program
        t = jnp.linspace(1.0, process.t_min, steps)
        sigmas, scales = np.asarray(process.sigma(t), np.float64), np.asarray(process.scale(t), np.float64)
        f = np.asarray(process.drift(jnp.ones((steps, 1)), t), np.float64)[:, 0]
        g = np.asarray(process.diffusion(t), np.float64)
        dt = -np.diff(np.asarray(t, np.float64), append=0.0)
    return Discretization(np.append(sigmas, 0.0), np.append(scales, 1.0), f * dt, g**2 / scales**2 * dt)


class Predictor(NamedTuple):
    """A predictor in the coordinates x / scale, and what its corrector has to know of the process."""

    rule: Linear
    alpha: np.ndarray  # [N]: (scale before / scale after)^2 of the forward step, 1 for VE; SDE algorithm 5's alpha


def reverse_diffusion(grid: Discretization) -> Predictor:
    """SDE eq. 46: the forward step x' = r x + G z with its drift and noise taken backwards.

    In the process's own coordinates x <- (2 - r) x + G^2 score + G z, where r and G are those of the exact
    transition; VP's beta_i = 1 - r^2.
    """
    ratio, fall = _ratio(grid), -np.diff(grid.sigmas**2)
    return _predictor(grid, (2 - ratio) * ratio, ratio * fall, ratio * np.sqrt(fall))


def ancestral(grid: Discretization) -> Predictor:
    """DDPM's: a draw from q(x_i | x_(i+1), x_0) with the denoised x for x_0, the posterior's own variance.

    SDE eq. 47 for VE. What it does does not depend on the scale of the process.
    """
    fall = -np.diff(grid.sigmas**2)
    return _predictor(grid, np.ones_like(fall), fall, np.sqrt(fall) * grid.sigmas[1:] / grid.sigmas[:-1])


def euler_maruyama(grid: Discretization) -> Predictor:
    """The reverse SDE (SDE eq. 6) by steps of Euler and Maruyama: x <- x - (f x - g^2 score) dt + g sqrt(dt) z."""
    ratio = _ratio(grid)
    return _predictor(grid, ratio * (1 - grid.shrink), ratio * grid.spread, ratio * np.sqrt(grid.spread))


def _ratio(grid: Discretization) -> np.ndarray:
    """r of the forward step: the scale before a backward step over the scale after it."""
    return grid.scales[:-1] / grid.scales[1:]


def _predictor(grid: Discretization, keep: np.ndarray, drift: np.ndarray, noise: np.ndarray) -> Predictor:
    if grid.sigmas[-1] == 0:  # the last step denoises: E[clean | x] = x + sigma^2 score, and adds no noise
        keep[-1], drift[-1], noise[-1] = 1.0, grid.sigmas[-2] ** 2, 0.0
    return Predictor(Linear(grid.sigmas, keep, drift, noise), _ratio(grid) ** 2)


Corrector = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(z [b, ...], score [b, ...], sigma [b], alpha) -> the step size epsilon [b] of a Langevin step"""


def by_norms(snr: float = 0.16) -> Corrector:
    """SDE algorithms 4 and 5: epsilon = 2 alpha (snr |z| / |score|)^2, here with the norms of each sample by itself.

    The published code takes means over the batch, so that a sample depends on its company. In few dimensions norms of
    single samples scatter widely, and a step that depends on x biases the chain: use `by_level` there. Never more
    than sigma^2, which is stable for all data, since no log-density after noise curves more than 1 / sigma^2.
    """

    def step_size(z: jax.Array, score: jax.Array, sigma: jax.Array, alpha: jax.Array) -> jax.Array:
        ratio = batch_norm(z) / jnp.maximum(batch_norm(score), jnp.finfo(z.dtype).tiny)
        return jnp.minimum(2 * alpha * (snr * ratio) ** 2, sigma**2)

    return step_size


def by_level(snr: float = 0.16) -> Corrector:
    """epsilon = 2 alpha (snr sigma)^2 ("ald" in the published code); NCSN's is snr 0.316, NCSNv2's 0.176 (CIFAR-10)."""
    return lambda z, score, sigma, alpha: 2 * alpha * (snr * sigma) ** 2


def predictor_corrector(
    score_fn: Score,
    predictor: Predictor,
    corrector: Corrector | None = None,
    *,
    corrector_steps: int = 1,
    start: Start | None = None,
) -> Sampler:
    """SDE algorithm 1: at every level `corrector_steps` Langevin steps, then the predictor to the next level.

    A corrector step is x <- x + epsilon score + sqrt(2 epsilon) z; `corrector` (default `by_norms()`) gives epsilon.
    With 0 of them the predictor is alone. Evaluations: steps times (corrector_steps + 1). `step_size` in the
    diagnostics is epsilon of the last corrector step, where there is one.
    """
    if corrector_steps < 0:
        raise UserError(f"corrector_steps is {corrector_steps}: it must be 0 or more")
    if not corrector_steps:
        return linear(score_fn, predictor.rule, start)
    epsilon_of = by_norms() if corrector is None else corrector
    levels, alphas = (jnp.asarray(a, jnp.float32) for a in (predictor.rule.levels, predictor.alpha))
    begin = gaussian(float(predictor.rule.levels[0])) if start is None else start

    def init(keys: jax.Array, shape: tuple[int, ...]) -> Point:
        return Point(begin(keys, shape))

    def step(keys: jax.Array, i: jax.Array, state: Point) -> tuple[Point, Info]:
        sigma = jnp.full(state.x.shape[:1], levels[i])

        def correct(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, _ = carry
            score = score_fn(x, levels[i, None])
            z = normal(keys, x.shape[1:], CORRECTION, i, k)
            epsilon = epsilon_of(z, score, sigma, alphas[i])
            return x + expand(epsilon, x) * score + expand(jnp.sqrt(2 * epsilon), x) * z, epsilon

        x, epsilon = jax.lax.fori_loop(0, corrector_steps, correct, (state.x, jnp.zeros_like(sigma)))
        x, score = linear_step(score_fn, predictor.rule, keys, i, x)
        return Point(x), info(score, epsilon, corrector_steps + 1)

    return Sampler(init, step, np.asarray(predictor.rule.levels, np.float32))
