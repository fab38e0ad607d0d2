"""Every default of the package. A preset is one data set with one recipe; options override fields.

`cifar10_NAME` are the published recipes for 32x32 images, `mnist_NAME` the same for 28x28 with the widths that these
need, `digits_dcgan` is small enough for a minute on two cores, and the mixtures are the 25 Gaussians of WGAN-GP. What a
recipe takes from its source and what it does not is said beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lib.process import UserError

Kind = Literal["dcgan", "cnn", "resnet", "mlp"]
Objective = Literal["non_saturating", "hinge", "least_squares", "wasserstein", "elbo"]


def _require(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)


@dataclass(frozen=True)
class Data:
    """What is learned."""

    source: str = "digits"
    """gaussians, digits, mnist, cifar10, a folder of images, or a .npz file of uint8 images [n, h, w, c]"""
    size_px: int | None = None
    """images of a folder are cropped to a square and resized to this side (default: as they are)"""
    labels: tuple[int, ...] = ()
    """learn the images of these classes only, numbered 0, 1, ... in this order (default: all)"""
    flip: bool = False
    """mirror half of the images while training"""
    dequantize: bool = False
    """spread each grey level over its interval, as SNGAN and WGAN-GP do"""

    def __post_init__(self) -> None:
        _require(self.size_px is None or self.size_px >= 2, "data.size_px must be at least 2")


@dataclass(frozen=True)
class Network:
    """Generator and critic. A generator doubles its images `levels` times, from side / 2^levels."""

    kind: Kind = "dcgan"
    """dcgan: strided convolutions; cnn: those of SNGAN; resnet: residual blocks; mlp: for points"""
    latent: int = 100
    """numbers that an image is made from, N(0, 1)"""
    width: int = 64
    """channels of the generator at the highest resolution (resnet, mlp: at all)"""
    critic_width: int = 64
    """channels of the critic at the highest resolution (resnet, mlp: at all)"""
    levels: int = 4
    """resolutions between the latent and the image; mlp: hidden layers"""
    critic_levels: int | None = None
    """dcgan, cnn: those of the critic, which sees more of an image at once with more of them (default: levels)"""
    kernel_px: int = 4
    """dcgan: side of the generator's kernels"""
    critic_kernel_px: int = 5
    """dcgan: side of the critic's kernels"""
    critic_norm: Literal["batch", "none", "spectral"] = "batch"
    """batch norm, nothing, or spectral norm of every weight"""
    slope: float = 0.2
    """of the critic's leaky ReLU below zero (resnet: 0)"""
    pooling: Literal["sum", "mean"] = "sum"
    """resnet: over the pixels of the critic's last layer"""
    conditioning: Literal["none", "concatenation", "projection"] = "none"
    """how the class enters: not, beside the inputs, or by conditional batch norm and a projection"""

    def __post_init__(self) -> None:
        least = min(self.latent, self.width, self.critic_width, self.levels, self.kernel_px, self.critic_kernel_px)
        levels = self.levels if self.critic_levels is None else self.critic_levels
        _require(min(least, levels) >= 1, "network: latent, widths, levels and kernels must be at least 1")
        _require(0 <= self.slope < 1, "network.slope must be at least 0 and below 1")
        points = self.kind != "mlp" or (self.conditioning == "none" and self.critic_norm != "batch")
        _require(points, "network.kind mlp has neither classes nor batch norm")
        _require(
            self.conditioning != "projection" or self.kind == "resnet",
            "network.conditioning projection is for network.kind resnet",
        )


@dataclass(frozen=True)
class Optim:
    """A step is a cycle: `n_critic` updates of the critic and one of the generator."""

    loss: Objective = "non_saturating"
    """of a GAN; elbo trains the critic's network as the encoder of a VAE instead"""
    steps: int = 1000
    """cycles"""
    n_critic: int = 1
    """updates of the critic per cycle"""
    batch_size: int = 128
    """real examples per update of the critic, and as many generated ones"""
    generator_batch: int | None = None
    """generated examples per update of the generator (default: batch_size)"""
    generator_first: bool = False
    """the generator moves before the critic in every cycle, as in SNGAN's code"""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """of both networks"""
    lr: float = 2e-4
    """learning rate"""
    critic_lr: float | None = None
    """learning rate of the critic (default: lr)"""
    b1: float = 0.5
    """decay of Adam's first moment"""
    b2: float = 0.999
    """decay of Adam's second moment"""
    decay: Literal["constant", "linear"] = "constant"
    """linear: the learning rate falls to zero over the steps"""
    clip: float | None = None
    """the critic's weights are clipped to this before each of its updates (WGAN)"""
    gradient_penalty: float = 0.0
    """weight of (|gradient| - 1)^2 between real and generated examples (WGAN-GP)"""
    r1: float = 0.0
    """weight of |gradient|^2 / 2 at real examples (Mescheder et al. 2018)"""
    head_start: int = 1
    """the first 25 updates of the generator, and every 500th, wait for so many cycles of the critic (WGAN: 20)"""
    kl_weight: float = 1.0
    """elbo: of the divergence from the prior"""
    noise_std: float = 0.3
    """elbo: standard deviation of a pixel about its reconstruction"""
    ema_decay: float = 0.999
    """of the averaged generator that samples are made with (0: the generator itself)"""

    def __post_init__(self) -> None:
        _require(min(self.steps, self.n_critic, self.head_start) >= 1,
                 "optim: steps, n_critic and head_start must be at least 1")  # fmt: skip
        _require(self.batch_size >= 2, "optim.batch_size must be at least 2")
        _require(self.generator_batch is None or self.generator_batch >= 2, "optim.generator_batch must be at least 2")
        for name in ("lr", "critic_lr", "clip", "noise_std"):
            value = getattr(self, name)
            _require(value is None or (math.isfinite(value) and value > 0), f"optim.{name} must be positive")
        _require(0 <= self.b1 < 1 and 0 < self.b2 < 1, "optim: b1 and b2 must be between 0 and 1")
        _require(min(self.gradient_penalty, self.r1, self.kl_weight) >= 0,
                 "optim: gradient_penalty, r1 and kl_weight must not be negative")  # fmt: skip
        _require(0 <= self.ema_decay < 1, "optim.ema_decay must be at least 0 and below 1")
        adversarial = self.n_critic > 1 or self.generator_first or self.clip or self.gradient_penalty or self.r1
        _require(self.loss != "elbo" or not adversarial, "optim.loss elbo has no critic: set its options back")


