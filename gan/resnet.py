"""Residual networks for 32x32 images: those of WGAN-GP, SNGAN and the projection discriminator.

Miyato et al. 2018 (arXiv 1802.05957), table 4, and Miyato and Koyama 2018 (arXiv 1802.05637), after their code. Inputs
and outputs are those of `gan.dcgan`. Weights are Glorot's, sqrt(2) times as large inside residual branches.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from gan.blocks import BatchNorm, doubled, halved, leaky_relu, with_class
from lib.initial import constant, xavier
from lib.layers import Conv

_BRANCH, _PLAIN = xavier(2**0.5), xavier()


class UpBlock(nn.Module):
    """[b, h, w, c] -> [b, 2h, 2w, features]; the class enters by its rows in the norms."""

    features: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array | None, train: bool) -> jax.Array:
        norm = lambda h: nn.relu(BatchNorm(self.classes, constant(1.0))(h, train, y))  # noqa: E731
        h = Conv(self.features, (3, 3), kernel_init=_BRANCH)(doubled(norm(x)))
        h = Conv(self.features, (3, 3), kernel_init=_BRANCH)(norm(h))
        # A 1x1 convolution and copies of pixels commute; this order costs a quarter.
        return h + doubled(Conv(self.features, (1, 1), kernel_init=_PLAIN)(x))


class Generator(nn.Module):
    """A dense layer to side / 2^levels, one block per doubling, then batch norm without a class, 3x3, tanh."""

    shape: tuple[int, int, int]
    width: int
    levels: int
    classes: int = 0
    """of conditional batch norm; 0: a class is put beside z"""

    @nn.compact
    def __call__(self, z: jax.Array, y: jax.Array | None, train: bool) -> jax.Array:
        height, width, channels = self.shape
        side = height >> self.levels, width >> self.levels
        h = z if self.classes else with_class(z, y)
        h = nn.Dense(side[0] * side[1] * self.width, kernel_init=_PLAIN)(h).reshape(len(z), *side, self.width)
        for _ in range(self.levels):
            h = UpBlock(self.width, self.classes)(h, y, train)
        h = nn.relu(BatchNorm(scale_init=constant(1.0))(h, train))
        return jnp.tanh(Conv(channels, (3, 3), kernel_init=_PLAIN)(h))


class CriticBlock(nn.Module):
    """Two convolutions beside a shortcut, which has one only where something changes; `down` halves the image."""

    features: int
    down: bool
    first: bool = False
    """of the network: pixels are not put through an activation, and the shortcut is halved first"""
    slope: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = leaky_relu(self.slope)
        h = Conv(self.features, (3, 3), kernel_init=_BRANCH)(x if self.first else act(x))
        h = Conv(self.features, (3, 3), kernel_init=_BRANCH)(act(h))
        if not (self.down or x.shape[-1] != self.features):
            return h + x
        # Means of pixels and a 1x1 convolution commute, so the shortcut is always halved first.
        shortcut = Conv(self.features, (1, 1), kernel_init=_PLAIN)(halved(x) if self.down else x)
        return (halved(h) if self.down else h) + shortcut


class Critic(nn.Module):
    """Halving blocks, two plain ones, pooling, one number; with `classes` also the projection on the class's row."""

    width: int
    levels: int
    pooling: Literal["sum", "mean"] = "sum"
    slope: float = 0.0
    classes: int = 0
    """of the projection; 0: a class is put beside the pixels"""

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array | None, train: bool, halves: bool = False) -> jax.Array:
        del train, halves
        h = x if self.classes else with_class(x, y)
        for i in range(max(1, self.levels - 1)):
            h = CriticBlock(self.width, down=True, first=i == 0, slope=self.slope)(h)
        for _ in range(2):
            h = CriticBlock(self.width, down=False, slope=self.slope)(h)
        h = leaky_relu(self.slope)(h)
        h = h.sum((1, 2)) if self.pooling == "sum" else h.mean((1, 2))
        score = nn.Dense(1, use_bias=False, kernel_init=_PLAIN)(h)
        if not self.classes:
            return score
        assert y is not None
        rows = self.param("embedding", _PLAIN, (self.classes, self.width))
        return score + jnp.sum((y @ rows) * h, axis=-1, keepdims=True)
