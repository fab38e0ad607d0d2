"""What generator and critic play for, as functions of the critic's scores [b] (before any sigmoid), and the penalties
that keep it smooth.

Non-saturating: Goodfellow et al. 2014. Least squares: Mao et al. 2017, real 1, generated 0. Hinge: Lim and Ye 2017,
Miyato et al. 2018. Wasserstein: Arjovsky et al. 2017. All are means over the batch, to be minimised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Game = Literal["non_saturating", "hinge", "least_squares", "wasserstein"]
Score = Callable[[jax.Array], jax.Array]  # x [b, ...] -> [b]


def critic_loss(game: Game, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Of scores of real and of generated examples. Its best critic has, with densities p and q of real and generated
    ones: log p/q (non-saturating), p / (p + q) (least squares), the sign of p - q (hinge)."""
    if game == "non_saturating":
        return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))
    if game == "hinge":
        return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
    if game == "least_squares":
        return (jnp.mean((real - 1) ** 2) + jnp.mean(fake**2)) / 2
    return jnp.mean(fake) - jnp.mean(real)


def generator_loss(game: Game, fake: jax.Array) -> jax.Array:
    """Of the scores of generated examples."""
    if game == "non_saturating":
        return jnp.mean(jax.nn.softplus(-fake))
    if game == "least_squares":
        return jnp.mean((fake - 1) ** 2) / 2
    return -jnp.mean(fake)


def gradient_penalty(score: Score, real: jax.Array, fake: jax.Array, keys: jax.Array) -> jax.Array:
    """E (|grad score| - 1)^2 at points between pairs of real and generated examples (Gulrajani et al. 2017, eq. 3).

    `keys` [b], one per pair, place the point on the line.
    """
    weight = jax.vmap(jax.random.uniform)(keys).reshape(-1, *(1,) * (real.ndim - 1))
    return jnp.mean((gradient_norms(score, real + weight * (fake - real)) - 1) ** 2)


def r1(score: Score, real: jax.Array) -> jax.Array:
    """E |grad score|^2 / 2 at real examples (Mescheder et al. 2018, eq. 9)."""
    return jnp.mean(_squared_gradients(score, real)) / 2


def gradient_norms(score: Score, x: jax.Array) -> jax.Array:
    """|grad score| at every example, [b]; where it is zero, its own gradient is zero and not undefined."""
    squares = _squared_gradients(score, x)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _squared_gradients(score: Score, x: jax.Array) -> jax.Array:
    gradients = jax.grad(lambda x: jnp.sum(score(x)))(x)
    return jnp.sum(gradients**2, axis=tuple(range(1, x.ndim)))


def evidence_bound(
    x: jax.Array, decoded: jax.Array, mean: jax.Array, log_variance: jax.Array, noise_std: float
) -> tuple[jax.Array, jax.Array]:
    """(reconstruction [], divergence []): means over examples of |x - decoded|^2 / (2 noise_std^2), and of the
    divergence of N(mean, exp(log_variance)) [b, latent] from N(0, I), in nats (Kingma and Welling 2014, appendix B)."""
    squares = jnp.sum((x - decoded) ** 2, axis=tuple(range(1, x.ndim)))
    divergence = jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=1) / 2
    return jnp.mean(squares) / (2 * noise_std**2), jnp.mean(divergence)
