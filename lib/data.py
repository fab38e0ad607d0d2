"""Sources of batches. A source gives the same batches for the same seed and step, so a resumed run sees what the
uninterrupted one would have seen.

The engine needs four things of a source: `constant`, arrays that stay on the devices during training;
`per_step(first, count)`, what changes with the step, with `count` leading; `select(constant, x)`, the pure function
that makes a batch of the two inside the compiled program; and the PartitionSpecs of both.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from lib.process import UserError
from lib.shard import DATA

DATA_VARIABLE = "GRADIENT_FIELDS_DATA"


def _rows(arrays: Any, axis: int = 0) -> int:
    return int(jax.tree.leaves(arrays)[0].shape[axis])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows).astype(np.int32)


def shuffled(seed: int, rows: int, batch_size: int, first: int, count: int) -> np.ndarray:
    """Indices [count, batch_size] of the batches of steps `first`, `first` + 1, ...

    Every epoch is one permutation of all rows, drawn from (seed, epoch) alone; batches run on across its end.
    """
    flat = np.arange(first * batch_size, (first + count) * batch_size, dtype=np.int64)
    epochs = flat // rows
    out = np.empty(flat.shape, np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(seed, int(epoch), rows)[flat[here] % rows]
    return out.reshape(count, batch_size)


@dataclasses.dataclass(frozen=True)
class FullBatch:
    """All rows in every step. `arrays`: a tree with rows leading (`()` for steps without data).

    With `step_name`, arrays is a dict, and the batch holds the number of the step under that name.
    """

    arrays: Any
    step_name: str | None = None
    constant_spec: P = P(DATA)
    per_step_spec: P = P()

    @property
    def constant(self) -> Any:
        return self.arrays

    def per_step(self, first: int, count: int) -> np.ndarray:
        return np.arange(first, first + count, dtype=np.int32)

    def select(self, constant: Any, x: jax.Array) -> Any:
        return constant if self.step_name is None else {**constant, self.step_name: x}


@dataclasses.dataclass(frozen=True)
class Resident:
    """Shuffled minibatches of arrays that fit on every device.

    `row_axis` is 1 where a replica axis leads (see `lib.train.fit`); all replicas draw the same row numbers.
    """

    arrays: Any
    batch_size: int
    seed: int = 0
    row_axis: int = 0
    constant_spec: P = P()
    per_step_spec: P = P(None, DATA)

    @property
    def constant(self) -> Any:
        return self.arrays

    def per_step(self, first: int, count: int) -> np.ndarray:
        return shuffled(self.seed, _rows(self.arrays, self.row_axis), self.batch_size, first, count)

    @staticmethod
    def select(constant: Any, x: jax.Array) -> Any:
        return jax.tree.map(lambda rows: rows[x], constant)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Shuffled minibatches of windows of `length` consecutive times out of sequences, arrays [sequences, T, ...].

    A batch is [batch_size, length, ...]; `row_axis` as for `Resident`.
    """

    arrays: Any
    length: int
    batch_size: int
    seed: int = 0
    row_axis: int = 0
    constant_spec: P = P()
    per_step_spec: P = P(None, DATA)

    @property
    def constant(self) -> Any:
        return self.arrays

    def per_step(self, first: int, count: int) -> np.ndarray:
        starts = _rows(self.arrays, self.row_axis + 1) - self.length + 1
        rows = _rows(self.arrays, self.row_axis) * starts
        return shuffled(self.seed, rows, self.batch_size, first, count)

    def select(self, constant: Any, x: jax.Array) -> Any:
        starts = _rows(constant, 1) - self.length + 1
        sequence, start = x[:, None] // starts, x[:, None] % starts
        return jax.tree.map(lambda rows: rows[sequence, start + np.arange(self.length)], constant)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Shuffled minibatches read by `fetch(indices [k]) -> tree [k, ...]` while the previous chunk trains.

    For data larger than a device. Gives the same batches as `Resident` over the same rows.
    """

    fetch: Callable[[np.ndarray], Any]
    rows: int
    batch_size: int
    seed: int = 0
    constant_spec: P = P()
    per_step_spec: P = P(None, DATA)

    @property
    def constant(self) -> Any:
        return ()

    def per_step(self, first: int, count: int) -> Any:
        indices = shuffled(self.seed, self.rows, self.batch_size, first, count)
        flat = self.fetch(indices.reshape(-1))
        return jax.tree.map(lambda x: x.reshape(count, self.batch_size, *x.shape[1:]), flat)

    @staticmethod
    def select(constant: Any, x: Any) -> Any:
        del constant
        return x


@dataclasses.dataclass(frozen=True)
class Beside:
    """The batches of another source (dicts) with the same `constants` beside them in every one.

    For frozen networks and targets: arguments of the compiled program, and no part of it.
    """

    source: Resident | Streamed
    constants: dict[str, Any]

    @property
    def constant(self) -> Any:
        return self.source.constant, self.constants

    @property
    def constant_spec(self) -> Any:
        return self.source.constant_spec, P()

    @property
    def per_step_spec(self) -> P:
        return self.source.per_step_spec

    def per_step(self, first: int, count: int) -> Any:
        return self.source.per_step(first, count)

    def select(self, constant: Any, x: Any) -> Any:
        rows, constants = constant
        return {**self.source.select(rows, x), **constants}


Source = FullBatch | Resident | Windows | Streamed | Beside


def data_folder(*parts: str) -> Path:
    """A path inside the folder that the environment variable GRADIENT_FIELDS_DATA names.

    Raises UserError where the variable is not set or the path does not exist.
    """
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        raise UserError(f"{'/'.join(parts)} is needed: set {DATA_VARIABLE} to the folder that holds it")
    path = Path(root, *parts)
    if not path.exists():
        raise UserError(f"{path}: not found (from {DATA_VARIABLE})")
    return path


@dataclasses.dataclass(frozen=True)
class TfdsRows:
    """A split of a prepared TFDS data set, one row at a time: {"image": uint8 [h, w, c], "label": int, ...}."""

    folder: Path
    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Raises UserError where the files are damaged."""
        try:
            return self.source[i]
        except (OSError, RuntimeError) as error:  # array_record reports absent and damaged files as RuntimeError
            raise UserError(f"{self.folder} is damaged: {' '.join(str(error).split())}") from None


