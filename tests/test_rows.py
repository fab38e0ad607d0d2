"""lib.rows: what is computed of every row by itself."""

import jax
import numpy as np

from lib.rows import compile_rows
from lib.shard import make_mesh

RNG = np.random.default_rng(0)


def test_rows_know_neither_their_count_nor_the_devices():
    def shifted(shared, numbers, rows):
        matrix, key = shared
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return {"y": rows @ matrix + jax.vmap(jax.random.normal)(keys)[:, None]}

    data, shared = RNG.normal(size=(7, 5)).astype(np.float32), (RNG.normal(size=(5, 32)), jax.random.key(0))
    one, two = (compile_rows(shifted, make_mesh(n), 2) for n in (1, 2))
    whole = one(shared, data)["y"]
    assert whole.shape == (7, 32)
    np.testing.assert_array_equal(two(shared, data)["y"], whole)
    np.testing.assert_array_equal(two(shared, data[3:], first=3)["y"], whole[3:])
