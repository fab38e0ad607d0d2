"""The pictures of a report: phase portraits, orbits, energies, the learned H, errors against the step size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from hnn.evaluate import Sweep, Trained, energies
from hnn.systems import System, total_energy
from lib import plot

STYLE = {
    "truth": dict(color="#9aa0a6", lw=3.2, alpha=0.8, zorder=1),
    "measurement": dict(color="#9aa0a6", lw=3.2, alpha=0.8, zorder=1),
    "baseline": dict(color=plot.COLORS[1]),
    "hnn": dict(color=plot.COLORS[0]),
    "hnn_rollout": dict(color=plot.COLORS[2]),
    "separable": dict(color=plot.COLORS[3]),
    "dissipative": dict(color=plot.COLORS[4]),
    "lstm": dict(color=plot.COLORS[5]),
    "euler": dict(color=plot.COLORS[6], lw=1.0),
}


def _style(name: str) -> dict:
    return STYLE.get(name, {})


def phase_portrait(path: Path, system: System, paths: dict[str, np.ndarray]) -> Path:
    """One panel per model: its trajectory over the truth and the level lines of the true H. One degree of freedom.

    `paths`: {name: [T, 2]}, the truth or measurement first.
    """
    reference, *names = paths
    figure, axes = plot.panels(1, len(names), width=2.7, height=2.9, sharex=True, sharey=True)
    reach = 1.35 * np.abs(paths[reference]).max(0)
    q, p = (np.linspace(-r, r, 81) for r in reach)
    levels = energies(system.hamiltonian, np.stack(np.meshgrid(q, p), -1))
    for ax, name in zip(axes[0], names, strict=True):
        ax.contour(q, p, levels, levels=12, colors="#d0d7de", linewidths=0.6, zorder=0)
        ax.plot(*paths[reference].T, **_style(reference))
        ax.plot(*paths[name].T, **_style(name))
        ax.plot(*paths[reference][0], "o", color="black", ms=4, zorder=5)
        ax.set(title=name, xlabel="$q$", xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]))
        ax.grid(False)
    axes[0, 0].set_ylabel("$p$")
    return plot.save(figure, path)


def orbits(path: Path, paths: dict[str, np.ndarray], bodies: int) -> Path:
    """Positions in the plane: truth and each model side by side; `paths`: {name: [T, 4 n_bodies]}."""
    figure, axes = plot.panels(1, len(paths), width=2.7, height=3.0, sharex=True, sharey=True, layout="compressed")
    reach = 1.25 * np.abs(paths["truth"][:, : 2 * bodies]).max()
    for ax, (name, ys) in zip(axes[0], paths.items(), strict=True):
        x, y = ys[:, :bodies], ys[:, bodies : 2 * bodies]
        for body in range(bodies):
            color = plot.COLORS[body]
            ax.plot(x[:, body], y[:, body], color=color, lw=1.1, alpha=0.85)
            ax.plot(x[-1, body], y[-1, body], "o", color=color, ms=5)
            ax.plot(x[0, body], y[0, body], "o", color=color, ms=5, mfc="white")
        ax.set(title=name, xlabel="$x$", aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    axes[0, 0].set_ylabel("$y$")
    return plot.save(figure, path)


def over_time(path: Path, system: System, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Energy, and the distance to the reference; `lines`: {name: (t [T], y [T, 2n])}, the reference first."""
    figure, axes = plot.panels(1, 2, width=4.6, height=2.9)
    reference = next(iter(lines))
    ts, truth = lines[reference]
    level = energies(system.hamiltonian, truth)
    for name, (t, ys) in lines.items():
        energy = energies(system.hamiltonian, ys)
        axes[0, 0].plot(t, energy, label=name, **_style(name))
        if name != reference:
            there = np.stack([np.interp(t, ts, column) for column in truth.T], -1)
            error = np.sqrt(np.mean((ys - there) ** 2, -1))
            axes[0, 1].semilogy(t[1:], error[1:], label=name, **_style(name))
    spread = max(np.ptp(level), 0.25 * np.abs(level).mean(), 1e-3)
    axes[0, 0].set(title="true H along each rollout", xlabel="time", ylabel="H")
    axes[0, 0].set_ylim(level.min() - 2 * spread, level.max() + 2 * spread)
    axes[0, 1].set(title=f"distance to the {reference}", xlabel="time", ylabel="root mean square error")
    axes[0, 0].legend(ncols=2, fontsize=7)
    return plot.save(figure, path)


def learned_hamiltonian(path: Path, system: System, models: dict[str, Trained], points: np.ndarray) -> Path:
    """The learned H beside the true one: level lines for one degree of freedom, otherwise a scatter.

    A Hamiltonian is known up to a constant; each learned one is shifted to agree on the mean over `points` [m, 2n].
    """
    maps = {name: _shifted(system, trained, points) for name, trained in models.items()}
    if system.dimension > 1:
        return _hamiltonian_scatter(path, system, maps, points)
    reach = 1.1 * np.abs(points).max(0)
    q, p = (np.linspace(-r, r, 121) for r in reach)
    grid = np.stack(np.meshgrid(q, p), -1)
    truth = energies(system.hamiltonian, grid)
    levels = np.linspace(truth.min(), np.quantile(truth, 0.9), 13)
    figure, axes = plot.panels(1, 1 + len(maps), width=2.8, height=2.9, sharex=True, sharey=True)
    surfaces = {"true H": truth, **{name: learned(grid) for name, learned in maps.items()}}
    for ax, (name, values) in zip(axes[0], surfaces.items(), strict=True):
        filled = ax.contourf(q, p, values, levels=levels, cmap="viridis", extend="both")
        ax.plot(*points[::7].T, ".", color="white", ms=1.2, alpha=0.7)
        ax.set(title=name if name == "true H" else f"learned H, {name}", xlabel="$q$")
        ax.grid(False)
    figure.colorbar(filled, ax=axes[0, -1], shrink=0.85)
    axes[0, 0].set_ylabel("$p$")
    return plot.save(figure, path)


