"""Convolutions that stay fast inside loops on the CPU.

XLA's CPU backend runs a convolution on its fast path only in one dimension order: input [b, spatial..., c],
kernel [spatial..., c / groups, features], output like the input. The transposes that `jax.grad` emits are in
other orders, and XLA brings them back to this one only outside loops; inside `lax.scan`, `fori_loop` or
`while_loop` the gradient to the kernel is about sixty times slower (jax-ml/jax#12868). Here the backward pass
is written as two ordinary convolutions in that order, with this same function, so derivatives of every order
stay on the fast path.

Nor is it fast where zeros stand between entries of the input or of the kernel, as in transposed convolutions and
in the backward pass of strided ones. These are computed without the zeros, by phases: the kernel gradient of a
transposed 4x4 convolution with stride 2 (64 images of 8x8, 128 to 64 channels) takes 12 ms instead of 372 on two
cores, about as long as the convolution itself.

Nor where the kernel has more entries than the input, as XLA then exchanges the two, nor with one channel or few
features. These are matrix products here (`lib.products`).

Nor where a convolution with many channels and a kernel of 3x3, or that strides cut into 2x2 blocks, is computed as it
is written, or its gradient to the kernel: Winograd's algorithm takes two thirds of the time (`minimal`).

Nor with hardly any features and a large kernel: the 9x9 convolution that ends networks of images takes a third of the
time when it computes blocks of 2x2 pixels as its features.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lib import products, winograd
from lib.blocks import depth_to_space, padded, resized, space_to_depth
from lib.shard import equally_varying
from lib.window import Window, channels_last, dilated, is_spread, is_undilated, phases, result_sizes, transposed_padding

# Where Winograd's algorithm is faster (see `_suits_winograd`), measured with both of two cores at work: with so many
# results, with no more entries of the kernel for each tile, and by the sides of the kernels for which it ever is.
_MANY, _PER_TILE = 512, 4096
_WORTH, _WORTH_OF_GRADIENT = {2: 200, 3: 85}, {2: 35, 3: 45}

Padding = str | Sequence[tuple[int, int]]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    minimal: bool = False,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` with a backward pass that is fast inside loops on the CPU.

    `minimal`: with Winograd's algorithm where it is faster (`lib.winograd`), which takes two thirds of the time and is
    exact to 1e-5 of the largest result in single precision: for training rather than for measuring.

    Same arguments, result and errors. `dimension_numbers` decides, as there: ("NHWC", "HWIO", "NHWC") and its
    analogues in one and three spatial dimensions (what `flax.linen.Conv` passes) get the fast backward pass.
    Other orders, `batch_group_count != 1`, other keywords (`out_sharding`), and every call while the default
    backend is a GPU or TPU, whose compilers do not need it, go to `jax.lax.conv_general_dilated` itself.

    The backend is chosen while tracing (`jax.default_backend()`), not while lowering: both choices compute
    the same thing, so on a machine with several backends a wrong guess costs speed and nothing else, whereas
    `lax.platform_dependent` would trace both, carry the residuals of both through every gradient, and forbid
    forward mode on GPU and TPU too.

    Limit: it is a `jax.custom_vjp`, so on the CPU forward-mode differentiation (`jax.jvp`, `jacfwd`,
    `linearize`, hence `jax.hessian`) raises TypeError. Reverse over reverse works to any order; where forward
    mode is needed, build the model with `flax.linen.Conv`.
    """
    spatial = lhs.ndim - 2
    if (
        jax.default_backend() != "cpu"
        or not 1 <= spatial <= 3
        or rhs.ndim != lhs.ndim
        or batch_group_count != 1
        or kwargs
        or lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) != channels_last(spatial)
    ):
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
            feature_group_count, batch_group_count, precision, preferred_element_type, **kwargs,
        )  # fmt: skip
    lhs_dilation = (1,) * spatial if lhs_dilation is None else tuple(lhs_dilation)
    rhs_dilation = (1,) * spatial if rhs_dilation is None else tuple(rhs_dilation)
    if isinstance(padding, str):
        if any(d != 1 for d in lhs_dilation):
            raise ValueError("padding by name is not defined with lhs_dilation: give pairs or use conv_transpose")
        padding = lax.padtype_to_pads(lhs.shape[1:-1], dilated(rhs.shape[:-2], rhs_dilation), window_strides, padding)
    window = Window(
        tuple(window_strides), tuple((lo, hi) for lo, hi in padding), lhs_dilation, rhs_dilation,
        feature_group_count, precision, preferred_element_type, minimal,
    )  # fmt: skip
    conv = _in_blocks if _is_thin(window, rhs) and lhs.size else _conv
    return conv(window, *equally_varying(lhs, rhs))


