"""Every default of the package. A preset is one data set with one recipe; options override fields.

`NAME_v1` and `NAME_v2` are the published recipes of NCSN (arXiv 1907.05600) and NCSNv2 (arXiv 2006.09011), `NAME_edm`
is EDM's (arXiv 2206.00364) with a network as large as the data set deserves. What is measured from the data unless it
is given says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lib.process import UserError

Kind = Literal["v1", "v2", "unet", "mlp"]
Name = Literal[
    "annealed_langevin",
    "langevin",
    "predictor_corrector",
    "reverse_diffusion",
    "ancestral",
    "euler_maruyama",
    "euler",
    "heun",
    "dpm_solver",
    "probability_flow",
    "underdamped_langevin",
]
SAMPLERS: tuple[str, ...] = Name.__args__


def _require(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)


@dataclass(frozen=True)
class Data:
    """What is learned."""

    source: str = "digits"
    """toy_mixture, digits, mnist, cifar10, a folder of images, or a .npz file of uint8 images [n, h, w, c]"""
    size_px: int | None = None
    """images of a folder are cropped to a square and resized to this side (default: as they are)"""
    flip: bool = False
    """mirror half of the images while training"""
    dequantize: bool = False
    """spread each grey level over its interval, as NCSN v1 does and likelihoods need"""

    def __post_init__(self) -> None:
        _require(self.size_px is None or self.size_px >= 2, "data.size_px must be at least 2")


@dataclass(frozen=True)
class Network:
    """v1 and v2: NCSN's RefineNets; unet and mlp: preconditioned as in EDM."""

    kind: Kind = "unet"
    width: int = 64
    """channels at full resolution; units of the mlp"""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """unet: channels of each resolution in units of width"""
    blocks: int = 2
    """unet: residual blocks per resolution; mlp: layers"""
    patch_px: int = 1
    """unet: pixels are gathered in squares of this side first, which saves time on large images"""
    attention: tuple[int, ...] = ()
    """unet: heights at which blocks attend, in patches"""
    heads: int = 1
    """of the attention"""
    conditioning: Literal["film", "additive"] = "film"
    """unet: how the noise level enters a block"""
    features: Literal["positional", "fourier"] = "positional"
    """of the noise level"""
    dropout: float = 0.0
    """unet and mlp"""
    energy: bool = False
    """unet and mlp: the score is minus the gradient of an energy"""
    class_conditional: bool = False
    """unet and mlp: the network is told the class"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of convolutions and matrix products"""

    def __post_init__(self) -> None:
        _require(self.width >= 2 and self.width % 2 == 0, "network.width must be even and at least 2")
        _require(bool(self.multipliers) and min(self.multipliers) >= 1, "network.multipliers must be positive")
        _require(min(self.blocks, self.patch_px, self.heads) >= 1, "network: blocks, patch_px, heads must be positive")
        _require(0 <= self.dropout < 1, "network.dropout must be at least 0 and below 1")
        plain = not (self.energy or self.class_conditional)
        _require(plain or self.kind in ("unet", "mlp"), f"network.kind {self.kind} has neither classes nor an energy")


@dataclass(frozen=True)
class Noise:
    """Noise levels, in the units of what the network sees: pixels in [0, 1] for v1 and v2, else in [-1, 1]."""

    training: Literal["ladder", "log_normal", "ve", "vp", "sub_vp"] = "log_normal"
    """levels of training: those of a geometric ladder, EDM's, or those of a diffusion at uniform times"""
    sigma_min: float = 0.002
    """lowest level"""
    sigma_max: float | None = 80.0
    """highest level (none: the largest distance between two training images, NCSNv2's technique 1)"""
    levels: int | None = None
    """of the ladder (default: as many as NCSNv2's technique 2 asks for)"""
    P_mean: float = -1.2
    """log_normal: mean of log sigma"""
    P_std: float = 1.2
    """log_normal: its standard deviation"""
    sigma_data: float | None = None
    """unet and mlp: size of the data (default: measured)"""

    def __post_init__(self) -> None:
        _require(self.sigma_min > 0, "noise.sigma_min must be positive")
        high = math.inf if self.sigma_max is None else self.sigma_max
        _require(high > self.sigma_min, "noise.sigma_max must be above noise.sigma_min")
        _require(self.levels is None or self.levels >= 2, "noise.levels must be at least 2")
        _require(self.P_std > 0, "noise.P_std must be positive")
        _require(self.sigma_data is None or self.sigma_data > 0, "noise.sigma_data must be positive")


