"""Strided convolutions: the networks of DCGAN (Radford et al. 2016, arXiv 1511.06434) and the CNN of SNGAN, and the
multilayer perceptrons for points.

Generators: `(z [b, latent], y [b, classes] | None, train) -> [b, *shape]`, images in [-1, 1]. Critics: `(x [b, *shape],
y, train, halves=False) -> [b, outputs]`, before any sigmoid, where `halves` is that of batch norm. Weights are
N(0, 0.02), as in DCGAN and in SNGAN's CNN.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gan.blocks import BatchNorm, leaky_relu, with_class
from lib.initial import normal, xavier
from lib.layers import Conv, ConvTranspose

_WEIGHTS = normal(0.02)


class Generator(nn.Module):
    """A dense layer to side / 2^levels, then transposed convolutions of stride 2, batch norm and ReLU between, tanh.

    `smooth`: the last convolution has stride 1 and 3x3 pixels, after as many doublings (SNGAN, table 3).
    """

    shape: tuple[int, int, int]
    width: int
    levels: int
    kernel_px: int = 4
    smooth: bool = False

    @nn.compact
    def __call__(self, z: jax.Array, y: jax.Array | None, train: bool) -> jax.Array:
        height, width, channels = self.shape
        side = height >> self.levels, width >> self.levels
        widths = [self.width << (self.levels - i) for i in range(self.levels + 1)]
        kernel = (self.kernel_px, self.kernel_px)
        h = with_class(z, y)
        h = nn.Dense(side[0] * side[1] * widths[0], use_bias=False, kernel_init=_WEIGHTS)(h)
        h = nn.relu(BatchNorm()(h.reshape(len(z), *side, widths[0]), train))
        for features in widths[1:] if self.smooth else widths[1:-1]:
            h = ConvTranspose(features, kernel, (2, 2), use_bias=False, kernel_init=_WEIGHTS)(h)
            h = nn.relu(BatchNorm()(h, train))
        if self.smooth:
            return jnp.tanh(Conv(channels, (3, 3), kernel_init=_WEIGHTS)(h))
        return jnp.tanh(ConvTranspose(channels, kernel, (2, 2), kernel_init=_WEIGHTS)(h))


class Critic(nn.Module):
    """Convolutions of stride 2 with leaky ReLUs, batch norm (where there is any) from the second one on."""

    width: int
    levels: int
    kernel_px: int = 5
    batch_norm: bool = True
    slope: float = 0.2
    outputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array | None, train: bool, halves: bool = False) -> jax.Array:
        h, act = with_class(x, y), leaky_relu(self.slope)
        for i in range(self.levels):
            normed = self.batch_norm and i > 0
            kernel = (self.kernel_px, self.kernel_px)
            h = Conv(self.width << i, kernel, (2, 2), use_bias=not normed, kernel_init=_WEIGHTS)(h)
            h = act(BatchNorm()(h, train, halves=halves) if normed else h)
        return nn.Dense(self.outputs, kernel_init=_WEIGHTS)(h.reshape(len(x), -1))


class CnnCritic(nn.Module):
    """SNGAN, table 3: between convolutions of stride 2 (4x4) such of stride 1 (3x3), without batch norm."""

    width: int
    levels: int
    slope: float = 0.1
    outputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array | None, train: bool, halves: bool = False) -> jax.Array:
        del train, halves
        act = leaky_relu(self.slope)
        h = act(Conv(self.width, (3, 3), kernel_init=_WEIGHTS)(with_class(x, y)))
        for i in range(1, self.levels + 1):
            h = act(Conv(self.width << i, (4, 4), (2, 2), kernel_init=_WEIGHTS)(h))
            h = act(Conv(self.width << i, (3, 3), kernel_init=_WEIGHTS)(h))
        return nn.Dense(self.outputs, kernel_init=_WEIGHTS)(h.reshape(len(x), -1))


class MLP(nn.Module):
    """Generator or critic of points [b, d] (WGAN-GP, section 5.1): dense layers with (leaky) ReLUs."""

    width: int
    layers: int
    outputs: int
    slope: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array | None, train: bool, halves: bool = False) -> jax.Array:
        del y, train, halves
        for _ in range(self.layers):
            x = leaky_relu(self.slope)(nn.Dense(self.width, kernel_init=xavier(2**0.5))(x))
        return nn.Dense(self.outputs, kernel_init=xavier())(x)