def conv_transpose(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    padding: Padding,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    transpose_kernel: bool = False,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    minimal: bool = False,
) -> jax.Array:
    """`jax.lax.conv_transpose` for channels-last arrays by way of `conv_general_dilated` above.

    `lhs` is [b, spatial..., c]; `rhs` [spatial..., c, features], or [spatial..., features, c] with
    `transpose_kernel`, which also flips it in space. `padding` is "SAME", "VALID" (those of the forward
    convolution) or (low, high) pairs (those of the dilated input). Raises ValueError for `dimension_numbers`
    of another order.
    """
    spatial = lhs.ndim - 2
    order = channels_last(spatial)
    if dimension_numbers not in (None, order) and (
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) != order
    ):
        raise ValueError(f"conv_transpose takes channels-last arrays; dimension_numbers were {dimension_numbers}")
    rhs_dilation = (1,) * spatial if rhs_dilation is None else tuple(rhs_dilation)
    if isinstance(padding, str):
        sizes = dilated(rhs.shape[:-2], rhs_dilation)
        padding = [transposed_padding(size, stride, padding) for size, stride in zip(sizes, strides, strict=True)]
    if transpose_kernel:
        rhs = _flip_and_swap(rhs, groups=1)
    return conv_general_dilated(
        lhs, rhs, (1,) * spatial, padding, strides, rhs_dilation, order,
        precision=precision, preferred_element_type=preferred_element_type, minimal=minimal,
    )  # fmt: skip


