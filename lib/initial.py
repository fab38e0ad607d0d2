"""Initial weights from a single draw.

Compiling a random program per array, as linen's initialisers do, took three quarters of a minute for NCSN on one core.
Here they return a `Draw`, which says what is wanted, and `initialised` fills all of them from two random vectors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Initializer = Callable[..., Any]
Kind = Literal["uniform", "normal"]


@flax.struct.dataclass
class Draw(nn.meta.AxisMetadata):
    """A box, in linen's sense, around an array that is still to be drawn."""

    value: Any
    kind: Kind = flax.struct.field(pytree_node=False)
    mean: float = flax.struct.field(pytree_node=False)
    std: float = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict) -> Any:
        raise NotImplementedError

    def remove_axis(self, index: int, params: dict) -> Any:
        raise NotImplementedError


def _initializer(kind: Kind, mean: float, std: Callable[[tuple[int, ...]], float]) -> Initializer:
    return lambda key, shape, dtype=jnp.float32: Draw(jnp.zeros(shape, dtype), kind, mean, std(shape))


def normal(std: float, mean: float = 0.0) -> Initializer:
    return _initializer("normal", mean, lambda shape: std)


def uniform(bound: float) -> Initializer:
    """In (-bound, bound)."""
    return _initializer("uniform", 0.0, lambda shape: bound / 3**0.5)


def xavier(gain: float = 1.0) -> Initializer:
    """Uniform of variance 2 gain^2 / (fan_in + fan_out), kernels [..., inputs, outputs] (Glorot and Bengio 2010)."""
    fans = lambda shape: math.prod(shape[:-2]) * (shape[-2] + shape[-1])  # noqa: E731
    return _initializer("uniform", 0.0, lambda shape: gain * (2 / fans(shape)) ** 0.5)


def constant(value: float) -> Initializer:
    return _initializer("uniform", value, lambda shape: 0.0)


def initialised(net: nn.Module, *args: Any) -> Callable[[jax.Array], Any]:
    """`init(key) -> params` of a module that is applied to `args`; what is named "bias" and is no Draw is zero.

    `init` raises TypeError where any other parameter is no Draw.
    """

    def init(key: jax.Array) -> Any:
        boxes = jax.eval_shape(lambda key: net.init(key, *args), key)
        leaves, tree = jax.tree_util.tree_flatten_with_path(boxes, is_leaf=_is_draw)
        draws = [leaf for _, leaf in leaves if _is_draw(leaf) and leaf.std]
        size = {kind: sum(draw.value.size for draw in draws if draw.kind == kind) for kind in ("uniform", "normal")}
        unit = _unit_variance(key, size["uniform"], size["normal"])
        if not isinstance(key, Tracer):
            unit = jax.tree.map(np.asarray, unit)  # slices of NumPy's need no compiler
        used = dict.fromkeys(unit, 0)

        def fill(path: tuple, leaf: Any) -> jax.Array:
            if not _is_draw(leaf):
                if path[-1].key != "bias":
                    raise TypeError(f"{jax.tree_util.keystr(path)} has an initialiser from outside lib.initial")
                return jnp.zeros(leaf.shape, leaf.dtype)
            shape, dtype = leaf.value.shape, leaf.value.dtype
            if not leaf.std:
                return jnp.full(shape, leaf.mean, dtype)
            start = used[leaf.kind]
            used[leaf.kind] += leaf.value.size
            flat = leaf.mean + leaf.std * unit[leaf.kind][start : used[leaf.kind]]
            return jnp.asarray(flat.reshape(shape), dtype)

        return jax.tree.unflatten(tree, [fill(path, leaf) for path, leaf in leaves])

    return init


def _is_draw(x: Any) -> bool:
    return isinstance(x, Draw)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unit_variance(key: jax.Array, uniform: int, normal: int) -> dict[Kind, jax.Array]:
    """So many numbers of mean 0 and variance 1 of each kind."""
    keys, bound = jax.random.split(key), 3**0.5
    return {
        "uniform": jax.random.uniform(keys[0], (uniform,), minval=-bound, maxval=bound),
        "normal": jax.random.normal(keys[1], (normal,)),
    }
