"""What is measured of the generator while it trains: fresh samples, samples of fixed latents, and pictures of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.spatial.distance
from jax.sharding import Mesh

from gan.config import Config
from gan.data import MODE_STD, MODES
from gan.model import Gan
from gan.sampling import classes_of, compile_generator, latents
from lib import features, images
from lib.features.net import FeatureNet
from lib.metrics import cache, frechet, manifold
from lib.metrics.images import of_array
from lib.metrics.measure import K_DENSITY, kept
from lib.metrics.statistics import Statistics, summarize
from lib.metrics.toys import mode_coverage
from lib.shard import fetch
from lib.sources import Dataset
from lib.train import State

FIXED_STREAM = 2**31 - 1  # of latents; the others are numbered by the step
_SHOWN = 64
_FEATURES, _SPREAD_ROWS = 1000, 500

Measure = Callable[[np.ndarray], dict[str, float]]


class Looker:
    """`looker(state, step) -> {"score", "fixed_score", "coverage", "spread", ...}`, and pictures in a folder.

    All are of the averaged generator. "score" and what follows are of fresh latents, which are others in every look;
    "fixed_score" is of the same latents in all of them, so that it changes with the generator alone.
    """

    def __init__(self, config: Config, model: Gan, data: Dataset, mesh: Mesh, pictures: Path | None):
        self._config, self._model, self._pictures = config, model, pictures
        self._measure = measure_points(data.train["x"]) if len(model.shape) == 1 else measure_images(data, mesh)
        self._generate = compile_generator(model, mesh)
        self._y = classes_of(model, config.watch.samples)

    def __call__(self, state: State, step: int) -> dict[str, float]:
        variables, count = fetch(state.ema), self._config.watch.samples
        made = {}
        for name, stream in (("fixed", FIXED_STREAM), ("fresh", step)):
            z = latents(self._model, self._config.seed, count, stream)
            made[name] = self._generate(variables, z, self._y)
            if self._pictures is not None and len(self._model.shape) == 3:
                images.write(self._pictures / f"{name}_{step:07}.png", images.grid(made[name][:_SHOWN]))
        fixed = self._measure(made["fixed"])
        return {**self._measure(made["fresh"]), "fixed_score": fixed["score"]}


def measure_images(data: Dataset, mesh: Mesh) -> Measure:
    """Score: Fréchet distance to all training images; coverage and spread: of features, against 1,000 of them."""
    net = net_for(data)
    train = of_array(data.train["image"], "training images")
    real = kept(cache.path_of(train, net, _FEATURES), lambda: summarize(train, net, max_features=_FEATURES, mesh=mesh))
    apart = _mean_distance(real.features)

    def measure(x: np.ndarray) -> dict[str, float]:
        found: Statistics = summarize(of_array(images.to_uint8(x)), net, max_features=_FEATURES, mesh=mesh)
        verdicts = manifold.compare(real.features, found.features, k_density=K_DENSITY)
        return {
            "score": frechet.fid(real, found),
            "coverage": float(np.mean(verdicts.coverage)),
            "precision": float(np.mean(verdicts.precision)),
            "spread": _mean_distance(found.features) / apart,
        }

    return measure


def net_for(data: Dataset) -> FeatureNet:
    """The network that judges images of this size. Raises UserError where its weights are not there."""
    return features.load(features.default_for(*data.train["image"].shape[1:]))


def measure_points(real: np.ndarray) -> Measure:
    """Score: the share of samples that would have to go to another of the 25 modes; coverage: share of modes found."""
    apart = _mean_distance(real)

    def measure(x: np.ndarray) -> dict[str, float]:
        found = mode_coverage(x, MODES, MODE_STD)
        return {
            "score": misplaced(x),
            "coverage": found["modes"].value / len(MODES),
            "precision": found["good"].value,
            "spread": _mean_distance(x) / apart,
        }

    return measure


def misplaced(x: np.ndarray) -> float:
    """Total variation between where samples [n, 2] are and the uniform distribution over modes.

    Samples farther than three standard deviations from every mode are in none.
    """
    distances = scipy.spatial.distance.cdist(x, MODES)
    good = distances.min(1) <= 3 * MODE_STD
    shares = np.bincount(distances.argmin(1)[good], minlength=len(MODES)) / len(x)
    return float(np.maximum(1 / len(MODES) - shares, 0).sum())


def _mean_distance(rows: np.ndarray) -> float:
    """Between two of (at most 500) rows [n, d]."""
    return float(scipy.spatial.distance.pdist(np.asarray(rows[:_SPREAD_ROWS], np.float64)).mean())
