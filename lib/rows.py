"""What is computed of every row of a batch by itself, by one program, for any number of rows and devices.

Row i is computed in place i % width of a program whose shape is always [width] on every device. So neither how many
rows there are nor how many devices changes a bit of it: the order of sums in a matrix product depends on the shape of
the program, and only on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lib.process import UserError
from lib.shard import DATA, fetch, place, primary


def compile_rows(fn: Callable[[Any, jax.Array, Any], Any], mesh: Mesh, width: int) -> Callable[..., Any]:
    """Compiles `call(shared, rows) -> tree` from `fn(shared, numbers [width], rows) -> tree of [width, ...]`.

    `rows` is a tree of arrays [count, ...], as is what comes back; `shared` is whole on every device. Rows have the
    numbers first, first + 1, ...: what is random about a row comes from its number.
    """
    run = on_mesh(fn, mesh, (P(), P(DATA), P(DATA)))

    def call(shared: Any, rows: Any, *, first: int = 0, progress: str | None = None) -> Any:
        blocks = Blocks(mesh, width, first, len(jax.tree.leaves(rows)[0]), rows)
        shared, parts = place(shared, mesh), []
        with bar(progress, len(blocks)) as shown:
            for numbers, block_rows, wanted in blocks:
                out = fetch(run(shared, numbers, block_rows))
                parts.append(jax.tree.map(lambda a: a[wanted], out))  # noqa: B023 (used at once)
                shown.update(1)
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    return call


class Blocks:
    """The rows first, ..., first + count - 1 in blocks of `width` rows on every device.

    Row i is always in place i % width of a device, so blocks begin at multiples of width; rows that nobody asked for
    are copies.
    """

    def __init__(self, mesh: Mesh, width: int, first: int, count: int, rows: Any):
        if count < 1 or first < 0:
            raise UserError(f"{count} samples from number {first}: needed are at least one, and a number >= 0")
        for array in jax.tree.leaves(rows):
            if len(array) != count:
                raise UserError(f"{len(array)} conditions for {count} samples: one for each is needed")
        self.mesh, self.width, self.first, self.count = mesh, width, first, count
        self.rows = jax.tree.map(np.asarray, rows)
        self.starts = range(first // width * width, first + count, width * mesh.size)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[jax.Array, Any, np.ndarray]]:
        for start in self.starts:
            numbers = start + np.arange(self.width * self.mesh.size)
            wanted = (numbers >= self.first) & (numbers < self.first + self.count)
            at = np.clip(numbers - self.first, 0, self.count - 1)
            rows = jax.tree.map(lambda a: a[at], self.rows)  # noqa: B023 (used at once)
            yield *place((numbers, rows), self.mesh, P(DATA)), wanted


def on_mesh(fn: Callable, mesh: Mesh, in_specs: tuple[P, ...], *, donate: bool = False) -> Callable:
    """Rows spread over devices. The same options on any number of devices, since they too decide the order of sums."""
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=P(DATA), check_vma=False)  # no collectives
    cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_cpu_multi_thread_eigen": False} if cpu else None
    return jax.jit(mapped, donate_argnums=0 if donate else (), compiler_options=options)


def bar(title: str | None, total: int) -> Any:
    """A progress bar on a terminal, nothing elsewhere or without a title."""
    from tqdm import tqdm

    return tqdm(desc=title, total=total, disable=None if title and primary() else True, leave=False, delay=2)
