"""Exact likelihoods by the probability-flow ODE (SDE, arXiv 2011.13456, section 4.3 and appendix D.2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lib.process import UserError
from ncsn.ode import ADAPTIVE, Adaptive, scaled_field, size, solve
from ncsn.samplers import PROBE
from ncsn.sde import Score


class LogLikelihood(NamedTuple):
    log_density: jax.Array  # [b], nats, of x in its own units
    latent: jax.Array  # [b, ...] at sigma_max
    nfe: jax.Array  # int32 [b]: evaluations of the score, each with its derivative along every probe


def log_likelihood(
    score_fn: Score,
    x: jax.Array,
    keys: jax.Array,
    sigma_min: float,
    sigma_max: float,
    *,
    probes: int | None = 1,
    how: Adaptive = ADAPTIVE,
) -> LogLikelihood:
    """log p(x) of data [b, ...], under the model whose latents at sigma_max are N(0, sigma_max^2 I).

    x is taken as being at sigma_min already. The divergence of the flow is Hutchinson's estimate by `probes` vectors
    of random signs, the same ones all along the path of a sample (keys [b]), which makes log_density an unbiased
    estimate; or with `probes=None` exact, by as many vectors as x has dimensions. Drift and divergence come from one
    linearisation: one forward pass, and one transposed pass per probe.
    """
    if probes is not None and probes < 1:
        raise UserError(f"probes is {probes}: at least 1 is needed, or None for the exact trace")
    shape, dims = x.shape[1:], math.prod(x.shape[1:])
    if probes is None:
        vectors = jnp.broadcast_to(jnp.eye(dims).reshape(dims, *shape), (len(x), dims, *shape))
    else:
        signs = lambda key: jax.random.rademacher(jax.random.fold_in(key, PROBE), (probes, *shape), x.dtype)  # noqa: E731
        vectors = jax.vmap(signs)(keys)
    weight = 1.0 if probes is None else 1.0 / probes

    def field(y: tuple[jax.Array, jax.Array], log_sigma: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        slope, transposed = jax.vjp(lambda y: scaled_field(score_fn, y, log_sigma, how.sigma_data), y[0])
        vectors = jnp.moveaxis(vectors, 1, 0)
        products = jax.vmap(lambda v: v * transposed(v)[0])(vectors)  # [probes, b, ...]
        return slope, weight * jnp.sum(products, axis=(0, *range(2, products.ndim)))

    small, large = size(sigma_min, how.sigma_data), size(sigma_max, how.sigma_data)
    y0 = (x / small, jnp.zeros(len(x), x.dtype))
    solved = solve(field, y0, vectors, jnp.log(sigma_min), jnp.log(sigma_max), how)
    y1, growth = solved.y  # growth: log of how much the flow has spread volumes, in the scaled coordinates
    latent = y1 * large
    squares = jnp.sum((latent / sigma_max) ** 2, axis=tuple(range(1, x.ndim)))
    log_prior = -squares / 2 - dims * math.log(sigma_max * math.sqrt(2 * math.pi))
    log_density = log_prior + growth + dims * jnp.log(large / small)
    return LogLikelihood(log_density, latent, solved.nfe)


def bits_per_dim(log_density: jax.Array, dims: int, width: float) -> jax.Array:
    """Negative log-likelihood of 8-bit data in bits per dimension, from log densities in nats.

    For (pixel + U[0, 1)) / 256, stretched to an interval of `width`: 1 for [0, 1], which makes it 8 bits minus
    log2 of the density per dimension, and 2 for [-1, 1], which makes it 7 bits. An upper bound, in expectation, of
    what the discrete pixels cost.
    """
    return -log_density / (dims * math.log(2)) + math.log2(256 / width)
