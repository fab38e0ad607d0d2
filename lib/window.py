"""What is static in a convolution: its strides, padding and dilations, and the sizes that follow from them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import lax


class Window(NamedTuple):
    """What is static in a convolution of channels-last arrays; hashable, one entry per spatial dimension."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    precision: Any
    preferred_element_type: Any
    minimal: bool


def is_spread(window: Window, *what: str) -> bool:
    """Whether `what`, of the strides and the two dilations, and nothing else is not 1, in one group."""
    spread = ("strides", "lhs_dilation", "rhs_dilation")
    return window.groups == 1 and [any(n != 1 for n in getattr(window, name)) for name in spread] == [
        name in what for name in spread
    ]


def is_undilated(window: Window) -> bool:
    """Whether a convolution has strides at most, in one group."""
    return is_spread(window) or is_spread(window, "strides")


def phases(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """How many entries are equal modulo the stride, at most."""
    return [-(-k // s) for k, s in zip(sizes, strides, strict=True)]


def result_sizes(sizes: Sequence[int], kernel: Sequence[int], padding: Sequence[tuple[int, int]]) -> list[int]:
    """Of a convolution with stride 1; `sizes` are those of the input, dilated."""
    return [n + lo + hi - k + 1 for n, k, (lo, hi) in zip(sizes, kernel, padding, strict=True)]


def channels_last(spatial: int) -> lax.ConvDimensionNumbers:
    last = spatial + 1
    image = (0, last, *range(1, last))
    return lax.ConvDimensionNumbers(image, (last, last - 1, *range(spatial)), image)


def dilated(sizes: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    return tuple(0 if n == 0 else d * (n - 1) + 1 for n, d in zip(sizes, dilation, strict=True))


def transposed_padding(size: int, stride: int, padding: str) -> tuple[int, int]:
    """What "SAME" or "VALID" of a forward convolution (dilated kernel `size`) is on the dilated input."""
    if padding == "SAME":
        total = size + stride - 2
        low = size - 1 if stride > size - 1 else -(-total // 2)
    elif padding == "VALID":
        total = size + stride - 2 + max(size - stride, 0)
        low = size - 1
    else:
        raise ValueError(f"padding must be 'SAME', 'VALID' or (low, high) pairs, not {padding!r}")
    return low, total - low