def tfds_rows(name: str, split: str) -> TfdsRows:
    """`split` may be a part of one, as in `train[:10000]`.

    Reads GRADIENT_FIELDS_DATA/tfds without TensorFlow, and never the network. Raises UserError where it is absent.
    """
    folder = data_folder("tfds")
    versions = sorted((folder / name).glob("*/dataset_info.json"))
    if not versions:
        raise UserError(f"{folder / name}: no prepared TFDS data set there")
    import tensorflow_datasets as tfds

    logging.getLogger("absl").addFilter(_not_advice)
    builder = tfds.builder_from_directory(str(versions[-1].parent))
    if split.split("[")[0] not in builder.info.splits:
        raise UserError(f"{name} has no split {split!r}, only {', '.join(builder.info.splits)}")
    try:
        source = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
        len(source)  # a ValueError for [5:3]
    except ValueError as error:
        raise UserError(f"{name} has no part {split!r}: {' '.join(str(error).split())}") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{versions[-1].parent} is damaged: {' '.join(str(error).split())}") from None
    return TfdsRows(versions[-1].parent, source)


def _not_advice(record: logging.LogRecord) -> bool:
    """Pillow decodes well enough, and a user of ours cannot act on being told to install OpenCV."""
    return "OpenCV is not installed" not in record.getMessage()


def load_tfds(name: str, split: str) -> dict[str, np.ndarray]:
    """A whole split as arrays, e.g. {"image": uint8 [n, h, w, c], "label": int64 [n]}; see `tfds_rows`.

    Raises UserError where it is absent or damaged.
    """
    return _all_rows(tfds_rows(name, split))


def load_labelled(name: str, split: Literal["train", "test"]) -> dict[str, np.ndarray]:
    """{"image": uint8 [n, h, w, c], "label": int32 [n]} of "digits" or of a prepared TFDS data set, e.g. "mnist".

    The digits are those inside scikit-learn, 0..16 stretched to 0..255; a fixed random fifth of them (360) is "test".
    """
    if name != "digits":
        rows = load_tfds(name, split)
        return {"image": rows["image"], "label": rows["label"].astype(np.int32)}
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    image = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = np.random.Generator(np.random.Philox(0)).permutation(len(labels))
    chosen = order[:360] if split == "test" else order[360:]
    return {"image": image[chosen], "label": labels[chosen].astype(np.int32)}


def _all_rows(rows: TfdsRows) -> dict[str, np.ndarray]:
    first = rows[0]
    out = {key: np.empty((len(rows), *np.shape(value)), np.asarray(value).dtype) for key, value in first.items()
           if not isinstance(value, str | bytes)}  # fmt: skip
    for i in range(len(rows)):
        row = rows[i]
        for key in out:
            out[key][i] = row[key]
    return out
