"""Score functions with a condition built in: what comes out is a score function again, for every sampler."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ncsn.noise import expand
from ncsn.sde import Score

LabelledScore = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x [b, ...], sigma [b] or [1], label int [b]) -> [b, ...]"""


def labelled(score_fn: LabelledScore, labels: jax.Array) -> Score:
    """The score given the labels [b]."""
    return lambda x, sigma: score_fn(x, sigma, labels)


def classifier_free(score_fn: LabelledScore, labels: jax.Array, null_label: int, weight: float) -> Score:
    """s(x) + weight (s(x | label) - s(x)) (arXiv 2207.12598, whose w is weight - 1).

    weight 0 forgets the labels, 1 is `labelled`, more than 1 sharpens. Both scores are one call for twice the batch;
    diagnostics count it as one evaluation. `null_label` is what the network was trained with for "no label".
    """

    def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        both_labels = jnp.concatenate([jnp.full_like(labels, null_label), labels])
        both_sigmas = sigma if len(sigma) == 1 else jnp.concatenate([sigma, sigma])
        both = score_fn(jnp.concatenate([x, x]), both_sigmas, both_labels)
        without, given = jnp.split(both, 2)
        return without + weight * (given - without)

    return guided


def classifier_guided(
    score_fn: Score, log_probability: Callable[[jax.Array, jax.Array], jax.Array], weight: float = 1.0
) -> Score:
    """s(x) + weight grad_x log p(label | x, sigma) (SDE, arXiv 2011.13456, section 5; arXiv 2105.05233).

    `log_probability(x [b, ...], sigma [b] or [1]) -> [b]` is that of the wanted labels, by a classifier of noisy data.
    For weight 1 and exact parts this is the score given the labels.
    """

    def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda x: jnp.sum(log_probability(x, sigma)))(x)
        return score_fn(x, sigma) + weight * gradient

    return guided


def reconstruction(
    score_fn: Score,
    known: jax.Array,
    mask: jax.Array | np.ndarray,
    std: float,
    *,
    basis: np.ndarray | None = None,
) -> Score:
    """The score given that clean x is `known` where `mask` (bool) is true; both broadcast to x [b, ...].

    s(x) + grad_x log N(known; D(x), r^2), with the denoised D = x + sigma^2 s(x) and, for the spread of what is clean
    around it, r^2 = sigma^2 std^2 / (sigma^2 + std^2): PiGDM (Song et al., "Pseudoinverse-guided diffusion models for
    inverse problems", ICLR 2023), whose std is 1. Exact for independent normal data of that `std`. The gradient goes
    through the network, so one evaluation costs two to three. `basis` as in `constraints.inpaint`.
    """

    def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        variance = expand(sigma, x) ** 2

        def denoised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            score = score_fn(x, sigma)
            clean = x + variance * score
            return clean if basis is None else jnp.matmul(clean, basis, precision="highest"), score

        clean, pull, score = jax.vjp(denoised, x, has_aux=True)
        spread = variance * std**2 / (variance + std**2)
        (gradient,) = pull(jnp.where(mask, known - clean, 0) / spread)
        return score + gradient

    return guided
