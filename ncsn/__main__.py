"""python -m ncsn train|sample|inpaint|colorize|likelihood|evaluate|plan: the command line of score networks."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lib import config as configs
from lib import planning
from lib.process import UserError, command, dispatch
from lib.run import RunFolder, check_out
from ncsn.config import PRESETS, SAMPLERS, Config, Evaluation, Sampling

_PRESETS = textwrap.fill(f"presets: {', '.join(PRESETS)}", 100, subsequent_indent="  ")
_SAMPLERS = textwrap.fill(f"samplers: {', '.join(SAMPLERS)}", 100, subsequent_indent="  ")

HELP = f"""usage: python -m ncsn COMMAND ...

  train PRESET --out RUN        train and evaluate; writes numbers, pictures and RUN/report.html
  train PRESET --out RUN --resume          go on where a stopped run was
  train PRESET --data.source FOLDER        learn the images of a folder
  sample RUN --out FILE         new samples; FILE is .png (a grid) or .npz, or a folder of single images
  inpaint RUN IMAGE --mask FILE --out PNG  fill in what is missing of an image
  colorize RUN IMAGE --out PNG  colours for a grey image
  likelihood RUN                bits per dimension of test images, by the probability-flow ODE
  evaluate RUN                  measure a trained run again, with other options if wanted
  plan PRESET --devices N       what a training step costs on devices that are not here

{_PRESETS}
{_SAMPLERS}

`python -m ncsn COMMAND ... --help` lists every option, e.g. --optim.lr 3e-4 --sampler heun --nfe 35"""

Options = Annotated[Sampling, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Train(configs.ShardedRunOptions):
    """Train a score network and evaluate it."""

    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Sample:
    """New samples of a trained network."""

    sampling: Options
    out: Path = Path("samples.png")
    """.png for a grid, .npz for an array ("images", uint8; points: "x"), or a folder for one file per image"""
    count: int = 64
    """how many"""
    seed: int = 0
    """sample i depends on the seed and on i alone"""
    label: int | None = None
    """class to draw (default: all in turn)"""
    movie: Path | None = None
    """.gif of the chain"""
    interpolate: bool = False
    """rows of samples between two latents of the probability-flow ODE, instead of independent ones"""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError("count must be at least 1")


@dataclass(frozen=True)
class Inpaint:
    """Fill in what is missing of an image."""

    sampling: Options
    image: Annotated[Path, tyro.conf.Positional]
    """of the size that the network knows, or larger (it is resized)"""
    mask: str = "right"
    """which part is missing: left, right, top, bottom, middle, or an image file that is white there"""
    out: Path = Path("inpainted.png")
    """grid: the image, what is known of it, and the fillings"""
    count: int = 6
    """fillings"""
    seed: int = 0
    label: int | None = None
    """class of the image (default: unknown)"""


@dataclass(frozen=True)
class Colorize:
    """Colours for a grey image (or for the grey values of a coloured one)."""

    sampling: Options
    image: Annotated[Path, tyro.conf.Positional]
    out: Path = Path("colorized.png")
    """grid: the grey image and the coloured ones"""
    count: int = 6
    """colourings"""
    seed: int = 0
    label: int | None = None
    """class of the image (default: unknown)"""


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run again."""

    evaluation: Annotated[Evaluation, tyro.conf.arg(name="")]
    sampling: Sampling
    """of all samplers"""


@dataclass(frozen=True)
class Likelihood:
    """Bits per dimension of test images."""

    count: int = 64
    """test images"""
    probes: int | None = 1
    """directions of Hutchinson's estimate of the divergence (None: exact, for small images)"""
    rtol: float = 1e-4
    """relative and absolute tolerance of the ODE solver"""
    seed: int = 0


