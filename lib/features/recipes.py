"""How each of the small classifiers is trained: every default of `python -m lib.features train` is here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from lib.process import UserError


@dataclass(frozen=True)
class Config:
    """SGD with Nesterov momentum; the learning rate rises linearly over `warmup` and then falls linearly to zero."""

    name: str = "cifar10_cnn"
    """of the weight file"""
    data: Literal["digits", "mnist", "cifar10"] = "cifar10"
    kind: Literal["plain", "residual", "vgg"] = "plain"
    patch_px: int = 4
    """side of the patches that the first layer sees; its stride is the half of it (vgg: 0)"""
    widths: tuple[int, ...] = (48, 96, 192)
    """channels per level; the last one is the number of features"""
    head: Literal["softmax", "sigmoid"] = "softmax"
    """one answer, or one-vs-rest"""
    steps: int = 2800
    """updates"""
    batch_size: int = 256
    """images per step"""
    lr: float = 0.3
    """peak learning rate"""
    warmup: float = 0.2
    """fraction of the steps"""
    weight_decay: float = 5e-4
    """L2 penalty on kernels"""
    label_smoothing: float = 0.1
    """probability spread over all classes"""
    shift_px: int = 2
    """random shifts up to this"""
    flip: bool = True
    """mirror half of the images"""
    cutout_px: int = 0
    """side of the covered square (0: none)"""
    holdout: int = 2500
    """training images kept for the temperature"""
    seed: int = 0
    """root of the random numbers"""
    checkpoint_every: int = 200
    """steps"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "holdout", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError("lr must be positive")
        if not self.widths or min(self.widths) < 1:
            raise UserError("widths must be positive, one per level")
        if self.kind == "vgg" and self.patch_px:
            raise UserError("patch_px must be 0 where kind is vgg")
        if self.kind != "vgg" and (self.patch_px < 2 or self.patch_px % 2):
            raise UserError("patch_px must be even")
        if not (0 <= self.warmup < 1 and 0 <= self.label_smoothing < 1):
            raise UserError("warmup and label_smoothing must be at least 0 and below 1")
        if min(self.shift_px, self.cutout_px, self.weight_decay) < 0:
            raise UserError("shift_px, cutout_px and weight_decay must not be negative")


_CIFAR10 = Config()
PRESETS = {
    "digits": Config(
        "digits_cnn",
        "digits",
        patch_px=2,
        widths=(32, 64),
        steps=1500,
        batch_size=64,
        lr=0.1,
        shift_px=1,
        flip=False,
        holdout=137,
    ),
    "mnist": Config("mnist_cnn", "mnist", widths=(24, 48, 96), steps=1500, flip=False, holdout=2000),
    "cifar10": _CIFAR10,
    "cifar10_judge_a": dataclasses.replace(
        _CIFAR10, name="cifar10_judge_a", head="sigmoid", label_smoothing=0.0, seed=1
    ),
    "cifar10_judge_b": dataclasses.replace(
        _CIFAR10, name="cifar10_judge_b", kind="residual", head="sigmoid", label_smoothing=0.0, seed=2
    ),
    "cifar10_vgg": dataclasses.replace(
        _CIFAR10, name="cifar10_vgg", kind="vgg", patch_px=0, widths=(32, 64, 128, 128), steps=1400, seed=3
    ),
}
