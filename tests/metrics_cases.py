"""A feature net that needs no weights, for the tests of lib/metrics."""

import jax.numpy as jnp
import numpy as np

from lib.features.net import FeatureNet, Features


def toy_net(dimension=6, classes=4, channels=1, sizes_px=(4,), name="toy", seed=0):
    """Random projections of the pixels of 4 x 4 images (or of their corner, for a net of any size)."""
    rng = np.random.default_rng(seed)
    params = {
        # Multiples of 1/1024: sums over pixels are exact in float32, in whatever order they are added.
        "pool": np.round(16 * rng.standard_normal((16 * channels, dimension))).astype(np.float32) / 1024,
        "logits": rng.standard_normal((dimension, classes)).astype(np.float32),
    }

    def apply(params, images):
        flat = images[:, :4, :4].reshape(len(images), -1).astype(jnp.float32) - 128
        pool = jnp.tanh(flat @ params["pool"])
        return Features(pool, pool @ params["logits"])

    return FeatureNet(name, apply, params, dimension, classes, channels, sizes_px, f"{seed:064x}", "minus 128")


def pixels(n, seed=0, shape=(4, 4, 1), low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (n, *shape), np.uint8)


def features(seed=3, n=1003, m=907, dimension=24):
    """Two sets of correlated float32 features, as `reference/make_metrics.py` gave them to torch-fidelity."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((dimension, dimension)) / np.sqrt(dimension)
    real = np.maximum(rng.standard_normal((n, dimension)) @ mix, 0)
    generated = np.maximum(rng.standard_normal((m, dimension)) @ (1.1 * mix) + 0.1, 0)
    return real.astype(np.float32), generated.astype(np.float32)
