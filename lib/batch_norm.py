"""Statistics of batches that do not depend on how many devices a batch is spread over."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lib.shard import pmean
from lib.sums import channel_sums


def channel_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [c] of [..., c] over all leading axes and all devices of the data axis."""
    mean, square = pmean((_channel_means(x), _channel_means(x * x)))
    return mean, jnp.maximum(square - mean * mean, 0.0)


def _channel_means(x: jax.Array) -> jax.Array:
    """[..., c] -> [c]."""
    return channel_sums(x, x.shape[-1] / x.size)
