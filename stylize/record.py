"""What a run depends on beyond its configuration, in data.json: where a run goes on it must find the same again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib import config as configs
from lib.metrics.images import of_array
from lib.process import UserError
from lib.run import RunFolder, first_difference, read_json, write_json
from stylize.vgg import LossNetwork

FILE = "data.json"


@dataclass(frozen=True)
class Record:
    """SHA-256 of what was used."""

    loss_network: str
    """of its weights"""
    photos: str | None = None
    """of the squares of photographs that a network learns from"""


def of(network: LossNetwork, photos: np.ndarray | None = None) -> Record:
    """Photographs are uint8 [n, s, s, 3]."""
    return Record(network.weights_sha256, None if photos is None else of_array(photos).sha256())


def read(run: Path) -> Record | None:
    """That of the run in a folder, or of what was exported of it; none where it was made without."""
    path = run / FILE
    return configs.from_json(Record, read_json(path), str(path)) if path.exists() else None


def check(run: Path, found: Record) -> None:
    """Raises UserError where the run in this folder was started with something else; without a record it passes."""
    known = read(run)
    difference = first_difference(configs.to_json(known), configs.to_json(found)) if known else None
    if difference:
        raise UserError(f"{run} was started with other weights or photographs: SHA-256 of {difference}")


def write(folder: RunFolder, found: Record) -> None:
    """Into the folder of a run that has none."""
    if folder.primary and not (folder.path / FILE).exists():
        write_json(folder.path / FILE, configs.to_json(found))


def compare(run: Path, network: LossNetwork, say: Callable[[str], None]) -> None:
    """Says where a run was trained with another loss network than this one."""
    known = read(run)
    if known is not None and known.loss_network != network.weights_sha256:
        now, then = network.weights_sha256[:12], known.loss_network[:12]
        say(f"{run} was trained with another loss network, weights {then}: the objective by {now} is another one")
