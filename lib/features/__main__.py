"""python -m lib.features get|convert|train|list: weights of feature networks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lib.features import CLASSIFIERS, INCEPTIONS
from lib.process import UserError, command

HELP = """usage: python -m lib.features COMMAND ...

  get inception|vgg16|vgg19        download the published weights into the cache folder, checked and resumable
  convert FILE OUT.safetensors     make a PyTorch or Keras weight file ours (pip install -e ".[convert]")
  train digits|mnist|cifar10 ...   train a small classifier
  list                             the networks, and where their weights are looked for"""


def networks() -> str:
    """One line per network."""
    from lib.features import classifier, weights

    places = {name: weights.cached("inception") for name in INCEPTIONS}
    places |= {name: classifier.FOLDER / f"{name}{weights.SUFFIX}" for name in CLASSIFIERS}
    places |= {f"{name} (not for metrics)": weights.cached(name) for name in ("vgg16", "vgg19")}
    return "\n".join(f"{name:26}{path}{'' if path.exists() else ' (missing)'}" for name, path in places.items())


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return
    name, rest = argv[0], argv[1:]
    if name == "get":
        from lib.features import download

        download.main(rest)
    elif name == "convert":
        from lib.features import convert

        convert.main(rest)
    elif name == "train":
        from lib.features import training

        training.main(rest)
    elif name == "list":
        print(networks())
    else:
        raise UserError(f"unknown command {name!r}: choose from get, convert, train, list")


if __name__ == "__main__":
    sys.exit(command(main))
