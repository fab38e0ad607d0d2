"""How well a trained field follows the true one: derivatives, rollouts, Euler in both senses, the paper's own recipe.

All rollouts are float64 and start from fresh initial conditions that no model has seen. Every number is computed per
seed; `NAME` is the mean over seeds and `NAME.sd` their standard deviation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hnn.data import Dataset, Trajectories
from hnn.model import SequenceModel, lstm_follow
from hnn.solvers import ImplicitMidpoint, rollout
from hnn.systems import System, system_field, total_energy
from lib.shard import DATA, local_mesh

Field = Callable[[Any, jax.Array], jax.Array]
Average = Literal["mean", "median"]

_GROUP = 25
# The initial conditions are the same for every run, whatever its seed: results stay comparable.
_EVALUATION_KEY = 20190604
_SWEEP_SUBSTEPS = tuple(2**k for k in range(9))
SWEPT = 8  # initial conditions of the comparison over step sizes
_LEARNED_SUBSTEPS = tuple(2**k for k in range(6))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model and its parameters, each with a leading axis of seeds."""

    model: Any
    params: Any


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Initial conditions y0 [n, 2n], how long each is followed, and the true trajectories [n, T, 2n]."""

    y0: np.ndarray
    span: np.ndarray
    truth: np.ndarray
    inside: slice
    extrapolation: slice
    original: slice


@functools.lru_cache(maxsize=16)
def _compiled_rollouts(field: Field, points: int, rtol: float) -> Callable:
    ts = np.linspace(0, 1, points)

    def one(params: Any, y0: jax.Array, span: jax.Array) -> jax.Array:
        # In its own unit of time, so that one program serves all spans.
        return rollout(lambda y: span * field(params, y), y0, ts, rtol=rtol, atol=rtol, max_steps=20_000)

    def group(params: Any, seed: jax.Array, y0: jax.Array, span: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda p: p[seed], params)
        return jax.vmap(partial(one, own))(y0, span)

    def groups(params: Any, *parts: jax.Array) -> jax.Array:
        return jax.lax.map(lambda part: group(params, *part), parts)

    along = P(DATA)
    mesh = local_mesh()
    sharded = jax.shard_map(groups, mesh=mesh, in_specs=(P(), along, along, along), out_specs=along, check_vma=False)
    return jax.jit(sharded)  # no collectives: every device follows its own trajectories


def rollouts(field: Field, params: Any, y0: np.ndarray, span: np.ndarray, points: int, rtol: float) -> np.ndarray:
    """Follow a field in float64: y0 [S, n, 2n] for spans [n] gives [S, n, points, 2n]; params lead with [S].

    Trajectories that are stepped together take as many steps as the slowest of them. So they go in groups of like
    span and one seed, one after the other on each device.
    """
    seeds, count, _ = y0.shape
    size = min(count, _GROUP)
    rows = np.resize(np.argsort(span, kind="stable"), (-(-count // size), size))
    seed = np.repeat(np.arange(seeds), len(rows))
    row = np.tile(rows, (seeds, 1))
    padded = np.resize(np.arange(len(seed)), -(-len(seed) // local_mesh().size) * local_mesh().size)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        starts, spans = y0[seed[:, None], row].astype(np.float64), span[row].astype(np.float64)
        ys = _compiled_rollouts(field, points, rtol)(wide, seed[padded], starts[padded], spans[padded])
    out = np.empty((seeds, count, points, y0.shape[-1]))
    out[seed[:, None], row] = np.asarray(ys)[: len(seed)]
    return out


def true_rollouts(system: System, y0: np.ndarray, span: np.ndarray, points: int) -> np.ndarray:
    """The truth from y0 [n, 2n]: [n, points, 2n]."""
    return rollouts(_parameter_free(system), np.zeros(1), y0[None], span, points, 1e-11)[0]


@functools.lru_cache(maxsize=16)
def _parameter_free(system: System) -> Field:
    field = system_field(system)
    return lambda params, y: field(y)


def make_scenes(system: System, t_end: float, count: int, points: int) -> Scenes:
    """Fresh initial conditions inside and outside the training range, and those of the paper's notebook."""
    keys = jax.random.split(jax.random.key(_EVALUATION_KEY), 3)
    original_sampler = system.sample_original_test or system.sample_initial
    samplers = [system.sample_initial, system.sample_extrapolation, original_sampler]
    counts = [count, count if system.sample_extrapolation else 0, 15]
    draws = [(jax.jit(s, static_argnums=1), k, n) for s, k, n in zip(samplers, keys, counts, strict=True) if s and n]
    with jax.enable_x64(True):
        parts = [np.asarray(draw(key, n)) for draw, key, n in draws]
    spans = [np.full(count, t_end), np.full(counts[1], t_end), original_spans(system)]
    y0, span = np.concatenate(parts), np.concatenate(spans)
    truth = true_rollouts(system, y0, span, points)
    ends = np.cumsum(counts)
    return Scenes(y0, span, truth, slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2]))


