"""Sums over all axes but the last, as a matrix product: on the CPU five times as fast as XLA's reduction."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lib.shard import equally_varying


def channel_sums(x: jax.Array, weight: float = 1.0, parts: tuple[int, ...] = ()) -> jax.Array:
    """[b, ..., c] -> [c], times `weight`, in single precision or better; of `parts` (n,) of the first axis, [n, c].

    Those of each image come first: many short products take a third of the time of a long one.
    """
    images = _sums(x.reshape(len(x), -1, x.shape[-1]), weight)
    return _sums(images.reshape(*parts, -1, x.shape[-1]), 1.0)


def _sums(x: jax.Array, weight: float) -> jax.Array:
    """[..., n, c] -> [..., c], times `weight`."""
    ones = jnp.full((*x.shape[:-2], 1, x.shape[-2]), weight, jnp.promote_types(x.dtype, jnp.float32))
    return (ones @ x)[..., 0, :]


def biased(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., c] plus bias [c]; on the CPU with such a sum in its gradient."""
    return _biased(*equally_varying(x, bias)) if jax.default_backend() == "cpu" else x + bias


@jax.custom_vjp
def _biased(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias


_biased.defvjp(lambda x, bias: (_biased(x, bias), None), lambda _, g: (g, channel_sums(g).astype(g.dtype)))


def affine(x: jax.Array, gain: jax.Array, offset: jax.Array) -> jax.Array:
    """x [..., c] times gain [c] plus offset [c]; on the CPU with such sums in its gradient.

    Gains and offsets [n, c] are those of n parts of the first axis of x.
    """
    return (_affine if jax.default_backend() == "cpu" else _plain)(*equally_varying(x, gain, offset))


def _plain(x: jax.Array, gain: jax.Array, offset: jax.Array) -> jax.Array:
    rows = x.reshape(*gain.shape[:-1], -1, x.shape[-1])
    return (rows * gain[..., None, :] + offset[..., None, :]).reshape(x.shape)


_affine = jax.custom_vjp(_plain)


def _affine_bwd(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, gain = residuals
    parts = gain.shape[:-1]
    of_gain, of_offset = channel_sums(g * x, parts=parts), channel_sums(g, parts=parts)
    return _plain(g, gain, jnp.zeros_like(gain)), of_gain.astype(gain.dtype), of_offset.astype(gain.dtype)


_affine.defvjp(lambda x, gain, offset: (_affine(x, gain, offset), (x, gain)), _affine_bwd)
