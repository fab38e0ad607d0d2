"""Random weights and images that tests and tests/reference/make_features.py make alike, from seeds and names alone."""

import zlib

import numpy as np

from lib.features import inception, vgg

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
IMAGES_SEED = 7
VGG_SIZE_PX = 32


def generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))


def _he(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    fan_in = int(np.prod(shape[1:]))
    return generator(seed, name).standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))


def _batch_norm(seed: int, name: str, part: str, features: int) -> np.ndarray:
    rng = generator(seed, f"{name}.{part}")
    if part in ("weight", "running_var"):
        return rng.uniform(0.5, 1.5, features).astype(np.float32)
    return (0.1 * rng.standard_normal(features)).astype(np.float32)


def inception_state(seed: int = 0) -> dict[str, np.ndarray]:
    """The FID Inception's state dict in PyTorch's layout: He weights, random batch-norm statistics."""
    state = {}
    for name, shape in inception.shapes().items():
        layer, _, kind = name.partition("/")
        if kind == "kernel" and layer != "fc":
            h, w, inputs, features = shape
            state[f"{layer}.conv.weight"] = _he(seed, layer, (features, inputs, h, w))
            state |= {f"{layer}.bn.{part}": _batch_norm(seed, layer, part, features) for part in BATCH_NORM}
    state["fc.weight"] = _he(seed, "fc", (inception.CLASSES, inception.POOL))
    state["fc.bias"] = generator(seed, "fc.bias").standard_normal(inception.CLASSES).astype(np.float32)
    return state


def vgg_state(depth: int, seed: int = 0) -> dict[str, np.ndarray]:
    """torchvision's state dict of VGG-16 or VGG-19 without the classifier: He weights, small biases."""
    state, inputs = {}, 3
    for i, name in enumerate(vgg.layer_names(depth)):
        if name.startswith("conv"):
            width = vgg.WIDTHS[int(name[4]) - 1]
            state[f"features.{i}.weight"] = _he(seed, f"vgg{depth}.{name}", (width, inputs, 3, 3))
            rng = generator(seed, f"vgg{depth}.{name}.bias")
            state[f"features.{i}.bias"] = (0.1 * rng.standard_normal(width)).astype(np.float32)
            inputs = width
    return state


def images(height: int, width: int, count: int = 2) -> np.ndarray:
    """uint8 [count, height, width, 3]: smooth colours with noise, so that both have something to show."""
    rng = generator(IMAGES_SEED, f"{height}x{width}")
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 1, 3))
    waves = np.sin(2 * np.pi * (3 * x + 2 * y)[None, :, :, None] + phase)
    noise = rng.standard_normal((count, height, width, 3))
    return np.uint8(np.clip(127.5 + 80 * waves + 30 * noise, 0, 255))


def positions(name: str, size: int, count: int = 64) -> np.ndarray:
    """Where a large array is sampled: flat indices."""
    return generator(IMAGES_SEED, f"positions.{name}").integers(0, size, count)
