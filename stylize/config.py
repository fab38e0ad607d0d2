"""Every default of the package. Images are RGB in [-1, 1]; sizes are those of the longest side.

Style losses are ||G - A||^2 / ||A||^2 per layer (G = F F^T / (h w c), A the same of the style image) and content losses
||F - P||^2 / ||P||^2, so that weights mean the same for every loss network and every style; `scale` "raw" gives the
published sums instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lib.process import UserError


def _require(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)


def _positive(name: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, f"{name} must be positive")


def _not_negative(name: str, *values: float) -> None:
    _require(all(math.isfinite(v) and v >= 0 for v in values), f"{name} must not be negative")


Scale = Literal["relative", "raw"]


@dataclass(frozen=True)
class Perception:
    """The loss network, and what is compared in it."""

    weights: str | None = None
    """file of VGG weights (default: the cache, the data folder, or the small network that is part of the package)"""
    layers: Literal["gatys", "johnson"] = "gatys"
    """whose layers are compared where none are named: those of Gatys et al., styles at relu1_1 to relu5_1 and contents
    at relu4_2, or of Johnson et al., at relu1_2 to relu4_3 and relu2_2; as deep as the weights reach"""
    style_layers: tuple[str, ...] = ()
    """e.g. relu1_1 relu2_1, or pixels"""
    content_layers: tuple[str, ...] = ()
    """e.g. relu4_2"""
    style_weight: float = 50.0
    content_weight: float = 1.0
    tv_weight: float = 3.0
    """of the mean squared difference of neighbouring pixels, without which optimisation leaves grain"""
    pooling: Literal["max", "average"] = "average"
    scale: Scale = "relative"
    """losses relative to the targets' own size, or as published: mean squared differences (see above)"""

    def __post_init__(self) -> None:
        _not_negative("style_weight, content_weight and tv_weight", self.style_weight, self.content_weight,
                      self.tv_weight)  # fmt: skip
        _require(self.style_weight + self.content_weight > 0, "style_weight and content_weight are both zero")


@dataclass(frozen=True)
class Optimization:
    """Gatys et al. (arXiv 1508.06576): the pixels are the parameters."""

    optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    iterations: tuple[int, ...] = (200, 100)
    """per scale, from the smallest; scales beyond these take as many as the last"""
    smallest_px: int = 256
    """longest side of the first scale; every further one is twice as large"""
    lr: float = 0.03
    """adam: in units of pixel values, which span 2"""
    memory: int = 30
    """lbfgs: pairs of steps and gradients that are remembered, 24 bytes a pixel each"""
    line_search: bool = True
    """lbfgs: along each direction until the objective has fallen enough; without, each step is taken whole, as the
    programs of Gatys et al. and Johnson et al. do, which call Torch's L-BFGS"""
    start: Literal["content", "noise"] = "content"
    """what the first scale begins with, unless an image is given"""
    clip: bool = True
    """lbfgs: the objective sees pixels as a file shows them, between black and white; without, as published, it sees
    values that are lost when the image is saved"""
    tile_px: int | None = None
    """side of the tiles that a scale is computed in, by Adam (default: 256 for more pixels than 1024 x 768)"""

    def __post_init__(self) -> None:
        _require(bool(self.iterations) and min(self.iterations) >= 1, "optim.iterations must be positive")
        _require(self.smallest_px >= 16, "optim.smallest_px must be at least 16")
        _positive("optim.lr", self.lr)
        _require(self.memory >= 1, "optim.memory must be at least 1")
        _require(self.tile_px is None or self.tile_px >= 64, "optim.tile_px must be at least 64")


Baseline = Literal["gatys", "lbfgs_noise", "adam_noise", "lbfgs_content"]
BASELINES: dict[Baseline, Optimization] = {
    "gatys": Optimization("lbfgs", start="noise", memory=100, line_search=False, clip=False),
    "lbfgs_noise": Optimization("lbfgs", start="noise"),
    "adam_noise": Optimization("adam", start="noise"),
    "lbfgs_content": Optimization("lbfgs", start="content"),
}
"""what a network is compared with: an optimiser of pixels, and what it starts from"""


@dataclass(frozen=True)
class Evaluation:
    """How a network is measured."""

    count: int = 50
    """photographs, from the first"""
    size_px: int = 256
    """photographs are cropped to squares of this side"""
    iterations: int = 100
    """of optimising the pixels of each photograph, to compare with"""
    against: tuple[Baseline, ...] = tuple(BASELINES)
    """optimisers, and what they start from"""
    style: int = 0
    """which style of the network; clips are measured in all of them"""

    def __post_init__(self) -> None:
        _require(
            min(self.count, self.iterations) >= 1 and self.size_px >= 32 and self.style >= 0,
            "count and iterations must be at least 1, size-px 32, style 0",
        )


@dataclass(frozen=True)
class Network:
    """Johnson et al. (2016) with instance normalisation (arXiv 1607.08022), one set of scales and shifts per style."""

    width: int = 32
    """channels after the first convolution"""
    blocks: int = 5
    """residual blocks"""
    upsampling: Literal["nearest", "transposed"] = "nearest"
    """nearest neighbour and a convolution, or the paper's transposed convolution, which leaves a checkerboard"""
    kernel_px: int = 9
    """side of the first and the last convolution"""
    output: Literal["linear", "tanh"] = "linear"
    """of the last convolution: what is beyond black and white costs a little in training, or the paper's tanh, which
    saturates there: pixels that are beyond hardly come back"""
    memory: bool = False
    """for movies: the network also sees the stylised frame before, moved to this one, and where that is reliable, and
    keeps some of it"""

    def __post_init__(self) -> None:
        _require(self.width >= 1 and self.blocks >= 1, "network.width and network.blocks must be positive")
        _require(self.kernel_px >= 1 and self.kernel_px % 2 == 1, "network.kernel_px must be odd, and at least 1")


