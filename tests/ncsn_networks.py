"""What tests of networks and tests/reference/make_ncsn.py make alike: random weights and images, from names alone."""

import zlib

import jax
import numpy as np

from ncsn.model import ScoreModel, ncsn_v1, ncsn_v2

SHAPE, NGF = (12, 8, 3), 8
SIGMAS = (1.0, 0.3, 0.1, 0.03)
LEVEL = np.array([2, 0, 3])
SIGMA = np.float32(SIGMAS)[LEVEL]


def generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[11, zlib.crc32(name.encode())]))


def refinenets() -> dict[str, ScoreModel]:
    return {"v1": ncsn_v1(SHAPE, SIGMAS, NGF), "v2": ncsn_v2(SHAPE, NGF)}


def images() -> np.ndarray:
    """float32 [3, *SHAPE] in [0, 1]."""
    return generator("images").uniform(size=(len(LEVEL), *SHAPE)).astype(np.float32)


def random_params(model: ScoreModel) -> dict:
    """Activations keep their size, and no part is near what would make it invisible."""

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = "/".join(key.key for key in path)
        values = generator(name).standard_normal(leaf.shape)
        if name.endswith("kernel"):
            return np.float32(values / np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32((1 if name.endswith(("gamma", "alpha", "scale")) else 0) + 0.5 * values)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))
