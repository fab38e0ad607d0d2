"""How good the images of a trained generator are: its best and its last checkpoint by the metrics of `lib.metrics`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gan import commands
from gan.config import Config
from gan.looks import net_for
from gan.sampling import Trained, draw_samples
from lib import images
from lib.features.net import FeatureNet
from lib.judge import CONFIDENT, Judge, neighbours
from lib.shard import local_mesh
from lib.sources import Dataset

Picture = tuple[Path, str]
_SHOWN, _NEIGHBOURS = 100, 10


def evaluate(
    config: Config, data: Dataset, trained: dict[str, Trained], out: Path, say: Callable[[str], None]
) -> tuple[dict[str, float], list[Picture], str]:
    """Numbers NAME.METRIC with the names real, best and last; pictures; and the protocol."""
    net = net_for(data)
    judge = Judge(net, data, config.data.labels)
    numbers, pictures = judge.floor(), []
    count = config.evaluation.samples
    for name, one in trained.items():
        say(f"sampling {count} images of the {name} checkpoint, cycle {one.step}")
        x = draw_samples(one, count, mesh=local_mesh(), seed=config.seed)
        pixels = images.to_uint8(x)
        numbers |= judge.numbers(name, pixels) | {f"{name}.samples": count, f"{name}.cycle": one.step}
        path = images.write(out / f"samples_{name}.png", images.grid(x[:_SHOWN], columns=10))
        pictures.append((path, f"The first {_SHOWN} samples of the {name} checkpoint, uncurated."))
        if name == "best":  # the last one is the same network
            pictures.append(neighbours(out / "neighbours.png", net, data.train["image"], pixels[:_NEIGHBOURS]))
    pictures += commands.strips(trained["best"], out, seed=config.seed)
    return numbers, pictures, _protocol(config, net)


def _protocol(config: Config, net: FeatureNet) -> str:
    return (
        f"Samples of seed {config.seed} by the averaged generator and its running statistics, rounded to 8 bits, "
        f"against all training images; features of {net.name} (weights {net.weights_sha256[:12]}): scores "
        "compare with nothing but scores of the same features. real: test images in the place of samples. best: the "
        "checkpoint whose look "
        f"had the lowest Fréchet distance, of {config.watch.samples} fresh samples to the training images; last: the "
        f"one at the end. confident: share of samples that {net.name} reads with a probability above {CONFIDENT:g}; "
        "smallest_class and largest_class: share of the rarest and the commonest class among its readings, over "
        "1 / number of classes. copying: 1 for copies of training images, for fresh samples what test images score."
    )


def over_seeds(runs: list[dict[str, float]]) -> dict[str, float]:
    """Means over trainings, and their standard deviations as NAME.sd, of every number that all of them have."""
    out = {}
    for name in runs[0]:
        if not name.endswith(".sd") and all(isinstance(run.get(name), int | float) for run in runs):
            values = np.array([run[name] for run in runs], np.float64)
            out |= {name: float(values.mean()), f"{name}.sd": float(values.std(ddof=1))}
    return out
