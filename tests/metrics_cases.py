"""A feature net that needs no weights, for the tests of lib/metrics."""

import jax.numpy as jnp
import numpy as np

from lib.features.net import FeatureNet, Features


def toy_net(dimension=6, classes=4, channels=1, sizes_px=(4,), name="toy", seed=0):
    """Random projections of the pixels of 4 x 4 images (or of their corner, for a net of any size)."""
    rng = np.random.default_rng(seed)
    params = {
        "pool": rng.standard_normal((16 * channels, dimension)).astype(np.float32) / 64,
        "logits": rng.standard_normal((dimension, classes)).astype(np.float32),
    }

    def apply(params, images):
        flat = images[:, :4, :4].reshape(len(images), -1).astype(jnp.float32) - 128
        pool = jnp.tanh(flat @ params["pool"])
        return Features(pool, pool @ params["logits"])

    return FeatureNet(name, apply, params, dimension, classes, channels, sizes_px, f"{seed:064x}", "minus 128")


def pixels(n, seed=0, shape=(4, 4, 1), low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (n, *shape), np.uint8)
