"""All metrics of one set of images against another, from one pass over each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from lib.features.net import FeatureNet
from lib.metrics import cache, frechet, kernel, manifold
from lib.metrics.images import Images
from lib.metrics.result import Protocol, Result
from lib.metrics.statistics import SPLITS, Statistics, check_fits, summarize
from lib.process import UserError

Metric = Literal["fid", "is", "kid", "precision", "recall", "density", "coverage", "copying"]
# how many images of each set the metric is defined for
LEAST = {"fid": 2, "is": SPLITS, "kid": 2, "precision": 4, "recall": 4, "density": 6, "coverage": 6, "copying": 2}
BETTER = {"fid": "lower", "is": "higher", "kid": "lower", "precision": "higher", "recall": "higher",
          "density": "higher", "coverage": "higher", "copying": "as held-out"}  # fmt: skip
K, K_DENSITY = 3, 5
KID_SUBSETS, KID_SIZE = 100, 1000
BOOTSTRAP = 10
_MANIFOLD = ("precision", "recall", "density", "coverage", "copying")
_SEED = 0


def measure(
    real: Images,
    generated: Images,
    net: FeatureNet,
    *,
    metrics: Sequence[Metric] = tuple(LEAST),
    max_features: int = 10_000,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    cached: bool = True,
    progress: Callable[[str, int], Callable[[int], object]] = lambda label, count: lambda done: None,
) -> dict[str, Result]:
    """{"fid.NET": Result, ...} of `generated` against `real`.

    FID and IS are of all images. The other metrics, and FID's uncertainty, are of at most `max_features` images of
    each set (drawn with a fixed seed), which bounds memory. With `cached`, statistics of the real set are kept and
    found again under a hash of its pixels. `progress(label, count)` gives what is called with every batch's size.
    Raises UserError for images that do not fit the net or a metric.
    """
    for images in (real, generated):
        check_fits(images, net)
        for metric in metrics:
            if min(images.count, max_features) < LEAST[metric]:
                raise UserError(f"{metric} needs at least {LEAST[metric]} images, {images.label} gives "
                                f"{min(images.count, max_features)}")  # fmt: skip

    def statistics(images: Images) -> Statistics:
        options = {"max_features": max_features, "batch_size": batch_size, "mesh": mesh}
        return summarize(images, net, progress=progress(images.label, images.count), **options)

    path = cache.path_of(real, net, max_features) if cached else None
    reference = kept(path, lambda: statistics(real)) if path else statistics(real)
    found = compare(reference, statistics(generated), metrics)
    protocol = Protocol(
        features=net.name,
        weights_sha256=net.weights_sha256,
        preprocessing=net.preprocessing + _grey(real, generated, net),
        real=real.label,
        generated=generated.label,
        n_real=real.count,
        n_generated=generated.count,
        rounding=generated.rounding if generated.rounding == real.rounding
        else f"{generated.rounding}; real: {real.rounding}",
        settings="",
    )  # fmt: skip
    return {
        f"{metric}.{net.name}": Result(value, sd, kind, dataclasses.replace(protocol, settings=settings))
        for metric, (value, sd, kind, settings) in found.items()
    }


def kept(path: Path, make: Callable[[], Statistics]) -> Statistics:
    """The statistics in a file of `lib.metrics.cache`; where it is missing or damaged, made and written."""
    found = cache.load(path)
    if found is None:
        found = make()
        cache.save(path, found)
    return found


def _grey(real: Images, generated: Images, net: FeatureNet) -> str:
    repeated = [i.label for i in (real, generated) if i.shape[2] != net.channels]
    return f"; grey repeated to {net.channels} channels ({', '.join(repeated)})" if repeated else ""


def compare(
    real: Statistics, generated: Statistics, metrics: Sequence[Metric]
) -> dict[Metric, tuple[float, float, str, str]]:
    """{metric: (value, uncertainty, what the uncertainty is, settings)} from statistics alone."""
    found = {}
    stored = f"{len(real.features)} real and {len(generated.features)} generated images"
    if "fid" in metrics:
        sd = frechet.bootstrap_fid(real, generated, BOOTSTRAP, _SEED)
        kind = f"bootstrap over images, {BOOTSTRAP} resamples"
        found["fid"] = (frechet.fid(real, generated), sd, kind, f"all images; bootstrap from {stored}")
    if "is" in metrics:
        scores = generated.scores
        settings = "all generated images, shuffled (seed 2020)"
        found["is"] = (float(scores.mean()), float(scores.std()), f"sd over {SPLITS} splits", settings)
    if "kid" in metrics:
        size = min(KID_SIZE, len(real.features), len(generated.features))
        value, sd = kernel.kid(real.features, generated.features, KID_SUBSETS, KID_SIZE)
        settings = f"(x·y/d + 1)³, unbiased, subsets of {size} from {stored}"
        found["kid"] = (value, sd, f"sd over {KID_SUBSETS} subsets", settings)
    if set(metrics) & set(_MANIFOLD):
        verdicts = manifold.compare(real.features, generated.features, k=K, k_density=K_DENSITY)
        for metric in _MANIFOLD:
            if metric in metrics:
                each = np.asarray(getattr(verdicts, metric), np.float64)
                sd = each.std(ddof=1) / np.sqrt(len(each))
                kind = "bootstrap over images (closed form), the other set held fixed"
                found[metric] = (float(each.mean()), float(sd), kind, _SETTINGS[metric] + f"; {stored}")
    return {metric: found[metric] for metric in metrics}


_SETTINGS = {
    "precision": f"k = {K}, closed balls",
    "recall": f"k = {K}, closed balls",
    "density": f"k = {K_DENSITY}, open balls",
    "coverage": f"k = {K_DENSITY}, open balls",
    "copying": "share nearer to its nearest real image than that is to another; 1 for copies, for fresh samples what "
    "held-out real images give (a third to a half)",
}
