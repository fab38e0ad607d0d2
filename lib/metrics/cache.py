"""Statistics of reference sets, kept under a hash of what they depend on.

Files are written whole under a name of their own and then renamed, so concurrent writers cannot mix, and a reader sees
all of a file or none. A file that is damaged all the same is computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from lib.features.net import FeatureNet
from lib.metrics.images import Images
from lib.metrics.statistics import SAMPLE_SEED, SPLITS, Statistics
from lib.process import tell

VERSION = 1
"""changed whenever the same images and weights would give other statistics"""
_ARRAYS = ("mean", "covariance", "rows", "features", "scores")


def folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gradient-fields" / "statistics"


def path_of(images: Images, net: FeatureNet, max_features: int) -> Path:
    """Where the statistics of these images under this net belong. Reads all images."""
    record = {
        "version": VERSION,
        "images_sha256": images.sha256(),
        "net": net.name,
        "weights_sha256": net.weights_sha256,
        "preprocessing": net.preprocessing,
        "max_features": max_features,
        "sample_seed": SAMPLE_SEED,
        "splits": SPLITS,
    }
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return folder() / f"{net.name}-{key[:32]}.safetensors"


def load(path: Path) -> Statistics | None:
    """None where there is nothing or nothing whole."""
    try:
        data = path.read_bytes()
        digest, data = data[:32], data[32:]
        if hashlib.sha256(data).digest() != digest:
            return None
        arrays = safetensors.numpy.load(data)
    except (FileNotFoundError, SafetensorError):
        return None
    return Statistics(count=int(arrays.pop("count")[0]), **arrays)


def save(path: Path, statistics: Statistics) -> None:
    """A cache that cannot be written (full disk, no rights) costs time later and nothing else: one line on stderr."""
    arrays = {name: np.ascontiguousarray(getattr(statistics, name)) for name in _ARRAYS}
    data = safetensors.numpy.save({**arrays, "count": np.array([statistics.count])})
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
            file.write(hashlib.sha256(data).digest() + data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        tell(f"warning: statistics are not kept: {path}: {error.strerror}")
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


assert {field.name for field in dataclasses.fields(Statistics)} == {"count", *_ARRAYS}
