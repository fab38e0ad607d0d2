"""From what a user asks for (a sampler and its budget) to the sampler, and samples of a trained network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lib.process import UserError
from ncsn import experiment, guidance, langevin, noise, ode
from ncsn.config import Config, Sampling
from ncsn.data import Facts
from ncsn.experiment import Trained
from ncsn.samplers import Diagnostics, Sampler, Start, compile_sampler, gaussian, uniform
from ncsn.sde import Score
from ncsn.underdamped import underdamped_langevin

_LANGEVIN = ("annealed_langevin", "langevin", "underdamped_langevin")
_LOWEST = 0.01  # of the range of pixels: where annealing ends for a network that was trained on no ladder
_UNDERDAMPED_STEP = 0.5


class Condition(NamedTuple):
    """A condition on samples: the data of each, and what they make of a score function and of a sampler."""

    data: Any  # tree of arrays [count, ...]
    score: Callable[[Score, Any], Score] = lambda score_fn, data: score_fn
    sampler: Callable[[Sampler, Any], Sampler] = lambda sampler, data: sampler


def make_sampler(config: Config, known: Facts, options: Sampling, score_fn: Score) -> Sampler:
    """The sampler of `options` for a network trained with `config` on data with these facts (in its units).

    Raises UserError for budgets and levels that make no sense.
    """
    high, low = _range(config, known, options)
    name, nfe = options.sampler, options.nfe
    start = _start(config, known, options, high)
    ends = {"start": start}
    if name in _LANGEVIN:
        return _langevin(config, known, options, score_fn, high, low, start)
    if name in ("euler", "heun", "dpm_solver"):
        steps = (nfe + 1) // 2 if name == "heun" else nfe
        steps -= not options.denoise and name == "heun"  # without the cheap last step
        sigmas = noise.karras(high, low, steps, options.rho) if steps > 1 else np.float32([high])
        levels = np.append(sigmas, 0.0) if options.denoise else noise.karras(high, low, steps + 1, options.rho)
        if name == "heun":
            return ode.heun(score_fn, levels, ode.Churn(options.churn), **ends)
        return {"euler": ode.euler, "dpm_solver": ode.dpm_solver}[name](score_fn, levels, **ends)
    if name == "probability_flow":
        levels = [high, low, 0.0] if options.denoise else [high, low]
        how = ode.Adaptive(options.rtol, options.rtol, known.size)
        return ode.probability_flow(score_fn, levels, how, **ends)
    per_level = 2 if name == "predictor_corrector" else 1
    steps = nfe // per_level
    if steps < 2 + options.denoise:
        raise UserError(f"nfe is {nfe}: {name} needs at least {per_level * (2 + options.denoise)}")
    sigmas = noise.geometric(high, low, steps + (not options.denoise))
    grid = langevin.ladder(np.append(sigmas, 0.0) if options.denoise else sigmas)
    predictors = {"ancestral": langevin.ancestral, "euler_maruyama": langevin.euler_maruyama}
    predictor = predictors.get(name, langevin.reverse_diffusion)(grid)
    corrector = langevin.by_norms(options.snr) if name == "predictor_corrector" else None
    return langevin.predictor_corrector(score_fn, predictor, corrector, corrector_steps=per_level - 1, **ends)


def _range(config: Config, known: Facts, options: Sampling) -> tuple[float, float]:
    """The highest and the lowest noise level."""
    trained, ladder = config.noise, config.noise.training == "ladder"
    far = options.sampler in _LANGEVIN and not ladder  # Langevin needs to reach every mode and no more
    given = None if far else trained.sigma_max
    high = options.sigma_max or given or known.largest_distance
    low = options.sigma_min or (max(trained.sigma_min, _LOWEST * _unit(config)) if far else trained.sigma_min)
    if low >= high:
        raise UserError(f"noise levels from {high:g} down to {low:g}: sigma_max must be above sigma_min")
    return high, low


def _unit(config: Config) -> float:
    low, high = experiment.pixel_range(config)
    return high - low


def _start(config: Config, known: Facts, options: Sampling, high: float) -> Start:
    """NCSN's chains begin with uniform pixels; all others with what the highest noise level makes of the data."""
    if config.network.kind in ("v1", "v2") and options.sampler in _LANGEVIN:
        return uniform(*experiment.pixel_range(config))
    if options.sampler == "langevin":
        return uniform(-8.0, 8.0)  # the square of NCSN's figure 3
    return gaussian(float(np.hypot(high, known.std)), known.mean)


