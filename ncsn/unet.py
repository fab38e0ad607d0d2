"""A U-Net of the DDPM++ and NCSN++ kind, as EDM has it (arXiv 2011.13456, appendix H; arXiv 2206.00364, appendix F)."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lib.initial import constant, xavier
from lib.layers import Conv
from lib.process import UserError
from ncsn.blocks import Embedding, Features, dropout, pixel_mean, worth_a_product

EPS = 1e-6
HALF = 0.5**0.5
"""sums of two branches are scaled by it, which keeps their variance"""


class GroupNorm(nn.Module):
    """x [b, h, w, c] with mean 0 and variance 1 within each group of channels, then scaled and shifted by channel.

    At most 32 groups, of 4 channels at least. In float32 throughout.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        groups = next(g for g in range(min(32, max(c // 4, 1)), 0, -1) if c % g == 0)
        scale, bias = self.param("scale", constant(1), (c,)), self.param("bias", constant(0), (c,))

        def by_group(x: jax.Array) -> jax.Array:
            """[b, h, w, c] -> means over the pixels of a group, [b, 1, 1, c]."""
            mean = pixel_mean(x)
            if worth_a_product(x):
                # With a matrix of blocks, because where XLA has to find the group of a channel inside the loop over
                # pixels, a CPU takes four times as long for all that is fused into it.
                blocks = np.kron(np.eye(groups), np.full((c // groups, c // groups), groups / c)).astype(np.float32)
                return jnp.matmul(mean, blocks, precision=lax.Precision.HIGHEST)
            mean = jnp.mean(mean.reshape(-1, groups, c // groups), axis=-1, keepdims=True)
            return jnp.broadcast_to(mean, (len(x), groups, c // groups)).reshape(-1, 1, 1, c)

        y = x.astype(jnp.float32)
        y = y - by_group(y)
        y = y * (lax.rsqrt(by_group(y**2) + EPS) * scale) + bias
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Every pixel looks at all pixels; the input is added."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = GroupNorm(name="norm")(x).reshape(b, h * w, c)
        qkv = nn.Dense(3 * c, kernel_init=xavier(), dtype=self.dtype, name="qkv")(y)
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, c // self.heads), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c)
        return HALF * (x + nn.Dense(c, kernel_init=constant(0), dtype=self.dtype, name="out")(y))


class Block(nn.Module):
    """norm, SiLU, (resize), conv, noise level, norm, SiLU, dropout, conv; plus the input; then perhaps attention."""

    features: int
    layer: int
    conditioning: Literal["film", "additive"]
    dropout: float
    dtype: Any
    resize: Literal["up", "down"] | None = None
    heads: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, keys: jax.Array | None) -> jax.Array:
        def dense(features: int) -> jax.Array:
            return nn.Dense(features, kernel_init=xavier(), name="condition")(condition)[:, None, None].astype(x.dtype)

        resized = {"up": enlarge, "down": shrink, None: lambda x: x}[self.resize]
        h = resized(nn.silu(GroupNorm(name="norm1")(x)))
        h = Conv(self.features, (3, 3), kernel_init=xavier(), dtype=self.dtype, name="conv1")(h)
        if self.conditioning == "film":
            scale, shift = jnp.split(dense(2 * self.features), 2, axis=-1)
            h = nn.silu(GroupNorm(name="norm2")(h) * (1 + scale) + shift)
        else:
            h = nn.silu(GroupNorm(name="norm2")(h + dense(self.features)))
        h = dropout(h, keys, self.dropout, self.layer)
        h = Conv(self.features, (3, 3), kernel_init=constant(0), dtype=self.dtype, name="conv2")(h)
        if self.resize or x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1), kernel_init=xavier(), dtype=self.dtype, name="shortcut")(resized(x))
        x = HALF * (x + h)
        return Attention(self.heads, self.dtype, name="attention")(x) if self.heads else x


class UNet(nn.Module):
    """x [b, h, w, c] -> float32 [b, h, w, c]; h and w must halve as often as there are multipliers but one, and
    divide by `patch_px` before.

    `edm` makes a `ScoreModel` of it. DDPM++ of EDM for CIFAR-10: UNet(128, (2, 2, 2), blocks=4, attention=(16,),
    conditioning="additive", dropout=0.13). Raises UserError where the sizes do not divide.
    """

    width: int = 64
    """channels of the first convolution; the embedding has four times as many"""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """channels of each resolution in units of `width`, from full to coarsest"""
    blocks: int = 2
    """per resolution on the way down; one more on the way up"""
    attention: tuple[int, ...] = ()
    """heights at which blocks attend; if there is any, the middle attends too"""
    heads: int = 1
    patch_px: int = 1
    """pixels are gathered in squares of this side, whose numbers are the channels of the first convolution"""
    classes: int = 0
    features: Features = "positional"
    conditioning: Literal["film", "additive"] = "film"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, c_noise: jax.Array, label: jax.Array | None = None, keys: jax.Array | None = None
    ) -> jax.Array:
        condition = Embedding(self.width, self.classes, self.features, name="embedding")(c_noise, label)
        widths = [self.width * m for m in self.multipliers]
        self._check(x.shape, widths)
        x = gather(x, self.patch_px)
        channels, layer = x.shape[-1], 0

        def block(h: jax.Array, features: int, resize: Any = None, attend: bool = False) -> jax.Array:
            nonlocal layer
            layer += 1
            options = (self.conditioning, self.dropout, self.dtype, resize, self.heads if attend else 0)
            return Block(features, layer, *options, name=f"block{layer}")(h, condition, keys)

        h = Conv(self.width, (3, 3), kernel_init=xavier(), dtype=self.dtype, name="begin")(x)
        skips = [h]
        for level, features in enumerate(widths):
            if level:
                h = block(h, h.shape[-1], "down")
                skips.append(h)
            for _ in range(self.blocks):
                h = block(h, features, attend=h.shape[1] in self.attention)
                skips.append(h)
        h = block(h, widths[-1], attend=bool(self.attention))
        h = block(h, widths[-1])
        for level, features in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                h = block(h, h.shape[-1], "up")
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, features, attend=i == self.blocks and h.shape[1] in self.attention)
        h = nn.silu(GroupNorm(name="norm")(h.astype(jnp.float32)))
        return scatter(Conv(channels, (3, 3), kernel_init=constant(0), name="end")(h), self.patch_px)

    def _check(self, shape: tuple[int, ...], widths: list[int]) -> None:
        times = self.patch_px * 2 ** (len(widths) - 1)
        if shape[1] % times or shape[2] % times:
            raise UserError(f"{len(widths)} resolutions need a height and width that {times} divides, not {shape[1:3]}")
        if self.attention and any(width % self.heads for width in widths):
            raise UserError(f"{self.heads} heads do not divide the channels {widths}")


def gather(x: jax.Array, px: int) -> jax.Array:
    """[b, px h, px w, c] -> [b, h, w, px px c]; `scatter` is the inverse."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // px, px, w // px, px, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // px, w // px, px * px * c)


def scatter(x: jax.Array, px: int) -> jax.Array:
    """[b, h, w, px px c] -> [b, px h, px w, c]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, px, px, c // px**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * px, w * px, c // px**2)


def enlarge(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, 2 h, 2 w, c]: every pixel four times."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def shrink(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, h / 2, w / 2, c]: the mean of every 2x2 pixels."""
    b, h, w, c = x.shape
    return jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))
