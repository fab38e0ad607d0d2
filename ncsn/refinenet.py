"""The networks of NCSN and NCSNv2: a dilated residual encoder and RefineNet's cascade, at two resolutions.

Song and Ermon 2019 (arXiv 1907.05600, appendix A) and 2020 (arXiv 2006.09011, appendix B). What the second changed:
norms do not know the noise level, the refinement has no norms, and it pools by maximum. Initialisation is PyTorch's,
as is every detail that changes numbers: see the comments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lib.initial import constant, normal, uniform
from lib.layers import Conv
from ncsn.blocks import elu, pixel_mean

EPS = 1e-5


class InstanceNormPlus(nn.Module):
    """Instance normalisation that keeps the means of the channels, relative to one another (section A.1 of NCSN).

    x [b, h, w, c] -> gamma (normalised x + alpha (mean - its mean over channels) / its deviation over channels) + beta.
    With `levels`, gamma, alpha and beta are [levels, c], of which `level` [b] or [1] takes rows. In float32 throughout.
    """

    levels: int | None

    @nn.compact
    def __call__(self, x: jax.Array, level: jax.Array | None) -> jax.Array:
        dtype, x = x.dtype, x.astype(jnp.float32)
        shape = (x.shape[-1],) if self.levels is None else (self.levels, x.shape[-1])
        gamma, alpha = (self.param(name, normal(0.02, mean=1.0), shape) for name in ("gamma", "alpha"))
        beta = self.param("beta", constant(0), shape)
        if self.levels is not None:
            gamma, alpha, beta = (table[level][:, None, None] for table in (gamma, alpha, beta))
        mean = pixel_mean(x)
        centred = x - mean
        scale = lax.rsqrt(pixel_mean(centred**2) + EPS)
        spread = jnp.var(mean, axis=-1, keepdims=True, ddof=1)  # unbiased, as torch.var is
        relative = (mean - jnp.mean(mean, axis=-1, keepdims=True)) * lax.rsqrt(spread + EPS)
        return (gamma * scale * centred + (gamma * alpha * relative + beta)).astype(dtype)


class _Part(nn.Module):
    """What all blocks share: their norms' levels (None: unconditional, and none in the refinement) and the dtype."""

    levels: int | None
    dtype: Any

    def conv(self, x: jax.Array, features: int, name: str, *, size: int = 3, dilation: int = 1, **kwargs) -> jax.Array:
        init = uniform((size * size * x.shape[-1]) ** -0.5)
        options = {"dtype": self.dtype, "kernel_init": init, "bias_init": init, **kwargs}
        return Conv(features, (size, size), kernel_dilation=dilation, name=name, **options)(x)

    def norm(self, x: jax.Array, level: jax.Array | None, name: str) -> jax.Array:
        return InstanceNormPlus(self.levels, name=name)(x, level)

    def refine_norm(self, x: jax.Array, level: jax.Array | None, name: str) -> jax.Array:
        return x if self.levels is None else self.norm(x, level, name)


class ResidualBlock(_Part):
    """norm, ELU, conv, norm, ELU, conv, plus the input.

    "down" halves height and width after the second convolution, or with a dilation keeps them; either way, and where
    the width changes, the shortcut has a convolution, which is as wide as the dilation asks or 1x1.
    """

    features: int
    dilation: int = 1
    down: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, level: jax.Array | None) -> jax.Array:
        width, pool = x.shape[-1], self.down and self.dilation == 1
        h = elu(self.norm(x, level, "norm1"))
        h = self.conv(h, width if self.down else self.features, "conv1", dilation=self.dilation)
        h = elu(self.norm(h, level, "norm2"))
        h = self.conv(h, self.features, "conv2", dilation=self.dilation)
        if self.down or width != self.features:
            x = self.conv(x, self.features, "shortcut", size=1 if self.dilation == 1 else 3, dilation=self.dilation)
        return mean_pool(x + h) if pool else x + h


class ResidualConvUnits(_Part):
    """`blocks` times: two of (norm, ELU, conv) plus the input."""

    blocks: int

    @nn.compact
    def __call__(self, x: jax.Array, level: jax.Array | None) -> jax.Array:
        for i in range(self.blocks):
            h = x
            for j in range(2):
                h = elu(self.refine_norm(h, level, f"norm{i + 1}_{j + 1}"))
                h = self.conv(h, x.shape[-1], f"conv{i + 1}_{j + 1}", use_bias=False)
            x = x + h
        return x


