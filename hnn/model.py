"""The networks. A model of dynamics is a pure vector field `field(params, y [2n]) -> y' [2n]`; vmap makes batches.

Sizes and initialisation are those of the paper's code (arXiv 1906.01563): three dense layers, 200 hidden units, tanh,
orthogonal weights, biases uniform in +-1/sqrt(fan_in) as PyTorch has them, none in the last layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hnn.systems import field as symplectic_field

Params = Any
VectorField = Callable[[Params, jax.Array], jax.Array]
LearnedHamiltonian = Callable[[Params, jax.Array, jax.Array], jax.Array]


def _torch_bias(fan_in: int) -> Callable:
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class MLP(nn.Module):
    """[..., d] -> [..., outputs] through two tanh layers."""

    outputs: int
    hidden: int = 200

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.Dense(
                self.hidden,
                kernel_init=nn.initializers.orthogonal(),
                bias_init=_torch_bias(x.shape[-1]),
                param_dtype=jnp.float32,
            )(x)
            x = jnp.tanh(x)
        return nn.Dense(self.outputs, use_bias=False, kernel_init=nn.initializers.orthogonal())(x)


@dataclasses.dataclass(frozen=True)
class FieldModel:
    """`init(key) -> params` and `field(params, y [2n]) -> [2n]`.

    Where there are such scalars: `hamiltonian(params, q, p)`, whose symplectic gradient is (part of) the field, and
    `potential(params, y)`, whose gradient is the rest.
    """

    init: Callable[[jax.Array], Params]
    field: VectorField
    hamiltonian: LearnedHamiltonian | None = None
    potential: VectorField | None = None


def baseline(dimension: int, hidden: int = 200) -> FieldModel:
    """The paper's baseline: a network from y straight to y'."""
    net = MLP(2 * dimension, hidden)
    return FieldModel(lambda key: net.init(key, jnp.zeros(2 * dimension)), net.apply)


def _from_hamiltonian(init: Callable[[jax.Array], Params], hamiltonian: LearnedHamiltonian) -> FieldModel:
    def field(params: Params, y: jax.Array) -> jax.Array:
        return symplectic_field(lambda q, p: hamiltonian(params, q, p))(y)

    return FieldModel(init, field, hamiltonian)


def hnn(dimension: int, hidden: int = 200) -> FieldModel:
    """A Hamiltonian network: one scalar H(q, p), followed along its symplectic gradient (paper, section 2)."""
    net = MLP(1, hidden)

    def hamiltonian(params: Params, q: jax.Array, p: jax.Array) -> jax.Array:
        return net.apply(params, jnp.concatenate([q, p]))[0]

    return _from_hamiltonian(lambda key: net.init(key, jnp.zeros(2 * dimension)), hamiltonian)


def separable(dimension: int, hidden: int = 200) -> FieldModel:
    """H = T(p) + V(q) by two networks: explicit symplectic solvers (Stormer-Verlet, Yoshida) apply."""
    kinetic, potential = MLP(1, hidden), MLP(1, hidden)

    def init(key: jax.Array) -> Params:
        t, v = jax.random.split(key)
        x = jnp.zeros(dimension)
        return {"kinetic": kinetic.init(t, x), "potential": potential.init(v, x)}

    def hamiltonian(params: Params, q: jax.Array, p: jax.Array) -> jax.Array:
        return (kinetic.apply(params["kinetic"], p) + potential.apply(params["potential"], q))[0]

    return _from_hamiltonian(init, hamiltonian)


def dissipative(dimension: int, hidden: int = 200) -> FieldModel:
    """y' = M grad H + 0.1 grad D by two networks: Helmholtz's split into a conservative and a dissipative part.

    Sosanya and Greydanus 2022 (arXiv 2201.10085). The factor starts the training near a conservative field.
    """
    conservative, dissipation = MLP(1, hidden), MLP(1, hidden)

    def init(key: jax.Array) -> Params:
        h, d = jax.random.split(key)
        y = jnp.zeros(2 * dimension)
        return {"conservative": conservative.init(h, y), "dissipation": dissipation.init(d, y)}

    def hamiltonian(params: Params, q: jax.Array, p: jax.Array) -> jax.Array:
        return conservative.apply(params["conservative"], jnp.concatenate([q, p]))[0]

    def potential(params: Params, y: jax.Array) -> jax.Array:
        return 0.1 * dissipation.apply(params["dissipation"], y)[0]

    def field(params: Params, y: jax.Array) -> jax.Array:
        return symplectic_field(partial(hamiltonian, params))(y) + jax.grad(potential, argnums=1)(params, y)

    return FieldModel(init, field, hamiltonian, potential)


class ResidualMLP(nn.Module):
    """[..., d] -> [..., outputs]: the paper's encoder, and mirrored its decoder; relu, residual inner layers."""

    outputs: int
    hidden: int = 200

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(features: int, x: jax.Array) -> jax.Array:
            bias = _torch_bias(x.shape[-1])
            return nn.Dense(features, kernel_init=nn.initializers.orthogonal(), bias_init=bias)(x)

        h = nn.relu(dense(self.hidden, x))
        for _ in range(2):
            h = h + nn.relu(dense(self.hidden, h))
        return dense(self.outputs, h)


