"""lib/sums.py: the same as XLA's own reductions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lib.shard import DATA, make_mesh
from lib.sums import affine, channel_sums


def test_sums_over_all_axes_but_the_last():
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(channel_sums(x, 0.5), 0.5 * x.sum((0, 1, 2)), rtol=1e-5)
    assert channel_sums(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


def test_gradients_of_affine_maps_are_those_of_the_formula_on_any_number_of_devices():
    rng = np.random.default_rng(0)
    x, gain, offset, weights = (np.float32(rng.normal(size=shape)) for shape in ((4, 3, 5), 5, 5, (4, 3, 5)))

    def gradients(f, x, gain, offset, weights):
        return jax.grad(lambda *args: jnp.sum(weights * f(*args) ** 2), argnums=(0, 1, 2))(x, gain, offset)

    wanted = gradients(lambda x, gain, offset: x * gain + offset, x, gain, offset, weights)
    spread = jax.shard_map(
        lambda *args: gradients(affine, *args),
        mesh=make_mesh(2),
        in_specs=(P(DATA), P(), P(), P(DATA)),
        out_specs=(P(DATA), P(), P()),
    )
    for found in (gradients(affine, x, gain, offset, weights), spread(x, gain, offset, weights)):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
