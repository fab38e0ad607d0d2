"""Checkpoints by Orbax: asynchronous, atomic, and read back only when every byte is as it was saved.

Each checkpoint carries the state and a record: the shapes and a checksum of every array. The newest one that
restores wins; a torn one is skipped with a warning; one that belongs to another network is refused.
"""

from __future__ import annotations

import gc
import logging
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lib.process import UserError
from lib.shard import fetch

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports there what it also raises, over many lines


def _bytes_of(leaf: Any) -> Any:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def checksums(state: Any, kinds: Mapping[str, int | str] | None = None) -> dict[str, int | str]:
    """A checksum per array, by path: CRC-32 of its bytes, or where it is spread over hosts, none of which holds them
    all, a sum that the devices compute together, as text. `kinds`: like these, instead.
    """
    out: dict[str, int | str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name, data = jax.tree_util.keystr(path), _bytes_of(leaf)
        whole = data.is_fully_addressable or data.is_fully_replicated
        if isinstance(kinds[name], str) if kinds and name in kinds else not whole:
            out[name] = f"sum {int(_sum(data)):08x}"
        else:
            out[name] = zlib.crc32(np.ascontiguousarray(fetch(data)).tobytes())
    return out


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    """The bits of each number times an odd number of its place, modulo 2^32: the same however the array is spread."""
    width = x.dtype.itemsize
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, {1: np.uint8, 2: np.uint16, 4: np.uint32}[width])
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (place * np.uint32(2654435762) + np.uint32(1)), dtype=jnp.uint32)


def _shapes(state: Any) -> dict[str, str]:
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flat}


class Checkpoints:
    """The checkpoints of one model in one folder. Close it, or use it as a context manager."""

    _saving: ClassVar[Checkpoints | None] = None
    """Whose save may not be on disk yet. Processes meet at barriers that Orbax names alike for all folders: of two that
    are saved at the same time, one would find the barrier of the other."""

    def __init__(self, folder: Path, *, keep: int | None = 2):
        """`keep`: how many there are at most, the newest ones; none: all that are not deleted."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self.folder = folder.absolute()
        self._damaged: set[int] = set()
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {folder}: {error.strerror}") from None

    def save(self, step: int, state: Any) -> None:
        """Starts saving; returns once the arrays are copied. Raises UserError where an earlier save failed.

        A save to another folder that has not ended is waited for.
        """
        other = Checkpoints._saving
        if other is not None and other is not self:
            other.wait()
        Checkpoints._saving = self
        record = {"shapes": _shapes(state), "checksums": checksums(state)}
        try:
            while self._damaged:  # whoever only reads deletes nothing
                self._manager.delete(self._damaged.pop())
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
                force=True,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"cannot save step {step} to {self.folder}: {_first_line(error)}") from error

    def delete(self, step: int) -> None:
        """Deletes one that is on disk."""
        self._manager.delete(step)

    def wait(self) -> None:
        """Until the last save is on disk."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot save to {self.folder}: {_first_line(error)}") from error

    def steps(self) -> list[int]:
        """Those on disk, without the ones that `restore` found damaged."""
        return sorted(set(self._manager.all_steps()) - self._damaged)

    def restore(self, like: Any, *, step: int | None = None) -> Any | None:
        """The newest intact state (or that of `step`), with the shardings of `like`; None where there is none.

        `like` may be arrays or `jax.ShapeDtypeStruct`s with shardings.

        Raises UserError for checkpoints of a network with other arrays than `like`.
        """
        for candidate in reversed(self.steps()):
            if step is not None and candidate != step:
                continue
            state = self._restore(candidate, like)
            if state is not None:
                return state
            warnings.warn(f"checkpoint {self.folder / str(candidate)} is damaged and skipped", stacklevel=2)
            self._damaged.add(candidate)
        return None

    def _restore(self, step: int, like: Any) -> Any | None:
        try:
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        except (OSError, ValueError, KeyError):
            return None
        if not isinstance(record, dict) or set(record) != {"shapes", "checksums"}:
            return None
        wanted = _shapes(like)
        if record["shapes"] != wanted:
            first = min(k for k in record["shapes"].keys() | wanted if record["shapes"].get(k) != wanted.get(k))
            raise UserError(
                f"checkpoint {self.folder / str(step)} belongs to another network: "
                f"{first} is {record['shapes'].get(first)}, expected {wanted.get(first)}"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        hook = sys.unraisablehook
        sys.unraisablehook = _without_late_replies(hook)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = self._manager.restore(step, args=args)["state"]
        except (OSError, ValueError, KeyError):
            state = None
        if state is None:
            _collect_what_orbax_leaves()
            return None  # the hook stays: replies may come at any time from now on
        sys.unraisablehook = hook
        return state if checksums(state, record["checksums"]) == record["checksums"] else None

    def close(self) -> None:
        if Checkpoints._saving is self:
            Checkpoints._saving = None
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_finished(folder: Path, steps: int) -> None:
    """Raises UserError where RUN/checkpoints/NAME has no checkpoint of the last of `steps` steps; reads no array."""
    run, name = folder.parent.parent, folder.name
    if not folder.is_dir():
        raise UserError(f"{run} holds no trained {name}: train it first")
    with Checkpoints(folder) as checkpoints:
        if max(checkpoints.steps(), default=0) < steps:
            raise UserError(f"{run}: the training of {name} is not finished; continue it with train --resume")


def restore_finished(folder: Path, build: Callable[[], Any], steps: int) -> Any:
    """The state after the last of `steps` steps, on the first device, like the one that `build()` would compute.

    Raises UserError as `check_finished` does, and where the last checkpoint is damaged.
    """
    check_finished(folder, steps)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(build))
    with Checkpoints(folder) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error says it
        state = checkpoints.restore(like)
    if state is None or int(np.max(state.step)) < steps:
        raise UserError(f"{folder}: the last checkpoint is damaged; train --resume makes it anew")
    return state


def _without_late_replies(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """When one array cannot be read, Orbax closes its event loop; Python would print a traceback for every other.

    Those that TensorStore answers afterwards find the loop closed; those that never ran end when they are collected.
    """
    late = ("Event loop is closed", "Encountered error while reading array index")

    def filtered(unraisable: Any) -> object:
        return None if str(unraisable.exc_value).startswith(late) else hook(unraisable)

    return filtered


def _collect_what_orbax_leaves() -> None:
    """Tasks and coroutines of the arrays that were not read any more: Python would tell of each when it finds them."""
    log = logging.getLogger("asyncio")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        gc.collect()
        log.setLevel(level)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
