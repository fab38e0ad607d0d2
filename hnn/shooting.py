"""Trajectory matching by multiple shooting: what noisy observations need.

A trajectory of n points is cut into segments. Every segment has an initial state of its own, learned along with the
network and started at the noisy observation; all segments are rolled out in parallel, compared with the observations,
and tied together by a penalty on the gaps between them that grows over the training. So the sequential depth stays
short, the matrix products are large, and no gradient has to travel through a long rollout before the field is right.
(Bock 1983; for networks: Turan and Jaeschke 2021.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hnn.config import Rollout
from hnn.data import Trajectories
from hnn.model import FieldModel
from lib.process import UserError
from lib.train import Loss

_GRID_TOLERANCE = 0.05


def segments(part: Trajectories, interval: float, points: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Observations of one seed cut into segments of `points` samples.

    Returns {"y", "dy": [n_traj, S, points, d], "mask": [n_traj, S, points, 1] (0: no observation)} and the starting
    guesses of the initial states [n_traj, S, d]. Samples missing from a regular grid are masked; rows behind a gap
    longer than a segment are left out. Raises UserError for times that are on no regular grid.
    """
    steps = (part.t - part.t[0]) / interval
    index = np.round(steps).astype(int)
    if np.abs(steps - index).max() > _GRID_TOLERANCE:
        raise UserError("trajectory matching needs times on a regular grid (samples may be missing)")
    gaps = np.flatnonzero(np.diff(index) > points)
    kept = int(gaps[0]) + 1 if gaps.size else len(index)
    index, y, dy = index[:kept], part.y[:, :kept], part.dy[:, :kept]
    count = -(-(index[-1] + 1) // points)
    shape = (y.shape[0], count * points, y.shape[-1])
    grid_y, grid_dy, mask = (
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros((*shape[:2], 1), np.float32),
    )
    grid_y[:, index], grid_dy[:, index], mask[:, index] = y, dy, 1
    at = np.arange(count) * points
    first = np.stack([[np.interp(at, index, column) for column in trajectory.T] for trajectory in y])
    cut = {"y": grid_y, "dy": grid_dy, "mask": mask}
    arrays = {name: a.reshape(shape[0], count, points, -1) for name, a in cut.items()}
    return arrays, np.moveaxis(first, 1, 2).astype(np.float32)


def rollout_segments(field: Callable, starts: jax.Array, points: int, interval: float, per_step: int):
    """Runge-Kutta steps over `per_step` samples each: starts [b, d] -> states [b, points + 1, d], slopes [b, nodes, d].

    Samples between two steps are cubic Hermite interpolations. The slope at a node is the first Runge-Kutta stage.
    """
    h = per_step * interval

    def step(y: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k1 = field(y)
        k2 = field(y + h / 2 * k1)
        k3 = field(y + h / 2 * k2)
        k4 = field(y + h * k3)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), (y, k1)

    end, (ys, slopes) = jax.lax.scan(step, starts, None, length=points // per_step)
    if per_step > 1:
        t = (jnp.arange(per_step) / per_step)[None, :, None, None]
        a, b = ys[:, None], jnp.concatenate([ys[1:], end[None]])[:, None]
        da, db = h * slopes[:, None], h * jnp.concatenate([slopes[1:], field(end)[None]])[:, None]
        ys = (1 + 2 * t) * (1 - t) ** 2 * a + t * (1 - t) ** 2 * da + t * t * (3 - 2 * t) * b + t * t * (t - 1) * db
        ys = ys.reshape(-1, *starts.shape)
    return jnp.concatenate([ys, end[None]]).swapaxes(0, 1), slopes.swapaxes(0, 1)


def third_derivative(scalar: Callable[[jax.Array], jax.Array], x: jax.Array, v: jax.Array) -> jax.Array:
    """d^3/ds^3 scalar(x + s v) at s = 0; zero where the scalar is quadratic."""
    f = lambda s: scalar(x + s * v)  # noqa: E731
    for _ in range(3):
        f = partial(lambda g, s: jax.jvp(g, (s,), (1.0,))[1], f)
    return f(0.0)


def multiple_shooting(model: FieldModel, options: Rollout, interval: float) -> Loss:
    """Mean squared misfit of the segments to the observations, with continuity between segments.

    params {"net", "starts": [n_traj, S, d]}; batch of `segments`, and "step", the number of the update. With
    `derivative_weight` the observed derivatives are matched along the estimated states. With `roughness_weight` the
    squared third derivative of H in random directions is added: between the few trajectories, the smoothest H.
    """
    points, per_step = options.segment_points, options.samples_per_step
    growth = options.continuity_end / options.continuity_start

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array):
        net, starts = params["net"], params["starts"]
        trajectories, count, dimension = starts.shape
        field = jax.vmap(partial(model.field, net))
        flat = starts.reshape(-1, dimension)
        path, slopes = rollout_segments(field, flat, points, interval, per_step)
        path = path.reshape(trajectories, count, points + 1, dimension)
        numbers = dimension * batch["mask"].sum()
        misfit = jnp.sum((path[:, :, :points] - batch["y"]) ** 2 * batch["mask"]) / numbers
        gap = jnp.sum((path[:, :-1, points] - starts[:, 1:]) ** 2) / numbers
        weight = options.continuity_start * growth ** (batch["step"] / options.steps)
        total, parts = misfit + weight * gap, {"misfit": misfit, "gap": gap}
        if options.derivative_weight:
            nodes = (trajectories * count, points // per_step, dimension)
            observed = batch["dy"][:, :, ::per_step].reshape(nodes)
            there = batch["mask"][:, :, ::per_step].reshape(*nodes[:2], 1)
            parts["derivative"] = jnp.sum((slopes - observed) ** 2 * there) / (dimension * there.sum())
            total += options.derivative_weight * parts["derivative"]
        if options.roughness_weight or options.dissipation_roughness_weight:
            at = jax.lax.stop_gradient(path[:, :, :points].reshape(-1, dimension))[::5]  # enough, and cheap
            if model.potential is not None:
                # Friction leads from the observed states towards the origin.
                at = at * jax.random.uniform(jax.random.fold_in(key, 1), (at.shape[0], 1))
                parts["dissipation_roughness"] = _roughness(partial(model.potential, net), at, key)
                total += options.dissipation_roughness_weight * parts["dissipation_roughness"]
            parts["roughness"] = _roughness(partial(_hamiltonian, model, net), at, key)
            total += options.roughness_weight * parts["roughness"]
        return total, parts

    return loss


def _hamiltonian(model: FieldModel, net: Any, y: jax.Array) -> jax.Array:
    assert model.hamiltonian is not None
    return model.hamiltonian(net, *jnp.split(y, 2))


def _roughness(scalar: Callable, at: jax.Array, key: jax.Array) -> jax.Array:
    directions = jax.random.normal(key, at.shape)
    return jnp.mean(jax.vmap(partial(third_derivative, scalar))(at, directions) ** 2)


def shooting_optimizer(options: Rollout, adam: Callable[[float], optax.GradientTransformation]):
    """Separate peak learning rates for the network (with weight decay) and for the initial states."""
    net = optax.chain(optax.add_decayed_weights(options.weight_decay), adam(options.lr))
    return optax.partition({"net": net, "starts": adam(options.starts_lr)}, {"net": "net", "starts": "starts"})