def _langevin(
    config: Config, known: Facts, options: Sampling, score_fn: Score, high: float, low: float, start: Start
) -> Sampler:
    if options.sampler == "langevin":
        size = options.step_size or 0.1 * low**2
        return langevin.langevin(score_fn, low, size, options.nfe, start=start, denoise=options.denoise)
    levels = config.noise.levels if config.noise.training == "ladder" else None
    levels = levels or noise.levels_for(high, low, known.dimension)
    evaluations = 2 if options.sampler == "underdamped_langevin" else 1
    steps = options.nfe // (levels * evaluations)
    if not steps:
        raise UserError(
            f"nfe is {options.nfe}: {options.sampler} has {levels} noise levels here and needs {levels * evaluations}"
        )
    sigmas = noise.geometric(high, low, levels)
    if options.sampler == "underdamped_langevin":
        size = options.step_size or _UNDERDAMPED_STEP
        return underdamped_langevin(
            score_fn, sigmas, size, steps, friction=options.friction, start=start, denoise=options.denoise
        )
    size = options.step_size or noise.step_size_for(low, float(sigmas[0] / sigmas[1]), steps)
    return langevin.annealed_langevin(
        score_fn, sigmas, size, steps, start=start, rule=options.rule, denoise=options.denoise
    )


class Rows(NamedTuple):
    """What belongs to single samples, [count, ...] each; () where there is none of it."""

    label: Any = ()
    condition: Any = ()


class Samples(NamedTuple):
    x: np.ndarray  # [count, *shape], in the units of the network
    diagnostics: Diagnostics
    nfe: float  # mean over samples
    per_score: int  # evaluations of the network that one of its score takes: two with guidance


def score_function(trained: Trained, params: Any, label: Any, weight: float) -> Score:
    """The network's score given labels [b] (none: ()), sharpened by guidance unless its weight is 1."""
    model = trained.model
    if isinstance(label, tuple):
        return lambda x, sigma: model.score(params, x, sigma)
    score = lambda x, sigma, label: model.score(params, x, sigma, label)  # noqa: E731
    if weight == 1:
        return guidance.labelled(score, label)
    return guidance.classifier_free(score, label, model.classes, weight)


def draw_samples(
    config: Config,
    trained: Trained,
    options: Sampling,
    count: int,
    *,
    mesh: Mesh,
    seed: int = 0,
    label: np.ndarray | None = None,
    condition: Condition | None = None,
    frames: int = 0,
    noisy: bool = False,
    first: int = 0,
    progress: str | None = None,
) -> Samples:
    """`count` samples by one compiled chain. Sample i depends on the seed and on i alone.

    `label` [count] is for networks that know classes; where none are given, sample i is of class i modulo their
    number. `frames`: how many states along the chain to keep, where it has so many.
    """
    steps = len(make_sampler(config, trained.facts, options, lambda x, sigma: x).levels) - 1
    if trained.model.classes:
        label = (first + np.arange(count)) % trained.model.classes if label is None else np.asarray(label)
    elif label is not None:
        raise UserError("this network knows no classes: it cannot be asked for one")
    condition = condition or Condition(())
    rows = Rows(() if label is None else np.asarray(label, np.int32), condition.data)

    def build(params: Any, rows: Rows) -> Sampler:
        score_fn = condition.score(score_function(trained, params, rows.label, options.guidance), rows.condition)
        return condition.sampler(make_sampler(config, trained.facts, options, score_fn), rows.condition)

    draw = compile_sampler(build, trained.facts.shape, mesh, frames=min(frames, steps), noisy=noisy)
    x, diagnostics = draw(trained.params, jax.random.key(seed), count, rows, first=first, progress=progress)
    per_score = 2 if trained.model.classes and options.guidance != 1 else 1
    return Samples(x, diagnostics, per_score * float(diagnostics.nfe.mean()), per_score)


def to_pixels(config: Config, x: np.ndarray) -> np.ndarray:
    """Images in the units of the network to [-1, 1], clipped."""
    low, high = experiment.pixel_range(config)
    return np.clip((np.asarray(x, np.float32) - low) * (2 / (high - low)) - 1, -1, 1)


def from_pixels(config: Config, images: np.ndarray) -> jax.Array:
    """Images in [-1, 1] to the units of the network."""
    low, high = experiment.pixel_range(config)
    return low + (jnp.asarray(images, jnp.float32) + 1) * ((high - low) / 2)