def original_spans(system: System) -> np.ndarray:
    """How long the paper's notebooks follow each of their 15 trajectories.

    The spring notebook multiplies its time span by 1.09 in place at every call, first for a figure and then once per
    trajectory, so that the horizon grows from 23.8 to 79.4.
    """
    if system.name == "spring":
        return 20 * 1.09 ** np.arange(2, 17)
    return np.full(15, {"two_body": 25.0, "three_body": 3.0}.get(system.name, 20.0))


_compiled_energy = jax.jit(total_energy, static_argnums=0)


def energies(hamiltonian: Callable, ys: np.ndarray) -> np.ndarray:
    """H along trajectories [..., 2n] -> [...], float64."""
    with jax.enable_x64(True):
        return np.asarray(_compiled_energy(hamiltonian, np.asarray(ys, np.float64)))


def _compared_coordinates(system: System, ys: np.ndarray) -> np.ndarray:
    """Positions for the bodies, as in the paper; q and p for everything else."""
    return ys[..., : system.dimension] if system.name in ("two_body", "three_body") else ys


def trajectory_errors(system: System, ys: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors averaged over time and coordinates: of the true energy and of the coordinates, each [..., n]."""
    energy = (energies(system.hamiltonian, ys) - energies(system.hamiltonian, truth)) ** 2
    coordinates = (_compared_coordinates(system, ys) - _compared_coordinates(system, truth)) ** 2
    return energy.mean(-1), coordinates.mean((-2, -1))


def with_sd(name: str, per_seed: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation over seeds (the latter only where there are several)."""
    values = np.asarray(per_seed, np.float64)
    out = {name: float(values.mean())}
    if values.size > 1:
        out[f"{name}.sd"] = float(values.std(ddof=1))
    return out


def derivative_loss(field: Field, params: Any, part: Trajectories) -> np.ndarray:
    """Mean squared error of y' at the observations, per seed [S]; y and dy carry the axis of seeds."""
    flat = [np.asarray(a.reshape(a.shape[0], -1, a.shape[-1]), np.float32) for a in (part.y, part.dy)]
    return np.asarray(_compiled_loss(field)(params, *flat))


@functools.lru_cache(maxsize=16)
def _compiled_loss(field: Field) -> Callable:
    def one(p: Any, y: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.mean((jax.vmap(partial(field, p))(y) - dy) ** 2)

    return jax.jit(lambda *args: jax.lax.map(lambda a: one(*a), args))


def derivative_losses(name: str, field: Field, params: Any, data: Dataset) -> dict[str, float]:
    train, test = (derivative_loss(field, params, part) for part in data)
    return with_sd(f"{name}.train_loss", train) | with_sd(f"{name}.test_loss", test)


def true_field_losses(system: System, data: Dataset) -> dict[str, float]:
    """The noise floor: what the exact field scores on the noisy observations."""
    field = system_field(system)
    nothing = np.zeros(data.train.y.shape[0], np.float32)
    return derivative_losses("true_field", lambda _, y: field(y), nothing, data)


def rollout_numbers(
    name: str, system: System, scenes: Scenes, ys: np.ndarray, average: Average, *, original: bool = True
) -> dict[str, float]:
    """Energy and coordinate errors of rollouts ys [S, n, T, 2n] inside and outside the training range."""
    over_initial = np.median if average == "median" else np.mean
    out: dict[str, float] = {}
    for part, suffix in ((scenes.inside, ""), (scenes.extrapolation, "_extrapolation")):
        if part.start == part.stop:
            continue
        energy, coordinates = trajectory_errors(system, ys[:, part], scenes.truth[part])
        out |= with_sd(f"{name}.energy_mse{suffix}", over_initial(energy, axis=-1))
        out |= with_sd(f"{name}.coordinate_mse{suffix}", over_initial(coordinates, axis=-1))
        if average == "median":
            out |= with_sd(f"{name}.energy_mse{suffix}_mean", energy.mean(-1))
    if original:
        energy = system.original_energy or system.hamiltonian
        wrong = energies(energy, ys[:, scenes.original]) - energies(energy, scenes.truth[scenes.original])
        out |= with_sd(f"{name}.energy_mse_original_recipe", (wrong**2).mean((-2, -1)))
    return out


def field_numbers(
    name: str, trained: Trained, system: System, scenes: Scenes, average: Average, rtol: float
) -> tuple[dict[str, float], np.ndarray]:
    """Rollout metrics of a field, and the rollouts [S, n, T, 2n] themselves.

    `reversal_error`: follow the field for the whole span, flip the momenta, follow it once more, flip back: the mean
    squared distance to the start. Zero for every exact mechanical system without dissipation.
    """
    follow = partial(rollouts, trained.model.field, trained.params, span=scenes.span, rtol=rtol)
    seeds, points = jax.tree.leaves(trained.params)[0].shape[0], scenes.truth.shape[1]
    ys = follow(np.broadcast_to(scenes.y0, (seeds, *scenes.y0.shape)), points=points)
    out = rollout_numbers(name, system, scenes, ys, average)
    if system.dissipation is None:
        flip = np.repeat([1.0, -1.0], system.dimension)
        returned = follow(ys[:, :, -1] * flip, points=points)[:, scenes.inside, -1] * flip
        distance = (returned - scenes.y0[scenes.inside]) ** 2
        out |= with_sd(f"{name}.reversal_error", distance.mean((-2, -1)))
    return out, ys


def recorded_numbers(
    name: str, trained: Trained, system: System, ts: np.ndarray, observed: np.ndarray, rtol: float
) -> tuple[dict[str, float], np.ndarray]:
    """A field followed from the first of the measured rows [T, 2n] at ts [T], against the others; rollouts [S, T, 2n].

    The original recipe differs by the solver's tolerances alone: Dormand-Prince at rtol 1e-3, atol 1e-6.
    """
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), trained.params)
        y0 = jnp.asarray(observed[0])

        def follow(p: Any, **options: Any) -> jax.Array:
            return rollout(partial(trained.model.field, p), y0, ts, **options)

        ys = np.asarray(jax.jit(jax.vmap(partial(follow, rtol=rtol, atol=rtol)))(params))
        rough = partial(follow, solver=diffrax.Dopri5(), rtol=1e-3, atol=1e-6)
        original = np.asarray(jax.jit(jax.vmap(rough))(params))
    energy, coordinates = trajectory_errors(system, ys, observed)
    out = with_sd(f"{name}.energy_mse", energy) | with_sd(f"{name}.coordinate_mse", coordinates)
    energy, _ = trajectory_errors(system, original, observed)
    return out | with_sd(f"{name}.energy_mse_original_recipe", energy), ys


