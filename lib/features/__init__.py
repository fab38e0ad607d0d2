"""Feature networks: Inception, VGG, small classifiers, their weight files and the commands around them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib.process import UserError

if TYPE_CHECKING:
    from lib.features.net import FeatureNet

INCEPTIONS = ("inception", "inception.pytorch_fid")
CLASSIFIERS = ("digits_cnn", "mnist_cnn", "cifar10_cnn", "cifar10_judge_a", "cifar10_judge_b", "cifar10_vgg")
NAMES = (*INCEPTIONS, *CLASSIFIERS)

_BY_SIZE = {(8, 8, 1): "digits_cnn", (28, 28, 1): "mnist_cnn", (32, 32, 3): "cifar10_cnn"}


def load(name: str, path: Path | None = None) -> FeatureNet:
    """The feature network `name`, one of NAMES, with its default weights or those of the file `path`.

    Raises UserError for an unknown name and for weights that are missing or of another network.
    """
    if name in INCEPTIONS:
        from lib.features import inception

        return inception.load(name, path)
    if name not in CLASSIFIERS:
        raise UserError(f"unknown feature network {name!r}: choose from {', '.join(NAMES)}")
    from lib.features import classifier

    return classifier.load(name) if path is None else classifier.read(path)


def default_for(height: int, width: int, channels: int) -> str:
    """The network that measures images of this size where none is asked for."""
    return _BY_SIZE.get((height, width, channels), "inception")
