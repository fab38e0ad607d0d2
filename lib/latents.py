"""Between latents."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def slerp(a: jax.Array, b: jax.Array, weights: jax.Array) -> jax.Array:
    """Between latents a and b [...]: on the arc from a (weight 0) to b (weight 1), for weights [n], -> [n, ...].

    Norms are interpolated as well. A straight line would pass through latents much too small to be N(0, sigma^2 I).
    """
    norm_a, norm_b = jnp.linalg.norm(a.ravel()), jnp.linalg.norm(b.ravel())
    cosine = jnp.clip(jnp.sum(a * b) / (norm_a * norm_b), -1.0, 1.0)
    angle = jnp.arccos(cosine)
    w = weights.reshape(-1, *(1,) * a.ndim)
    small = angle < 1e-4  # the arc is a line then, and sin(angle) a poor divisor
    divisor = jnp.where(small, 1.0, jnp.sin(angle))
    from_a = jnp.where(small, 1 - w, jnp.sin((1 - w) * angle) / divisor)
    from_b = jnp.where(small, w, jnp.sin(w * angle) / divisor)
    length = (1 - w) * norm_a + w * norm_b
    return length * (from_a * a / norm_a + from_b * b / norm_b)
