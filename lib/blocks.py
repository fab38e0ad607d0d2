"""Cutting, padding and rearranging the spatial dimensions of channels-last arrays."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def resized(x: jax.Array, spans: Sequence[tuple[int, int]]) -> jax.Array:
    """[b, spatial..., c] from `start` on and of `length` in each spatial dimension; zeros where x has none."""
    sides = [(-start, start + n - size, 0) for (start, n), size in zip(spans, x.shape[1:-1], strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])


def space_to_depth(x: jax.Array, strides: Sequence[int]) -> jax.Array:
    """[b, n s..., c] -> [b, n..., s... c]."""
    b, *sizes, c = x.shape
    count = len(sizes)
    pairs = [n for size, s in zip(sizes, strides, strict=True) for n in (size // s, s)]
    x = x.reshape(b, *pairs, c).transpose(0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2), 2 * count + 1)
    return x.reshape(b, *(size // s for size, s in zip(sizes, strides, strict=True)), math.prod(strides) * c)


def depth_to_space(x: jax.Array, strides: Sequence[int]) -> jax.Array:
    """[b, n..., s... c] -> [b, n s..., c]."""
    b, *sizes, depth = x.shape
    count, c = len(sizes), depth // math.prod(strides)
    order = [axis for k in range(1, count + 1) for axis in (k, k + count)]
    x = x.reshape(b, *sizes, *strides, c).transpose(0, *order, 2 * count + 1)
    return x.reshape(b, *(size * s for size, s in zip(sizes, strides, strict=True)), c)
