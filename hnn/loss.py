"""What the networks are trained on. Every loss is `loss(params, batch, key) -> (scalar, {name: scalar})`, pure.

Derivative matching is the paper's loss. On noisy observations it is biased: noise on the inputs of a regression
shrinks the fitted field, so a spring comes out too slow however many data there are. Trajectory matching compares
positions with positions instead, and estimates the states that the noise hides along with the field.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from hnn.config import Pixels
from hnn.model import PixelModel, SequenceModel, VectorField
from lib.train import Loss


def derivative_matching(field: VectorField, robust_scale: float | None = None) -> Loss:
    """Mean squared error between field(y) and the observed y' (paper eq. 3); batch {"y": [b, 2n], "dy": [b, 2n]}.

    With `robust_scale`, observations count 1 / (1 + |y'|^2 / robust_scale): the few with enormous accelerations,
    which no network of this size can fit, otherwise decide the whole loss.
    """

    def loss(params, batch, key):
        del key
        predicted = jax.vmap(partial(field, params))(batch["y"])
        error = jnp.mean((predicted - batch["dy"]) ** 2, axis=-1)
        if robust_scale is not None:
            error = error / (1 + jnp.sum(batch["dy"] ** 2, axis=-1) / robust_scale)
        return jnp.mean(error), {}

    return loss


def next_observation(model: SequenceModel) -> Loss:
    """Mean squared error of each next observation given all before it; batch {"y": [b, T, 2n]}."""

    def loss(params, batch, key):
        del key

        def one(ys: jax.Array) -> jax.Array:
            _, predicted = jax.lax.scan(lambda carry, y: model.apply(params, carry, y), model.start(), ys[:-1])
            return jnp.mean((predicted - ys[1:]) ** 2)

        return jnp.mean(jax.vmap(one)(batch["y"])), {}

    return loss


def rk4_step(field, y: jax.Array, dt: float) -> jax.Array:
    """One classical Runge-Kutta step of y' = field(y)."""
    k1 = field(y)
    k2 = field(y + dt / 2 * k1)
    k3 = field(y + dt / 2 * k2)
    k4 = field(y + dt * k3)
    return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def latent_dynamics(model: PixelModel, options: Pixels) -> Loss:
    """Autoencoder, canonical coordinates and latent dynamics at once; batch {"frames": uint8 [b, window + 1, h, w]}.

    The paper's three terms (section 5), with two changes. The dynamics term follows the latent field over a window of
    frames by Runge-Kutta steps, where the paper takes one Euler step over one frame. With `normalized`, the latter two
    terms are divided by the variance of the coordinate that they compare, so that shrinking the latent space, which
    starves the decoder, gains nothing.
    """

    def loss(params, batch, key):
        del key
        frames = batch["frames"].astype(jnp.float32) / 255
        flat = frames.reshape(*frames.shape[:2], -1)
        pairs = jnp.concatenate([flat[:, :-1], flat[:, 1:]], axis=-1)
        z: jax.Array = model.apply(params, pairs, method="encode")  # pyright: ignore[reportAssignmentType]
        reconstruction = jnp.mean((model.apply(params, z, method="decode") - pairs) ** 2)
        field = jax.vmap(lambda one: model.apply(params, one, method="field"))

        def advance(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            state = rk4_step(field, state, options.stride)
            return state, state

        _, predicted = jax.lax.scan(advance, z[:, 0], length=(options.window - 1) // options.stride)
        variance = jnp.var(z, axis=(0, 1)) if options.normalized else jnp.ones(2)
        canonical = jnp.mean((z[:, :-1, 1] - (z[:, 1:, 0] - z[:, :-1, 0])) ** 2) / variance[1]
        followed = z[:, options.stride :: options.stride]
        dynamics = jnp.mean((jnp.moveaxis(predicted, 0, 1) - followed) ** 2 / variance)
        total = reconstruction + options.canonical_weight * canonical + options.dynamics_weight * dynamics
        return total, {"reconstruction": reconstruction, "canonical": canonical, "dynamics": dynamics}

    return loss
