"""Convolutions as matrix products, where XLA's own are slow on the CPU.

With one channel a convolution multiplies single numbers, and with few features most of a processor's registers are
empty. What the entries of the kernel see are the rows of a matrix here, or its results are added up: three to six times
as fast (28x28 pixels, 3x3 and 4x4).

Where the kernel has more entries than the input, XLA exchanges the two and leaves its fast path: a 5x5 convolution of
4x4 pixels takes forty times as long as the product with one matrix.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lib.blocks import resized
from lib.window import Window, dilated, is_spread, is_undilated, phases, result_sizes

_FEW, _TAPS = 4, 25  # channels or features, and entries of the kernel, at most


def has_few_channels(window: Window, rhs_shape: Sequence[int]) -> bool:
    """Whether a small kernel, maybe with strides, has few channels and more features."""
    *sizes, c, features = rhs_shape
    return is_undilated(window) and math.prod(sizes) <= _TAPS and c <= _FEW < features


def has_one_channel(window: Window, rhs_shape: Sequence[int]) -> bool:
    """Whether `gathered_results` is faster too: with more channels XLA's convolution is as fast."""
    return has_few_channels(window, rhs_shape) and rhs_shape[-2] == 1


def has_few_features(window: Window, rhs_shape: Sequence[int]) -> bool:
    """Whether a small kernel, maybe of a transposed convolution, has few features and more channels."""
    *sizes, c, features = rhs_shape
    plain = is_spread(window) or is_spread(window, "lhs_dilation")
    return plain and math.prod(sizes) <= _TAPS and features <= _FEW < c


