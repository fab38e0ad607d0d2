"""A trained network on points: its score against the exact one, and the weights of the modes that chains find."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lib import plot
from lib.metrics.toys import mmd
from lib.shard import local_mesh
from ncsn.config import Config, Sampling, parse_sampler
from ncsn.experiment import Trained, ladder
from ncsn.samplers import Sampler, compile_sampler
from ncsn.sampling import make_sampler
from ncsn.sde import Score
from ncsn.toys import NCSN_TOY, Mixture

Picture = tuple[Path, str]
_TRUTH: Mixture = NCSN_TOY
_KEY = 20190712
_GRID = 81
_REACH = 8.0
_STEP = 0.05  # of plain Langevin dynamics
_COMPARED = 2000  # points


def score_error(score_fn: Score, sigma: float, count: int = 4096) -> float:
    """The root of |score - exact score|^2 over |exact score|^2, both in the mean over the density at noise sigma."""
    keys = jax.random.split(jax.random.key(_KEY), count)

    @jax.jit
    def measure() -> jax.Array:
        x = _TRUTH.sample(keys, sigma)
        exact = _TRUTH.score(x, sigma)
        wrong = score_fn(x, jnp.full(count, sigma)) - exact
        return jnp.sqrt(jnp.mean(wrong**2) / jnp.mean(exact**2))

    return float(measure())


def heavy_mode_weight(x: np.ndarray) -> float:
    """The share of points [n, 2] on the side of the heavy mode; 0.8 of the distribution (to 1e-12)."""
    return float(np.mean(x.sum(axis=1) > 0))


def evaluate(config: Config, trained: Trained, out: Path) -> tuple[dict[str, float], list[Picture]]:
    """Numbers NAME.METRIC and pictures. NAME.analytic.METRIC: the same chain on the exact score."""
    mesh, count = local_mesh(), config.evaluation.samples
    learned = trained.model.score
    exact = lambda params, x, sigma: _TRUTH.score(x, sigma)  # noqa: E731
    sigmas = ladder(config, trained.facts)
    lowest = float(sigmas[-1])
    some = [*sigmas[:: max(1, len(sigmas) // 5)], lowest]
    errors = {float(s): score_error(partial(learned, trained.params), float(s)) for s in some}
    numbers = {"score.relative_error": max(errors.values())}
    numbers |= {f"score.relative_error_sigma_{s:.3g}": error for s, error in errors.items()}

    ends = 0.0 if config.sampling.denoise else lowest
    keys = jax.random.split(jax.random.key(_KEY + 1), count)
    clouds = {"data": np.asarray(jax.jit(partial(_TRUTH.sample, sigma=ends))(keys))}
    chains = {text: parse_sampler(text, config.sampling) for text in config.evaluation.samplers}
    chains["langevin"] = replace(config.sampling, sampler="langevin", step_size=_STEP)
    for text, options in chains.items():
        for variant, field in (("", learned), (".analytic", exact)):
            name = text.partition(":")[0] + variant
            build = partial(_build, config, trained, options, field)
            x, diagnostics = compile_sampler(build, (2,), mesh)(trained.params, jax.random.key(config.seed), count)
            numbers[f"{name}.heavy_mode_weight"] = heavy_mode_weight(x)
            numbers[f"{name}.mmd"] = mmd(clouds["data"][:_COMPARED], x[:_COMPARED]).value
            numbers[f"{name}.nfe"] = float(diagnostics.nfe.mean())
            clouds[name] = x
    pictures = [
        (_fields(out / "fields.png", partial(learned, trained.params), lowest), _FIELDS_CAPTION),
        (_clouds(out / "samples.png", clouds), _CLOUDS_CAPTION),
    ]
    return numbers, pictures


_FIELDS_CAPTION = (
    "Scores at the lowest noise level, learned and exact, and the length of their difference on a logarithmic colour "
    "scale: between the modes there are no data to learn from (NCSN, section 3.2.1)."
)
_CLOUDS_CAPTION = (
    "Samples. Plain Langevin dynamics gives each mode the share of its starting points that lie on its side; annealing "
    "finds the weights (NCSN, figure 3)."
)


def _build(config: Config, trained: Trained, options: Sampling, field: Any, params: Any, rows: Any) -> Sampler:
    del rows
    return make_sampler(config, trained.facts, options, partial(field, params))


def _fields(path: Path, score_fn: Score, sigma: float) -> Path:
    axis = np.linspace(-_REACH, _REACH, _GRID)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype(np.float32)
    both = jax.jit(lambda x: (score_fn(x, jnp.full(len(x), sigma)), _TRUTH.score(x, sigma)))
    learned, exact = (np.asarray(field).reshape(_GRID, _GRID, 2) for field in both(grid))
    wrong = np.linalg.norm(learned - exact, axis=-1)
    figure, axes = plot.panels(1, 3, width=3.6, height=3.4)
    thin = slice(None, None, 5)
    for ax, title, field in ((axes[0, 0], "learned score", learned), (axes[0, 1], "exact score", exact)):
        ax.quiver(axis[thin], axis[thin], field[thin, thin, 0], field[thin, thin, 1], width=0.004)
        ax.set(title=title, aspect="equal")
    shown = axes[0, 2].imshow(
        np.log10(np.maximum(wrong, 1e-3)), extent=(-_REACH, _REACH, -_REACH, _REACH), origin="lower", cmap="viridis"
    )
    axes[0, 2].set(title="log10 of the error's length")
    axes[0, 2].grid(False)
    figure.colorbar(shown, ax=axes[0, 2], shrink=0.8)
    return plot.save(figure, path)


def _clouds(path: Path, clouds: dict[str, np.ndarray]) -> Path:
    figure, axes = plot.panels(1, len(clouds), width=2.4, height=2.5)
    for ax, (name, x) in zip(axes[0], clouds.items(), strict=True):
        some: Any = x[:1500]
        ax.scatter(some[:, 0], some[:, 1], s=1, alpha=0.5, color=plot.COLORS[0])
        ax.set(title=f"{name}\n{heavy_mode_weight(x):.2f} heavy", xlim=(-9, 9), ylim=(-9, 9), aspect="equal")
    return plot.save(figure, path)


PROTOCOL = (
    "0.8 N((5, 5), I) + 0.2 N((-5, -5), I). heavy_mode_weight: share of samples nearer to (5, 5). "
    "score.relative_error: root of the mean squared error of the learned score over the mean squared exact score, both "
    "weighted by the density of the noisy data, at the noise level where it is largest. .analytic: the same chain on "
    "the exact score. langevin: as many steps as the run's own sampler, at the lowest noise level from uniform "
    "points in [-8, 8]^2. mmd: squared discrepancy from the exact distribution at the noise level where the "
    "chain ends, Gaussian kernels, 2,000 points."
)