@dataclass(frozen=True)
class Optim:
    """Adam; the learning rate rises over `warmup` and then falls to `final_lr` on a cosine."""

    loss: Literal["denoising", "sliced"] = "denoising"
    """denoising score matching, or sliced score matching of the noisy data"""
    steps: int = 2000
    """updates"""
    batch_size: int = 128
    """examples per step"""
    lr: float = 1e-3
    """peak learning rate"""
    final_lr: float = 1.0
    """learning rate after the last step, as a fraction of the peak"""
    warmup: float = 0.0
    """fraction of the steps"""
    b2: float = 0.999
    """decay of Adam's second moment"""
    clip: float | None = None
    """largest norm of the gradient (default: any)"""
    ema_decay: float = 0.999
    """of the averaged weights that samples are made with"""
    label_dropout: float = 0.0
    """share of labels that are hidden, for classifier-free guidance"""

    def __post_init__(self) -> None:
        _require(self.steps >= 1 and self.batch_size >= 1, "optim: steps and batch_size must be at least 1")
        _require(math.isfinite(self.lr) and self.lr > 0, "optim.lr must be positive")
        _require(0 <= self.final_lr <= 1, "optim.final_lr must be between 0 and 1, a fraction of lr")
        _require(0 <= self.warmup < 1, "optim.warmup must be at least 0 and below 1, a fraction of the steps")
        _require(0 < self.b2 < 1, "optim.b2 must be between 0 and 1")
        _require(self.clip is None or self.clip > 0, "optim.clip must be positive")
        _require(0 <= self.ema_decay < 1, "optim.ema_decay must be at least 0 and below 1")
        _require(0 <= self.label_dropout <= 1, "optim.label_dropout must be between 0 and 1")


@dataclass(frozen=True)
class Sampling:
    """A sampler and what it may cost."""

    sampler: Name = "heun"
    """which one"""
    nfe: int = 35
    """evaluations of the network per sample; a last one that removes the noise may come on top"""
    sigma_min: float | None = None
    """lowest noise level (default: that of training)"""
    sigma_max: float | None = None
    """highest noise level (default: that of training; Langevin samplers: the largest distance of two images)"""
    rho: float = 7.0
    """heun, euler, dpm_solver: how levels are spaced, EDM eq. 5"""
    denoise: bool = True
    """end with the mean of the clean images given the last noisy one"""
    step_size: float | None = None
    """annealed_langevin, langevin: at the lowest level (default: NCSNv2's technique 4); underdamped: per sigma (0.5)"""
    rule: Literal["code", "paper"] = "code"
    """annealed_langevin: the step of NCSN's code, or of its Algorithm 1, which is half of it"""
    snr: float = 0.16
    """predictor_corrector: signal-to-noise ratio of its Langevin steps"""
    churn: float = 0.0
    """heun: S_churn, how much noise is added and removed again"""
    friction: float = 1.0
    """underdamped_langevin: per sigma"""
    rtol: float = 1e-4
    """probability_flow: tolerance; it takes the evaluations that it needs"""
    constraint: Literal["guided", "replaced"] = "guided"
    """inpaint, colorize: the score is guided by what is known, or what is known replaces what each step made of it"""
    guidance: float = 1.0
    """weight of the label: 0 forgets it, above 1 sharpens (each evaluation is then two)"""

    def __post_init__(self) -> None:
        _require(self.nfe >= 1, "nfe must be at least 1")
        for name in ("sigma_min", "sigma_max", "step_size"):
            value = getattr(self, name)
            _require(value is None or (math.isfinite(value) and value > 0), f"{name} must be positive")
        _require(min(self.rho, self.snr, self.friction) > 0, "rho, snr and friction must be positive")
        _require(self.churn >= 0 and self.guidance >= 0, "churn and guidance must not be negative")
        _require(0 < self.rtol < 1, "rtol must be between 0 and 1")


