"""Diffusions as frozen dataclasses of pure functions (Song et al., arXiv 2011.13456), and how their scores are one.

Each is linear, dx = f(t) x dt + g(t) dw for t in [t_min, 1], so that x(t) = scale(t) x(0) + std(t) z. In the
coordinates x / scale it is the variance-exploding process with the noise sigma = std / scale (EDM, eq. 3), and there
all processes share one score function `score_fn(x, sigma)`. Times are [b] or a scalar; what is a function of time
alone has the shape of t.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lib.process import UserError
from ncsn.noise import Draw, expand

Score = Callable[[jax.Array, jax.Array], jax.Array]  # (x [b, ...], sigma or time [b] or [1]) -> [b, ...]


@dataclasses.dataclass(frozen=True)
class VE:
    """Variance exploding: sigma rises geometrically from sigma_min, which x(0) has already, to sigma_max."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        if not self.sigma_max > self.sigma_min > 0:
            raise UserError(f"sigma_max {self.sigma_max:g} and sigma_min {self.sigma_min:g}: needed is max > min > 0")
        _check_t_min(self.t_min)

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def scale(self, t: jax.Array) -> jax.Array:
        return jnp.ones_like(t)

    def std(self, t: jax.Array) -> jax.Array:
        return self.sigma_min * jnp.exp(self._rate * t)

    def sigma(self, t: jax.Array) -> jax.Array:
        return self.std(t)

    def time(self, sigma: jax.Array) -> jax.Array:
        """The inverse of `sigma`."""
        return jnp.log(sigma / self.sigma_min) / self._rate

    def drift(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.zeros_like(x)

    def diffusion(self, t: jax.Array) -> jax.Array:
        return self.std(t) * math.sqrt(2 * self._rate)

    def prior_sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return self.sigma_max * jax.random.normal(key, shape)

    def prior_log_density(self, x: jax.Array) -> jax.Array:
        """[b, ...] -> [b], in nats."""
        return _normal_log_density(x, self.sigma_max)


@dataclasses.dataclass(frozen=True)
class _LinearBeta:
    """f = -beta / 2 with a beta that rises linearly; at t = 1 hardly anything is left of the data."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        if not self.beta_max >= self.beta_min > 0:
            raise UserError(f"beta_max {self.beta_max:g} and beta_min {self.beta_min:g}: needed is max >= min > 0")
        _check_t_min(self.t_min)

    def _beta(self, t: jax.Array) -> jax.Array:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: jax.Array) -> jax.Array:
        """Of beta, from 0 to t."""
        return t * (self.beta_min + t / 2 * (self.beta_max - self.beta_min))

    def _time(self, integral: jax.Array) -> jax.Array:
        """The inverse of `_integral`: the root of the quadratic in the form that loses no digits near 0."""
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integral))

    def scale(self, t: jax.Array) -> jax.Array:
        return jnp.exp(-self._integral(t) / 2)

    def drift(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return -expand(self._beta(t), x) / 2 * x

    def prior_sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape)

    def prior_log_density(self, x: jax.Array) -> jax.Array:
        """[b, ...] -> [b], in nats."""
        return _normal_log_density(x, 1.0)


@dataclasses.dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving (DDPM): g^2 = beta."""

    def std(self, t: jax.Array) -> jax.Array:
        return jnp.sqrt(-jnp.expm1(-self._integral(t)))

    def sigma(self, t: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.expm1(self._integral(t)))

    def time(self, sigma: jax.Array) -> jax.Array:
        """The inverse of `sigma`."""
        return self._time(jnp.log1p(sigma**2))

    def diffusion(self, t: jax.Array) -> jax.Array:
        return jnp.sqrt(self._beta(t))


@dataclasses.dataclass(frozen=True)
class SubVP(_LinearBeta):
    """The drift of VP with less noise: g^2 = beta (1 - exp(-2 int beta)), so that std is the square of VP's."""

    def std(self, t: jax.Array) -> jax.Array:
        return -jnp.expm1(-self._integral(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        return 2 * jnp.sinh(self._integral(t) / 2)

    def time(self, sigma: jax.Array) -> jax.Array:
        """The inverse of `sigma`."""
        return self._time(2 * jnp.arcsinh(sigma / 2))

    def diffusion(self, t: jax.Array) -> jax.Array:
        return jnp.sqrt(self._beta(t) * -jnp.expm1(-2 * self._integral(t)))


Process = VE | VP | SubVP


def score_in_time(process: Process, score_fn: Score) -> Score:
    """The score (x, t) of the process's own marginals, from the shared one (x, sigma)."""

    def score(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, x.shape[:1])
        scale = expand(process.scale(t), x)
        return score_fn(x / scale, process.sigma(t)) / scale

    return score


def score_in_sigma(process: Process, score: Score) -> Score:
    """The inverse of `score_in_time`: the shared score (x, sigma), for sigma in the range of the process."""

    def score_fn(x: jax.Array, sigma: jax.Array) -> jax.Array:
        t = process.time(jnp.broadcast_to(sigma, x.shape[:1]))
        scale = expand(process.scale(t), x)
        return scale * score(scale * x, t)

    return score_fn


def reverse_drift(process: Process, score: Score, noise: float = 1.0) -> Score:
    """The drift (x, t) that has the process's marginals backwards in time beside a diffusion of noise * g(t).

    `score` is that of `score_in_time`. noise 1: the reverse SDE (eq. 6); 0: the probability-flow ODE (eq. 13).
    """

    def drift(x: jax.Array, t: jax.Array) -> jax.Array:
        g = expand(process.diffusion(t), x)
        return process.drift(x, t) - (1 + noise**2) / 2 * g**2 * score(x, t)

    return drift


def uniform_time(process: Process) -> Draw:
    """The sigma of a uniform time in [t_min, 1], for training."""
    return lambda key: process.sigma(jax.random.uniform(key, minval=process.t_min, maxval=1.0))


def likelihood_weight(process: Process) -> Callable[[jax.Array], jax.Array]:
    """g^2 / std^2 as a function of sigma: with it the loss bounds the negative log-likelihood (arXiv 2101.09258)."""

    def weight(sigma: jax.Array) -> jax.Array:
        t = process.time(sigma)
        return (process.diffusion(t) / process.std(t)) ** 2

    return weight


def _normal_log_density(x: jax.Array, std: float) -> jax.Array:
    dimension = math.prod(x.shape[1:])
    squares = jnp.sum((x / std) ** 2, axis=tuple(range(1, x.ndim)))
    return -squares / 2 - dimension * (math.log(std) + math.log(2 * math.pi) / 2)


def _check_t_min(t_min: float) -> None:
    if not 0 < t_min < 1:
        raise UserError(f"t_min is {t_min:g}: it must be above 0 and below 1")
