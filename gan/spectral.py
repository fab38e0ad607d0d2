"""Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957): every weight of the critic over its largest singular
value, which a power iteration follows.

A kernel [..., inputs, outputs] counts as the matrix [outputs, rest]. Its singular vectors u and v are kept from one
update of the critic to the next, and one iteration is made per update, however often the critic is called in it.
Between updates, as in the generator's, the vectors stay. Vectors (biases) are left as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

_EPSILON = 1e-12


def start(params: Any, key: jax.Array) -> Any:
    """{path: {"u": [outputs], "v": [rest]}} for every matrix in `params`: u random, v = W'u."""
    found = {}
    for i, (path, kernel) in enumerate(sorted(_matrices(params).items())):
        u = _unit(jax.random.normal(jax.random.fold_in(key, i), (kernel.shape[0],)))
        found[path] = {"u": u, "v": _unit(kernel.T @ u)}
    return unflatten_dict(found)


def iterate(params: Any, vectors: Any) -> Any:
    """One power iteration: v = W'u, u = W v, both of length one. No gradient passes through it."""

    def once(kernel: jax.Array, pair: dict[str, jax.Array]) -> dict[str, jax.Array]:
        v = _unit(kernel.T @ pair["u"])
        return {"u": _unit(kernel @ v), "v": v}

    return jax.lax.stop_gradient(_zip(once, params, vectors))


def norms(params: Any, vectors: Any) -> Any:
    """sigma = u'W v of every matrix, []; its gradient to W is u v'."""
    return _zip(lambda kernel, pair: pair["u"] @ (kernel @ pair["v"]), params, jax.lax.stop_gradient(vectors))


def normalised(params: Any, vectors: Any) -> Any:
    """`params` with every matrix divided by its sigma."""
    flat = flatten_dict(params)
    for path, sigma in flatten_dict(norms(params, vectors)).items():
        flat[path] = flat[path] / sigma
    return unflatten_dict(flat)


def _matrices(params: Any) -> dict[tuple, jax.Array]:
    return {path: _matrix(leaf) for path, leaf in flatten_dict(params).items() if jnp.ndim(leaf) > 1}


def _matrix(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(-1, kernel.shape[-1]).T


def _zip(fn: Any, params: Any, vectors: Any) -> Any:
    flat = flatten_dict(vectors, is_leaf=lambda path, tree: set(tree) == {"u", "v"})
    matrices = _matrices(params)
    return unflatten_dict({path: fn(matrices[path], pair) for path, pair in flat.items()})


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.linalg.norm(x) + _EPSILON)