@dataclass(frozen=True)
class Evaluation:
    """How a trained run is measured."""

    samples: int = 1000
    """images per sampler"""
    samplers: tuple[str, ...] = ("heun:35",)
    """NAME:NFE each, or NAME:NFE:SAMPLES; the first one makes the pictures"""
    inpainting: str = "ancestral:50"
    """NAME:NFE that fills in the halves of test images"""
    likelihood_images: int = 16
    """test images whose bits per dimension are computed (0: none)"""

    def __post_init__(self) -> None:
        _require(self.samples >= 10, "evaluation.samples must be at least 10")
        _require(bool(self.samplers), "evaluation.samplers is empty: give NAME:NFE")
        for text in self.samplers:
            _require(self.asked(text)[1] >= 10, f"{text!r}: at least 10 samples are needed")
        parse_sampler(self.inpainting)
        _require(self.likelihood_images >= 0, "evaluation.likelihood_images must not be negative")

    def asked(self, text: str, base: Sampling = Sampling()) -> tuple[Sampling, int]:
        """The sampler and the number of samples of one of `samplers`."""
        *parts, last = text.split(":")
        if len(parts) == 2 and last.isdigit():
            return parse_sampler(":".join(parts), base), int(last)
        return parse_sampler(text, base), self.samples


def parse_sampler(text: str, base: Sampling = Sampling()) -> Sampling:
    """`base` with the sampler and the budget of "NAME:NFE". Raises UserError where it is not that."""
    name, _, nfe = text.partition(":")
    _require(name in SAMPLERS, f"unknown sampler {name!r}: choose from {', '.join(SAMPLERS)}")
    _require(nfe.isdigit(), f"{text!r}: a sampler is written NAME:NFE, e.g. heun:35")
    same = name == base.sampler
    return replace(base, sampler=name, nfe=int(nfe), step_size=base.step_size if same else None)


@dataclass(frozen=True)
class Config:
    """One score network: its data, its training, and how it is sampled and measured."""

    data: Data = Data()
    network: Network = Network()
    noise: Noise = Noise()
    optim: Optim = Optim()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    seed: int = 0
    """root of all random numbers"""
    checkpoint_every: int = 1000
    """steps between checkpoints"""

    def __post_init__(self) -> None:
        refine = self.network.kind in ("v1", "v2")
        _require(0 <= self.seed < 2**32, "seed must be between 0 and 2**32 - 1")
        _require(self.checkpoint_every >= 1, "checkpoint_every must be at least 1")
        _require(
            not refine or self.noise.training == "ladder",
            f"network.kind {self.network.kind} is trained on a ladder: set noise.training to ladder",
        )
        _require(
            (self.network.kind == "mlp") == (self.data.source == "toy_mixture"),
            "toy_mixture is points, for which network.kind is mlp; images need one of v1, v2, unet",
        )
        _require(
            self.optim.label_dropout == 0 or self.network.class_conditional,
            "optim.label_dropout hides labels: set network.class_conditional",
        )
        _require(
            self.network.class_conditional or self.sampling.guidance == 1,
            "sampling.guidance needs a network that knows classes: set network.class_conditional",
        )


_V1 = Config(
    network=Network("v1", width=64),
    noise=Noise("ladder", sigma_min=0.01, sigma_max=1.0, levels=10),
    optim=Optim(steps=200_000),
    sampling=Sampling("annealed_langevin", nfe=1000, step_size=2e-5, constraint="replaced"),
    evaluation=Evaluation(
        samplers=("annealed_langevin:1000", "predictor_corrector:200", "heun:35"), inpainting="annealed_langevin:1000"
    ),
    checkpoint_every=5000,
)
_V2 = replace(
    _V1,
    network=Network("v2", width=64),
    noise=Noise("ladder", sigma_min=0.01, sigma_max=None),
    optim=Optim(steps=200_000, lr=1e-4),
    sampling=Sampling("annealed_langevin", nfe=1000, constraint="replaced"),
)
_EDM = Config(
    optim=Optim(steps=20_000, final_lr=0.0, warmup=0.05, b2=0.99, clip=1.0),
    evaluation=Evaluation(samplers=("heun:35", "heun:19", "dpm_solver:20", "annealed_langevin:1000")),
)
# A few minutes on two cores. Digits have 17 grey levels: noise far below a sixteenth is not worth learning.
_FEW_STEPS = Optim(steps=1300, batch_size=64, lr=3e-3, final_lr=0.0, warmup=0.05)
_FEW_SAMPLES = Evaluation(200, ("annealed_langevin:400",), inpainting="annealed_langevin:200", likelihood_images=0)
_DIGITS = Data("digits")

