"""ACAI: autoencoders whose interpolations a critic cannot tell from data (Berthelot et al. 2018, arXiv 1807.07543).

    model = build(options, channels=1, classes=10)              # ACAI, or the same autoencoder without a critic
    tx = optimiser(model.options)
    state, step = init_state(model.init(key), tx, key), make_step(model.loss, tx)   # of lib.train
    z = model.encode(params, image)                             # [b, w, w, latent_channels]
    model.decode(params, interpolate(z[0], z[1], frames=16))

The critic d guesses the part alpha of the smaller share of a mixed latent; the autoencoder wants it to guess 0:

    L_d  = E (d(x_alpha) - alpha)^2 + E d(gamma x + (1 - gamma) x_0)^2        x_0 = g(f(x)), z = f(x)
    L_ae = E (x - x_0)^2 + lambda E d(x_alpha)^2                              x_alpha = g(alpha z + (1 - alpha) z')

Networks, weights and the simultaneous updates of both are those of the published code. All three losses (that of a
classifier of latents is the third) are one sum whose terms reach only the parameters that they are for, so a step is
`lib.train.make_step` with one Adam, which treats each parameter for itself.

In a batch each latent is mixed with its neighbour, the first with the second, the third with the fourth, and so on: a
fixed pairing of random examples, as that of the published code is, which mixes the first with the last. Neighbours are
on the same device, so that the number of devices changes no pair and mixing needs no communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gan.acai_config import Options
from gan.blocks import doubled, halved
from lib.initial import initialised, normal, xavier
from lib.layers import Conv
from lib.process import UserError
from lib.shard import example_keys
from lib.train import Loss, Metrics

Params = dict[str, Any]
SLOPE = 0.2  # of leaky rectifiers


def _conv(x: jax.Array, features: int, size: int = 3) -> jax.Array:
    # He's variance for the rectifiers' slope, less a factor of 2 that the published code leaves out.
    std = ((1 + SLOPE**2) * size * size * x.shape[-1]) ** -0.5
    return Conv(features, (size, size), kernel_init=normal(std))(x)


def _rectified(x: jax.Array) -> jax.Array:
    return nn.leaky_relu(x, SLOPE)


class Encoder(nn.Module):
    """[b, h, w, c] -> [b, h / 2^scales, w / 2^scales, features]."""

    depth: int
    scales: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _conv(x, self.depth, 1)
        for scale in range(self.scales):
            for _ in range(2):
                x = _rectified(_conv(x, self.depth << scale))
            x = halved(x)
        x = _rectified(_conv(x, self.depth << self.scales))
        return _conv(x, self.features)


class Decoder(nn.Module):
    """[b, h, w, latent_channels] -> [b, h 2^scales, w 2^scales, channels]."""

    depth: int
    scales: int
    channels: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        for scale in reversed(range(self.scales)):
            for _ in range(2):
                z = _rectified(_conv(z, self.depth << scale))
            z = doubled(z)
        z = _rectified(_conv(z, self.depth))
        return _conv(z, self.channels)


class Critic(nn.Module):
    """[b, h, w, c] -> [b]: the mean of what an encoder makes of an image."""

    depth: int
    scales: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.mean(Encoder(self.depth, self.scales, self.features, name="encoder")(x), (1, 2, 3))


class Classifier(nn.Module):
    """Latents [b, ...] -> logits [b, classes]."""

    classes: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        return nn.Dense(self.classes, kernel_init=xavier())(z.reshape(len(z), -1))


Function = Callable[[Params, jax.Array], jax.Array]


@dataclass(frozen=True)
class Model:
    """Pure functions of an autoencoder. Images are what `pixels` takes or returns."""

    options: Options
    init: Callable[[jax.Array], Params]
    """of a key"""
    loss: Loss
    """of batches {"image": [b, h, w, c], "label": int [b], where there are classes}"""
    encode: Function
    """images -> [b, latent_width, latent_width, latent_channels]"""
    decode: Function
    """latents -> [b, size_px, size_px, channels], about [-1, 1]"""
    classify: Function | None
    """latents -> logits [b, classes]; None without classes"""
    critic: Function | None
    """images -> [b], the share of the smaller part that it takes them for; None without one"""


def build(options: Options, channels: int, classes: int = 0) -> Model:
    """With a critic or without, as the options say."""
    return (acai if options.critic else autoencoder)(options, channels, classes)


def networks(options: Options, channels: int) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Encoder, decoder, and the critic where there is one; with the shape of what each takes, a batch of one."""
    image = (1, options.size_px, options.size_px, channels)
    latent = (1, options.latent_width, options.latent_width, options.latent_channels)
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "encoder": (Encoder(options.depth, options.scales, options.latent_channels), image),
        "decoder": (Decoder(options.depth, options.scales, channels), latent),
    }
    if options.critic:
        found["critic"] = (Critic(options.depth, options.scales, options.latent_channels), image)
    return found


