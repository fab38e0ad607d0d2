"""The Inception network of 5 December 2015, on which FID, IS and KID are defined, quirks included.

It is neither the published Inception-v3 nor torchvision's: images are enlarged to 299 px without half-pixel centres,
average pools leave the padding out, the last block has a max pool where the others have an average pool, and there are
1008 logits, which the Inception score takes without their bias. Batch normalisation (eps 1e-3) is folded into the
convolutions when weights are converted, as nothing is ever trained here.

Source: the TensorFlow graph inception-2015-12-05 as read by pytorch-fid 0.3.0 and torch-fidelity 0.4.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from lib import layers
from lib.features import weights
from lib.features.net import FeatureNet, Features
from lib.process import UserError

SIZE_PX, POOL, CLASSES = 299, 2048, 1008
BATCH_NORM_EPS = 1e-3


class Conv(NamedTuple):
    """A convolution with bias (the folded batch normalisation) and ReLU; without stride it keeps the size."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    strides: int = 1
    padding: str = "SAME"


Stage = Conv | str | tuple[Conv, ...]
"""of a branch: a convolution, the name of a 3x3 pool, or convolutions side by side"""


def _block_35(pool: int) -> list[list[Stage]]:
    return [
        [Conv("branch1x1", 64)],
        [Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))],
        [Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))],
        ["average", Conv("branch_pool", pool)],
    ]


def _block_17(c: int) -> list[list[Stage]]:
    wide, tall = (1, 7), (7, 1)
    return [
        [Conv("branch1x1", 192)],
        [Conv("branch7x7_1", c), Conv("branch7x7_2", c, wide), Conv("branch7x7_3", 192, tall)],
        [
            Conv("branch7x7dbl_1", c), Conv("branch7x7dbl_2", c, tall), Conv("branch7x7dbl_3", c, wide),
            Conv("branch7x7dbl_4", c, tall), Conv("branch7x7dbl_5", 192, wide),
        ],
        ["average", Conv("branch_pool", 192)],
    ]  # fmt: skip


def _block_8(pool: str) -> list[list[Stage]]:
    wide, tall = (1, 3), (3, 1)
    return [
        [Conv("branch1x1", 320)],
        [Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, wide), Conv("branch3x3_2b", 384, tall))],
        [
            Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)),
            (Conv("branch3x3dbl_3a", 384, wide), Conv("branch3x3dbl_3b", 384, tall)),
        ],
        [pool, Conv("branch_pool", 192)],
    ]  # fmt: skip


STEM: list[Conv | str] = [
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    "max_halving",
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    "max_halving",
]
BLOCKS: dict[str, list[list[Stage]]] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": [
        [Conv("branch3x3", 384, (3, 3), 2, "VALID")],
        [
            Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
        ],
        ["max_halving"],
    ],
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": [
        [Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, "VALID")],
        [
            Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
        ],
        ["max_halving"],
    ],
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("max"),
}  # fmt: skip
"""Names are those of the PyTorch ports, so that their weight files map onto ours name by name."""


class Outputs(NamedTuple):
    pool: jax.Array  # [b, 2048], the features of FID and KID
    logits_unbiased: jax.Array  # [b, 1008], those of the Inception score
    logits: jax.Array  # [b, 1008]


class Inception(nn.Module):
    """Preprocessed images [b, 299, 299, 3] in [-1, 1] -> Outputs."""

    precision: Any = "highest"  # GPUs and TPUs round the operands of float32 convolutions by default

    @nn.compact
    def __call__(self, x: jax.Array) -> Outputs:
        for stage in STEM:
            x = self._stage(x, stage)
        for name, branches in BLOCKS.items():
            x = jnp.concatenate([self._branch(x, branch, f"{name}.") for branch in branches], axis=-1)
        pool = jnp.mean(x, axis=(1, 2))
        unbiased = nn.Dense(CLASSES, use_bias=False, precision=self.precision, name="fc")(pool)
        return Outputs(pool, unbiased, unbiased + self.param("fc_bias", nn.initializers.zeros, (CLASSES,)))

    def _branch(self, x: jax.Array, branch: list[Stage], prefix: str) -> jax.Array:
        for stage in branch:
            parts = stage if isinstance(stage, tuple) and not isinstance(stage, Conv) else (stage,)
            outputs = [self._stage(x, part, prefix) for part in parts]
            x = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
        return x

    def _stage(self, x: jax.Array, stage: Any, prefix: str = "") -> jax.Array:
        if stage == "average":
            return average_pool(x)
        if stage == "max":
            return max_pool(x)
        if stage == "max_halving":
            return max_pool_halving(x)
        layer = layers.Conv(
            stage.features, stage.kernel, stage.strides, stage.padding, precision=self.precision,
            name=prefix + stage.name,
        )  # fmt: skip
        return nn.relu(layer(x))


# Pools are written with slices, which XLA fuses: on a CPU its own windows took 4 to 10 times as long, a quarter of all.