PRESETS: dict[str, Config] = {
    "toy_mixture": Config(
        Data("toy_mixture"),
        Network("mlp", width=64, blocks=3),
        Noise("ladder", sigma_min=1.0, sigma_max=20.0, levels=20),
        Optim(steps=3000, batch_size=256, lr=3e-3, final_lr=0.0, warmup=0.05, b2=0.99),
        Sampling("annealed_langevin", nfe=1000, step_size=0.2, denoise=False),
        Evaluation(samples=4096, samplers=("annealed_langevin:1000", "heun:35"), likelihood_images=0),
    ),
    "digits_v1": replace(
        _V1,
        data=replace(_DIGITS, dequantize=True),
        network=Network("v1", width=16),
        noise=replace(_V1.noise, sigma_min=0.03),
        optim=_FEW_STEPS,
        sampling=replace(_V1.sampling, nfe=400, step_size=2e-4),
        evaluation=_FEW_SAMPLES,
        checkpoint_every=500,
    ),
    "digits_v2": replace(
        _V2,
        data=_DIGITS,
        network=Network("v2", width=16),
        noise=replace(_V2.noise, sigma_min=0.03),
        optim=replace(_FEW_STEPS, steps=2200, lr=4e-3),
        sampling=replace(_V2.sampling, nfe=400),
        evaluation=_FEW_SAMPLES,
        checkpoint_every=500,
    ),
    "digits_edm": replace(
        _EDM,
        data=_DIGITS,
        network=Network(width=16, multipliers=(1, 2), blocks=1, class_conditional=True),
        noise=Noise(sigma_max=40.0, P_mean=0.5, P_std=1.5),
        optim=replace(_EDM.optim, steps=400, batch_size=64, lr=4e-3, label_dropout=0.25),
        sampling=Sampling("dpm_solver", nfe=20, guidance=2.0),
        evaluation=Evaluation(500, ("dpm_solver:20", "annealed_langevin:200:100"), likelihood_images=0),
        checkpoint_every=500,
    ),
    "mnist_v1": replace(_V1, data=Data("mnist", dequantize=True)),
    "mnist_v2": replace(_V2, data=Data("mnist")),
    "mnist_edm": replace(
        _EDM,
        data=Data("mnist"),
        network=Network(width=32, multipliers=(1, 2), blocks=1, patch_px=2, class_conditional=True),
        # EDM's own levels, for photographs, hardly visit those at which a digit's class and shape are decided.
        noise=Noise(sigma_max=40.0, P_mean=0.5, P_std=1.5),
        optim=replace(_EDM.optim, steps=3000, lr=2e-3, label_dropout=0.1),
        # Less mixes classes up, more loses variety: fid.mnist_cnn of 2,000 samples 0.21, 0.052, 0.077 at 1, 1.4, 1.6.
        sampling=Sampling("dpm_solver", nfe=20, guidance=1.4),
        evaluation=Evaluation(
            5000, ("dpm_solver:20", "dpm_solver:10", "heun:19", "annealed_langevin:500:500"), likelihood_images=64
        ),
    ),
    "cifar10_v1": replace(
        _V1, data=Data("cifar10", flip=True, dequantize=True), network=Network("v1", width=128)
    ),
    "cifar10_v2": replace(
        _V2, data=Data("cifar10", flip=True), network=Network("v2", width=128), optim=Optim(steps=300_000, lr=1e-4)
    ),
    "cifar10_edm": replace(
        _EDM,
        data=Data("cifar10", flip=True),
        network=Network(width=128, multipliers=(2, 2, 2), blocks=4, attention=(16,), conditioning="additive",
                        dropout=0.13, class_conditional=True, precision="bfloat16"),
        optim=replace(_EDM.optim, steps=100_000, batch_size=512, ema_decay=0.9999),
        evaluation=replace(_EDM.evaluation, samples=10_000),
        checkpoint_every=5000,
    ),
}  # fmt: skip
