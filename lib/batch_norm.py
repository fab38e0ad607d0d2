"""Statistics of batches that do not depend on how many devices a batch is spread over."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lib.shard import pmean


def channel_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [c] of [..., c] over all leading axes and all devices of the data axis."""
    mean, square = pmean((_channel_means(x), _channel_means(x * x)))
    return mean, jnp.maximum(square - mean * mean, 0.0)


def _channel_means(x: jax.Array) -> jax.Array:
    """[..., c] -> [c], as a matrix product: five times as fast on the CPU as its reduction over leading axes."""
    rows = x.reshape(-1, x.shape[-1])
    return (jnp.full((1, len(rows)), 1 / len(rows)) @ rows)[0]