def _shifted(system: System, trained: Trained, points: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    params = jax.tree.map(lambda x: np.asarray(x[0]), trained.params)
    learned = jax.jit(lambda ys: total_energy(partial(trained.model.hamiltonian, params), ys))

    def raw(ys: np.ndarray) -> np.ndarray:
        return np.asarray(learned(np.asarray(ys, np.float32)), np.float64)

    shift = np.mean(energies(system.hamiltonian, points) - raw(points))
    return lambda ys: raw(ys) + shift


def _hamiltonian_scatter(path: Path, system: System, maps: dict, points: np.ndarray) -> Path:
    figure, axes = plot.panels(1, len(maps), width=3.4, height=3.2)
    truth = energies(system.hamiltonian, points)
    low, high = np.quantile(truth, [0.005, 0.995])
    for ax, (name, learned) in zip(axes[0], maps.items(), strict=True):
        ax.plot([low, high], [low, high], color="#9aa0a6", lw=2)
        ax.plot(truth, learned(points), ".", ms=2, alpha=0.4, color=_style(name).get("color"))
        margin = 0.15 * (high - low)
        ax.set(title=f"learned H, {name}", xlabel="true H", ylabel="learned H (shifted)")
        ax.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    return plot.save(figure, path)


def error_against_step(path: Path, sweep: Sweep, adaptive: dict[str, tuple[float, float]]) -> Path:
    """Energy and coordinate MSE against the step size; `adaptive`: {name: (energy, coordinate MSE)} as level lines."""
    figure, axes = plot.panels(1, 2, width=4.6, height=3.3)
    markers = iter("osv^D*Ph" * 2)
    for label, (dt, *errors) in sweep.lines.items():
        style = dict(marker=next(markers), ms=3.5)
        name = label.split(", ")[-1]
        style["color"] = STYLE["euler"]["color"] if name == "true field" else _style(name).get("color")
        style["ls"] = "--" if label.startswith("Euler") and name != "true field" else "-"
        for ax, error in zip(axes[0], errors, strict=True):
            ax.loglog(dt, np.where(np.isfinite(error), np.clip(error, None, 1e6), np.nan), label=label, **style)
    for name, levels in adaptive.items():
        for ax, level in zip(axes[0], levels, strict=True):
            ax.axhline(level, ls=":", lw=1.3, label=f"adaptive, {name}", color=_style(name).get("color"))
    for ax, title in zip(axes[0], ("energy MSE", "coordinate MSE"), strict=True):
        ax.set(title=title, xlabel="step size", ylim=(None, 1e3))
    axes[0, 0].legend(fontsize=6.5)
    return plot.save(figure, path)


def coordinates_over_time(path: Path, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """q against time, a panel per model; `lines`: {name: (t [T], y [T, 2])}, the reference first."""
    reference, *models = lines
    figure, axes = plot.panels(len(models), 1, width=8.5, height=1.6, sharex=True, sharey=True)
    for ax, name in zip(axes[:, 0], models, strict=True):
        ax.plot(lines[reference][0], lines[reference][1][:, 0], **_style(reference))
        ax.plot(lines[name][0], lines[name][1][:, 0], **_style(name))
        ax.set(title=name, ylabel="$q$")
    axes[-1, 0].set_xlabel("time")
    return plot.save(figure, path)


def vector_fields(path: Path, models: dict[str, Trained], reach: np.ndarray, truth: Callable | None) -> Path:
    """Arrows of the true field, where there is one, and of each model; one degree of freedom, `reach` [2]."""
    q, p = np.meshgrid(*(np.linspace(-r, r, 13) for r in reach))
    points = np.stack([q, p], -1).reshape(-1, 2).astype(np.float32)
    fields = {} if truth is None else {"truth": jax.jit(jax.vmap(truth))(points)}
    for name, trained in models.items():
        params = jax.tree.map(lambda x: np.asarray(x[0]), trained.params)
        fields[name] = jax.jit(jax.vmap(trained.model.field, (None, 0)))(params, points)
    figure, axes = plot.panels(1, len(fields), width=2.7, height=2.9, sharex=True, sharey=True)
    for ax, (name, dy) in zip(axes[0], fields.items(), strict=True):
        ax.quiver(q, p, *np.asarray(dy).T.reshape(2, *q.shape), color=_style(name).get("color"), angles="xy")
        ax.set(title=name, xlabel="$q$")
        ax.grid(False)
    axes[0, 0].set_ylabel("$p$")
    return plot.save(figure, path)
