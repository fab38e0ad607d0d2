"""Statistics of batches that do not depend on how many devices a batch is spread over."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lib.shard import pmean
from lib.sums import channel_sums


def channel_moments(x: jax.Array, parts: tuple[int, ...] = ()) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [c] of [..., c] over all leading axes and all devices of the data axis; of `parts` (n,) of the
    first axis, [n, c]."""
    weight = x.shape[-1] * math.prod(parts) / x.size
    mean, square = pmean((channel_sums(x, weight, parts), channel_sums(x * x, weight, parts)))
    return mean, jnp.maximum(square - mean * mean, 0.0)