def train(args: Sequence[str]) -> None:
    base, where, rest = configs.starting_point(PRESETS, "ncsn", args)
    chosen = configs.parse(Train(config=base), rest, "python -m ncsn train PRESET")
    config = chosen.config
    preset = args[0] if args and args[0] in PRESETS else Path(config.data.source).stem
    if chosen.resume and chosen.out is None and where is None:
        raise UserError("--resume needs --out RUN, the folder of the run to go on with")
    out = chosen.out or where or Path("runs") / f"ncsn-{preset}"

    from lib import shard

    shard.start(convolutions=config.network.kind != "mlp")
    if shard.primary():
        RunFolder.check(out, "ncsn", configs.to_json(config), resume=chosen.resume)
    from lib.judge import check_measurable
    from ncsn import data, experiment, page

    mesh = shard.make_mesh(chosen.devices or experiment.default_devices(config))
    rows = data.load(config)
    known = data.facts(rows)
    experiment.check_fits(config, known)
    if "image" in rows.test:
        check_measurable(rows, config.data.source)
    with RunFolder.start(out, "ncsn", configs.to_json(config), resume=chosen.resume, primary=shard.primary()) as folder:
        say = _say if shard.primary() else lambda text: None
        trained = experiment.train(config, rows, known, folder, mesh, say, sharded=chosen.shard_state)
        if shard.primary():
            _finish(page.evaluate_run(config, rows, trained, folder, _say), folder)


def evaluate(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(Config, "ncsn", "evaluate", args)
    options = configs.parse(Evaluate(config.evaluation, config.sampling), rest, "python -m ncsn evaluate RUN")
    config = dataclasses.replace(config, evaluation=options.evaluation, sampling=options.sampling)
    trained = _open(config, folder)
    from ncsn import data, page

    _finish(page.evaluate_run(config, data.load(config), trained, folder, _say), folder)


def sample(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(Config, "ncsn", "sample", args)
    options = configs.parse(Sample(config.sampling), rest, "python -m ncsn sample RUN")
    check_out(options.out, ".png", ".npz", "")
    if options.movie is not None:
        check_out(options.movie, ".gif")
    trained = _open(config, folder)
    from ncsn import commands

    _say(commands.sample(config, trained, options))


def inpaint(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(Config, "ncsn", "inpaint", args)
    options = configs.parse(Inpaint(config.sampling, tyro.MISSING), rest, "python -m ncsn inpaint RUN IMAGE")
    check_out(options.out, ".png")
    trained = _open(config, folder)
    from ncsn import commands

    _say(commands.inpaint(config, trained, options))


def colorize(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(Config, "ncsn", "colorize", args)
    options = configs.parse(Colorize(config.sampling, tyro.MISSING), rest, "python -m ncsn colorize RUN IMAGE")
    check_out(options.out, ".png")
    trained = _open(config, folder)
    from ncsn import commands

    _say(commands.colorize(config, trained, options))


def likelihood(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(Config, "ncsn", "likelihood", args)
    options = configs.parse(Likelihood(), rest, "python -m ncsn likelihood RUN")
    trained = _open(config, folder)
    from ncsn import commands

    _say(commands.likelihood(config, trained, options))


def _open(config: Config, folder: RunFolder):
    from lib import shard

    shard.start(convolutions=config.network.kind != "mlp")
    from ncsn import experiment

    return experiment.open_run(config, folder)


def _say(text: str) -> None:
    print(text, flush=True)


def plan(args: Sequence[str]) -> None:
    def outline(config: Config):
        from ncsn import experiment

        return experiment.outline(config)

    planning.main(args, "ncsn", PRESETS, outline)


def _finish(numbers: dict[str, float], folder: RunFolder) -> None:
    from ncsn import page

    _say("\n" + page.summary(numbers) + f"\n\n{folder.path / 'report.html'}")


COMMANDS = {
    "train": train,
    "sample": sample,
    "inpaint": inpaint,
    "colorize": colorize,
    "likelihood": likelihood,
    "evaluate": evaluate,
    "plan": plan,
}


def main(args: Sequence[str]) -> None:
    dispatch(COMMANDS, HELP, args)


if __name__ == "__main__":
    sys.exit(command(main))
