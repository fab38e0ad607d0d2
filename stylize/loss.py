"""What is minimised: style, content and total variation (Gatys et al., arXiv 1508.06576, eqs. 1 to 7; Johnson 2016).

Images are [b, h, w, 3] in [-1, 1]. Every term is part of the one objective, so that a line search sees all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from stylize.config import Perception
from stylize.vgg import LossNetwork

Arrays = dict[str, jax.Array]


def gram(features: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """F F^T / (h w c) of [b, h, w, c]: [b, c, c] (arXiv 1508.06576, eq. 3, per pixel and channel).

    With a mask [h, w] in [0, 1] only its region counts, and h w becomes the sum of its squares: the guided Gram
    matrix of Gatys et al. (arXiv 1611.07865, eq. 4).
    """
    b, h, w, c = features.shape
    size = jnp.float32(h * w)
    if mask is not None:
        features = features * mask[:, :, None]
        size = jnp.maximum(jnp.sum(mask * mask), 1e-6)
    rows = features.reshape(b, h * w, c)
    return _products(rows) / (size * c)


@jax.custom_vjp
def _products(rows: jax.Array) -> jax.Array:
    """[b, n, c] -> [b, c, c]. Its gradient by itself would be two products, one of them with a transposed copy."""
    return jnp.einsum("bnc,bnd->bcd", rows, rows)


_products.defvjp(lambda rows: (_products(rows), rows), lambda rows, g: (rows @ (g + g.mT),))


@jax.custom_vjp
def total_variation(x: jax.Array) -> jax.Array:
    """The mean squared difference of vertical and of horizontal neighbours, summed; 0 where there are none."""
    return sum(jnp.sum(d * d) / max(d.size, 1) for d in (jnp.diff(x, axis=axis) for axis in (1, 2)))


def _variation_gradient(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    """Written into one array; by itself it would be six, which counts where images are large."""
    out = jnp.zeros_like(x)
    for axis in (1, 2):
        d = jnp.diff(x, axis=axis)
        d *= 2 * g / max(d.size, 1)
        for first, part in ((1, d), (0, -d)):
            start = [first if i == axis else 0 for i in range(x.ndim)]
            out = jax.lax.dynamic_update_slice(out, jax.lax.dynamic_slice(out, start, d.shape) + part, start)
    return (out,)


total_variation.defvjp(lambda x: (total_variation(x), x), _variation_gradient)


@flax.struct.dataclass
class Style:
    """What an image's Gram matrices should be, per layer, in each region of the image."""

    grams: Arrays  # [regions, c, c] per layer
    masks: Arrays  # [regions, h', w'] per layer, or {} where the one region is everything


@flax.struct.dataclass
class Content:
    """What an image's activations should be, [b, h', w', c] per layer."""

    features: Arrays


@functools.partial(jax.jit, static_argnums=0, inline=True)
def style_of(
    network: LossNetwork, params: Any, images: Sequence[jax.Array], weights: Sequence[float] | None = None
) -> Arrays:
    """The Gram matrices [c, c] per layer of style images [h, w, 3] of any sizes: their weighted mean."""
    return mixed([_grams_of(network, params, image) for image in images], weights)


def _grams_of(network: LossNetwork, params: Any, image: jax.Array) -> Arrays:
    found = network.features(params, image[None], network.style_layers)
    return {layer: gram(found[layer])[0] for layer in network.style_layers}


def mixed(grams: Sequence[Arrays], weights: Sequence[float] | None = None) -> Arrays:
    """The weighted mean of several styles' Gram matrices."""
    shares = jnp.asarray(weights or [1.0] * len(grams), jnp.float32)
    shares = shares / jnp.sum(shares)
    return {layer: sum(share * g[layer] for share, g in zip(shares, grams, strict=True)) for layer in grams[0]}


def everywhere(grams: Arrays) -> Style:
    """One style for the whole image."""
    return Style({layer: g[None] for layer, g in grams.items()}, {})


def regions(grams: Sequence[Arrays], masks: jax.Array, shapes: Mapping[str, tuple[int, int]]) -> Style:
    """A style per region: masks [regions, h, w] in [0, 1], which are averaged to each layer's `shapes`."""
    small = {layer: jax.image.resize(masks, (len(masks), *shapes[layer]), "linear") for layer in grams[0]}
    return Style({layer: jnp.stack([g[layer] for g in grams]) for layer in grams[0]}, small)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def content_of(network: LossNetwork, params: Any, x: jax.Array) -> Content:
    """The activations of images [b, h, w, 3] at the content layers."""
    return Content(network.features(params, x, network.content_layers))


def style_losses(found: Arrays, style: Style, *, relative: bool) -> Arrays:
    """Per layer, [b]: the squared difference of Gram matrices, weighted by the regions' shares of the image.

    Relative to the squared size of the target, or per entry (1 / c^2 of the sum, as published).
    """
    out = {}
    for layer, targets in style.grams.items():
        masks = style.masks.get(layer)
        total = jnp.zeros(())
        for r in range(targets.shape[0]):
            mask = None if masks is None else masks[r]
            share = 1.0 if masks is None else jnp.mean(masks[r])
            total += share * gram_distance(gram(found[layer], mask), targets[r], relative=relative)
        out[layer] = total
    return out


def gram_distance(grams: jax.Array, target: jax.Array, *, relative: bool) -> jax.Array:
    """The squared difference of [..., c, c], relative to that of the target or per entry: [...]."""
    axes = (-2, -1)
    size = jnp.sum(target**2, axes) if relative else target.shape[-1] ** 2
    return jnp.sum((grams - target) ** 2, axes) / size


def content_losses(found: Arrays, content: Content, *, relative: bool) -> Arrays:
    """Per layer, [b]: the squared difference of activations, relative to those of the target or per activation."""
    out = {}
    for layer, target in content.features.items():
        axes = (1, 2, 3)
        size = jnp.sum(target**2, axes) if relative else target[0].size
        out[layer] = jnp.sum((found[layer] - target) ** 2, axes) / jnp.maximum(size, 1e-6)
    return out


def perceptual_loss(
    network: LossNetwork, options: Perception, params: Any, x: jax.Array, style: Style, content: Content
) -> tuple[jax.Array, Arrays]:
    """(the objective, {"style", "content", "tv"} before their weights), means over the images [b, h, w, 3].

    Layers of a kind count alike: each loss is the mean over its layers.
    """
    found = network.features(params, x, network.layers)
    relative = options.scale == "relative"
    terms = {
        "style": _mean(style_losses(found, style, relative=relative)),
        "content": _mean(content_losses(found, content, relative=relative)),
        "tv": total_variation(x),
    }
    total = (
        options.style_weight * terms["style"]
        + options.content_weight * terms["content"]
        + options.tv_weight * terms["tv"]
    )
    return total, terms


def _mean(losses: Arrays) -> jax.Array:
    return jnp.mean(jnp.stack([jnp.mean(value) for value in losses.values()]))
