"""Convolutions with few channels on one side, as matrix products.

What a processor's convolution is slow at: with one channel it multiplies single numbers, and with one feature most
of its registers are empty. Here the entries of all patches are the rows of a matrix, or its results are added up again.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def gathered(x: jax.Array, first: Sequence[Sequence[int]], strides: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """[b, spatial..., c] -> [taps... c, b sizes...]: for each tap, the entries that it sees, zeros where there are none.

    In every spatial dimension tap k sees the entries `first[k]`, `first[k]` + stride, ..., as many as `sizes` says.
    """
    x = jnp.moveaxis(x, -1, 0)
    low = [max(0, -min(starts)) for starts in first]
    spans = [(n - 1) * s + 1 for n, s in zip(sizes, strides, strict=True)]
    high = [max(0, max(starts) + span - n) for starts, span, n in zip(first, spans, x.shape[2:], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *((lo, hi, 0) for lo, hi in zip(low, high))])
    found = []
    for place in itertools.product(*first):
        begin = [start + lo for start, lo in zip(place, low, strict=True)]
        end = [start + span for start, span in zip(begin, spans, strict=True)]
        found.append(lax.slice(x, (0, 0, *begin), (*x.shape[:2], *end), (1, 1, *strides)))
    return jnp.concatenate(found).reshape(len(found) * len(x), -1)


def scattered(
    y: jax.Array, first: Sequence[Sequence[int]], strides: Sequence[int], sizes: Sequence[int], features: int
) -> jax.Array:
    """The transpose: [b, spatial..., taps... features] -> [b, sizes..., features], sums of what each tap gives to the
    entries `first[k]`, `first[k]` + stride, ...; what lies outside is left out."""
    y = y.reshape(*y.shape[:-1], -1, features)
    spans = [(n - 1) * s + 1 for n, s in zip(y.shape[1:], strides)]
    total: jax.Array | float = 0.0
    for k, place in enumerate(itertools.product(*first)):
        sides = [
            (start, size - start - span, s - 1)
            for start, size, span, s in zip(place, sizes, spans, strides, strict=True)
        ]
        total += lax.pad(y[..., k, :], jnp.zeros((), y.dtype), [(0, 0, 0), *sides, (0, 0, 0)])
    return jnp.asarray(total)
