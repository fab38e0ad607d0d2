"""python -m lib.metrics REAL GENERATED: every metric of one set of images against another."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lib import config as configs
from lib.metrics.measure import LEAST, Metric, measure
from lib.metrics.result import table, to_json
from lib.process import UserError, command
from lib.run import finite_or_none

_PROG = "python -m lib.metrics"


@dataclass(frozen=True)
class Measure:
    """Compare images with reference images, each a folder, a .npz file (uint8 [n, h, w, c], or float in [-1, 1]) or a
    TFDS name with a split (mnist:test, cifar10:train[:10000]) under GRADIENT_FIELDS_DATA."""

    real: Annotated[str, tyro.conf.Positional]
    """the reference set; its statistics are cached"""
    generated: Annotated[str, tyro.conf.Positional]
    """the set that is judged"""
    features: str = "auto"
    """feature net (`python -m lib.features list`); auto: by the size of the images"""
    weights: Path | None = None
    """its weight file, .safetensors (default: the committed or downloaded one)"""
    metrics: tuple[Metric, ...] = tuple(LEAST)
    """which metrics"""
    json: bool = False
    """one JSON object on stdout and nothing else"""
    max_features: int = 10_000
    """images of each set for all metrics but FID and IS, which use all images"""
    batch_size: int | None = None
    """images at a time (default: 256; 16 a device where the net resizes images)"""
    devices: int | None = None
    """devices to spread batches over (default: all; on a CPU one per core)"""
    cache: bool = True
    """keep the reference set's statistics and use kept ones"""

    def __post_init__(self) -> None:
        for name in ("max_features", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")


def main(args: Sequence[str]) -> None:
    options = configs.parse(Measure(tyro.MISSING, tyro.MISSING), args, _PROG)
    from lib import shard

    shard.start()
    from lib import features
    from lib.metrics.images import open_images

    mesh = shard.make_mesh(options.devices)
    real, generated = open_images(options.real), open_images(options.generated)
    name = features.default_for(*real.shape) if options.features == "auto" else options.features
    net = features.load(name, options.weights)
    with contextlib.ExitStack() as bars:
        results = measure(
            real,
            generated,
            net,
            metrics=options.metrics,
            max_features=options.max_features,
            batch_size=options.batch_size,
            mesh=mesh,
            cached=options.cache,
            progress=lambda label, count: _bar(bars, label, count),
        )
    if shard.primary():
        print(json.dumps(finite_or_none(to_json(results)), indent=2) if options.json else table(results))


def _bar(bars: contextlib.ExitStack, label: str, count: int) -> Callable[[int], object]:
    """On stderr, and only where that is a terminal."""
    from tqdm import tqdm

    return bars.enter_context(tqdm(desc=label, total=count, unit="image", disable=None, leave=False, delay=2)).update


if __name__ == "__main__":
    sys.exit(command(main))
