"""The feed-forward network of Johnson et al. (2016), with instance normalisation (arXiv 1607.08022) per style.

Images are [b, h, w, 3] in [-1, 1]. One set of scales and shifts per style (conditional instance normalisation, Dumoulin
et al., arXiv 1610.07629, eq. 5) lets one network hold several; what is between two styles is between their sets. The
last set is no style: it is trained to leave the photograph as it is, so that a mixture with it is a weaker style.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lib.conv import conv_general_dilated
from lib.layers import Conv, ConvTranspose
from stylize.config import Network

MULTIPLE = 16
"""heights and widths that the network takes; `stylize.apply` pads others"""
_EPSILON = 1e-5
_KEPT = 0.75  # of the frame before; a share that is learned pixel by pixel soon ends at all of it
_RANGE = 150 / 127.5  # the paper's tanh, a little beyond white and black, so that these can be reached


class Rows(NamedTuple):
    """The mesh axis over which the rows of one image are divided, and its size."""

    axis: str
    devices: int


def pad(x: jax.Array, size: int, mode: str, rows: Rows | None) -> jax.Array:
    """`size` more pixels on every side: "reflect" or "edge" at the image's borders, the neighbours' rows inside."""
    if size == 0:
        return x
    sides = ((0, 0), (size, size), (size, size), (0, 0))
    padded = jnp.pad(x, sides, mode=mode)
    if rows is None or rows.devices == 1:
        return padded
    inner = padded[:, size:-size]
    down = [(i, i + 1) for i in range(rows.devices - 1)]
    up = [(i + 1, i) for i in range(rows.devices - 1)]
    above = jax.lax.ppermute(inner[:, -size:], rows.axis, down)
    below = jax.lax.ppermute(inner[:, :size], rows.axis, up)
    i = jax.lax.axis_index(rows.axis)
    top = jnp.where(i == 0, padded[:, :size], above)
    bottom = jnp.where(i == rows.devices - 1, padded[:, -size:], below)
    return jnp.concatenate([top, inner, bottom], axis=1)


class Norm(nn.Module):
    """Instance normalisation, scaled and shifted by a mixture of styles."""

    styles: int
    rows: Rows | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mix: jax.Array) -> jax.Array:
        """x [b, h, w, c], mix [b, styles] -> [b, h, w, c]."""
        shape = (self.styles, x.shape[-1])
        scale = mix @ self.param("scale", nn.initializers.ones, shape)
        bias = mix @ self.param("bias", nn.initializers.zeros, shape)
        mean = self._mean(x)
        centred = x - mean[:, None, None]
        gain = scale * jax.lax.rsqrt(self._mean(centred * centred) + _EPSILON)
        return centred * gain[:, None, None] + bias[:, None, None]

    def _mean(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, c]: over rows as a matrix product, faster on the CPU than a reduction; then over columns.

        One sum over all pixels would lose digits: 2e-4 of an image of a million.
        """
        b, h, w, c = x.shape
        columns = (jnp.full((1, h), 1 / h, x.dtype) @ x.reshape(b, h, w * c)).reshape(b, w, c)
        mean = jnp.mean(columns, axis=1)
        return mean if self.rows is None else jax.lax.pmean(mean, self.rows.axis)


