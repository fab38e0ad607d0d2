"""Distributions whose scores are known at every noise level: what samplers and losses are measured against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib.process import UserError


class Mixture(NamedTuple):
    """A mixture of k Gaussians in d dimensions, convolved with N(0, sigma^2 I); x is [b, d], sigma [b] or a scalar.

    Covariances are axes' diag(variances) axes, so that adding sigma^2 to the variances is all that noise does.
    """

    weights: np.ndarray  # [k], sums to 1
    means: np.ndarray  # [k, d]
    variances: np.ndarray  # [k, d]
    axes: np.ndarray  # [k, d, d], rows are unit eigenvectors

    def log_density(self, x: jax.Array, sigma: jax.Array | float = 0.0) -> jax.Array:
        """[b], in nats."""
        return jax.nn.logsumexp(self._log_joint(x, sigma), axis=1)

    def responsibilities(self, x: jax.Array, sigma: jax.Array | float = 0.0) -> jax.Array:
        """The posterior probability of each component, [b, k]."""
        return jax.nn.softmax(self._log_joint(x, sigma), axis=1)

    def score(self, x: jax.Array, sigma: jax.Array | float = 0.0) -> jax.Array:
        """The gradient of `log_density`, [b, d]."""
        return self._average(x, sigma, -1 / self._noisy(sigma))

    def denoise(self, x: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """E[clean | x] = x + sigma^2 score, [b, d], without the cancellation."""
        means = jnp.sum(self.responsibilities(x, sigma)[..., None] * self.means, axis=1)
        return means + self._average(x, sigma, self.variances / self._noisy(sigma))

    def sample(self, keys: jax.Array, sigma: float = 0.0) -> jax.Array:
        """[b, d], one example per key [b]."""

        def one(key: jax.Array) -> jax.Array:
            choose, draw = jax.random.split(key)
            k = jax.random.categorical(choose, jnp.log(self.weights))
            scale = jnp.sqrt(jnp.asarray(self.variances)[k] + sigma**2)
            z = jax.random.normal(draw, scale.shape)
            return jnp.asarray(self.means)[k] + jnp.sum((scale * z)[:, None] * jnp.asarray(self.axes)[k], axis=0)

        return jax.vmap(one)(keys)

    def _noisy(self, sigma: jax.Array | float) -> jax.Array:
        """Variances with the noise, [b or 1, k, d]."""
        return self.variances + jnp.reshape(sigma, (-1, 1, 1)) ** 2

    def _rotated(self, x: jax.Array) -> jax.Array:
        """x from every mean, in the components' axes, [b, k, d]. Sums, not matrix products: those round on a GPU."""
        return jnp.sum((x[:, None] - self.means)[:, :, None] * self.axes, axis=-1)

    def _log_joint(self, x: jax.Array, sigma: jax.Array | float) -> jax.Array:
        noisy = self._noisy(sigma)
        terms = self._rotated(x) ** 2 / noisy + jnp.log(2 * math.pi * noisy)
        return jnp.log(self.weights) - jnp.sum(terms, axis=-1) / 2

    def _average(self, x: jax.Array, sigma: jax.Array | float, factors: jax.Array) -> jax.Array:
        """The mean over components of factors * (x - mean), the factors [b, k, d] being along the axes."""
        there = jnp.sum((factors * self._rotated(x))[..., None] * self.axes, axis=2)
        return jnp.sum(self.responsibilities(x, sigma)[..., None] * there, axis=1)


def mixture(weights: Sequence[float], means: Sequence[Sequence[float]], std: float) -> Mixture:
    """Isotropic components: weights [k], means [k, d]. UserError unless the weights are a distribution."""
    w, m = np.asarray(weights, np.float32), np.asarray(means, np.float32)
    if (w < 0).any() or not math.isclose(w.sum(), 1, rel_tol=1e-5) or len(w) != len(m):
        raise UserError(f"weights {list(weights)}: needed is one per mean, none negative, with the sum 1")
    if not std > 0:
        raise UserError(f"std is {std:g}: it must be positive")
    axes = np.broadcast_to(np.eye(m.shape[1], dtype=np.float32), (*m.shape, m.shape[1]))
    return Mixture(w, m, np.full_like(m, std**2), axes)


def gaussian(mean: Sequence[float], covariance: Sequence[Sequence[float]]) -> Mixture:
    """One component: mean [d], covariance [d, d]. UserError unless this is symmetric and positive definite."""
    given = np.asarray(covariance, np.float64)
    variances, vectors = np.linalg.eigh(given)
    if not np.allclose(given, given.T) or variances.min() <= 0:
        raise UserError("a covariance must be symmetric and positive definite")
    as_one = lambda a: np.asarray(a, np.float32)[None]  # noqa: E731
    return Mixture(np.ones(1, np.float32), as_one(mean), as_one(variances), as_one(vectors.T))


NCSN_TOY = mixture([0.8, 0.2], [[5.0, 5.0], [-5.0, -5.0]], 1.0)
"""NCSN, section 3.2.2: 0.8 N((5, 5), I) + 0.2 N((-5, -5), I)"""
