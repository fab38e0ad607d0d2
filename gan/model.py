"""Generator and critic seen as one thing: a `Gan`, pure functions that an experiment trains and samples.

    model = build(config.network, facts)                # shape (h, w, c) or (d,), classes 0: none
    variables = model.init(key)                         # {"generator": {"params", "statistics"}, "critic": {...}}
    x, statistics = model.generate(variables["generator"], z, y, train=True)
    scores, statistics = model.score(variables["critic"], x, y)

z float32 [b, latent], N(0, 1). x float32 [b, *shape], images in [-1, 1]. y float32 [b, classes], a one-hot row or any
mixture of classes, where the networks are told a class; None otherwise. scores [b], before any sigmoid. `statistics`
are the running ones of batch norm, which sampling uses ({} without any); `train` is whether the batch's own count.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gan import dcgan, resnet
from gan.blocks import STATISTICS
from gan.config import Network
from gan.data import Facts
from lib.initial import initialised
from lib.process import UserError

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Gan:
    """See the top of this file. Of a VAE, `critic` is the encoder, and `encode` takes the place of `score`."""

    shape: tuple[int, ...]
    latent: int
    classes: int
    """that the networks are told; 0: none"""
    generator: nn.Module
    critic: nn.Module
    spectral: bool
    """whether the critic's weights are to be normalised (`gan.spectral`)"""

    def init(self, key: jax.Array) -> dict[str, Variables]:
        keys = jax.random.split(key)
        z, x = jnp.zeros((2, self.latent)), jnp.zeros((2, *self.shape))
        y = jnp.zeros((2, self.classes)) if self.classes else None
        made = {
            "generator": initialised(self.generator, z, y, True)(keys[0]),
            "critic": initialised(self.critic, x, y, True)(keys[1]),
        }
        return {name: {"params": tree["params"], STATISTICS: tree.get(STATISTICS, {})} for name, tree in made.items()}

    def generate(self, variables: Variables, z: jax.Array, y: jax.Array | None, *, train: bool) -> tuple:
        """(x [b, *shape], statistics)."""
        return _apply(self.generator, variables, z, y, train)

    def score(self, variables: Variables, x: jax.Array, y: jax.Array | None, *, halves: bool = False) -> tuple:
        """(scores [b], statistics). `halves`: both halves of the batch have their own statistics in batch norm."""
        outputs, statistics = _apply(self.critic, variables, x, y, True, halves)
        return outputs[:, 0], statistics

    def encode(self, variables: Variables, x: jax.Array, *, train: bool) -> tuple:
        """((mean, log_variance) [b, latent] each, statistics)."""
        outputs, statistics = _apply(self.critic, variables, x, None, train)
        return (outputs[:, : self.latent], outputs[:, self.latent :]), statistics


def _apply(module: nn.Module, variables: Variables, *args: Any) -> tuple:
    outputs, changed = module.apply(variables, *args, mutable=[STATISTICS])
    return outputs, changed.get(STATISTICS, {})


def build(network: Network, facts: Facts, *, encoder: bool = False) -> Gan:
    """The networks of a configuration. Raises UserError where they do not fit the images."""
    shape, classes = facts.shape, facts.classes if network.conditioning != "none" else 0
    outputs = 2 * network.latent if encoder else 1
    width, critic_width, levels = network.width, network.critic_width, network.levels
    critic_levels = network.critic_levels or levels
    if network.kind == "mlp":
        generator = dcgan.MLP(width, levels, shape[0])
        critic = dcgan.MLP(critic_width, levels, outputs, network.slope)
    else:
        image = _image(shape, levels)
        generator, critic = {
            "dcgan": lambda: (
                dcgan.Generator(image, width, levels, network.kernel_px),
                dcgan.Critic(critic_width, critic_levels, network.critic_kernel_px, network.critic_norm == "batch",
                             network.slope, outputs),
            ),
            "cnn": lambda: (
                dcgan.Generator(image, width, levels, network.kernel_px, smooth=True),
                dcgan.CnnCritic(critic_width, critic_levels, network.slope, outputs),
            ),
            "resnet": lambda: (
                resnet.Generator(image, width, levels, classes if network.conditioning == "projection" else 0),
                resnet.Critic(critic_width, levels, network.pooling, network.slope,
                              classes if network.conditioning == "projection" else 0),
            ),
        }[network.kind]()  # fmt: skip
    return Gan(shape, network.latent, classes, generator, critic, network.critic_norm == "spectral" and not encoder)


def _image(shape: tuple[int, ...], levels: int) -> tuple[int, int, int]:
    height, width, channels = shape
    least = 2**levels
    if height % least or width % least:
        raise UserError(
            f"network.levels is {levels}: the images, {height} x {width}, need a height and width that {least} divides"
        )
    return height, width, channels


def one_hot(label: jax.Array, classes: int) -> jax.Array | None:
    """Labels [b] as rows [b, classes]; None where there are no classes."""
    return jax.nn.one_hot(label, classes) if classes else None


def parameters(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
