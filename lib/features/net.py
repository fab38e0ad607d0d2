"""What every feature network looks like to those who measure with it."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lib.shard import DATA, compile_step, fetch, place

_IN_FLIGHT = 2


class Features(NamedTuple):
    """What a network says about a batch of images."""

    pool: jax.Array  # float32 [b, dimension], the features that distances are measured on
    logits: jax.Array  # float32 [b, classes], before the softmax (or before the sigmoids)


@dataclasses.dataclass(frozen=True)
class FeatureNet:
    """A frozen network as a measuring instrument; metrics carry its `name` in theirs."""

    name: str
    apply: Callable[[Any, jax.Array], Features]
    """pure: `apply(params, images)` with images uint8 [b, h, w, channels] of a size that `sizes_px` allows"""
    params: Any
    dimension: int
    classes: int
    channels: int
    sizes_px: tuple[int, ...] | None
    """the image sizes (height = width) it was trained for; None: it resizes any size itself"""
    weights_sha256: str
    """of the bytes of its weight file: two scores compare only if this is the same"""
    preprocessing: str
    """what it does to pixels, for the protocol of a score"""
    one_vs_rest: bool = False
    """whether each class has a sigmoid of its own, so that an image can be of several; else a softmax over all"""

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """[..., classes] of logits [..., classes]."""
        return jax.nn.sigmoid(logits) if self.one_vs_rest else jax.nn.softmax(logits)


def outputs(
    net: FeatureNet, batches: Iterable[np.ndarray], *, batch_size: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(pool, logits) float32 of uint8 batches [b, h, w, c], spread over the devices of `mesh`, in order.

    One program for all of them: a batch of less than `batch_size` is filled up with copies of its last image, whose
    outputs are cut off again. Grey images are repeated for a network that takes colour.
    """
    rows = -(-batch_size // mesh.size) * mesh.size

    def body(nothing: tuple, params: Any, pixels: jax.Array) -> tuple[tuple, Any]:
        return nothing, net.apply(params, pixels.repeat(net.channels // pixels.shape[3], axis=3))

    how = "jit" if mesh.size == 1 else "shard_map"
    apply = compile_step(body, mesh, how, in_specs=(P(), P(), P(DATA)), out_specs=(P(), P(DATA)))
    params = place(net.params, mesh)

    def finished(count: int, device: Any) -> tuple[np.ndarray, np.ndarray]:
        pool, logits = fetch(device)
        return pool[:count], logits[:count]

    in_flight: deque[tuple[int, Any]] = deque()
    for pixels in batches:
        count = len(pixels)
        if count < rows:
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], rows - count, axis=0)])
        in_flight.append((count, apply((), params, place(pixels, mesh, P(DATA)))[1]))
        if len(in_flight) == _IN_FLIGHT:  # the next batch is read while this one is computed
            yield finished(*in_flight.popleft())
    while in_flight:
        yield finished(*in_flight.popleft())
