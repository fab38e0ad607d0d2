"""Weight files: flat names to arrays, in safetensors. No pickle is ever loaded here.

Names are paths into the parameters of a Flax module, "Mixed_5b/branch1x1/kernel".
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lib.features.download import weights_folder
from lib.process import UserError
from lib.run import write_bytes

SUFFIX = ".safetensors"
_SHOWN = 3


class Weights(NamedTuple):
    arrays: dict[str, np.ndarray]
    sha256: str
    """of the bytes of the file, hexadecimal"""


def cached(name: str) -> Path:
    """Where the converted weights of network `name` belong: the cache folder, whether they are there or not."""
    return weights_folder() / f"{name}{SUFFIX}"


def read(path: Path) -> Weights:
    """The arrays of a safetensors or .npz file, and the hash of the bytes that they came from.

    Raises UserError where the file is missing, neither of the two, or holds NaN or infinity.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such weight file") from None
    try:
        arrays = _npz(content, path) if content.startswith(b"PK") else load(content)
    except (SafetensorError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(
            f"{path} is not a weight file ({error}): PyTorch's and Keras' files go through "
            "`python -m lib.features convert`"
        ) from None
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.number) or not np.all(np.isfinite(array)):
            raise UserError(f"{path}: {name} holds values that are not finite numbers")
    return Weights(arrays, hashlib.sha256(content).hexdigest())


def _npz(content: bytes, path: Path) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # a zip file of something else: PyTorch's
            raise ValueError(f"{path.name} holds {name}")
    return arrays


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Replaces `path` in one step and returns the SHA-256 of its bytes; the same arrays give the same bytes."""
    content = save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def flat(params: Any) -> dict[str, Any]:
    """Nested parameters (or their shapes) as {"outer/inner": leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `flat`, in float32."""
    return traverse_util.unflatten_dict({name: np.asarray(a, np.float32) for name, a in arrays.items()}, sep="/")


def check(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], source: Path | str) -> None:
    """Raises UserError that names the first array which is missing, unknown or of another shape."""
    missing = [name for name in expected if name not in arrays]
    if missing:
        raise UserError(f"{source}: {_some(missing)} missing: these are the weights of another network")
    unknown = [name for name in arrays if name not in expected]
    if unknown:
        raise UserError(f"{source}: {_some(unknown)} unknown: these are the weights of another network")
    for name, shape in expected.items():
        if tuple(arrays[name].shape) != tuple(shape):
            raise UserError(f"{source}: {name} has shape {tuple(arrays[name].shape)}, not {tuple(shape)}")


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more are" if more > 0 else " are" if len(names) > 1 else " is")