@dataclass(frozen=True)
class Watch:
    """What is measured while training; best is the checkpoint with the lowest score of all looks."""

    every: int = 1000
    """cycles between two looks"""
    samples: int = 1000
    """fresh samples per look"""
    patience: int | None = None
    """training ends after so many looks without a better one (default: never before its last step)"""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "watch.every must be at least 1")
        _require(self.samples >= 20, "watch.samples must be at least 20")
        _require(self.patience is None or self.patience >= 1, "watch.patience must be at least 1")


@dataclass(frozen=True)
class Evaluation:
    """How a trained run is measured."""

    samples: int = 10_000
    """of the best and of the last checkpoint"""

    def __post_init__(self) -> None:
        _require(self.samples >= 20, "evaluation.samples must be at least 20")


@dataclass(frozen=True)
class Config:
    """One generator: its data, its training, and how it is watched and measured."""

    data: Data = Data()
    network: Network = Network()
    optim: Optim = Optim()
    watch: Watch = Watch()
    evaluation: Evaluation = Evaluation()
    seed: int = 0
    """root of all random numbers"""
    checkpoint_every: int = 1000
    """cycles between checkpoints"""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed must be between 0 and 2**32 - 1")
        _require(self.checkpoint_every >= 1, "checkpoint_every must be at least 1")
        _require(
            (self.network.kind == "mlp") == (self.data.source == "gaussians"),
            "gaussians are points, for which network.kind is mlp; images need one of dcgan, cnn, resnet",
        )
        penalised = self.optim.gradient_penalty or self.optim.r1
        _require(
            not (penalised and self.network.critic_norm == "batch"),
            "a penalty on the gradient of every example needs a critic without batch norm: set network.critic_norm",
        )
        _require(
            self.optim.loss != "elbo" or self.network.kind in ("dcgan", "cnn"),
            "optim.loss elbo is for network.kind dcgan or cnn",
        )
        _require(
            self.optim.loss != "elbo" or self.network.conditioning == "none",
            "optim.loss elbo knows no classes: set network.conditioning to none",
        )

    @property
    def classes_known(self) -> bool:
        return self.network.conditioning != "none"

    @property
    def generator_batch(self) -> int:
        return self.optim.generator_batch or self.optim.batch_size


# Radford et al. 2016 for 32x32, in the form of pytorch-gan-collections: 1024 channels at 2x2 down to 128 at 16x16.
_DCGAN = Config(
    data=Data("cifar10"),
    network=Network(),
    optim=Optim(steps=100_000, ema_decay=0.9999),
    watch=Watch(every=2000, samples=5000),
    evaluation=Evaluation(50_000),
    checkpoint_every=2000,
)
# Arjovsky et al. 2017 and their code: RMSProp, weights in ±0.01, a critic that is always ahead.
_WGAN = replace(
    _DCGAN,
    optim=Optim("wasserstein", steps=100_000, n_critic=5, batch_size=64, optimizer="rmsprop", lr=5e-5, clip=0.01,
                head_start=20, ema_decay=0.9999),
)  # fmt: skip
# Gulrajani et al. 2017, the ResNet for CIFAR-10 without classes, and their code: Adam(0, 0.9), learning rate to zero,
# twice as many samples for the generator, no norm in the critic, the mean over its last pixels.
_WGAN_GP = replace(
    _DCGAN,
    data=Data("cifar10", dequantize=True),
    network=Network("resnet", latent=128, width=128, critic_width=128, levels=3, critic_norm="none", slope=0.0,
                    pooling="mean"),
    optim=Optim("wasserstein", steps=100_000, n_critic=5, batch_size=64, generator_batch=128, b1=0.0, b2=0.9,
                decay="linear", gradient_penalty=10.0, ema_decay=0.9999),
)  # fmt: skip
# Miyato et al. 2018 and their code: hinge, the generator first, the learning rate falling from the first step on.
_SNGAN = replace(
    _WGAN_GP,
    network=replace(_WGAN_GP.network, width=256, critic_norm="spectral", pooling="sum"),
    optim=replace(_WGAN_GP.optim, loss="hinge", steps=50_000, gradient_penalty=0.0, generator_first=True),
)
_VAE = replace(_DCGAN, optim=Optim("elbo", steps=50_000, lr=1e-3, b1=0.9, ema_decay=0.999))