def acai(options: Options, channels: int, classes: int = 0) -> Model:
    """ACAI; the classifier of latents is there where there are `classes`."""
    model = autoencoder(options, channels, classes)
    net, shape = networks(options, channels)["critic"]

    def init(key):
        return {**model.init(key), "critic": _initial(net, shape, jax.random.fold_in(key, 3))}

    def criticise(params, x):
        return net.apply({"params": params["critic"]}, pixels(x, options.size_px))

    def loss(params, batch, key):
        x = pixels(batch["image"], options.size_px)
        alpha = shares(key, len(x))
        z = model.encode(params, x)
        restored, fused = jnp.split(model.decode(params, jnp.concatenate([z, mixed(z, alpha)])), 2)
        frozen = jax.lax.stop_gradient(params)
        # The first and the last apply the same weights to the same images, which XLA does once; gradients differ.
        found = jnp.mean(criticise(frozen, fused) ** 2)
        real = options.critic_regularization * x + (1 - options.critic_regularization) * restored
        guess_real = criticise(params, jax.lax.stop_gradient(real))
        guess_fused = criticise(params, jax.lax.stop_gradient(fused))
        error = jnp.mean((x - restored) ** 2)
        critic_fused, critic_real = jnp.mean((guess_fused - alpha) ** 2), jnp.mean(guess_real**2)
        classified, metrics = _classified(model.classify, params, z, batch)
        metrics |= {"mse": error, "found": found, "critic_mixed": critic_fused, "critic_real": critic_real}
        return error + options.critic_weight * found + critic_fused + critic_real + classified, metrics

    return dataclasses.replace(model, init=init, loss=loss, critic=criticise)


def autoencoder(options: Options, channels: int, classes: int = 0) -> Model:
    """The baseline: ACAI's autoencoder with the squared error alone."""
    nets = {name: net for name, net in networks(options, channels).items() if name != "critic"}
    (encoder, _), (decoder, latent_shape) = nets.values()
    classifier = Classifier(classes)
    if classes:
        nets["classifier"] = (classifier, latent_shape)

    def init(key):
        keys = [jax.random.fold_in(key, i) for i in range(len(nets))]
        return {name: _initial(net, shape, k) for k, (name, (net, shape)) in zip(keys, nets.items(), strict=True)}

    def encode(params, x):
        return encoder.apply({"params": params["encoder"]}, pixels(x, options.size_px))

    def decode(params, z):
        return decoder.apply({"params": params["decoder"]}, z)

    def classify(params, z):
        return classifier.apply({"params": params["classifier"]}, z)

    known = classify if classes else None

    def loss(params, batch, key):
        del key
        x = pixels(batch["image"], options.size_px)
        z = encode(params, x)
        error = jnp.mean((x - decode(params, z)) ** 2)
        classified, metrics = _classified(known, params, z, batch)
        return error + classified, {**metrics, "mse": error}

    return Model(options, init, loss, encode, decode, known, None)


def optimiser(options: Options) -> optax.GradientTransformation:
    falling = optax.linear_schedule(options.lr, 0.0, options.steps)
    return optax.adam(falling if options.decay == "linear" else options.lr)


def pixels(image: jax.Array, size_px: int) -> jax.Array:
    """uint8 or float32 in [-1, 1], [b, h, w, c] -> float32 in [-1, 1], [b, size_px, size_px, c] with a black border.

    Raises ValueError for other types and for images that are larger.
    """
    if image.dtype == jnp.uint8:
        image = image.astype(jnp.float32) / 127.5 - 1
    elif image.dtype != jnp.float32:
        raise ValueError(f"images must be uint8 or float32, not {image.dtype}")
    border = [size_px - n for n in image.shape[1:3]]
    if min(border) < 0:
        raise ValueError(f"images {image.shape[1:3]} are larger than {size_px} px")
    widths = [(0, 0), *((n // 2, n - n // 2) for n in border), (0, 0)]
    return jnp.pad(image, widths, constant_values=-1) if any(border) else image


def shares(key: jax.Array, count: int) -> jax.Array:
    """alpha ~ U[0, 1/2] of the examples of the local batch, [count], each from its own key."""
    return jax.vmap(lambda k: jax.random.uniform(k, maxval=0.5))(example_keys(key, count))


def mixed(z: jax.Array, alpha: jax.Array) -> jax.Array:
    """alpha z + (1 - alpha) z', where z' [b, ...] is z with the neighbours of each pair exchanged.

    Raises UserError where the local batch is odd.
    """
    if len(z) % 2:
        raise UserError(f"a batch of {len(z)} on a device: ACAI mixes pairs, so make it even")
    others = z.reshape(len(z) // 2, 2, *z.shape[1:])[:, ::-1].reshape(z.shape)
    weight = alpha.reshape(-1, *[1] * (z.ndim - 1))
    return weight * z + (1 - weight) * others


def interpolate(start: jax.Array, end: jax.Array, frames: int) -> jax.Array:
    """On straight lines from `start` to `end`, [...] each and both included -> [frames, ...], frames >= 2."""
    t = jnp.linspace(0.0, 1.0, frames).reshape(-1, *[1] * start.ndim)
    return (1 - t) * start + t * end


def _initial(net: nn.Module, shape: tuple[int, ...], key: jax.Array) -> Params:
    return initialised(net, jnp.zeros(shape))(key)["params"]


def _classified(classify: Function | None, params: Params, z: jax.Array, batch: Any) -> tuple[jax.Array, Metrics]:
    """The cross-entropy of the classifier, nats, which teaches the autoencoder nothing; 0 without one."""
    if classify is None:
        return jnp.zeros(()), {}
    if "label" not in batch:
        raise UserError("the classifier of latents needs labels, which these data have not: train it without classes")
    logits = classify(params, jax.lax.stop_gradient(z))
    cross_entropy = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))
    correct = jnp.mean((jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32))
    return cross_entropy, {"classifier": cross_entropy, "accuracy": correct}
