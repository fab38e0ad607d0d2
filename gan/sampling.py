"""Samples of a trained generator, by one compiled program that is called for every block of them."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gan.data import Facts
from gan.model import Gan
from lib.latents import slerp
from lib.process import UserError
from lib.rows import compile_rows
from lib.shard import example_keys

_WIDTH = 128  # images that a device makes at once
_TIMED = 512


@dataclasses.dataclass(frozen=True)
class Trained:
    """A generator with the averaged weights and running statistics that samples are made with."""

    model: Gan
    variables: Any
    facts: Facts
    step: int


Generate = Callable[[Any, np.ndarray, np.ndarray | None], np.ndarray]


@functools.cache
def compile_generator(model: Gan, mesh: Mesh) -> Generate:
    """`generate(variables, z [n, latent], y [n, classes] | None) -> [n, *shape]`, in blocks spread over the mesh."""

    def block(variables: Any, numbers: jax.Array, rows: dict[str, Any]) -> jax.Array:
        return model.generate(variables, rows["z"], rows["y"], train=False)[0]

    run = compile_rows(block, mesh, _WIDTH)
    return lambda variables, z, y: run(variables, {"z": z, "y": y})


def latents(model: Gan, seed: int, count: int, stream: int = 0) -> np.ndarray:
    """float32 [count, latent], N(0, 1); row i depends on the seed, the stream and on i alone."""
    return np.asarray(_normal_rows(jax.random.key(seed), stream, count, model.latent))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normal_rows(key: jax.Array, stream: int, count: int, width: int) -> jax.Array:
    keys = example_keys(jax.random.fold_in(key, stream), count)
    return jax.vmap(lambda key: jax.random.normal(key, (width,)))(keys)


def classes_of(model: Gan, count: int, label: int | None = None) -> np.ndarray | None:
    """One-hot rows [count, classes], of `label` or of all classes in turn; None where the networks know none.

    Raises UserError for a class that there is not.
    """
    if not model.classes:
        if label is not None:
            raise UserError("this network knows no classes: it cannot be asked for one")
        return None
    if label is not None and not 0 <= label < model.classes:
        raise UserError(f"the label is {label}: the classes are 0 to {model.classes - 1}")
    chosen = np.arange(count) % model.classes if label is None else np.full(count, label)
    return np.eye(model.classes, dtype=np.float32)[chosen]


def draw_samples(
    trained: Trained, count: int, *, mesh: Mesh, seed: int = 0, label: int | None = None, stream: int = 0
) -> np.ndarray:
    """[count, *shape]; sample i depends on the seed, the stream and on i alone."""
    z, y = latents(trained.model, seed, count, stream), classes_of(trained.model, count, label)
    return compile_generator(trained.model, mesh)(trained.variables, z, y)


def images_per_s(trained: Trained, mesh: Mesh) -> float:
    """Of the compiled generator, latents given and images fetched: the median of five times 512, after a first one."""
    z, y = latents(trained.model, 0, _TIMED), classes_of(trained.model, _TIMED)
    generate, seconds = compile_generator(trained.model, mesh), []
    for _ in range(6):
        begin = time.perf_counter()
        generate(trained.variables, z, y)
        seconds.append(time.perf_counter() - begin)
    return _TIMED / statistics.median(seconds[1:])


def slerp_rows(a: np.ndarray, b: np.ndarray, columns: int) -> np.ndarray:
    """Latents [n, latent] to latents, along arcs: [n * columns, latent], `columns` for every pair."""
    weights = jnp.linspace(0, 1, columns)
    arcs = jax.jit(jax.vmap(lambda a, b: slerp(a, b, weights)))(a, b)
    return np.asarray(arcs).reshape(-1, a.shape[-1])
