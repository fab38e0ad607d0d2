"""Winograd's minimal filtering for 2x2 and 3x3 convolutions (Lavin and Gray, arXiv 1509.09308).

Tiles of 4x4 results cost 36 products per pair of channels instead of 144 (3x3), or 25 instead of 64 (2x2). Where the
sides of an image are no multiples of 4, others take a quarter (5x5) or a third (7x7, with kernels of 2x2) fewer. A
GPU's own library chooses such algorithms by itself. In single precision results differ from direct ones by 1e-5 of the
largest.

What is between the two transformations is five times as large as images, and moving it through a CPU's memory takes
as long as the products save. So a loop takes as many images, or rows of one, at once as fit into a core's cache. With
two cores at work, each on 64 images of 16x16 and 64 channels, that is 10.1 ms instead of 11.2 for the direct
convolution, and 13.1 instead of 19.6 for the gradient to the kernel; 13.2 and 17.6 instead of 23.8 and 29.2 with 32
images and 128 channels; with 32 channels direct convolutions are faster. Where XLA divides the work among devices, all
is taken at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import polynomial

from lib.blocks import padded
from lib.shard import alone, equally_varying

# Where polynomials are evaluated, for a tile of so many lines; infinity is the last one. Single precision loses few
# digits to these; with one point more it loses ten times as much.
_POINTS = {5: (0, 1, -1, 2), 6: (0, 1, -1, 2, -2), 7: (0, 1, -1, 2, 0.5, -0.5), 8: (0, 1, -1, 2, -2, 0.5, -0.5)}
_LINES = 2  # of a tile, whose transformation takes as long as its products
_FIXED = 4  # the side of tiles for kernels that are transformed before any image is seen
_CACHE = 3 << 19  # bytes; the second level of a core has about as many
_PER_TILE = 128  # entries of the kernel: each part reads all of it, which takes so many tiles to be worth it

Padding = Sequence[tuple[int, int]]


class _Matrices(NamedTuple):
    """How tiles of results, and the lines of the input and kernel that they depend on, become products and back."""

    input: np.ndarray
    """[lines, lines]"""
    kernel: np.ndarray
    """[lines, taps]"""
    result: np.ndarray
    """[tile, lines]"""


@functools.cache
def _matrices(tile: int, taps: int) -> _Matrices:
    """By Toom and Cook: polynomials are known by their values at as many points; the last one is infinity.

    Those of 4 results and 3 taps are the paper's.
    """
    lines = tile + taps - 1
    points = np.array(_POINTS[lines], np.float64)
    others = [np.delete(points, i) for i in range(lines - 1)]
    inputs = [*map(polynomial.polyfromroots, others), polynomial.polyfromroots(points)]
    scale = np.array([np.prod(a - rest) for a, rest in zip(points, others, strict=True)])
    last = np.eye(1, taps, taps - 1)
    return _Matrices(
        np.array([np.pad(row, (0, lines - len(row))) for row in inputs]),
        np.concatenate([np.vander(points, taps, increasing=True) / scale[:, None], last]),
        np.concatenate([np.vander(points, tile, increasing=True).T, np.eye(1, tile, tile - 1).T], axis=1),
    )


def _of_places(matrix: np.ndarray) -> np.ndarray:
    """What a matrix [n, lines] does in both dimensions, from places in a tile (`spectrum`) to entries, row by row:
    [n^2, lines^2]."""
    return np.einsum("jv,iu->ijvu", matrix, matrix).reshape(len(matrix) ** 2, -1)


def _product(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """[m, n], [n, a, b] -> [m, a, b]: of kernels faster than `_combined`, which adds line to line."""
    return (jnp.asarray(matrix, x.dtype) @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])


def _tile_for(sizes: Sequence[int], taps: int) -> int:
    """The side of the tiles that take the least time for results of these sizes: few products, in short lines."""

    def cost(lines: int) -> int:
        return _products(sizes, taps, lines + 1 - taps) * (lines + _LINES)

    return min(_POINTS, key=cost) + 1 - taps


def _products(sizes: Sequence[int], taps: int, tile: int) -> int:
    return math.prod(-(-length // tile) * (tile + taps - 1) for length in sizes)


def tile_count(sizes: Sequence[int], taps: int) -> int:
    """How many tiles one image's results of these sizes have."""
    tile = _tile_for(sizes, taps)
    return math.prod(-(-length // tile) for length in sizes)


def saved(sizes: Sequence[int], taps: int) -> float:
    """How many times as many products the direct convolution takes for results of these sizes."""
    return math.prod(sizes) * taps**2 / _products(sizes, taps, _tile_for(sizes, taps))


def results(x: jax.Array, kernel: jax.Array, padding: Padding, block: int = 1) -> jax.Array:
    """The convolution of stride 1 with zero padding: [b, h, w, c], [taps, taps, c, f] -> [b, h', w', f].

    `block`: one with so large strides, whose padded input is cut into blocks with as many entries a side, which are
    channels: the kernel is [taps, taps, block^2 c, f].
    """
    taps = len(kernel)
    sizes = _sizes(x, padding, taps, block)
    return _of_spectrum(x, spectrum(kernel, _tile_for(sizes, taps)), padding, taps, block)


def _sizes(x: jax.Array, padding: Padding, taps: int, block: int) -> list[int]:
    return [(n + sum(sides)) // block - taps + 1 for n, sides in zip(x.shape[1:3], padding, strict=True)]


def kernel_gradient(x: jax.Array, g: jax.Array, padding: Padding, block: int = 1) -> jax.Array:
    """That of `results` where the gradient of these is g [b, h', w', f]: [taps, taps, block^2 c, f]."""
    (_, h, w, f), c = g.shape, block**2 * x.shape[-1]
    taps = (x.shape[1] + sum(padding[0])) // block - h + 1
    tile = _tile_for((h, w), taps)
    parts = _Parts.of(x, (h, w), f, tile, taps, padding, block)
    rows, columns = (n * tile for n in parts.tiles)
    sides = (0, rows - h), (0, columns - w)
    images, gradients = parts.whole(x, parts.padding[0]), parts.whole(g, (0, parts.bands * rows - h))

    def products(i: jax.Array | int) -> jax.Array:
        own = parts.slice(gradients, i, rows, rows, sides)
        pair = parts.tiles_of_input(images, i), _tiles_of_gradient(own, tile, taps)
        # The wider one last: XLA rearranges the first one.
        return jnp.einsum("nti,ntj->nij", *(pair if c < f else reversed(pair)))

    total = products(0)
    if parts.count > 1:
        total = jax.lax.fori_loop(1, parts.count, lambda i, total: total + products(i), total)
    found = _product(_of_places(_matrices(tile, taps).kernel.T), total).reshape(taps, taps, *total.shape[1:])
    return found if c < f else jnp.swapaxes(found, 2, 3)


def spectrum(kernel: jax.Array, tile: int) -> jax.Array:
    """A kernel [taps, taps, c, f] in the basis of the tiles, [lines^2, c, f]; of the places in a tile, those of one
    column stand together."""
    taps, _, c, f = kernel.shape
    return _product(_of_places(_matrices(tile, taps).kernel.T).T, kernel.reshape(-1, c, f))


def _of_spectrum(x: jax.Array, kernel: jax.Array, padding: Padding, taps: int, block: int = 1) -> jax.Array:
    x, kernel = equally_varying(x, kernel)
    tile, f = math.isqrt(len(kernel)) + 1 - taps, kernel.shape[-1]
    h, w = _sizes(x, padding, taps, block)
    parts = _Parts.of(x, (h, w), f, tile, taps, padding, block)
    images, (rows, columns) = parts.whole(x, parts.padding[0]), parts.tiles
    matrix = _matrices(tile, taps).result

    def part(i: jax.Array | int) -> jax.Array:
        y = jnp.einsum("ntc,ncf->ntf", parts.tiles_of_input(images, i), kernel)
        lines = _combined(matrix, list(y.reshape(len(matrix.T), -1, *y.shape[1:])), axis=1)  # of columns
        tiles = _combined(matrix, list(lines), axis=0)
        tiles = tiles.reshape(tile, tile, parts.images, rows, columns, f)
        tall = jnp.transpose(tiles, (2, 3, 0, 4, 1, 5)).reshape(parts.images, rows * tile, columns * tile, f)[:, :, :w]
        return tall[:, :h] if parts.bands == 1 else tall

    if parts.count == 1:
        return part(0)
    _, found = jax.lax.scan(lambda _, i: (None, part(i)), None, jnp.arange(parts.count))
    return found.reshape(-1, parts.bands * found.shape[2], w, f)[: len(x), :h]


class _Parts(NamedTuple):
    """What a loop takes at once: as many images as the cache has room for, or a band of one image's rows."""

    tile: int
    """side of its results"""
    taps: int
    images: int
    bands: int
    """in one image; 1 if there are several images"""
    count: int
    """of the parts"""
    lacking: int
    """images that the last part has too few"""
    tiles: tuple[int, int]
    """rows and columns of them, in a part's image"""
    padding: tuple[tuple[int, int], ...]
    """of the input's rows, all bands together, and columns"""
    block: int
    """side of what of the input are channels"""

    @classmethod
    def of(
        cls, x: jax.Array, sizes: Sequence[int], features: int, tile: int, taps: int, padding: Padding, block: int
    ) -> _Parts:
        """For an input [b, h, w, c] and results of these sizes and features."""
        b, *lengths, c = x.shape
        c *= block**2
        rows, columns = (-(-n // tile) for n in sizes)
        tiles = _CACHE // ((tile + taps - 1) ** 2 * max(c, features) * x.dtype.itemsize)
        tiles = max(tiles, c * features // _PER_TILE) if alone() else b * rows * columns
        images = min(b, max(1, tiles // (rows * columns)))
        images = next((n for n in range(images, images // 2, -1) if b % n == 0), images)
        bands = -(-rows // max(1, tiles // columns)) if images == 1 else 1
        rows = -(-rows // bands)
        blocks = -(-b // images)
        sides = tuple(
            (low, block * (n * tile + taps - 1) - low - length)
            for (low, _), n, length in zip(padding, (bands * rows, columns), lengths, strict=True)
        )
        return cls(tile, taps, images, bands, blocks * bands, blocks * images - b, (rows, columns), sides, block)

    def whole(self, x: jax.Array, sides: tuple[int, int]) -> jax.Array:
        """[b, h, w, c] with the images that are lacking, and rows at both sides if they are taken in bands."""
        return padded(x, (0, self.lacking), sides if self.bands > 1 else (0, 0), (0, 0))

    def slice(
        self, x: jax.Array, i: jax.Array | int, rows: int, step: int, sides: Sequence[tuple[int, int]]
    ) -> jax.Array:
        """Of what `whole` returns, those of part i with what is beside them. A band has so many rows, and the next one
        begins `step` rows later."""
        if self.count == 1:
            return padded(x, (0, 0), *sides)
        banded = self.bands > 1
        first = i // self.bands * self.images, i % self.bands * step, 0, 0
        own = jax.lax.dynamic_slice(x, first, (self.images, rows if banded else x.shape[1], *x.shape[2:]))
        return padded(own, (0, 0), (0, 0) if banded else sides[0], sides[1])

    def tiles_of_input(self, x: jax.Array, i: jax.Array | int) -> jax.Array:
        """[lines^2, tiles, c]: tiles of part i, which overlap, in the basis in which convolutions are products.

        Whole stacks go from stage to stage: one loop per line of a matrix. A loop for each of the products is four
        times as much to compile.
        """
        matrix, (*_, c), side = _matrices(self.tile, self.taps).input, x.shape, self.block
        step = side * self.tiles[0] * self.tile
        x = self.slice(x, i, step + side * (self.taps - 1), step, self.padding)
        x = x.reshape(len(x), -1, side, x.shape[2] // side, side, c)
        lines = _combined(matrix, self._overlapping(x, axis=1), axis=0)  # [lines, images, rows, side, w, side, c]
        stacks = [jnp.swapaxes(x, 3, 4) for x in self._overlapping(lines, axis=4)]
        return _combined(matrix, stacks, axis=0).reshape(len(matrix) ** 2, -1, side**2 * c)

    def _overlapping(self, x: jax.Array, axis: int) -> list[jax.Array]:
        """The lines that tiles depend on: as many arrays, each with the k-th line of every tile along `axis`."""
        lines = self.tile + self.taps - 1
        last = x.shape[axis] - lines + 1
        return [jax.lax.slice_in_dim(x, k, k + last, self.tile, axis) for k in range(lines)]


def _tiles_of_gradient(g: jax.Array, tile: int, taps: int) -> jax.Array:
    """[b, h, w, f], sides multiples of the tile's -> [lines^2, tiles, f]: the transpose of how results are found from
    products."""
    b, h, w, f = g.shape
    matrix = _matrices(tile, taps).result.T
    g = g.reshape(b, h // tile, tile, w, f)
    lines = _combined(matrix, [g[:, :, k] for k in range(tile)], axis=0)
    lines = lines.reshape(len(matrix), b, h // tile, w // tile, tile, f)
    tiled = _combined(matrix, [lines[..., k, :] for k in range(tile)], axis=0)
    return tiled.reshape(len(matrix) ** 2, -1, f)


def _combined(matrix: np.ndarray, lines: Sequence[jax.Array], axis: int) -> jax.Array:
    """Sums of lines, one for each row of the matrix, along a new axis; additions and a few products."""
    out = []
    for row in matrix.tolist():
        terms = [line if factor == 1 else factor * line for factor, line in zip(row, lines, strict=True) if factor]
        out.append(sum(terms[1:], terms[0]))
    return jnp.stack(out, axis)


class Kernel(NamedTuple):
    """A fixed 3x3 kernel in the basis of the tiles, for the convolution and for its gradient."""

    forward: jax.Array
    """[36, c, f]"""
    backward: jax.Array
    """[36, f, c]"""


def transform(kernel: np.ndarray | jax.Array) -> Kernel:
    """[3, 3, c, f] -> Kernel."""
    kernel = jnp.asarray(kernel)
    return Kernel(spectrum(kernel, _FIXED), spectrum(jnp.swapaxes(kernel[::-1, ::-1], 2, 3), _FIXED))


@jax.custom_vjp
def conv(x: jax.Array, kernel: Kernel) -> jax.Array:
    """The convolution of stride 1 with as much zero padding as keeps the size, [b, h, w, c] -> [b, h, w, f].

    Its gradient to x is another one, so that derivatives of every order stay fast; that to the kernel is taken to be
    zero.
    """
    return _of_spectrum(x, kernel.forward, ((1, 1), (1, 1)), taps=3)


def _conv_forward(x: jax.Array, kernel: Kernel) -> tuple[jax.Array, Kernel]:
    return conv(x, kernel), kernel


def _conv_backward(kernel: Kernel, g: jax.Array) -> tuple[jax.Array, Kernel]:
    return conv(g, Kernel(kernel.backward, kernel.forward)), jax.tree.map(jnp.zeros_like, kernel)


conv.defvjp(_conv_forward, _conv_backward)