@dataclass(frozen=True)
class Optim:
    """The learning rate rises over `warmup` and then falls to `final_lr` on a cosine."""

    algorithm: Literal["muon", "adam"] = "muon"
    """Muon (Jordan et al. 2024) for the kernels of convolutions and Adam for the rest, or Adam for all"""

    steps: int = 2000
    """updates"""
    batch_size: int = 4
    """photographs per step"""
    crop_px: int = 256
    """side of the squares that photographs are cropped to"""
    whole: float = 0.0
    """share of the steps, at their end, that see whole squares of photo_px instead of crops: instance normalisation
    knows an image by what it sees of it, and in use that is everything"""
    lr: float = 3e-3
    """peak learning rate; adam: 1e-3"""
    whole_lr: float | None = None
    """what whole squares begin with after crops, to fall on a cosine of their own (none: one cosine for all)"""
    final_lr: float = 0.0
    """learning rate after the last step, as a fraction of the peak"""
    warmup: float = 0.02
    """fraction of the steps"""
    identity: float = 0.1
    """share of examples that are to stay as they are, which makes the strength adjustable afterwards"""
    temporal_weight: float = 0.0
    """of the mean squared difference to the stylised frame before, of a camera that shifts and zooms over stills"""

    def __post_init__(self) -> None:
        _require(self.steps >= 1 and self.batch_size >= 1, "optim: steps and batch_size must be at least 1")
        _require(self.crop_px >= 32 and self.crop_px % 4 == 0, "optim.crop_px must be a multiple of 4, 32 or more")
        _require(0 <= self.whole <= 1, "optim.whole must be between 0 and 1, a share of the steps")
        _positive("optim.lr", self.lr)
        if self.whole_lr is not None:
            _positive("optim.whole_lr", self.whole_lr)
        _require(0 <= self.final_lr <= 1, "optim.final_lr must be between 0 and 1, a fraction of lr")
        _require(0 <= self.warmup < 1, "optim.warmup must be at least 0 and below 1, a fraction of the steps")
        _require(0 <= self.identity < 1, "optim.identity must be at least 0 and below 1")
        _not_negative("optim.temporal_weight", self.temporal_weight)


@dataclass(frozen=True)
class Config:
    """A feed-forward network for one style or several."""

    styles: tuple[str, ...] = ()
    """images"""
    photos: str = ""
    """folder of photographs to learn from"""
    style_px: int | None = 256
    """longest side of the style images while training (none: as they are)"""
    warm_start: str | None = None
    """a trained run to begin with, of the same network, of any styles, with a memory or without"""
    photo_px: int | None = None
    """shorter side that photographs have while training (none: a quarter more than their crops)"""
    perception: Perception = Perception()
    network: Network = Network()
    optim: Optim = Optim()
    seed: int = 0
    """root of all random numbers"""
    checkpoint_every: int = 200
    """steps between checkpoints"""

    def __post_init__(self) -> None:
        _require(self.style_px is None or self.style_px >= 16, "style_px must be at least 16")
        _require(
            self.photo_px is None or self.photo_px >= self.optim.crop_px,
            f"photo_px must be at least optim.crop_px, {self.optim.crop_px}",
        )
        _require(
            self.optim.whole == 0 or (self.photo_px or 1) % 4 == 0,
            "optim.whole needs a photo_px that is a multiple of 4",
        )
        _require(0 <= self.seed < 2**32, "seed must be between 0 and 2**32 - 1")
        _require(self.checkpoint_every >= 1, "checkpoint_every must be at least 1")
        _require(
            self.network.memory or self.optim.temporal_weight == 0,
            "optim.temporal_weight compares with the frame before: set network.memory",
        )


_JOHNSON = Perception(layers="johnson", style_weight=20.0)
_SMALL = Config(
    photo_px=256,
    perception=_JOHNSON,
    network=Network(width=16),
    optim=Optim(steps=21_000, batch_size=2, crop_px=128, whole=0.14, lr=4e-3, whole_lr=1.3e-3),
)

PRESETS: dict[str, Config] = {
    # Two hours on two cores; the released networks of Johnson et al. with instance normalisation are as narrow.
    "small": _SMALL,
    # To go on from a network for images (warm_start), which sees whole squares to the end.
    "movie": replace(
        _SMALL,
        perception=replace(_JOHNSON, style_weight=30.0),
        network=replace(_SMALL.network, memory=True),
        optim=replace(_SMALL.optim, steps=1300, batch_size=1, lr=2e-3, whole=1.0, whole_lr=None, temporal_weight=40.0),
    ),
    # 40,000 steps of 4 photographs at 256 pixels, for a GPU.
    "full": Config(perception=_JOHNSON, optim=Optim(steps=40_000)),
    "paper": Config(
        perception=_JOHNSON,
        network=Network(upsampling="transposed", output="tanh"),
        optim=Optim("adam", steps=40_000, lr=1e-3, final_lr=1.0, warmup=0.0, identity=0.0),
    ),
}
