"""A tiny loss network and tiny images, shared by the tests of stylize."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from lib import config as configs
from lib import images
from lib.checkpoint import Checkpoints
from lib.features import vgg, weights
from lib.run import RunFolder
from stylize import training
from stylize.vgg import LossNetwork

WIDTHS = (4, 6, 8, 8)


def smooth(seed, height, width, channels=3):
    """An image with structure: a few waves in [-1, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 16.0
    out = np.zeros((height, width, channels))
    for c in range(channels):
        for _ in range(4):
            a, b, phase = rng.uniform(-4, 4, 3)
            out[..., c] += np.sin(a * y + b * x + phase)
    return np.float32(np.clip(out / 3, -1, 1))


def tiny_vgg(seed=0):
    """Random parameters of a VGG-9, of He's scale, so that activations keep their size."""
    rng = np.random.default_rng(seed)
    params, c = {"mean": np.zeros(3, np.float32)}, 3
    for layer in vgg.layer_names(9):
        if layer.startswith("conv"):
            width = WIDTHS[int(layer[4]) - 1]
            kernel = rng.normal(size=(3, 3, c, width)) * np.sqrt(2 / (9 * c))
            params[layer] = {"kernel": np.float32(kernel), "bias": np.float32(rng.normal(size=width) * 0.1)}
            c = width
    return params


def tiny_network(style=("relu1_1", "relu2_1", "relu3_1"), content=("relu3_1",)):
    return LossNetwork(tiny_vgg(), "0" * 64, tuple(style), tuple(content), "average")


def write_photos(folder, *sizes):
    """Photographs 0.png, 1.png, ... of these heights and widths."""
    for k, size in enumerate(sizes):
        images.write(folder / f"{k}.png", smooth(k, *size))


def write_vgg(desk):
    """vgg.safetensors, for --perception.weights."""
    weights.write(desk / "vgg.safetensors", weights.flat(tiny_vgg()))


def write_runs(desk, config):
    """Runs as training leaves them, with their initial weights: `run`, and `stopped` a step before its end."""
    state = training.start_state(config)
    for name, steps in {"run": config.optim.steps, "stopped": config.optim.steps - 1}.items():
        with RunFolder.start(desk / name, "stylize", configs.to_json(config), resume=False) as folder:
            folder.logger(training.NAME, 0)(steps, {"loss": 1.0})
        for style, path in zip(training.style_names(config), config.styles, strict=True):
            if (desk / path).exists():
                images.write(desk / name / "styles" / f"{style}.png", images.read(desk / path))
        with Checkpoints(desk / name / "checkpoints" / training.NAME) as checkpoints:
            checkpoints.save(steps, state.replace(step=jnp.int32(steps)))


@contextlib.contextmanager
def compiled_once(folder):
    """Inside, programs that several runs have in common are compiled once, as at the command line (lib.shard.start)."""
    options = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in options}
    for chosen in (options, before):
        for name, value in chosen.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if chosen is options:
            yield
