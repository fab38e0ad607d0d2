"""Every default of autoencoders: ACAI, and the same without its critic (Berthelot et al. 2018, arXiv 1807.07543).

The presets `lines_`, `mnist_` and `cifar10_` are the published configurations, 2^24 images long; `--autoencoder.steps`
makes them shorter. `digits_acai` is small enough for a minute on two cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lib.process import UserError


def _require(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)


@dataclass(frozen=True)
class Images:
    """What is learned."""

    source: str = "mnist"
    """lines, digits, mnist, cifar10, a folder of images, or a .npz file of uint8 images [n, h, w, c]"""
    size_px: int | None = None
    """images of a folder are cropped to a square and resized to this side (default: as they are)"""
    labels: tuple[int, ...] = ()
    """learn the images of these classes only, numbered 0, 1, ... in this order (default: all)"""


@dataclass(frozen=True)
class Options:
    """An autoencoder and how it is trained. The defaults are those published for MNIST with latents of 256 numbers."""

    size_px: int = 32
    """height and width; smaller images get a black border"""
    depth: int = 16
    """channels of the first scale; they double at each next one"""
    latent_width: int = 4
    """height and width of the latents"""
    latent_channels: int = 16
    """of the latents"""
    critic: bool = True
    """ACAI; without, the same autoencoder with the squared error alone"""
    critic_weight: float = 0.5
    """lambda: how much the autoencoder minds what the critic finds"""
    critic_regularization: float = 0.2
    """gamma: the share of the data in the images that the critic is to find nothing in"""
    steps: int = 2**24 // 64
    """updates"""
    batch_size: int = 64
    """images per step; even on every device"""
    lr: float = 1e-4
    """learning rate of Adam"""
    decay: Literal["constant", "linear"] = "constant"
    """linear: the learning rate falls to zero over the steps, which short trainings need"""

    def __post_init__(self) -> None:
        _require(min(self.size_px, self.depth, self.latent_width, self.latent_channels) >= 1, "sizes must be positive")
        _require(
            self.latent_width << self.scales == self.size_px,
            f"latent_width {self.latent_width} is not size_px {self.size_px} halved a whole number of times",
        )
        _require(self.critic_weight >= 0, "critic_weight must not be negative")
        _require(0 <= self.critic_regularization <= 1, "critic_regularization must be between 0 and 1")
        _require(self.steps >= 1, "steps must be at least 1")
        _require(self.batch_size >= 2 and self.batch_size % 2 == 0, "batch_size must be even: ACAI mixes pairs")
        _require(math.isfinite(self.lr) and self.lr > 0, "lr must be positive")

    @property
    def scales(self) -> int:
        """How many times images are halved."""
        return max(self.size_px // self.latent_width, 1).bit_length() - 1

    @property
    def latent_dimensions(self) -> int:
        return self.latent_width**2 * self.latent_channels


@dataclass(frozen=True)
class Measurement:
    """How an autoencoder is measured."""

    every: int = 1024
    """steps between two looks"""
    kmeans_starts: int = 100
    """random starts of k-means, of which the best counts (published: 1,000)"""
    seed: int = 0
    """of the lines, the images and the clusters that are looked at"""

    def __post_init__(self) -> None:
        _require(min(self.every, self.kmeans_starts) >= 1, "every and kmeans_starts must be at least 1")
        _require(0 <= self.seed < 2**32, "seed must be between 0 and 2**32 - 1")


@dataclass(frozen=True)
class AutoencoderConfig:
    """One autoencoder: its data, its training, and how it is measured."""

    data: Images = Images()
    autoencoder: Options = Options()
    measurement: Measurement = Measurement()
    seed: int = 0
    """root of all random numbers of the training"""
    checkpoint_every: int = 1024
    """steps between checkpoints"""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed must be between 0 and 2**32 - 1")
        _require(self.checkpoint_every >= 1, "checkpoint_every must be at least 1")
        _require(
            self.data.source != "lines" or (self.autoencoder.size_px == 32 and not self.data.labels),
            "lines have 32 pixels (autoencoder.size_px) and no classes to choose (data.labels)",
        )


_LINES = AutoencoderConfig(Images("lines"), Options(latent_width=2))
_MNIST = AutoencoderConfig(Images("mnist"), Options(latent_channels=2))
_CIFAR10 = AutoencoderConfig(Images("cifar10"), Options(depth=64))
_CIFAR10_1024 = replace(_CIFAR10, autoencoder=Options(depth=64, latent_channels=64))


def _plain(config: AutoencoderConfig) -> AutoencoderConfig:
    return replace(config, autoencoder=replace(config.autoencoder, critic=False))


# Numbers at the end are dimensions of the latents.
AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "digits_acai": AutoencoderConfig(
        Images("digits"), Options(8, depth=8, latent_width=2, latent_channels=8, steps=2000, lr=1e-3),
        Measurement(every=500), checkpoint_every=500,
    ),
    "lines_acai": _LINES,
    "lines_autoencoder": _plain(_LINES),
    "mnist_acai_32": _MNIST,
    "mnist_acai_256": replace(_MNIST, autoencoder=Options()),
    "mnist_autoencoder_32": _plain(_MNIST),
    "cifar10_acai_256": _CIFAR10,
    "cifar10_acai_1024": _CIFAR10_1024,
    "cifar10_autoencoder_1024": _plain(_CIFAR10_1024),
}  # fmt: skip
