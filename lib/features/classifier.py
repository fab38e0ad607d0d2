"""Small classifiers of digits (8x8), MNIST and CIFAR-10 whose weights come with the package: the offline instruments.

A weight file says itself which network it belongs to, so a newly trained one is read just as well. `logits` are
divided by a temperature that was fitted on held-out training images: their softmax (or, of the one-vs-rest judges,
their sigmoids) are calibrated probabilities.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lib import config as configs
from lib import conv, layers
from lib.batch_norm import channel_moments
from lib.features import CLASSIFIERS, weights
from lib.features.net import FeatureNet, Features
from lib.process import UserError

FOLDER = Path(__file__).parent / "pretrained"

_STATISTICS_DECAY = 0.95
EPSILON = 1e-5
_WHITENING_FLOOR = 1e-2  # variance; chroma of JPEG files has next to none at this scale
_MAX_DIRECTIONS = 24
PIXEL_SCALE = 64.0
_NHWC = ("NHWC", "HWIO", "NHWC")
# Features measure: convolutions are exact to the last digits.
_Conv = functools.partial(layers.Conv, use_bias=False, conv_general_dilated=conv.conv_general_dilated)


@dataclass(frozen=True)
class Design:
    """What has to be known of a network to build it; stored in its weight file."""

    kind: Literal["plain", "residual", "vgg"]
    patch_px: int
    """of the first layer, whose stride is the half of it; a VGG has no such layer (0)"""
    widths: tuple[int, ...]
    """channels per level; each level has half the size of the one before, the last one's channels are the features"""
    head: Literal["softmax", "sigmoid"]
    size_px: int
    channels: int
    zero: int
    """the pixel value that becomes 0, which is also what convolutions see beyond the border"""
    classes: int = 10


class BatchNorm(nn.Module):
    """Batch norm over all but the last axis; its statistics in training are those of the batch of all devices."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]."""
        channels = x.shape[-1:]
        mean = self.variable("statistics", "mean", jnp.zeros, channels)
        variance = self.variable("statistics", "variance", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        m, v = mean.value, variance.value
        if train:
            m, v = channel_moments(x)
            if not self.is_initializing():
                mean.value = _STATISTICS_DECAY * mean.value + (1 - _STATISTICS_DECAY) * jax.lax.stop_gradient(m)
                variance.value = _STATISTICS_DECAY * variance.value + (1 - _STATISTICS_DECAY) * jax.lax.stop_gradient(v)
        gain = scale * jax.lax.rsqrt(v + EPSILON)
        return x * gain + (bias - m * gain)


class Whitening(nn.Module):
    """Patches in their principal directions, each at unit variance, with both signs; only the bias is learned.

    A first layer that need not be learned shortens the training of small networks by about a half (Page 2018; Jordan,
    arXiv 2404.00498, section 3.2), and costs no backward pass. Neighbouring patches overlap by a half. The kernel is a
    statistic of the training images: `whitening_kernel`.
    """

    patch_px: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, 2 h / patch_px, 2 w / patch_px, directions]."""
        size, stride = (self.patch_px, self.patch_px), (self.patch_px // 2,) * 2
        shape = (*size, x.shape[-1], 2 * _directions(self.patch_px, x.shape[-1]))
        kernel = self.variable("statistics", "kernel", jnp.zeros, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        return jax.lax.conv_general_dilated(x, kernel.value, stride, "SAME", dimension_numbers=_NHWC) + bias


class Plain(nn.Module):
    """Whitened patches, then two convolutions per level with max pools between the levels; average pool."""

    patch_px: int
    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> Features:
        x = nn.relu(Whitening(self.patch_px)(x))
        for level, width in enumerate(self.widths):
            x = x if level == 0 else _max_pool(x)
            for _ in range(2):
                x = _Conv(width, (3, 3))(x)
                x = nn.relu(BatchNorm()(x, train))
        pool = jnp.mean(x, (1, 2))
        return Features(pool, nn.Dense(self.classes)(pool))


class Residual(nn.Module):
    """Strided convolutions between residual blocks (He et al., arXiv 1512.03385), all of them learned; average pool."""

    patch_px: int
    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> Features:
        for level, width in enumerate(self.widths):
            size, stride = (self.patch_px, self.patch_px // 2) if level == 0 else (3, 2)
            x = _Conv(width, (size, size), (stride, stride))(x)
            x = nn.relu(BatchNorm()(x, train))
            y = _Conv(width, (3, 3))(x)
            y = nn.relu(BatchNorm()(y, train))
            y = _Conv(width, (3, 3))(y)
            x = nn.relu(x + BatchNorm()(y, train))
        pool = jnp.mean(x, (1, 2))
        return Features(pool, nn.Dense(self.classes)(pool))


class SmallVGG(nn.Module):
    """Blocks of two convolutions at full resolution with average pools between the blocks; average pool.

    A VGG (arXiv 1409.1556) in widths and names, for perceptual losses: `lib.features.vgg.from_classifier` folds the
    batch norm into the convolutions. Average pools are those that texture synthesis prefers (arXiv 1505.07376).
    """

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> Features:
        for block, width in enumerate(self.widths, 1):
            x = x if block == 1 else nn.avg_pool(x, (2, 2), (2, 2))
            for i in (1, 2):
                x = _Conv(width, (3, 3), name=f"conv{block}_{i}")(x)
                x = nn.relu(BatchNorm(name=f"norm{block}_{i}")(x, train))
        features = jnp.mean(x, (1, 2))
        return Features(features, nn.Dense(self.classes)(features))


def build(design: Design) -> nn.Module:
    """The network: `apply({"params": ..., "statistics": ...}, scaled(images), train) -> Features`."""
    if design.kind == "vgg":
        return SmallVGG(design.widths, design.classes)
    return {"plain": Plain, "residual": Residual}[design.kind](design.patch_px, design.widths, design.classes)


def scaled(design: Design, images: jax.Array) -> jax.Array:
    """Pixels as the networks see them: uint8, or float in [-1, 1] (through which gradients pass), to float32."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        pixels = (images.astype(jnp.float32) + 1) * 127.5
    elif images.dtype == jnp.uint8:
        pixels = images.astype(jnp.float32)
    else:
        raise UserError(f"images must be uint8, or floats in [-1, 1], not {images.dtype}")
    return (pixels - design.zero) / PIXEL_SCALE


