"""What networks share: how they see the noise level and the class, and dropout; and the network for few numbers."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.special import ndtri

from lib.initial import constant, normal, xavier

Features = Literal["positional", "fourier"]


def pixel_mean(x: jax.Array) -> jax.Array:
    """The mean of each channel over the pixels, [b, h, w, c] -> [b, 1, 1, c]."""
    return _pixel_mean(x.shape[1:3], x) if worth_a_product(x) else jnp.mean(x, (1, 2), keepdims=True)


def worth_a_product(x: jax.Array) -> bool:
    """Whether sums over images like x are faster as matrix products: large ones on a CPU."""
    return jax.default_backend() == "cpu" and math.prod(x.shape[1:]) >= 8192


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pixel_mean(size: tuple[int, int], x: jax.Array) -> jax.Array:
    # On a CPU XLA sums over pixels channel by channel, through all of the memory; a matrix product takes the channels
    # along and is two to three times faster. Of four equal rows, because for one alone XLA does not call its library
    # but writes code, which takes longer to compile than the rest of a norm together.
    b, pixels, c = len(x), size[0] * size[1], x.shape[-1]
    weights = jnp.full((b, 4, pixels), 1 / pixels, x.dtype)
    mean = lax.dot_general(weights, x.reshape(b, pixels, c), (((2,), (1,)), ((0,), (0,))))
    return mean[:, :1, None]


def _pixel_mean_fwd(size: tuple[int, int], x: jax.Array) -> tuple[jax.Array, None]:
    return _pixel_mean(size, x), None


def _pixel_mean_bwd(size: tuple[int, int], _: None, g: jax.Array) -> tuple[jax.Array]:
    return (jnp.broadcast_to(g / (size[0] * size[1]), (len(g), *size, g.shape[-1])),)


_pixel_mean.defvjp(_pixel_mean_fwd, _pixel_mean_bwd)


def elu(x: jax.Array) -> jax.Array:
    """x where positive, else exp(x) - 1, whose rounding is that of numbers near 1; `expm1` costs twice as much."""
    return jnp.where(x > 0, x, jnp.exp(jnp.where(x > 0, 0, x)) - 1)


class Embedding(nn.Module):
    """c_noise [b] or [1], label int [b] | None -> [b, 4 width], or [1, 4 width] where nothing has more rows; float32.

    "positional" features are smooth in c_noise (frequencies from 1 down to 1e-4, DDPM's), "fourier" ones have
    frequencies up to about 2 `scale` turns per unit (NCSN++'s, with the quantiles of a Gaussian in place of draws).
    """

    width: int
    classes: int
    features: Features
    scale: float = 16.0

    @nn.compact
    def __call__(self, c_noise: jax.Array, label: jax.Array | None) -> jax.Array:
        half = self.width // 2
        if self.features == "positional":
            frequencies = 1e4 ** -(np.arange(half) / max(half - 1, 1))
        else:
            frequencies = 2 * np.pi * self.scale * ndtri(0.5 + 0.5 * (np.arange(half) + 0.5) / half)
        angle = c_noise[:, None] * frequencies.astype(np.float32)
        h = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        if self.classes:
            # A row per class and one for "no class"; as large as the features.
            rows = normal(0.5**0.5)
            h = h + nn.Embed(self.classes + 1, h.shape[-1], embedding_init=rows, name="label")(label)
        for name in ("dense1", "dense2"):
            h = nn.silu(nn.Dense(4 * self.width, kernel_init=xavier(), name=name)(h))
        return h


def dropout(x: jax.Array, keys: jax.Array | None, rate: float, layer: int) -> jax.Array:
    """x [b, ...] with a fraction `rate` of each row set to zero by the row's own key [b]; None: x."""
    if keys is None or not rate:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


class MLP(nn.Module):
    """x [b, d] -> float32 [b, d] through residual SiLU layers that the noise level and the class scale and shift."""

    width: int = 128
    layers: int = 3
    classes: int = 0
    features: Features = "positional"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, c_noise: jax.Array, label: jax.Array | None = None, keys: jax.Array | None = None
    ) -> jax.Array:
        # A quarter of the width: an embedding has four times as many numbers as it is told.
        condition = Embedding(self.width // 4, self.classes, self.features, name="embedding")(c_noise, label)
        outputs = x.shape[-1]
        h = nn.Dense(self.width, kernel_init=xavier(), dtype=self.dtype, name="begin")(x)
        for i in range(self.layers):
            scale, shift = jnp.split(
                nn.Dense(2 * self.width, kernel_init=xavier(), name=f"condition{i}")(condition), 2, -1
            )
            y = nn.silu(h * (1 + scale) + shift)
            y = nn.Dense(self.width, kernel_init=xavier(), dtype=self.dtype, name=f"dense{i}")(y)
            h = h + dropout(y, keys, self.dropout, i)
        return nn.Dense(outputs, kernel_init=constant(0), name="end")(nn.silu(h.astype(jnp.float32)))
