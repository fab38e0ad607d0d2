"""The commands `rollout` and `simulate`: trajectories of trained models and of true systems, to files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from hnn import figures
from hnn.config import Config
from hnn.data import save_films, save_npz, simulate_films
from hnn.data import simulate as simulate_data
from hnn.evaluate import energies, lstm_trajectory, true_rollouts
from hnn.experiment import check_finished, interval, load_data, load_trained
from hnn.model import FieldModel
from hnn.solvers import ImplicitMidpoint, StormerVerlet, Yoshida4, separable_terms
from hnn.solvers import rollout as integrate
from hnn.systems import SYSTEMS, System
from lib.process import UserError
from lib.run import RunFolder, check_out

if TYPE_CHECKING:
    from hnn.__main__ import Rollout, Simulate

_FIXED = {
    "euler": diffrax.Euler(),
    "midpoint": ImplicitMidpoint(),
    "verlet": StormerVerlet(),
    "yoshida": Yoshida4(),
}


def follow(folder: RunFolder, config: Config, options: Rollout) -> str:
    """Rolls one model of a run out and writes the file; returns a line for the user.

    Raises UserError for a model, seed, state, solver or file that does not fit the run.
    """
    system = SYSTEMS[config.system]
    name = options.model or config.models[-1]
    t_end = config.evaluation.t_end if options.t_end is None else options.t_end
    _check(options, config, system, name, t_end)
    check_finished(config, folder, [name])
    data = load_data(config)
    trained = load_trained(config, data, folder, [name])[name]
    params = jax.tree.map(lambda x: x[options.seed], trained.params)
    y0 = np.asarray(options.y0) if options.y0 else _fresh_state(system)
    if isinstance(trained.model, FieldModel):
        ts = np.linspace(0, t_end, options.points)
        ys = _field_rollout(trained.model, params, y0, ts, options)
    else:
        ts = np.arange(0, t_end, interval(data.train))
        ys = lstm_trajectory(trained.model, params, y0, len(ts))
    arrays = {"t": ts, "y": ys}
    if system.sample_initial is not None:
        arrays["truth"] = true_rollouts(system, y0[None], np.array([ts[-1]]), len(ts))[0]
    _write(options.out, system, name, arrays)
    drift = np.abs(energies(system.hamiltonian, ys) - energies(system.hamiltonian, ys[:1]))
    return f"{options.out}: {name} over T = {ts[-1]:g}, largest change of the true energy {np.max(drift):.3g}"


def _check(options: Rollout, config: Config, system: System, name: str, t_end: float) -> None:
    if system.name == "pixel_pendulum":
        raise UserError("rollout follows coordinates; the films of a pixel_pendulum run are in its report.html")
    if name not in config.models:
        raise UserError(f"this run has no model {name!r}: choose from {', '.join(config.models)}")
    if not 0 <= options.seed < config.seeds:
        raise UserError(f"seed must be between 0 and {config.seeds - 1}, the run has {config.seeds}")
    if options.y0 and len(options.y0) != 2 * system.dimension:
        raise UserError(f"y0 needs {2 * system.dimension} numbers (all q, then all p), got {len(options.y0)}")
    if not np.isfinite(options.y0).all():
        raise UserError("y0 must be finite")
    if not (np.isfinite(t_end) and t_end > 0):
        raise UserError("t_end must be positive")
    if options.points < 2:
        raise UserError("points must be at least 2")
    check_out(options.out, ".npz", ".png")
    if not options.y0 and system.sample_initial is None:
        raise UserError(f"{system.name} is a recording: give the initial state with --y0")
    if options.solver == "adaptive" and options.dt is not None:
        raise UserError("dt is for solvers with fixed steps: choose --solver euler, midpoint, verlet or yoshida")
    if options.solver != "adaptive" and not (options.dt and np.isfinite(options.dt) and options.dt > 0):
        raise UserError(f"--solver {options.solver} needs a positive --dt")
    if options.solver != "adaptive" and t_end / options.dt > 10_000_000:
        raise UserError(f"dt {options.dt:g} would take more than ten million steps: choose a larger one")
    if options.solver in ("verlet", "yoshida") and name != "separable":
        raise UserError(f"{options.solver} needs H = T(p) + V(q): train the model separable, or use --solver midpoint")


def _fresh_state(system: System) -> np.ndarray:
    assert system.sample_initial is not None
    with jax.enable_x64(True):
        return np.asarray(system.sample_initial(jax.random.key(0), 1))[0]


def _field_rollout(model: FieldModel, params: object, y0: np.ndarray, ts: np.ndarray, options: Rollout) -> np.ndarray:
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        field = partial(model.field, wide)
        if options.solver in ("verlet", "yoshida"):
            assert model.hamiltonian is not None
            field = separable_terms(partial(model.hamiltonian, wide))
        solver = _FIXED.get(options.solver)
        return np.asarray(jax.jit(lambda y: integrate(field, y, ts, solver=solver, dt=options.dt))(jnp.asarray(y0)))


def _write(out: Path, system: System, name: str, arrays: dict[str, np.ndarray]) -> None:
    partial_out = out.with_name(out.name + f".partial{out.suffix}")
    if out.suffix == ".npz":
        np.savez_compressed(partial_out, **arrays)
    else:
        lines = {"truth": (arrays["t"], arrays.get("truth", arrays["y"])), name: (arrays["t"], arrays["y"])}
        figures.over_time(partial_out, system, lines)
    partial_out.replace(out)


def simulate(system: System, options: Simulate) -> str:
    """Writes the trajectories (or films) of a system; returns a line for the user. Raises UserError."""
    check_out(options.out, ".npz")
    if not 0 <= options.seed < 2**32:
        raise UserError("seed must be between 0 and 2**32 - 1")
    key = jax.random.key(options.seed)
    if system.name == "pixel_pendulum":
        if options.n_points or options.t_end or options.noise_std:
            raise UserError("films of pixel_pendulum have a fixed length and no noise: leave these options out")
        films = simulate_films(key, n_trajectories=options.n_trajectories)
        save_films(options.out, films)
        return f"{options.out}: {films.train.frames.shape[0]} + {films.test.frames.shape[0]} films"
    t_span = None if options.t_end is None else (system.t_span[0], options.t_end)
    data = simulate_data(
        system,
        key,
        n_trajectories=options.n_trajectories,
        noise_std=options.noise_std,
        n_points=options.n_points,
        t_span=t_span,
    )
    save_npz(options.out, data, system.name)
    return f"{options.out}: {len(data.train.y)} + {len(data.test.y)} trajectories of {len(data.train.t)} points"
