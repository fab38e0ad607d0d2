"""The objective of an image that is larger than memory, tile by tile, exactly.

Gram matrices are sums over places, so those of the whole image are the sums of the tiles'; with them known, the
gradient too is a sum over tiles. Each tile is computed with a margin as wide as the deepest layer sees, and counts only
its own part: there are no seams, nothing has to be shifted, and the objective is that of the whole image.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lib.shard import DATA
from lib.train import Loss, Metrics
from stylize.config import Perception
from stylize.loss import Arrays, gram_distance, total_variation
from stylize.vgg import LossNetwork


class Grid(NamedTuple):
    """Where tiles lie, in pixels: windows with their margins, and the parts of the image that they count."""

    window_px: tuple[int, int]
    starts: np.ndarray
    """[tiles, 2] of the windows"""
    parts: np.ndarray
    """[tiles, 2, 2]: first and last + 1 row and column of what a tile counts, within its window"""


def margin(network: LossNetwork) -> int:
    """How far the deepest layer sees, in pixels, rounded up to a multiple of its stride."""
    stride, reach = 1, 0
    for layer in network.up_to(network.layers):
        if layer.startswith("conv"):
            reach += stride
        elif layer.startswith("pool"):
            reach += stride
            stride *= 2
    return -(-reach // network.stride) * network.stride


def grid(size: tuple[int, int], tile_px: int, network: LossNetwork) -> Grid:
    """Tiles of an image [h, w] whose sides are multiples of the network's stride; windows are all of one size."""
    unit, edge = network.stride, margin(network)
    tile = max(tile_px // unit, 1) * unit
    axes = []
    for length in size:
        window = min(tile + 2 * edge, length)
        low = np.arange(0, length, tile)
        high = np.minimum(low + tile, length)
        start = np.clip(low - edge, 0, length - window)
        axes.append((window, start, low - start, high - start))
    (h, top, top_low, top_high), (w, left, left_low, left_high) = axes
    i, j = (k.ravel() for k in np.meshgrid(np.arange(len(top)), np.arange(len(left)), indexing="ij"))
    starts = np.stack([top[i], left[j]], -1)
    rows, columns = np.stack([top_low[i], top_high[i]], -1), np.stack([left_low[j], left_high[j]], -1)
    return Grid((h, w), starts.astype(np.int32), np.stack([rows, columns], 1).astype(np.int32))


def objective(network: LossNetwork, options: Perception, mesh: Mesh, tile_px: int) -> Loss:
    """`loss(x, batch, key)` as `optimize.objective` has it, in the memory of one tile per device.

    `batch` is {"params", "grams": {layer: [c, c]}, "picture": the content image [1, h, w, 3]}: activations of the
    content are computed anew for each tile. Images are continued to multiples of the stride by their last row and
    column. One style everywhere; the gradient is exact, and of the first order only.
    """

    def loss(x: jax.Array, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key
        whole, picture = (_continued(image, network.stride) for image in (x, batch["picture"]))
        tiles = _spread_out(grid(whole.shape[1:3], tile_px, network), mesh)
        features, metrics = _tiled(network, options, mesh, tiles, batch["params"], batch["grams"], whole, picture)
        tv = total_variation(x)
        return features + options.tv_weight * tv, {**metrics, "tv": tv}

    return loss


@functools.partial(jax.jit, static_argnums=(0, 3, 4), inline=True)
def style_of(network: LossNetwork, params: Any, image: jax.Array, mesh: Mesh, tile_px: int) -> Arrays:
    """The Gram matrices [c, c] per layer of a style image [h, w, 3], continued as those of `objective`, in the memory
    of one tile per device."""
    whole = _continued(image[None], network.stride)
    tiles = _spread_out(grid(whole.shape[1:3], tile_px, network), mesh)

    def one(total: Arrays, x: Any) -> tuple[Arrays, None]:
        starts, parts = x
        found = network.features(params, _windows(whole, starts, tiles, mesh), network.style_layers)
        return jax.tree.map(jnp.add, total, _products(network, found, parts)), None

    sizes = {layer: network.channels(layer) for layer in network.style_layers}
    blank = {layer: jnp.zeros((c, c), image.dtype) for layer, c in sizes.items()}
    total, _ = jax.lax.scan(one, blank, (jnp.asarray(tiles.starts), jnp.asarray(tiles.parts)))
    return {layer: total[layer] / (_places(network, whole, layer) * c) for layer, c in sizes.items()}


def _windows(image: jax.Array, starts: jax.Array, tiles: _Rounds, mesh: Mesh) -> jax.Array:
    """[devices, h', w', 3], those of one round."""
    image = _whole(image, mesh)
    cut = jax.vmap(
        lambda s: jax.lax.dynamic_slice(image[0], (s[0], s[1], jnp.zeros_like(s[0])), (*tiles.window_px, 3))
    )(starts)
    return cut if mesh.size == 1 else jax.lax.with_sharding_constraint(cut, NamedSharding(mesh, P(DATA)))


def _whole(image: jax.Array, mesh: Mesh) -> jax.Array:
    """On every device: XLA would divide the one image of a batch over all of them, padded to as many."""
    return image if mesh.size == 1 else jax.lax.with_sharding_constraint(image, NamedSharding(mesh, P()))


def _products(network: LossNetwork, found: Arrays, parts: jax.Array) -> Arrays:
    """F F^T per style layer, of what tiles count."""
    products = {}
    for layer in network.style_layers:
        f = found[layer]
        rows = (f * _counted(f.shape, parts, network.scale(layer))).reshape(-1, f.shape[-1])
        products[layer] = rows.T @ rows
    return products


def _places(network: LossNetwork, image: jax.Array, layer: str) -> int:
    h, w = image.shape[1:3]
    return (h // network.scale(layer)) * (w // network.scale(layer))


def _continued(x: jax.Array, unit: int) -> jax.Array:
    if x.shape[1] % unit == x.shape[2] % unit == 0:
        return x  # the gradient of no padding at all is six more images in memory
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % unit), (0, -x.shape[2] % unit), (0, 0)), mode="edge")