class PixelModel(nn.Module):
    """Two stacked frames [..., 2 h w] <-> latent z [..., 2] = (q, p), and a field on z per frame (paper, section 5).

    The decoder sees `gain` times z: with orthogonal weights its relu kinks lie at inputs of that size.
    """

    pixels: int
    conservative: bool = True
    hidden: int = 200
    gain: float = 10.0

    def setup(self) -> None:
        self.encoder = ResidualMLP(2, self.hidden)
        self.decoder = ResidualMLP(2 * self.pixels, self.hidden)
        self.dynamics = MLP(1 if self.conservative else 2, self.hidden)

    def encode(self, pair: jax.Array) -> jax.Array:
        return self.encoder(pair)

    def decode(self, z: jax.Array) -> jax.Array:
        return self.decoder(self.gain * z)

    def field(self, z: jax.Array) -> jax.Array:
        """z' of one latent state z [2], per frame."""
        if not self.conservative:
            return self.dynamics(z)
        return symplectic_field(lambda q, p: self.dynamics(jnp.concatenate([q, p]))[0])(z)

    def __call__(self, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        """All parts once, for initialisation."""
        z = self.encode(pair)
        return self.decode(z), self.dynamics(z)


class SequenceModel(nn.Module):
    """An LSTM that sees y_t and gives y_{t+1} - y_t on the data's own time grid; the baseline without a field."""

    dimension: int
    hidden: int = 200

    @nn.compact
    def __call__(self, carry: Any, y: jax.Array) -> tuple[Any, jax.Array]:
        """One step for y [2n]: the new carry and the predicted y at the next time."""
        carry, out = nn.OptimizedLSTMCell(self.hidden)(carry, y)
        return carry, y + nn.Dense(2 * self.dimension)(out)

    def start(self) -> Any:
        """The carry before the first observation."""
        return (jnp.zeros(self.hidden), jnp.zeros(self.hidden))


def lstm_follow(model: SequenceModel, params: Params, y0: jax.Array, count: int) -> jax.Array:
    """A trajectory [count, 2n] from y0 [2n], each prediction fed back as the next input."""

    def step(state: tuple[Any, jax.Array], _: None) -> tuple[tuple[Any, jax.Array], jax.Array]:
        carry, y = model.apply(params, *state)
        return (carry, y), y

    carry = jax.tree.map(lambda c: c.astype(y0.dtype), model.start())
    _, ys = jax.lax.scan(step, (carry, y0), None, length=count - 1)
    return jnp.concatenate([y0[None], ys])
