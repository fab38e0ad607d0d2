"""How stored images become what a network sees, inside the compiled step and by one key per example."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How uint8 images become the floats that a network sees."""

    range: tuple[float, float] = (-1.0, 1.0)
    """what black and white become: (0, 1) for NCSN v1 and v2, (-1, 1) for the others"""
    dequantize: bool = False
    """spread each grey level evenly over its 1/256 of the range, as NCSN v1 and likelihoods do"""
    flip: bool = False
    """mirror every second image, left to right"""

    def __call__(self, images: jax.Array, keys: jax.Array) -> jax.Array:
        """uint8 [b, h, w, c] -> float32, with the keys [b] of the examples. ValueError for other types."""
        if images.dtype != jnp.uint8:
            raise ValueError(f"images must be uint8, not {images.dtype}")
        dequantize_keys, flip_keys = split_each(keys, 2)
        unit = dequantized(images, dequantize_keys) if self.dequantize else images.astype(jnp.float32) / 255
        low, high = self.range
        x = low + (high - low) * unit
        return flipped(x, flip_keys) if self.flip else x


def dequantized(images: jax.Array, keys: jax.Array) -> jax.Array:
    """(image + U[0, 1)) / 256, in [0, 1): NCSN v1's x / 256 * 255 + U / 256 for its x = image / 255.

    U has 16 bits: with more, 255 + U would round to 256, which is the next level's.
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, images.shape[1:], jnp.uint16))(keys)
    return images.astype(jnp.float32) / 256 + bits.astype(jnp.float32) / 2**24


def flipped(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Each of [b, h, w, c] mirrored left to right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def split_each(keys: jax.Array, count: int) -> jax.Array:
    """Keys [b] as [count, b]."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)