def max_pool_halving(x: jax.Array) -> jax.Array:
    """3x3, stride 2, no padding: [b, h, w, c] -> [b, (h - 1) // 2, (w - 1) // 2, c]."""
    for axis in (1, 2):
        end = (x.shape[axis] - 1) // 2 * 2
        first, second, third = (lax.slice_in_dim(x, i, end - 1 + i, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def max_pool(x: jax.Array) -> jax.Array:
    """3x3, stride 1, same size."""
    return _over_neighbours(x, jnp.maximum, -jnp.inf)


def average_pool(x: jax.Array) -> jax.Array:
    """3x3, stride 1, same size: the mean of the pixels inside the image, so of 4, 6 or 9."""
    rows, columns = (np.convolve(np.ones(size), np.ones(3), "same") for size in x.shape[1:3])
    return _over_neighbours(x, jnp.add, 0) * jnp.float32(1 / np.outer(rows, columns))[:, :, None]


def _over_neighbours(x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array], outside: float) -> jax.Array:
    """`combine` over each pixel's 3x3 surroundings; beyond the image there is `outside`."""
    for axis in (1, 2):
        size = x.shape[axis]
        padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)], constant_values=outside)
        before, here, after = (lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3))
        x = combine(combine(before, here), after)
    return x


def resize_tensorflow1(images: jax.Array) -> jax.Array:
    """[b, h, w, c] -> float32 [b, 299, 299, c], bilinear: output pixel i is at i * h / 299 of the input.

    TensorFlow 1's resize_bilinear: neither half-pixel centres nor a filter against aliasing.
    """
    x = jnp.asarray(images, jnp.float32)
    for axis in (2, 1):
        scale = np.float32(x.shape[axis] / SIZE_PX)
        x = _interpolate(x, np.arange(SIZE_PX, dtype=np.float32) * scale, axis)
    return x


def resize_half_pixel(images: jax.Array) -> jax.Array:
    """[b, h, w, c] -> float32 [b, 299, 299, c], bilinear: output pixel i is at (i + 1/2) * h / 299 - 1/2.

    PyTorch's F.interpolate(mode="bilinear", align_corners=False): no filter against aliasing either.
    """
    x = jnp.asarray(images, jnp.float32)
    for axis in (2, 1):
        scale = np.float32(x.shape[axis] / SIZE_PX)
        at = (np.arange(SIZE_PX, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
        x = _interpolate(x, at.clip(0), axis)
    return x


def _interpolate(x: jax.Array, at: np.ndarray, axis: int) -> jax.Array:
    """Linear interpolation of `x` along `axis` at float32 positions; beyond the last pixel it is constant."""
    low = at.astype(np.int32)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    weight = (at - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    below, above = jnp.take(x, low, axis), jnp.take(x, high, axis)
    return below + (above - below) * weight


def preprocess_fid(images: jax.Array) -> jax.Array:
    """As the TensorFlow graph does: uint8 [b, h, w, 3] -> [b, 299, 299, 3] in [-1, 127/128]."""
    return (resize_tensorflow1(images) - 128) / 128


def preprocess_pytorch_fid(images: jax.Array) -> jax.Array:
    """As pytorch-fid does: uint8 [b, h, w, 3] -> [b, 299, 299, 3] in [-1, 1]."""
    return 2 * resize_half_pixel(jnp.asarray(images, jnp.float32) / 255) - 1


PREPROCESSING = {
    "inception": (preprocess_fid, "TensorFlow 1 bilinear resize to 299 px (no half-pixel centres), (x - 128) / 128"),
    "inception.pytorch_fid": (preprocess_pytorch_fid, "PyTorch bilinear resize to 299 px (half-pixel), 2 x / 255 - 1"),
}


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its flat name."""
    x = jax.ShapeDtypeStruct((1, SIZE_PX, SIZE_PX, 3), jnp.float32)
    variables = jax.eval_shape(Inception().init, jax.random.key(0), x)
    return {name: leaf.shape for name, leaf in weights.flat(variables["params"]).items()}


def feature_net(name: str, arrays: dict[str, np.ndarray], sha256: str) -> FeatureNet:
    """The network with these weights under one of the names of PREPROCESSING."""
    preprocess, description = PREPROCESSING[name]

    def apply(params: Any, images: jax.Array) -> Features:
        if images.dtype != jnp.uint8:
            raise UserError(f"{name} measures uint8 images, not {images.dtype}")
        outputs: Any = Inception().apply({"params": params}, preprocess(images))
        return Features(outputs.pool, outputs.logits_unbiased)

    return FeatureNet(name, apply, weights.nested(arrays), POOL, CLASSES, 3, None, sha256, description)


def load(name: str = "inception", path: Path | None = None) -> FeatureNet:
    """The network with the converted weights at `path`, by default those in the cache folder.

    Raises UserError where they are missing (with what to do about it) or those of another network.
    """
    source = path or weights.cached("inception")
    if path is None and not source.exists():
        raise UserError(
            f"{source} is missing: `python -m lib.features get inception` downloads the published weights, "
            "`python -m lib.features convert FILE OUT` makes this file of them"
        )
    found = weights.read(source)
    weights.check(found.arrays, shapes(), source)
    return feature_net(name, found.arrays, found.sha256)
