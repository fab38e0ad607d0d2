"""Where trained networks are: run folders, exported ones, and those that come with the package, known by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lib import config as configs
from lib.run import RunFolder
from stylize.config import Config

_PRETRAINED = Path(__file__).parent / "pretrained"
PRETRAINED = tuple(sorted(path.parent.name for path in _PRETRAINED.glob("*/config.json")))
"""names of the networks that come with the package"""


def place(word: str) -> Path:
    """The folder of a network: a path, or the name of one that comes with the package where there is no such path."""
    return _PRETRAINED / word if word in PRETRAINED and not Path(word).exists() else Path(word)


def opened(word: str) -> tuple[RunFolder, Config]:
    """The folder and the configuration of a network. Raises UserError where there is none.

    Style images that lie in the folder are found wherever it is.
    """
    folder, values = RunFolder.open(place(word), "stylize")
    config = configs.from_json(Config, values)
    inside = [str(folder.path / style) if (folder.path / style).exists() else style for style in config.styles]
    return folder, dataclasses.replace(config, styles=tuple(inside))


def pretrained(folder: RunFolder) -> bool:
    """Whether a network is one that comes with the package."""
    return folder.path.parent == _PRETRAINED