def constant_energy_numbers(system: System, observed: np.ndarray) -> dict[str, float]:
    """What a model scores that keeps the energy of the first row for ever: the floor of every conservative one."""
    energy = energies(system.hamiltonian, observed)
    return {"constant.energy_mse": float(np.mean((energy - energy[0]) ** 2))}


def lstm_numbers(
    trained: Trained, system: System, scenes: Scenes, interval: float, average: Average
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The sequence model on its own time grid of step `interval`: metrics, times and rollouts."""
    t_end = float(scenes.span[0])
    count = int(t_end / interval) + 1
    ts = interval * np.arange(count)
    start = slice(0, scenes.extrapolation.stop)
    y0 = scenes.y0[start]
    follow = partial(lstm_follow, trained.model, count=count)
    many = jax.jit(jax.vmap(jax.vmap(follow, in_axes=(None, 0)), in_axes=(0, None)))
    ys = np.asarray(many(trained.params, jnp.asarray(y0, jnp.float32)), np.float64)
    truth = true_rollouts(system, y0, np.full(len(y0), ts[-1]), count)
    own = dataclasses.replace(scenes, truth=truth)
    return rollout_numbers("lstm", system, own, ys, average, original=False), ts, ys


def lstm_trajectory(model: SequenceModel, params: Any, y0: np.ndarray, count: int) -> np.ndarray:
    """One trajectory [count, 2n] of the sequence model from y0 [2n]."""
    return np.asarray(jax.jit(partial(lstm_follow, model, count=count))(params, jnp.asarray(y0, jnp.float32)))


def fixed_steps(
    solver: diffrax.AbstractSolver,
    field: Callable[[jax.Array], jax.Array],
    y0: jax.Array,
    dt: Any,
    substeps: Any,
    points: int,
) -> jax.Array:
    """[points + 1, 2n]: `points` intervals of `substeps` steps of length `dt`; both may be traced, one compilation."""
    term = diffrax.ODETerm(lambda t, y, args: field(y))

    def interval(y: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y = jax.lax.fori_loop(0, substeps, lambda _, y: solver.step(term, 0.0, dt, y, None, None, False)[0], y)
        return y, y

    _, ys = jax.lax.scan(interval, y0, None, length=points)
    return jnp.concatenate([y0[None], ys])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Errors against the step size: `{label: (dt [k], energy MSE [k], coordinate MSE [k])}`."""

    lines: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def euler_sweep(system: System, interval: float, t_end: float, y0: np.ndarray, learned: dict[str, Trained]) -> Sweep:
    """Euler on the true field, and learned fields under Euler and the implicit midpoint rule, over step sizes.

    Step sizes are 2, 1, 1/2, ... of the data's own `interval`; learned fields are those of the first seed.
    """
    points = max(1, int(t_end / (2 * interval)))
    truth = true_rollouts(system, y0, np.full(len(y0), 2 * interval * points), points + 1)

    def line(solver: diffrax.AbstractSolver, field: Callable, substeps: Sequence[int]):
        with jax.enable_x64(True):
            follow = jax.jit(
                jax.vmap(lambda y, dt, k: fixed_steps(solver, field, y, dt, k, points), in_axes=(0, None, None))
            )
            errors = []
            for k in substeps:
                ys = np.asarray(follow(jnp.asarray(y0), 2 * interval / k, k))
                with np.errstate(over="ignore", invalid="ignore"):
                    errors.append([e.mean() for e in trajectory_errors(system, ys, truth)])
        energy, coordinates = np.asarray(errors).T
        return 2 * interval / np.asarray(substeps), energy, coordinates

    lines = {"Euler, true field": line(diffrax.Euler(), system_field(system), _SWEEP_SUBSTEPS)}
    for name, trained in learned.items():
        with jax.enable_x64(True):
            params = jax.tree.map(lambda p: jnp.asarray(p[0], jnp.float64), trained.params)
        field = partial(trained.model.field, params)
        lines[f"Euler, {name}"] = line(diffrax.Euler(), field, _LEARNED_SUBSTEPS)
        lines[f"implicit midpoint, {name}"] = line(ImplicitMidpoint(), field, _LEARNED_SUBSTEPS)
    return Sweep(lines)


def first_seed_errors(system: System, scenes: Scenes, ys: np.ndarray) -> tuple[float, float]:
    """Energy and coordinate MSE of rollouts [S, n, T, 2n], of the seed and initial conditions that are swept."""
    part = slice(scenes.inside.start, min(scenes.inside.stop, scenes.inside.start + SWEPT))
    energy, coordinates = trajectory_errors(system, ys[0, part], scenes.truth[part])
    return float(energy.mean()), float(coordinates.mean())


def euler_numbers(sweep: Sweep, interval: float) -> dict[str, float]:
    """`euler.*` at the data's own sampling interval, and at every other step size under a name with it."""
    out = {}
    for dt, energy, coordinates in zip(*sweep.lines["Euler, true field"], strict=True):
        name = "euler" if np.isclose(dt, interval) else f"euler_dt_{dt:.3g}"
        out |= {f"{name}.energy_mse": float(energy), f"{name}.coordinate_mse": float(coordinates)}
    return out


def step_size_to_match(sweep: Sweep, coordinate_mse: float) -> float | None:
    """The largest step at which Euler on the true field is at least as accurate; None where no step of the sweep is."""
    steps, _, coordinates = sweep.lines["Euler, true field"]
    good = steps[coordinates <= coordinate_mse]
    return float(good.max()) if good.size else None


def fixed_path(system: System, y0: np.ndarray, dt: float, t_end: float) -> tuple[np.ndarray, np.ndarray]:
    """One trajectory by Euler on the true field: times [T] and states [T, 2n]."""
    points = max(1, int(t_end / dt))
    with jax.enable_x64(True):
        ys = fixed_steps(diffrax.Euler(), system_field(system), jnp.asarray(y0), dt, 1, points)
        return dt * np.arange(points + 1), np.asarray(ys)
