"""The trained network on images of any size: out comes exactly that size."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lib.shard import DATA, compiler_options, place
from stylize.model import MULTIPLE, Rows, mixture
from stylize.training import Trained, build_model

if TYPE_CHECKING:
    from stylize.movie import Stylize

_LEAST_ROWS = 8  # per device: a quarter of them has to be mirrored by the 3x3 kernels


class Stylizer:
    """Stylises one image after the other, the rows of each divided over the devices of the mesh.

    A program is compiled for every size (rounded up to multiples of 16) that comes.
    """

    def __init__(self, trained: Trained, mesh: Mesh):
        self._trained = trained
        self._mesh = mesh
        self._model = build_model(trained.config)
        self._params = functools.cache(lambda n: place(trained.params, self._part(n)))
        self._programs = functools.cache(self._compile)

    def mix(self, weights: list[float] | None = None, strength: float = 1.0) -> jax.Array:
        """[styles + 1] for `__call__`: the styles' shares (default: the first style alone)."""
        count = len(self._trained.config.styles)
        return mixture([1.0] + [0.0] * (count - 1) if weights is None else weights, strength)

    def only(self, style: int, strength: float = 1.0) -> jax.Array:
        """`mix` of one style."""
        return self.mix([float(i == style) for i in range(len(self._trained.config.styles))], strength)

    def __call__(
        self, image: np.ndarray, mix: jax.Array, before: np.ndarray | None = None, mask: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 [h, w, 3] in [-1, 1] -> the same.

        For networks with a memory: `before` [h, w, 3], the stylised frame before moved to the places of this one, and
        `mask` [h, w], 1 where it is reliable.
        """
        h, w = image.shape[:2]
        x = _padded(image)[None]
        if self._trained.config.network.memory:
            if before is None or mask is None:
                before, mask = np.zeros_like(image), np.zeros((h, w), np.float32)
            seen = np.concatenate([before * mask[..., None], mask[..., None]], -1)
            x = np.concatenate([x, _padded(seen)[None]], -1)
        devices = rows_over(x.shape[1], self._mesh.size, self._trained.config.network.kernel_px)
        y = self._programs(devices)(self._params(devices), jnp.asarray(x), mix[None])
        return np.clip(np.asarray(y)[0, :h, :w], -1, 1)

    def frames_in(self, mix: jax.Array) -> Stylize:
        """`(image, before, mask) -> stylised image` for `stylize_movie`."""
        return lambda image, before, mask: self(image, mix, before, mask)

    def _part(self, devices: int) -> Mesh:
        return Mesh(self._mesh.devices.reshape(-1)[:devices], (DATA,))

    def _compile(self, devices: int):
        rows = Rows(DATA, devices) if devices > 1 else None
        model, mesh = self._model.clone(rows=rows), self._part(devices)

        def run(params, x: jax.Array, mix: jax.Array) -> jax.Array:
            before = x[..., 3:] if x.shape[-1] > 3 else None
            return model.apply({"params": params}, x[..., :3], mix, before)

        if devices == 1:
            return jax.jit(run)
        spread = P(None, DATA)
        mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), spread, P()), out_specs=spread)
        return jax.jit(mapped, compiler_options=compiler_options(mesh))


def rows_over(height: int, devices: int, kernel_px: int) -> int:
    """The largest number of devices over which the rows of a padded image divide well.

    What is mirrored, or comes from the neighbours, is half of the largest kernel: each needs more rows than that.
    """
    spread = [n for n in range(2, devices + 1) if height % (_LEAST_ROWS * n) == 0 and height // n > kernel_px // 2]
    return max(spread, default=1)


def _padded(image: np.ndarray) -> np.ndarray:
    """Mirrored at the bottom and at the right, up to the next multiples of 16."""
    h, w = image.shape[:2]
    return np.pad(image, ((0, -h % MULTIPLE), (0, -w % MULTIPLE), (0, 0)), mode="reflect")