def _conv_impl(window: Window, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    if lhs.size and rhs.size and products.has_few_features(window, rhs.shape):
        return products.scattered_results(window, lhs, rhs)
    if lhs.size and rhs.size and products.has_one_channel(window, rhs.shape):
        return products.gathered_results(window, lhs, rhs)
    if is_spread(window, "lhs_dilation") and lhs.size and rhs.size:
        return _transposed(window, lhs, rhs)
    if products.has_more_kernel(window, lhs, rhs):
        return products.dense_results(window, lhs, rhs)
    results = phases(result_sizes(lhs.shape[1:-1], rhs.shape[:-2], window.padding), window.strides)
    if _suits_winograd(window, lhs, results, rhs.shape, _WORTH):
        stride, *_ = window.strides
        padding = _padding_of_blocks(window, lhs, rhs.shape, results)
        return winograd.results(lhs, _in_blocks_of_stride(rhs, window.strides), padding, stride)
    return lax.conv_general_dilated(
        lhs, rhs, window.strides, window.padding, window.lhs_dilation, window.rhs_dilation,
        channels_last(lhs.ndim - 2), window.groups, 1, window.precision, window.preferred_element_type,
    )  # fmt: skip


_conv = jax.custom_vjp(_conv_impl, nondiff_argnums=(0,))


def _conv_fwd(window: Window, lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv(window, lhs, rhs), (lhs, rhs)


def _conv_bwd(window: Window, residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    lhs, rhs = residuals
    if g.size == 0:
        return jnp.zeros_like(lhs), jnp.zeros_like(rhs)
    # An output dtype of its own (`preferred_element_type`) is the dtype of g, and the operands follow it.
    lhs_bar = _lhs_gradient(window, g, rhs.astype(g.dtype), lhs.shape)
    rhs_bar = _rhs_gradient(window, lhs.astype(g.dtype), g, rhs.shape)
    return lhs_bar.astype(lhs.dtype), rhs_bar.astype(rhs.dtype)


_conv.defvjp(_conv_fwd, _conv_bwd)


def _transposed(window: Window, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A transposed convolution without the zeros between its input's entries.

    With a stride of s, entry s m + a of the result meets those entries of the kernel that are a modulo s: one small
    convolution has the s results (in each dimension) as its features, which are then spread out.
    """
    strides, sizes = window.lhs_dilation, rhs.shape[:-2]
    low = [k - 1 - lo for k, (lo, _) in zip(sizes, window.padding, strict=True)]
    length = result_sizes(dilated(lhs.shape[1:-1], strides), sizes, window.padding)
    shift = [_first_zeros(*of) for of in zip(sizes, strides, low, length, strict=True)]
    taps = phases([k + z for k, z in zip(sizes, shift, strict=True)], strides)
    kernel = jnp.moveaxis(lax.rev(rhs, tuple(range(len(sizes)))), -2, 0)  # [c, spatial..., features]
    kernel = resized(kernel, [(-z, t * s) for z, t, s in zip(shift, taps, strides, strict=True)])
    kernel = jnp.moveaxis(space_to_depth(kernel, strides), 0, -2)
    kernel = lax.rev(kernel, tuple(range(len(sizes))))
    low = [n + z for n, z in zip(low, shift, strict=True)]
    first = [n // s for n, s in zip(low, strides, strict=True)]
    last = [-(-(n + m) // s) for n, s, m in zip(low, strides, length, strict=True)]
    padding = [(t - 1 - begin, end - n) for t, begin, end, n in zip(taps, first, last, lhs.shape[1:-1], strict=True)]
    plain = window._replace(lhs_dilation=window.strides, padding=tuple(padding))
    whole = depth_to_space(_conv_impl(plain, lhs, kernel), strides)
    return resized(whole, [(n % s, m) for n, s, m in zip(low, strides, length, strict=True)])


def _first_zeros(size: int, stride: int, low: int, length: int) -> int:
    """How many zeros before the kernel let the entries of the result that count fill as few blocks as possible.

    What counts is the number of blocks times that of the kernel's entries in each.
    """

    def cost(zeros: int) -> int:
        blocks = -(-(low + zeros + length) // stride) - (low + zeros) // stride
        return blocks * -(-(size + zeros) // stride)

    return min(range(stride), key=cost)


def _suits_winograd(
    window: Window, lhs: jax.Array, results: Sequence[int], rhs_shape: Sequence[int], worth: dict[int, float]
) -> bool:
    """Whether Winograd's algorithm is wanted, precise enough, and faster: not with few channels or results.

    It saves products, as many as c features, and costs transformations, as many as c + features. Blocks as large as
    the strides are channels.
    """
    wanted = window.minimal and window.precision is None and window.preferred_element_type is None
    even = is_undilated(window) and len(set(window.strides)) == 1
    if not (wanted and even and lhs.dtype in (jnp.float32, jnp.float64)):
        return False
    *sizes, c, features = rhs_shape
    taps, c = phases(sizes, window.strides), math.prod(window.strides) * c
    if len(taps) != 2 or taps[0] != taps[1] or taps[0] not in worth:
        return False
    if min(results) < 1 or len(lhs) * math.prod(results) < _MANY:
        return False
    if len(lhs) * winograd.tile_count(results, taps[0]) * _PER_TILE < c * features:
        return False
    filled = math.prod(sizes) / math.prod(taps) / math.prod(window.strides)  # of blocks of the kernel
    return winograd.saved(results, taps[0]) * filled * c * features >= worth[taps[0]] * (c + features)


def _strided_rhs_gradient(window: Window, lhs: jax.Array, g: jax.Array, rhs_shape: tuple[int, ...]) -> jax.Array:
    """That of a strided convolution, without zeros between the output gradient's entries.

    Blocks of the input's entries, as large as the stride, become channels; the kernel's entries do the same.
    """
    strides, (*sizes, c, features) = window.strides, rhs_shape
    blocks = space_to_depth(padded(lhs, (0, 0), *_padding_of_blocks(window, lhs, rhs_shape, g.shape[1:-1])), strides)
    plain = window._replace(strides=window.lhs_dilation, padding=((0, 0),) * len(sizes))
    in_blocks = (*phases(sizes, strides), math.prod(strides) * c, features)
    return _out_of_blocks(_rhs_gradient(plain, blocks, g, in_blocks), strides, sizes)


def _padding_of_blocks(
    window: Window, lhs: jax.Array, rhs_shape: Sequence[int], results: Sequence[int]
) -> list[tuple[int, int]]:
    """What the input of a strided convolution needs to be cut into blocks as large as the stride."""
    taps = phases(rhs_shape[:-2], window.strides)
    of_each = zip(window.padding, window.strides, results, taps, lhs.shape[1:-1], strict=True)
    return [(lo, s * (m + t - 1) - n - lo) for (lo, _), s, m, t, n in of_each]


def _in_blocks_of_stride(kernel: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """[sizes..., c, features] -> [taps..., strides... c, features]; zeros where a kernel does not fill its blocks."""
    *sizes, _, _ = kernel.shape
    kernel = jnp.moveaxis(kernel, -1, 0)  # [features, spatial..., c]
    spans = [(0, t * s) for t, s in zip(phases(sizes, strides), strides, strict=True)]
    return jnp.moveaxis(space_to_depth(resized(kernel, spans), strides), 0, -1)


def _out_of_blocks(kernel: jax.Array, strides: tuple[int, ...], sizes: Sequence[int]) -> jax.Array:
    """[taps..., strides... c, features] -> [sizes..., c, features]."""
    kernel = depth_to_space(jnp.moveaxis(kernel, -1, 0), strides)  # [features, spatial..., c]
    return jnp.moveaxis(resized(kernel, [(0, k) for k in sizes]), 0, -1)


def _is_thin(window: Window, rhs: jax.Array) -> bool:
    """Whether a convolution has a large kernel but hardly any features, as one that ends in an image's colours."""
    *sizes, _, features = rhs.shape
    return is_spread(window) and features <= 4 and min(sizes) >= 7


def _in_blocks(window: Window, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A convolution with few features as one with more: two entries of the result in each dimension are the features.

    Processors are fast at many features. The kernel is a little larger, to be seen from both entries.
    """
    *sizes, c, features = rhs.shape
    count = len(sizes)
    twice = (2,) * count
    length = result_sizes(lhs.shape[1:-1], sizes, window.padding)
    blocks, taps = phases(length, twice), phases([k + 1 for k in sizes], twice)
    spans = [(-lo, 2 * (m + t - 1)) for (lo, _), m, t in zip(window.padding, blocks, taps, strict=True)]
    kernel = jnp.moveaxis(rhs, -2, 0)  # [c, spatial..., features]
    shifted = [
        space_to_depth(resized(kernel, [(-a, 2 * t) for a, t in zip(phase, taps, strict=True)]), twice)
        for phase in itertools.product((0, 1), repeat=count)
    ]
    stacked = jnp.stack(shifted, axis=-2).reshape(c, *taps, 2**count, 2**count, features)  # ..., out, in, features
    stacked = jnp.moveaxis(jnp.moveaxis(stacked, 0, -2), -4, -2)  # [taps..., in, c, out, features]
    stacked = stacked.reshape(*taps, 2**count * c, 2**count * features)
    plain = window._replace(padding=((0, 0),) * count)
    y = depth_to_space(_conv(plain, space_to_depth(resized(lhs, spans), twice), stacked), twice)
    return resized(y, [(0, m) for m in length])


def _lhs_gradient(window: Window, g: jax.Array, rhs: jax.Array, lhs_shape: tuple[int, ...]) -> jax.Array:
    """The output gradient convolved with the flipped kernel, channels swapped; strides become dilation."""
    lhs_sizes = dilated(lhs_shape[1:-1], window.lhs_dilation)
    rhs_sizes = dilated(rhs.shape[:-2], window.rhs_dilation)
    g_sizes = dilated(g.shape[1:-1], window.strides)
    low = [k - 1 - lo for k, (lo, _) in zip(rhs_sizes, window.padding, strict=True)]
    high = [n + k - 1 - m - lo for n, k, m, lo in zip(lhs_sizes, rhs_sizes, g_sizes, low, strict=True)]
    back = window._replace(
        strides=window.lhs_dilation, lhs_dilation=window.strides, padding=tuple(zip(low, high, strict=True))
    )
    return _conv(back, g, _flip_and_swap(rhs, window.groups))


def _rhs_gradient(window: Window, lhs: jax.Array, g: jax.Array, rhs_shape: tuple[int, ...]) -> jax.Array:
    """The input, batch and channels exchanged, convolved with the output gradient as the kernel.

    Groups: the input's channels [groups * c] and the batch [b] become a batch of c images with [groups * b]
    channels, so that group i of the input meets the kernels of group i of the output's features.
    """
    if products.has_few_channels(window, rhs_shape):
        return products.gradient_of_few_channels(window, lhs, g, rhs_shape)
    if products.has_few_features(window, rhs_shape):
        return products.gradient_of_few_features(window, lhs, g, rhs_shape)
    if _suits_winograd(window, lhs, g.shape[1:-1], rhs_shape, _WORTH_OF_GRADIENT):
        return _winograd_rhs_gradient(window, rhs_shape, lhs, g)
    if is_spread(window, "strides"):
        return _strided_rhs_gradient(window, lhs, g, rhs_shape)
    if is_spread(
        window, "lhs_dilation"
    ):  # the strided one of which it is the transpose, with input and output exchanged
        *sizes, c, features = rhs_shape
        back = window._replace(
            strides=window.lhs_dilation,
            lhs_dilation=window.strides,
            padding=tuple((k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(sizes, window.padding, strict=True)),
        )
        return _flip_and_swap(_rhs_gradient(back, g, lhs, (*sizes, features, c)), 1)
    lhs_sizes = dilated(lhs.shape[1:-1], window.lhs_dilation)
    rhs_sizes = dilated(rhs_shape[:-2], window.rhs_dilation)
    g_sizes = dilated(g.shape[1:-1], window.strides)
    padding = tuple(
        (lo, m - n + k - 1 - lo) for (lo, _), n, k, m in zip(window.padding, lhs_sizes, rhs_sizes, g_sizes, strict=True)
    )
    back = window._replace(strides=window.rhs_dilation, rhs_dilation=window.strides, padding=padding)
    b, *sizes, channels = lhs.shape
    images = lhs.reshape(b, *sizes, window.groups, channels // window.groups)
    images = jnp.moveaxis(jnp.moveaxis(images, 0, -1), -2, 0)  # [c, spatial..., groups, b]
    images = images.reshape(channels // window.groups, *sizes, window.groups * b)
    kernels = jnp.moveaxis(g, 0, -2)  # [spatial..., b, features]
    return jnp.moveaxis(_conv(back, images, kernels), 0, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _winograd_rhs_gradient(window: Window, rhs_shape: tuple[int, ...], lhs: jax.Array, g: jax.Array) -> jax.Array:
    stride, *_ = window.strides
    padding = _padding_of_blocks(window, lhs, rhs_shape, g.shape[1:-1])
    return _out_of_blocks(winograd.kernel_gradient(lhs, g, padding, stride), window.strides, rhs_shape[:-2])


def _winograd_rhs_gradient_bwd(
    window: Window, rhs_shape: tuple[int, ...], residuals: tuple[jax.Array, jax.Array], by_rhs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """It is linear in both: what comes back is a convolution, and the gradient of one."""
    del rhs_shape
    lhs, g = residuals
    return _lhs_gradient(window, g, by_rhs, lhs.shape), _conv(window, lhs, by_rhs)


_winograd_rhs_gradient.defvjp(
    lambda window, shape, lhs, g: (_winograd_rhs_gradient(window, shape, lhs, g), (lhs, g)), _winograd_rhs_gradient_bwd
)


def _flip_and_swap(rhs: jax.Array, groups: int) -> jax.Array:
    """[spatial..., c, groups * f] -> [spatial..., f, groups * c], flipped in space."""
    *sizes, c, features = rhs.shape
    rhs = lax.rev(rhs, tuple(range(len(sizes)))).reshape(*sizes, c, groups, features // groups)
    return jnp.swapaxes(rhs, -1, -3).reshape(*sizes, features // groups, groups * c)
