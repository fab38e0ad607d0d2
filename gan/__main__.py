"""python -m gan train|sample|interpolate|evaluate: the command line of generative adversarial networks."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gan.config import PRESETS, Config, Evaluation
from lib import config as configs
from lib.run import RunFolder, UserError, check_out, command, dispatch, first_difference, read_json, write_json

_PRESETS = textwrap.fill(f"presets: {', '.join(PRESETS)}", 100, subsequent_indent="  ")

HELP = f"""usage: python -m gan COMMAND ...

  train PRESET --out RUN        train, watch and evaluate; writes numbers, pictures and RUN/report.html
  train PRESET --out RUN --resume          go on where a stopped run was
  train PRESET --data.source FOLDER        learn the images of a folder
  sample RUN --out FILE         new samples; FILE is .png (a grid) or .npz, or a folder of single images
  interpolate RUN --out PNG     strips between latents, or with --classes from class to class
  evaluate RUN                  measure a trained run again, with other options if wanted
  evaluate RUN RUN RUN          mean and standard deviation over trainings that differ in the seed

{_PRESETS}

`python -m gan COMMAND ... --help` lists every option, e.g. --optim.lr 3e-4 --watch.patience 10"""


@dataclass(frozen=True, kw_only=True)
class Train(configs.RunOptions):
    """Train a generator and evaluate it."""

    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Sample:
    """New samples of a trained generator."""

    out: Path = Path("samples.png")
    """.png for a grid, .npz for an array ("images", uint8; points: "x"), or a folder for one file per image"""
    count: int = 64
    """how many"""
    seed: int = 0
    """sample i depends on the seed and on i alone"""
    label: int | None = None
    """class to draw (default: all in turn)"""
    checkpoint: Literal["best", "last"] = "best"
    """which one"""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError("count must be at least 1")


@dataclass(frozen=True)
class Interpolate:
    """Strips of images between latents, or between classes."""

    out: Path = Path("interpolation.png")
    """a grid"""
    rows: int = 6
    """strips"""
    columns: int = 9
    """images in a strip between two latents"""
    classes: bool = False
    """one latent per strip, from class to class"""
    seed: int = 0
    """of the latents"""
    label: int | None = None
    """class of all strips (default: all in turn)"""
    checkpoint: Literal["best", "last"] = "best"
    """which one"""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 2:
            raise UserError("rows must be at least 1 and columns at least 2")


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run again."""

    evaluation: Annotated[Evaluation, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Seeds:
    """Mean and standard deviation over several runs."""

    out: Path | None = None
    """.json of the numbers (default: only the table)"""


def train(args: Sequence[str]) -> None:
    base, where, rest = configs.starting_point(PRESETS, "gan", args)
    chosen = configs.parse(Train(config=base), rest, "python -m gan train PRESET")
    config = chosen.config
    preset = args[0] if args and args[0] in PRESETS else Path(config.data.source).stem
    if chosen.resume and chosen.out is None and where is None:
        raise UserError("--resume needs --out RUN, the folder of the run to go on with")
    out = chosen.out or where or Path("runs") / f"gan-{preset}"

    from lib import shard

    shard.start(convolutions=config.network.kind != "mlp")
    if shard.primary():
        RunFolder.check(out, "gan", configs.to_json(config), resume=chosen.resume)
    from gan import data, experiment, page

    mesh = shard.make_mesh(chosen.devices or experiment.default_devices(config))
    experiment.check_devices(config, mesh.size)
    rows = data.load(config)
    facts = data.facts(rows)
    experiment.check_fits(config, rows, facts)
    with RunFolder.start(out, "gan", configs.to_json(config), resume=chosen.resume, primary=shard.primary()) as folder:
        say = _say if shard.primary() else lambda text: None
        trained = experiment.train(config, rows, facts, folder, mesh, say)
        if shard.primary():
            _finish(page.evaluate_run(config, rows, trained, folder, _say), folder)


def evaluate(args: Sequence[str]) -> None:
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
    if len(runs) > 1:
        return _over_seeds(runs, args[len(runs) :])
    folder, config, rest = configs.trained_run(Config, "gan", "evaluate", args)
    options = configs.parse(Evaluate(config.evaluation), rest, "python -m gan evaluate RUN")
    config = dataclasses.replace(config, evaluation=options.evaluation)
    trained = _open(config, folder)
    from gan import data, page

    return _finish(page.evaluate_run(config, data.load(config), trained, folder, _say), folder)


def _over_seeds(names: Sequence[str], rest: Sequence[str]) -> None:
    options = configs.parse(Seeds(), rest, "python -m gan evaluate RUN RUN ...")
    if options.out is not None:
        check_out(options.out, ".json")
    runs = [RunFolder.open(Path(name), "gan") for name in names]
    first = runs[0][1] | {"seed": None}
    for name, (_, values) in zip(names, runs, strict=True):
        difference = first_difference(first, values | {"seed": None})
        if difference:
            raise UserError(f"{names[0]} and {name} differ in more than the seed: {difference}")
    for folder, _ in runs:
        if not (folder.path / "evaluation.json").exists():
            raise UserError(f"{folder.path} is not evaluated yet: python -m gan evaluate {folder.path}")
    found = [read_json(folder.path / "evaluation.json") for folder, _ in runs]
    from gan import page
    from gan.evaluate import over_seeds

    numbers = over_seeds(found)
    if options.out is not None:
        write_json(options.out, {**numbers, "trainings": len(found)})
    _say(f"{page.summary(numbers)}\n\nmean ± standard deviation over {len(found)} trainings")


def sample(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(Config, "gan", "sample", args)
    options = configs.parse(Sample(), rest, "python -m gan sample RUN")
    check_out(options.out, ".png", ".npz", "")
    trained = _open(config, folder)
    from gan import commands

    _say(commands.sample(trained[options.checkpoint], options))


def interpolate(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(Config, "gan", "interpolate", args)
    options = configs.parse(Interpolate(), rest, "python -m gan interpolate RUN")
    check_out(options.out, ".png")
    trained = _open(config, folder)
    from gan import commands

    _say(commands.interpolate(trained[options.checkpoint], options))


def _open(config: Config, folder: RunFolder):
    from lib import shard

    shard.start(convolutions=config.network.kind != "mlp")
    from gan import experiment

    return experiment.open_run(config, folder)


def _say(text: str) -> None:
    print(text, flush=True)


def _finish(numbers: dict[str, float], folder: RunFolder) -> None:
    from gan import page

    _say("\n" + page.summary(numbers) + f"\n\n{folder.path / 'report.html'}")


COMMANDS = {"train": train, "sample": sample, "interpolate": interpolate, "evaluate": evaluate}


def main(args: Sequence[str]) -> None:
    dispatch(COMMANDS, HELP, args)


if __name__ == "__main__":
    sys.exit(command(main))
