"""Trained networks alone: folders to pass on, with weights in the place of checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import config as configs
from lib.features import weights
from lib.process import UserError
from lib.run import RunFolder, read_json, write_json, write_text
from stylize import record
from stylize.config import Config

WEIGHTS = "network.safetensors"
_LINES = 100  # of the training's metrics that are kept, about


def write(config: Config, params: Any, names: Sequence[str], folder: RunFolder, out: Path) -> None:
    """The network of a run in the new folder `out`: weights, configuration, environment, a thinned log, and the
    record of what it was trained with where there is one.

    The images of its styles, `names`, go along; of all other files only the names are kept. Raises UserError where
    `out` cannot be made.
    """
    try:
        (out / "styles").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}") from None
    styles = [f"styles/{name}.png" for name in names]
    for path in styles:
        shutil.copyfile(folder.path / path, out / path)
    portable = dataclasses.replace(
        config,
        styles=tuple(styles),
        photos=_name(config.photos),
        perception=dataclasses.replace(config.perception, weights=None),  # only evaluations load them: each its own
        warm_start=None if config.warm_start is None else _name(config.warm_start),
    )
    if (folder.path / record.FILE).exists():
        shutil.copyfile(folder.path / record.FILE, out / record.FILE)
    records = read_json(folder.path / "environment.json")
    rows = folder.metrics()
    kept = sorted({*range(0, len(rows), max(1, len(rows) // _LINES)), *range(len(rows))[-1:]})
    write_json(out / "environment.json", [{**r, "argv": [_name(word) for word in r["argv"]]} for r in records])
    write_text(out / "metrics.jsonl", "".join(json.dumps(rows[k]) + "\n" for k in kept))
    weights.write(out / WEIGHTS, weights.flat(params))
    write_json(out / "config.json", {"package": "stylize", "config": configs.to_json(portable)})


def read(folder: Path, like: Any) -> Any:
    """The parameters in an exported folder. Raises UserError where their shapes are not those of `like`."""
    found = weights.read(folder / WEIGHTS).arrays
    weights.check(found, {name: x.shape for name, x in weights.flat(like).items()}, folder / WEIGHTS)
    return weights.nested(found)


def _name(word: str) -> str:
    """A path without the folders of one machine."""
    return Path(word).name if Path(word).is_absolute() else word
