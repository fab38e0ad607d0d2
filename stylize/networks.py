"""Where trained networks are: run folders, exported ones, and those that come with the package, known by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lib import config as configs
from lib.run import RunFolder
from stylize.config import Config

_PRETRAINED = Path(__file__).parent / "pretrained"
PRETRAINED = ("starry_night", "movie")
"""names of the networks that come with the package, those for photographs first"""


def place(word: str) -> Path:
    """The folder of a network: a path, or the name of one that comes with the package where there is no such path."""
    return _PRETRAINED / word if word in PRETRAINED and not Path(word).exists() else Path(word)


def placed(args: Sequence[str]) -> list[str]:
    """The arguments of a command that begin with a network, which is a folder then."""
    return [*(str(place(word)) for word in args[:1]), *args[1:]]


def opened(word: str) -> tuple[RunFolder, Config]:
    """The folder and the configuration of a network. Raises UserError where there is none."""
    folder, values = RunFolder.open(place(word), "stylize")
    return folder, located(configs.from_json(Config, values), folder)


def located(config: Config, folder: RunFolder) -> Config:
    """With style images that lie in the folder found there, wherever it is."""
    inside = [folder.path / style for style in config.styles]
    found = [str(path) if path.exists() else style for path, style in zip(inside, config.styles, strict=True)]
    return dataclasses.replace(config, styles=tuple(found))


def pretrained(folder: RunFolder) -> bool:
    """Whether a network is one that comes with the package."""
    return folder.path.parent == _PRETRAINED