class Fusion(_Part):
    """Inputs of several resolutions, each through a convolution, enlarged to `size` and summed."""

    features: int

    @nn.compact
    def __call__(self, xs: Sequence[jax.Array], level: jax.Array | None, size: tuple[int, int]) -> jax.Array:
        out = []
        for i, x in enumerate(xs, 1):
            h = self.conv(self.refine_norm(x, level, f"norm{i}"), self.features, f"conv{i}")
            out.append(resize_corners(h, size))
        return sum(out[1:], out[0])


class ChainedPooling(_Part):
    """ELU, then twice: pool over 5x5, convolve, and add to the sum so far."""

    @nn.compact
    def __call__(self, x: jax.Array, level: jax.Array | None) -> jax.Array:
        x = path = elu(x)
        for i in range(1, 3):
            path = self.refine_norm(path, level, f"norm{i}")
            path = max_pool5(path) if self.levels is None else average_pool5(path)
            path = self.conv(path, x.shape[-1], f"conv{i}", use_bias=False)
            x = x + path
        return x


class Refine(_Part):
    """Residual units per input, fusion (of more than one input), chained pooling, residual units."""

    features: int
    last_units: int = 1

    @nn.compact
    def __call__(self, xs: Sequence[jax.Array], level: jax.Array | None) -> jax.Array:
        part = (self.levels, self.dtype)
        hs = [ResidualConvUnits(*part, 2, name=f"adapt{i}")(x, level) for i, x in enumerate(xs, 1)]
        h = hs[0]
        if len(hs) > 1:
            h = Fusion(*part, self.features, name="fusion")(hs, level, xs[0].shape[1:3])
        h = ChainedPooling(*part, name="pooling")(h, level)
        return ResidualConvUnits(*part, self.last_units, name="output")(h, level)


class RefineNet(_Part):
    """Images [b, h, w, c] in [0, 1] -> float32 [b, h, w, c]; height and width even.

    With `levels`, NCSN's CondRefineNetDilated with `level` int [b], or [1] for all; without, NCSNv2's network before
    the division by sigma. `ngf` is the width at full resolution; it doubles at the half, where the rest of the encoder
    stays.
    """

    ngf: int

    @nn.compact
    def __call__(self, x: jax.Array, level: jax.Array | None = None) -> jax.Array:
        n, part, channels = self.ngf, (self.levels, self.dtype), x.shape[-1]
        h = self.conv(2 * x - 1, n, "begin")
        stages = []
        for i, (features, dilation) in enumerate([(n, 1), (2 * n, 1), (2 * n, 2), (2 * n, 4)], 1):
            h = ResidualBlock(*part, features, dilation, down=i > 1, name=f"res{i}_1")(h, level)
            h = ResidualBlock(*part, features, dilation, name=f"res{i}_2")(h, level)
            stages.append(h)
        h = Refine(*part, 2 * n, name="refine1")([stages[3]], level)
        h = Refine(*part, 2 * n, name="refine2")([stages[2], h], level)
        h = Refine(*part, n, name="refine3")([stages[1], h], level)
        h = Refine(*part, n, last_units=3, name="refine4")([stages[0], h], level)
        h = elu(self.norm(h.astype(jnp.float32), level, "norm"))
        return self.conv(h, channels, "end", dtype=jnp.float32)


def mean_pool(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, h / 2, w / 2, c]."""
    b, h, w, c = x.shape
    return jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4), dtype=x.dtype)


def resize_corners(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear, with the corner pixels in the corners (`align_corners=True`): [b, h, w, c] -> [b, *size, c]."""
    for axis, spec in ((1, "ih,bhwc->biwc"), (2, "iw,bhwc->bhic")):
        if x.shape[axis] != size[axis - 1]:
            x = jnp.einsum(spec, jnp.asarray(_corner_weights(x.shape[axis], size[axis - 1]), x.dtype), x)
    return x


def _corner_weights(old: int, new: int) -> np.ndarray:
    """[new, old], rows sum to one."""
    at = np.arange(new) * ((old - 1) / max(new - 1, 1))
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))


def average_pool5(x: jax.Array) -> jax.Array:
    """5x5, stride 1, same size; zeros beyond the border count, as in PyTorch's AvgPool2d."""
    return _over_5(x, jnp.add, 0) / 25


def max_pool5(x: jax.Array) -> jax.Array:
    """5x5, stride 1, same size."""
    return _over_5(x, jnp.maximum, -jnp.inf)


def _over_5(x: jax.Array, combine: Any, outside: float) -> jax.Array:
    # Written with slices, which XLA fuses: its windows are several times slower on a CPU, their gradients more so.
    for axis in (1, 2):
        size = x.shape[axis]
        padded = jnp.pad(x, [(2, 2) if i == axis else (0, 0) for i in range(4)], constant_values=outside)
        parts = [lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(5)]
        x = combine(combine(combine(parts[0], parts[1]), combine(parts[2], parts[3])), parts[4])
    return x