def _directions(patch_px: int, channels: int) -> int:
    return min(patch_px**2 * channels, _MAX_DIRECTIONS)


def whitening_kernel(images: np.ndarray, patch_px: int) -> np.ndarray:
    """[patch_px, patch_px, c, directions] of scaled images [n, h, w, c].

    The eigenvectors of the covariance of patches with the largest eigenvalues, divided by their roots, and negated.
    """
    h, w, c = images.shape[1:]
    offsets = range(patch_px)
    cut = [images[:, i : h - patch_px + 1 + i, j : w - patch_px + 1 + j] for i in offsets for j in offsets]
    patches = np.stack(cut, 3).reshape(-1, patch_px**2 * c)
    values, vectors = np.linalg.eigh(np.cov(patches, rowvar=False, dtype=np.float64))
    kept = _directions(patch_px, c)
    values, vectors = values[::-1][:kept], vectors[:, ::-1][:, :kept]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(kept)])  # LAPACK leaves the sign open
    directions = (vectors / np.sqrt(values + _WHITENING_FLOOR)).reshape(patch_px, patch_px, c, kept)
    return np.concatenate([directions, -directions], -1).astype(np.float32)


def load(name: str, path: Path | None = None) -> FeatureNet:
    """One of `CLASSIFIERS`, with the weights of the package or those of `path`. Raises UserError for another name."""
    if name not in CLASSIFIERS:
        raise UserError(f"unknown classifier {name!r}: choose from {', '.join(CLASSIFIERS)}")
    return read(path or FOLDER / f"{name}.safetensors", name)


def load_predictor(name: str) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """`(predict, params)`: predict(params, images [b, h, w, c]) -> calibrated probabilities [b, classes].

    Of the judges they are one-vs-rest and need not sum to one. Images are uint8, or float in [-1, 1]; then the
    function is differentiable in them.
    """
    net = load(name)
    return lambda params, images: net.probabilities(net.apply(params, images).logits), net.params


def read(path: Path, name: str | None = None) -> FeatureNet:
    """A weight file that `python -m lib.features train` wrote, as an instrument named `name` (default: like the file).

    Raises UserError where it is missing, damaged or of something else.
    """
    found, design = weights.read(path), read_design(path)
    model = build(design)
    blank = jnp.zeros((1, design.size_px, design.size_px, design.channels))
    wanted = weights.flat(jax.eval_shape(lambda: model.init(jax.random.key(0), blank, False)))
    weights.check(found.arrays, {name: leaf.shape for name, leaf in wanted.items()}, path)
    size, channels = design.size_px, design.channels

    def apply(params: Any, images: jax.Array) -> Features:
        if images.shape[1:] != (size, size, channels):
            shape = " x ".join(map(str, images.shape[1:]))
            raise UserError(f"{name or path.stem} takes images of {size} x {size} x {channels}, not {shape}")
        return model.apply(params, scaled(design, images), False)

    return FeatureNet(
        name=name or path.stem,
        apply=apply,
        params=weights.nested(found.arrays),
        dimension=design.widths[-1],
        classes=design.classes,
        channels=channels,
        sizes_px=(size,),
        weights_sha256=found.sha256,
        preprocessing=f"none but (pixel - {design.zero}) / {PIXEL_SCALE:g} at {size} x {size}",
        one_vs_rest=design.head == "sigmoid",
    )


def read_design(path: Path) -> Design:
    """Which network a safetensors file belongs to; errors as in `read`."""
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("design", "")
        return configs.from_json(Design, json.loads(text))
    except FileNotFoundError:
        raise UserError(f"{path}: no such weight file") from None
    except (SafetensorError, json.JSONDecodeError, UserError):
        raise UserError(f"{path} holds other weights than those of a small classifier") from None


def serialize(design: Design, variables: Any) -> bytes:
    """The bytes of a weight file: kernels in half precision, vectors in single."""
    flat = weights.flat(variables)
    arrays = {name: np.asarray(x, np.float16 if np.ndim(x) > 1 else np.float32) for name, x in flat.items()}
    return save(arrays, metadata={"design": json.dumps(configs.to_json(design))})


def _max_pool(x: jax.Array) -> jax.Array:
    """2x2 without overlap, odd borders left out. Not `nn.max_pool`, whose gradient is slow on the CPU."""
    h, w = (n // 2 * 2 for n in x.shape[1:3])
    x = jnp.maximum(x[:, :h:2], x[:, 1:h:2])
    return jnp.maximum(x[:, :, :w:2], x[:, :, 1:w:2])
