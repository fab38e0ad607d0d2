"""What the networks are made of: batch norm over the whole batch, doubling and halving, the class beside the input."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lib.batch_norm import channel_moments
from lib.initial import Initializer, constant, normal
from lib.sums import affine

STATISTICS = "statistics"
_DECAY, _EPSILON = 0.9, 1e-5


class BatchNorm(nn.Module):
    """Batch norm over all devices; with `classes`, scale and shift are rows of the class (Dumoulin et al. 2017).

    While training, statistics are those of the batch, and the running ones that sampling uses follow them.
    """

    classes: int = 0
    scale_init: Initializer = normal(0.02, mean=1.0)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, y: jax.Array | None = None, *, halves: bool = False) -> jax.Array:
        """x [b, ..., c], y [b, classes] -> [b, ..., c].

        `halves`: both halves of a batch for training have their own statistics; the running ones follow their mean.
        """
        channels = x.shape[-1:]
        running_mean = self.variable(STATISTICS, "mean", lambda: constant(0.0)(None, channels))
        running_variance = self.variable(STATISTICS, "variance", lambda: constant(1.0)(None, channels))
        table = (self.classes, *channels) if self.classes else channels
        scale = self.param("scale", constant(1.0) if self.classes else self.scale_init, table)
        shift = self.param("bias", constant(0.0), table)
        if self.classes:
            assert y is not None
            spread = (len(x), *(1,) * (x.ndim - 2), -1)
            scale, shift = (y @ scale).reshape(spread), (y @ shift).reshape(spread)
        mean, variance = running_mean.value, running_variance.value
        if train:
            mean, variance = channel_moments(x, (2,) if halves else ())
            if not self.is_initializing():
                for running, now in ((running_mean, mean), (running_variance, variance)):
                    now = jax.lax.stop_gradient(jnp.mean(now, 0) if halves else now)
                    running.value = _DECAY * running.value + (1 - _DECAY) * now
        gain = scale * jax.lax.rsqrt(variance + _EPSILON)
        offset = shift - mean * gain
        return x * gain + offset if self.classes else affine(x, gain, offset)


def leaky_relu(slope: float) -> Callable[[jax.Array], jax.Array]:
    return nn.relu if slope == 0 else lambda x: jnp.where(x > 0, x, slope * x)


def doubled(x: jax.Array) -> jax.Array:
    """Nearest neighbours, [b, h, w, c] -> [b, 2h, 2w, c]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def halved(x: jax.Array) -> jax.Array:
    """The means of squares of four pixels, [b, h, w, c] -> [b, h / 2, w / 2, c]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def with_class(x: jax.Array, y: jax.Array | None) -> jax.Array:
    """The class [b, classes] beside the last axis of x [b, ..., c], the same for every pixel; x itself without one."""
    if y is None:
        return x
    maps = jnp.broadcast_to(y.reshape(len(x), *(1,) * (x.ndim - 2), -1), (*x.shape[:-1], y.shape[-1]))
    return jnp.concatenate([x, maps], axis=-1)
