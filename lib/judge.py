"""What image networks are measured by: `lib.metrics` against the training images, and what a classifier reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.special

from lib import features, images
from lib.features.net import FeatureNet, outputs
from lib.metrics.images import of_array
from lib.metrics.manifold import nearest
from lib.metrics.measure import LEAST, measure
from lib.process import UserError
from lib.shard import local_mesh
from lib.sources import Dataset

CONFIDENT = 0.9
_BATCH = 500
_METRICS = ("fid", "is", "kid", "precision", "recall", "density", "coverage", "copying")


def check_measurable(data: Dataset, source: str) -> None:
    """Raises UserError where there are fewer test images than the metrics need: before a training, not after it."""
    least, count = max(LEAST[metric] for metric in _METRICS), len(data.test["image"])
    if count < least:
        raise UserError(f"{source} gives {count} images for tests, with which samples are compared: {least} are needed")


class Judge:
    """The metrics of image sets against the training images, and a classifier's reading of them where there is one."""

    def __init__(self, net: FeatureNet, data: Dataset, labels: Sequence[int] = ()):
        """`labels`: the classes that the images are of, if not of all that the classifier reads."""
        self.net, self.data, self._labels = net, data, list(labels)
        self._train = of_array(data.train["image"], "training images")
        self.reads = "label" in data.train and net.name in features.CLASSIFIERS

    def floor(self) -> dict[str, float]:
        """Real test images in the place of samples, all of them."""
        test = self.data.test["image"]
        return self.numbers("real", test) | {"real.samples": len(test)}

    def numbers(self, name: str, pixels: np.ndarray) -> dict[str, float]:
        """{"NAME.fid.NET": ..., "NAME.fid.NET.sd": ..., ...} of uint8 images [n, h, w, c]."""
        found = measure(self._train, of_array(pixels, name), self.net, metrics=_METRICS, mesh=local_mesh())
        out = {}
        for metric, result in found.items():
            out[f"{name}.{metric}"] = result.value
            out[f"{name}.{metric}.sd"] = result.uncertainty
        if self.reads:
            chances = scipy.special.softmax(read(self.net, pixels)[1], axis=-1)
            counts = np.bincount(chances.argmax(-1), minlength=chances.shape[1])
            learned = counts[self._labels] if self._labels else counts
            shares = learned / len(chances) * len(learned)
            out[f"{name}.confident"] = float(np.mean(chances.max(-1) > CONFIDENT))
            out[f"{name}.smallest_class"] = float(shares.min())
            out[f"{name}.largest_class"] = float(shares.max())
        return out


def read(net: FeatureNet, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, d], logits [n, classes]) of uint8 images, the batch spread over this process's devices."""
    batches = (pixels[i : i + _BATCH] for i in range(0, len(pixels), _BATCH))
    pools, logits = zip(*outputs(net, batches, batch_size=_BATCH, mesh=local_mesh()), strict=True)
    return np.concatenate(pools), np.concatenate(logits)


def neighbours(path: Path, net: FeatureNet, train: np.ndarray, some: np.ndarray) -> tuple[Path, str]:
    """A picture of uint8 images `some`, and below each the one of `train` that is nearest; with its caption."""
    near = nearest(read(net, train)[0], read(net, some)[0])[0][:, 0]
    sheet = np.concatenate([some, train[near]])
    images.write(path, images.grid(images.from_uint8(sheet), columns=len(some)))
    return path, f"Samples, and below each the training image nearest to it in the features of {net.name}."