class Reflected(nn.Module):
    """A convolution that sees the image mirrored beyond its borders: zeros would leave a frame."""

    features: int
    kernel_px: int
    stride: int = 1
    rows: Rows | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.kernel_px, self.kernel_px)
        x = pad(x, self.kernel_px // 2, "reflect", self.rows)
        return Conv(self.features, size, (self.stride, self.stride), padding="VALID", name="conv")(x)


class Upsampled(nn.Module):
    """Nearest neighbour to twice the size, and a 3x3 convolution: [b, h, w, c] -> [b, 2 h, 2 w, features].

    Computed at the small size, in 16 instead of 36 products per pixel of it: three rows of the large image are two of
    the small one, so the kernel's rows (and columns) are summed to one 2x2 kernel per phase of the result.
    """

    features: int
    rows: Rows | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # Mirroring the large image at its border repeats the border of the small one.
        x = pad(x, 1, "edge", self.rows)
        by_row = (jnp.stack([kernel[0], kernel[1] + kernel[2]]), jnp.stack([kernel[0] + kernel[1], kernel[2]]))
        phases = [
            jnp.stack([k[:, 0], k[:, 1] + k[:, 2]] if j == 0 else [k[:, 0] + k[:, 1], k[:, 2]], axis=1)
            for k in by_row
            for j in (0, 1)
        ]
        y = conv_general_dilated(
            x, jnp.concatenate(phases, axis=-1), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        parts = jnp.split(y, 4, axis=-1)
        cut = [parts[2 * i + j][:, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)]
        stacked = jnp.stack(cut, axis=3).reshape(b, h, w, 2, 2, self.features)
        return stacked.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, self.features) + bias


class TransferNet(nn.Module):
    """c9s1-32, d64, d128, R128 x 5, u64, u32, c9s1-3 at the default width."""

    config: Network
    styles: int
    """with the one that is no style"""
    rows: Rows | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mix: jax.Array, before: jax.Array | None = None) -> jax.Array:
        """x [b, h, w, 3], mix [b, styles] -> [b, h, w, 3]; h and w are multiples of 4.

        With `memory`, `before` [b, h, w, 4] is the stylised frame before at the places of this one, and a mask that is
        1 where it is reliable; both are multiplied by the mask. None stands for no frame before. Where it is reliable
        most of the result is that frame, and the last convolution sees it too: through its bottleneck alone the network
        would have to paint every stroke again to keep it where it was.
        """
        width, rows = self.config.width, self.rows
        if self.config.memory:
            before = jnp.zeros((*x.shape[:3], 4), x.dtype) if before is None else before
            x = jnp.concatenate([x, before], -1)

        def norm(x: jax.Array) -> jax.Array:
            return Norm(self.styles, rows)(x, mix)

        x = nn.relu(norm(Reflected(width, self.config.kernel_px, rows=rows)(x)))
        for factor in (2, 4):
            x = nn.relu(norm(Reflected(factor * width, 3, stride=2, rows=rows)(x)))
        for _ in range(self.config.blocks):
            y = nn.relu(norm(Reflected(4 * width, 3, rows=rows)(x)))
            x = x + norm(Reflected(4 * width, 3, rows=rows)(y))
        for factor in (2, 1):
            x = nn.relu(norm(self._up(x, factor * width)))
        if self.config.memory:
            x = jnp.concatenate([x, before], -1)
        x = Reflected(3, self.config.kernel_px, rows=rows)(x)
        y = x if self.config.output == "linear" else _RANGE * jnp.tanh(x)
        return y if before is None else y + _KEPT * (before[..., :3] - before[..., 3:] * y)

    def _up(self, x: jax.Array, features: int) -> jax.Array:
        if self.config.upsampling == "nearest":
            return Upsampled(features, self.rows)(x)
        return Transposed(features, self.rows)(x)


class Transposed(nn.Module):
    """The paper's transposed convolution, 3x3 with stride 2: [b, h, w, c] -> [b, 2 h, 2 w, features]."""

    features: int
    rows: Rows | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h, w = x.shape[1:3]
        x = pad(x, 1, "edge", self.rows)
        y = ConvTranspose(self.features, (3, 3), (2, 2), padding="SAME", name="conv")(x)
        return y[:, 2 : 2 + 2 * h, 2 : 2 + 2 * w]


def mixture(weights: Any, strength: float = 1.0) -> jax.Array:
    """[styles + 1]: `weights` [styles], normalised to the sum `strength`; the rest is the set that is no style."""
    weights = jnp.asarray(weights, jnp.float32)
    shares = weights / jnp.sum(weights)
    return jnp.append(strength * shares, 1 - strength)