def gathered_results(window: Window, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """What the kernel's entries see, times the kernel."""
    *sizes, _, features = rhs.shape
    length = phases(result_sizes(lhs.shape[1:-1], sizes, window.padding), window.strides)
    y = lax.dot_general(
        _gathered(lhs, _first_seen(window, sizes), window.strides, length), rhs.reshape(-1, features),
        (((0,), (0,)), ((), ())), precision=window.precision, preferred_element_type=window.preferred_element_type,
    )  # fmt: skip
    return y.reshape(len(lhs), *length, features)


def scattered_results(window: Window, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The input times the kernel, each product where it belongs."""
    *sizes, c, features = rhs.shape
    length = result_sizes(dilated(lhs.shape[1:-1], window.lhs_dilation), sizes, window.padding)
    kernel = jnp.moveaxis(rhs, -2, 0).reshape(c, -1)
    kind = window.preferred_element_type or lhs.dtype
    wide = jnp.promote_types(kind, jnp.float32)  # sums are not rounded in between
    y = lax.dot(lhs.reshape(-1, c), kernel, precision=window.precision, preferred_element_type=wide)
    y = y.reshape(*lhs.shape[:-1], -1, features)
    return _scattered(y, _first_met(window, sizes), window.lhs_dilation, length).astype(kind)


def gradient_of_few_channels(window: Window, lhs: jax.Array, g: jax.Array, rhs_shape: Sequence[int]) -> jax.Array:
    """That to the kernel: what its entries see of the input, times the gradient g of the result."""
    seen = _gathered(lhs, _first_seen(window, rhs_shape[:-2]), window.strides, g.shape[1:-1])
    return lax.dot(seen, g.reshape(-1, g.shape[-1]), precision=window.precision).reshape(rhs_shape)


def gradient_of_few_features(window: Window, lhs: jax.Array, g: jax.Array, rhs_shape: Sequence[int]) -> jax.Array:
    """That to the kernel: what its entries meet of the gradient g of the result, times the input."""
    *sizes, c, features = rhs_shape
    met = _gathered(g, _first_met(window, sizes), window.lhs_dilation, lhs.shape[1:-1])
    found = lax.dot(met, lhs.reshape(-1, c), precision=window.precision)
    return jnp.swapaxes(found.reshape(*sizes, features, c), -1, -2)


def _first_seen(window: Window, sizes: Sequence[int]) -> list[range]:
    """In each spatial dimension, which entry of the input the kernel's entries see for the first result."""
    return [range(-lo, k - lo) for (lo, _), k in zip(window.padding, sizes, strict=True)]


def _first_met(window: Window, sizes: Sequence[int]) -> list[range]:
    """In each spatial dimension, to which entry of the result the kernel's entries take the first one of the input."""
    return [range(lo, lo - k, -1) for (lo, _), k in zip(window.padding, sizes, strict=True)]


def has_more_kernel(window: Window, lhs: jax.Array, rhs: jax.Array) -> bool:
    """Whether a convolution without dilations has more entries in its kernel than in its input, and a result."""
    sizes, kernel = lhs.shape[1:-1], rhs.shape[:-2]
    more = is_undilated(window) and math.prod(kernel) > math.prod(sizes) > 0
    return more and min(result_sizes(sizes, kernel, window.padding)) > 0


def dense_results(window: Window, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A convolution as a product with the matrix [spatial... c, spatial... features] from all entries of its input to
    all of its result."""
    b, *sizes, c = lhs.shape
    strides, low = window.strides, [lo for lo, _ in window.padding]
    length = phases(result_sizes(sizes, rhs.shape[:-2], window.padding), strides)
    kernel = jnp.moveaxis(rhs, -2, 0)  # [c, spatial..., features]
    seen = [
        resized(kernel, [(lo - s * i, n) for lo, s, i, n in zip(low, strides, place, sizes, strict=True)])
        for place in itertools.product(*map(range, length))
    ]
    matrix = jnp.moveaxis(jnp.stack(seen, axis=-2), 0, -3).reshape(math.prod(sizes) * c, -1)
    y = lax.dot(
        lhs.reshape(b, -1), matrix, precision=window.precision, preferred_element_type=window.preferred_element_type
    )
    return y.reshape(b, *length, rhs.shape[-1])


def _gathered(x: jax.Array, first: Sequence[range], strides: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """[b, spatial..., c] -> [taps... c, b sizes...]: for each tap, the entries that it sees, zeros where none are.

    In every spatial dimension tap k sees the entries `first[k]`, `first[k]` + stride, ..., as many as `sizes` says.
    """
    x = jnp.moveaxis(x, -1, 0)
    low = [max(0, -min(starts)) for starts in first]
    spans = [(n - 1) * s + 1 for n, s in zip(sizes, strides, strict=True)]
    high = [max(0, max(starts) + span - n) for starts, span, n in zip(first, spans, x.shape[2:], strict=True)]
    sides = [(lo, hi, 0) for lo, hi in zip(low, high, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *sides])
    found = []
    for place in itertools.product(*first):
        begin = [start + lo for start, lo in zip(place, low, strict=True)]
        end = [start + span for start, span in zip(begin, spans, strict=True)]
        found.append(lax.slice(x, (0, 0, *begin), (*x.shape[:2], *end), (1, 1, *strides)))
    return jnp.concatenate(found).reshape(len(found) * len(x), -1)


def _scattered(y: jax.Array, first: Sequence[range], strides: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """The transpose: [b, spatial..., taps, features] -> [b, sizes..., features], sums of what each tap gives to the
    entries `first[k]`, `first[k]` + stride, ...; what lies outside is left out."""
    spans = [(n - 1) * s + 1 for n, s in zip(y.shape[1:-2], strides, strict=True)]

    def part(k: int, place: Sequence[int]) -> jax.Array:
        sides = [
            (start, size - start - span, s - 1)
            for start, size, span, s in zip(place, sizes, spans, strides, strict=True)
        ]
        return lax.pad(y[..., k, :], jnp.zeros((), y.dtype), [(0, 0, 0), *sides, (0, 0, 0)])

    return functools.reduce(jnp.add, itertools.starmap(part, enumerate(itertools.product(*first))))