# 28x28 has two doublings; widths, batches, learning rates, steps and averages are our own.
_MNIST = {
    "data": Data("mnist"),
    "watch": Watch(every=500, samples=2000),
    "evaluation": Evaluation(10_000),
    "checkpoint_every": 500,
}
_MNIST_DCGAN = Config(
    network=Network(width=32, critic_width=32, levels=2, critic_levels=3, critic_kernel_px=4),
    optim=Optim(steps=20_000, batch_size=64, lr=5e-4, decay="linear"),
    **_MNIST,
)

# Gulrajani et al. 2017, section 5.1 and gan_toy.py, with a narrower network and fewer steps.
_MIXTURE = Config(
    data=Data("gaussians"),
    network=Network("mlp", latent=2, width=128, critic_width=128, levels=3, critic_norm="none", slope=0.0),
    optim=Optim("wasserstein", steps=6000, n_critic=5, batch_size=256, lr=1e-3, b1=0.5, b2=0.9, decay="linear",
                gradient_penalty=0.1, ema_decay=0.99),
    watch=Watch(every=500, samples=5000),
    evaluation=Evaluation(10_000),
    checkpoint_every=1000,
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "digits_dcgan": Config(
        data=Data("digits"),
        network=Network(latent=32, width=24, critic_width=24, levels=2, critic_kernel_px=4),
        optim=Optim(steps=8000, batch_size=64, lr=2e-3, decay="linear", ema_decay=0.995),
        watch=Watch(every=500, samples=500),
        evaluation=Evaluation(1000),
        checkpoint_every=500,
    ),
    "mnist_dcgan": _MNIST_DCGAN,
    # The class beside the inputs, and R1 in the place of the critic's batch norm, which allows twice the learning rate.
    "mnist_cgan": replace(
        _MNIST_DCGAN,
        network=replace(_MNIST_DCGAN.network, critic_norm="none", conditioning="concatenation"),
        optim=replace(_MNIST_DCGAN.optim, lr=1e-3, r1=0.1),
    ),
    "mnist_wgan_gp": replace(
        _MNIST_DCGAN,
        network=Network(latent=128, width=32, critic_width=32, levels=2, kernel_px=5, critic_norm="none"),
        optim=Optim("wasserstein", steps=6000, n_critic=5, batch_size=64, lr=1e-4, b2=0.9, gradient_penalty=10.0),
    ),
    "mnist_sngan": replace(
        _MNIST_DCGAN,
        data=Data("mnist", dequantize=True),
        network=Network("cnn", latent=128, width=32, critic_width=32, levels=2, critic_norm="spectral", slope=0.1),
        optim=Optim("hinge", steps=6000, b1=0.5, generator_first=True),
    ),
    "cifar10_dcgan": _DCGAN,
    # Mirza and Osindero 2014: the class beside the inputs of both networks.
    "cifar10_cgan": replace(_DCGAN, network=replace(_DCGAN.network, conditioning="concatenation")),
    "cifar10_wgan": _WGAN,
    "cifar10_wgan_gp": _WGAN_GP,
    "cifar10_wgan_gp_cnn": replace(
        _WGAN_GP,
        network=Network(latent=128, critic_width=128, levels=3, kernel_px=5, critic_norm="none"),
        optim=replace(_WGAN_GP.optim, steps=200_000, generator_batch=None, lr=1e-4, b1=0.5, decay="constant"),
    ),
    "cifar10_sngan": _SNGAN,
    "cifar10_sngan_cnn": replace(
        _SNGAN,
        network=Network("cnn", latent=128, levels=3, critic_norm="spectral", slope=0.1),
        optim=replace(_SNGAN.optim, steps=100_000, n_critic=1, b1=0.5, b2=0.999, generator_batch=None),
    ),
    # Miyato and Koyama 2018.
    "cifar10_sngan_projection": replace(_SNGAN, network=replace(_SNGAN.network, conditioning="projection")),
    "cifar10_vae": _VAE,
    "mixture_wgan_gp": _MIXTURE,
    "mixture_ns": replace(
        _MIXTURE,
        optim=replace(_MIXTURE.optim, loss="non_saturating", n_critic=1, gradient_penalty=0.0, b2=0.999),
    ),
}