class _Rounds(NamedTuple):
    """A grid, dealt out to the devices: arrays lead with [rounds, devices]; the last round's rest counts nothing."""

    window_px: tuple[int, int]
    starts: Any
    parts: Any


def _spread_out(tiles: Grid, mesh: Mesh) -> _Rounds:
    missing = -len(tiles.starts) % mesh.size
    starts = np.concatenate([tiles.starts, np.repeat(tiles.starts[-1:], missing, 0)])
    parts = np.concatenate([tiles.parts, np.zeros((missing, 2, 2), np.int32)])
    return _Rounds(tiles.window_px, starts.reshape(-1, mesh.size, 2), parts.reshape(-1, mesh.size, 2, 2))


def _tiled(
    network: LossNetwork,
    options: Perception,
    mesh: Mesh,
    tiles: _Rounds,
    params: Any,
    grams: Arrays,
    whole: jax.Array,
    picture: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """(style and content terms, weighted; both alone); differentiable in `whole`."""
    relative = options.scale == "relative"
    xs = (jnp.asarray(tiles.starts), jnp.asarray(tiles.parts))
    places = functools.partial(_places, network, whole)
    windows = functools.partial(_windows, tiles=tiles, mesh=mesh)

    def sums(cut: jax.Array, parts: jax.Array, pictures: jax.Array) -> tuple[Arrays, Arrays, Arrays]:
        """Of these tiles: F F^T per style layer, sum (F - P)^2 and sum P^2 per content layer."""
        found = network.features(params, cut, network.layers)
        wanted = network.features(params, pictures, network.content_layers)
        errors, squares = {}, {}
        for layer in network.content_layers:
            counted = _counted(found[layer].shape, parts, network.scale(layer))
            errors[layer] = jnp.sum(counted * (found[layer] - wanted[layer]) ** 2)
            squares[layer] = jnp.sum(counted * wanted[layer] ** 2)
        return _products(network, found, parts), errors, squares

    def loss_of(products: Arrays, errors: Arrays, squares: Arrays) -> tuple[jax.Array, Metrics]:
        style, content = [], []
        for layer in network.style_layers:
            size = places(layer) * grams[layer].shape[-1]
            style.append(gram_distance(products[layer] / size, grams[layer], relative=relative))
        for layer in network.content_layers:
            size = jnp.maximum(squares[layer], 1e-6) if relative else places(layer) * network.channels(layer)
            content.append(errors[layer] / size)
        terms = {"style": jnp.mean(jnp.stack(style)), "content": jnp.mean(jnp.stack(content))}
        return options.style_weight * terms["style"] + options.content_weight * terms["content"], terms

    def all_sums(image: jax.Array) -> tuple[Arrays, Arrays, Arrays]:
        def one(total: Any, x: Any) -> tuple[Any, None]:
            starts, parts = x
            return jax.tree.map(jnp.add, total, sums(windows(image, starts), parts, windows(picture, starts))), None

        shapes = jax.eval_shape(lambda: one_round(image))
        return jax.lax.scan(one, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), xs)[0]

    def one_round(image: jax.Array) -> tuple[Arrays, Arrays, Arrays]:
        return sums(windows(image, xs[0][0]), xs[1][0], windows(picture, xs[0][0]))

    @jax.custom_vjp
    def value(image: jax.Array) -> tuple[jax.Array, Metrics]:
        return loss_of(*all_sums(image))

    def forward(image: jax.Array) -> tuple[Any, Any]:
        total = all_sums(image)
        return loss_of(*total), (image, total)

    def backward(residuals: Any, cotangent: Any) -> tuple[jax.Array]:
        """Once more over the tiles, now that the derivatives by their sums are known."""
        image, total = residuals
        by_sums = jax.vjp(loss_of, *total)[1](cotangent)

        def one(gradient: jax.Array, x: Any) -> tuple[jax.Array, None]:
            starts, parts = x
            pull = jax.vjp(lambda cut: sums(cut, parts, windows(picture, starts)), windows(image, starts))[1]
            by_window = pull(by_sums)[0]
            for k in range(mesh.size):
                top, left = starts[k]
                at = (jnp.zeros_like(top), top, left, jnp.zeros_like(top))
                before = jax.lax.dynamic_slice(gradient, at, (1, *by_window.shape[1:]))
                gradient = jax.lax.dynamic_update_slice(gradient, before + by_window[k : k + 1], at)
            return _whole(gradient, mesh), None

        return (_whole(jax.lax.scan(one, jnp.zeros_like(image), xs)[0], mesh),)

    value.defvjp(forward, backward)
    return value(whole)


def _counted(shape: tuple[int, ...], parts: jax.Array, stride: int) -> jax.Array:
    """[tiles, h', w', 1]: 1 for the places of a layer that a tile counts."""

    def along(length: int, low: jax.Array, high: jax.Array) -> jax.Array:
        at = jnp.arange(length) * stride
        return (at >= low[:, None]) & (at < high[:, None])

    rows, columns = (along(shape[1 + k], parts[:, k, 0], parts[:, k, 1]) for k in (0, 1))
    return (rows[:, :, None] & columns[:, None, :])[..., None].astype(jnp.float32)
