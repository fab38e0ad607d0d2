"""What several tests of Hamiltonian networks share: exact data, and the networks once more in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hnn.data import Trajectories
from hnn.model import FieldModel, SequenceModel
from hnn.systems import SYSTEMS, system_field

KEY = jax.random.key(5)
SPRING = SYSTEMS["spring"]
RNG = np.random.default_rng(0)


def numpy_mlp(params, x):
    layers = params["params"]
    for name in ("Dense_0", "Dense_1"):
        x = np.tanh(x @ np.asarray(layers[name]["kernel"]) + np.asarray(layers[name]["bias"]))
    return x @ np.asarray(layers["Dense_2"]["kernel"])


def numpy_lstm(params, carry, y):
    cell, out = params["params"]["OptimizedLSTMCell_0"], params["params"]["Dense_0"]
    c, h = carry
    gate = lambda k: y @ cell[f"i{k}"]["kernel"] + h @ cell[f"h{k}"]["kernel"] + cell[f"h{k}"]["bias"]  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    c = sigmoid(gate("f")) * c + sigmoid(gate("i")) * np.tanh(gate("g"))
    h = sigmoid(gate("o")) * np.tanh(c)
    return (c, h), y + h @ out["kernel"] + out["bias"]


@functools.cache
def small_lstm():
    """A network of 8 units for one degree of freedom, and its initial parameters."""
    net = SequenceModel(1, 8)
    return net, jax.tree.map(np.asarray, net.init(KEY, net.start(), jnp.zeros(2)))


def spring_part(points=30, trajectories=3, seeds=0):
    """Exact trajectories of the spring: energies 1, 4, 9, ..."""
    t = np.linspace(0, 3, points)
    radius = 1 + np.arange(trajectories)[:, None]
    angle = radius - 2 * t
    y = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    dy = 2 * np.stack([y[..., 1], -y[..., 0]], axis=-1)
    if seeds:
        y, dy = (np.broadcast_to(a, (seeds, *a.shape)) for a in (y, dy))
    return Trajectories(t, y, y, dy)


TRUE = FieldModel(lambda key: {}, lambda params, y: system_field(SPRING)(y), lambda params, q, p: jnp.sum(q**2 + p**2))
