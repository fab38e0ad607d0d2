"""A trained generator of points: which of the 25 Gaussians it finds, and how close to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gan.config import Config
from gan.data import MODE_STD, MODES
from gan.looks import misplaced
from gan.sampling import Trained, draw_samples
from lib import plot
from lib.metrics.toys import mmd, mode_coverage
from lib.shard import local_mesh
from lib.sources import Dataset

Picture = tuple[Path, str]
_COMPARED, _DRAWN = 2000, 3000

PROTOCOL = (
    "25 Gaussians on a grid. good: share of samples within three standard deviations of a mode (98.9 % of real ones); "
    "modes: modes with at least one good sample; kl_from_uniform: of the good samples' modes, in nats; misplaced: "
    "share of samples that would have to go to another mode, those that are not good among them; mmd: squared "
    "discrepancy from real points, Gaussian kernels, 2,000 points. real: other points of the data in the place of "
    "samples."
)


def evaluate(
    config: Config, data: Dataset, trained: dict[str, Trained], out: Path
) -> tuple[dict[str, float], list[Picture]]:
    """Numbers NAME.METRIC with the names real, best and last, and a picture."""
    count = config.evaluation.samples
    clouds = {"real": data.test["x"][:count]}
    numbers = {}
    for name, one in trained.items():
        clouds[name] = draw_samples(one, count, mesh=local_mesh(), seed=config.seed)
        numbers[f"{name}.cycle"] = one.step
    for name, x in clouds.items():
        for metric, result in mode_coverage(x, MODES, MODE_STD).items():
            numbers[f"{name}.{metric}"] = result.value
            numbers[f"{name}.{metric}.sd"] = result.uncertainty
        found = mmd(data.train["x"][:_COMPARED], x[:_COMPARED])
        numbers |= {f"{name}.misplaced": misplaced(x), f"{name}.mmd": found.value, f"{name}.mmd.sd": found.uncertainty}
    return numbers, [picture(out / "samples.png", clouds)]


def picture(path: Path, clouds: dict[str, np.ndarray]) -> Picture:
    figure, axes = plot.panels(1, len(clouds), width=3.2, height=3.3)
    for ax, (name, x) in zip(axes[0], clouds.items(), strict=True):
        ax.scatter(x[:_DRAWN, 0], x[:_DRAWN, 1], s=1, alpha=0.5, color=plot.COLORS[0])
        ax.set(title=name, xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    return plot.save(figure, path), "Points of the data and of the generator."
