"""python -m gan train|sample|interpolate|evaluate|pegasus|plan: generative adversarial networks and autoencoders."""

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

from gan.acai_config import AUTOENCODERS, AutoencoderConfig, Measurement
from gan.config import PRESETS, Config, Evaluation
from lib import config as configs
from lib import planning
from lib.process import UserError, command, dispatch
from lib.run import RunFolder, check_out, first_difference, read_json, write_json

_PRESETS = textwrap.fill(f"presets: {', '.join([*PRESETS, *AUTOENCODERS])}", 104, subsequent_indent="  ")

Judges = Literal["cifar10_judge_a", "cifar10_judge_b"]
Guides = Literal[Judges, "cifar10_vgg"]

HELP = f"""usage: python -m gan COMMAND ...

  train PRESET --out RUN        train, watch and evaluate; writes numbers, pictures and RUN/report.html
  train PRESET --out RUN --resume          go on where a stopped run was
  train PRESET --data.source FOLDER        learn the images of a folder
  sample RUN --out FILE         new samples; FILE is .png (a grid) or .npz, or a folder of single images
  interpolate RUN --out PNG     strips between latents, or (--classes) classes; ACAI: between images
  evaluate RUN                  measure a trained run again, with other options if wanted
  plan PRESET --devices N       what a training step costs on devices that are not here
  evaluate RUN RUN RUN          mean and standard deviation over trainings that differ in the seed
  pegasus RUN... --out DIR      birds that are horses, by generators of cifar10 and ACAI; judged, with a page

{_PRESETS}

`python -m gan COMMAND ... --help` lists every option, e.g. --optim.lr 3e-4 --watch.patience 10"""


@dataclass(frozen=True, kw_only=True)
class Train(configs.ShardedRunOptions):
    """Train a generator and evaluate it."""

    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoder(configs.ShardedRunOptions):
    """Train an autoencoder and evaluate it."""

    config: Annotated[AutoencoderConfig, tyro.conf.arg(name="")]


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
    """which one; a training that was stopped, or diverged, has its best one"""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError("count must be at least 1")
        _check_seed(self.seed)


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
        _check_strips(self.rows, self.columns)
        _check_seed(self.seed)


@dataclass(frozen=True)
class Mix:
    """Strips from test image to test image by way of an autoencoder's latents."""

    out: Path = Path("interpolation.png")
    """a grid"""
    rows: int = 6
    """strips"""
    columns: int = 12
    """images in a strip"""
    labels: tuple[int, ...] = ()
    """classes of the first and of the last image, e.g. 2 7 (default: any)"""
    seed: int = 0
    """of the choice of images"""

    def __post_init__(self) -> None:
        _check_strips(self.rows, self.columns)
        _check_seed(self.seed)
        if len(self.labels) not in (0, 2):
            raise UserError("--labels needs two classes, that of the first and that of the last image")


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run again."""

    evaluation: Annotated[Evaluation, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class EvaluateAutoencoder:
    """Measure a trained autoencoder again."""

    measurement: Annotated[Measurement, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Seeds:
    """Mean and standard deviation over several runs."""

    out: Path | None = None
    """.json of the numbers (default: only the table)"""


@dataclass(frozen=True)
class Pegasus:
    """Images that are a bird and a horse, from runs that learned CIFAR-10."""

    out: Path = Path("pegasus")
    """folder for best.png, batch64.png, candidates.png, pegasus.json, scores.npz and index.html"""
    count: int = 1000
    """candidates of every route"""
    seed: int = 0
    """candidate i depends on the seed and on i alone"""
    steps: int = 200
    """of optimising latents"""
    guides: tuple[Guides, ...] = ("cifar10_judge_a", "cifar10_vgg")
    """classifiers that are followed and that choose; what deceives one of them need not deceive the other"""
    judge: Judges = "cifar10_judge_b"
    """classifier that judges"""
    most_distant: float = 1.5
    """images that are shown are no farther from training images than this, in units of real test images' distance"""

    def __post_init__(self) -> None:
        if self.count < 64 or self.steps < 1:
            raise UserError("count must be at least 64, for the batch that is shown, and steps at least 1")
        if self.judge in self.guides:
            raise UserError(f"{self.judge} is guide and judge: who guides does not judge")
        if not self.guides:
            raise UserError("guides is empty: nobody would choose")
        if not self.most_distant > 0:
            raise UserError("most_distant must be positive")
        _check_seed(self.seed)


def _check_strips(rows: int, columns: int) -> None:
    if rows < 1 or columns < 2:
        raise UserError("rows must be at least 1 and columns at least 2")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError("seed must be between 0 and 2**32 - 1")


def train(args: Sequence[str]) -> None:
    presets = AUTOENCODERS if _of_autoencoder(args) else PRESETS
    base, where, rest = configs.starting_point(presets, "gan", args)
    options = TrainAutoencoder(config=base) if isinstance(base, AutoencoderConfig) else Train(config=base)
    chosen = configs.parse(options, rest, "python -m gan train PRESET")
    config = chosen.config
    preset = args[0] if args and args[0] in presets else Path(config.data.source).stem
    if chosen.resume and chosen.out is None and where is None:
        raise UserError("--resume needs --out RUN, the folder of the run to go on with")
    out = chosen.out or where or Path("runs") / f"gan-{preset}"
    _start(config)
    from lib import shard

    if shard.primary():
        RunFolder.check(out, "gan", configs.to_json(config), resume=chosen.resume)
    if isinstance(config, AutoencoderConfig):
        from gan import acai_experiment as lab
        from gan.acai_evaluate import evaluate_run
    else:
        from gan import experiment as lab
        from gan.page import evaluate_run

    mesh = shard.make_mesh(chosen.devices or lab.default_devices(config))
    lab.check_devices(config, mesh.size)
    rows = lab.load(config)
    with RunFolder.start(out, "gan", configs.to_json(config), resume=chosen.resume, primary=shard.primary()) as folder:
        say = _say if shard.primary() else lambda text: None
        trained = lab.train(config, rows, folder, mesh, say, sharded=chosen.shard_state)
        if shard.primary():
            _finish(evaluate_run(config, rows, trained, folder, _say), folder)


def _of_autoencoder(args: Sequence[str]) -> bool:
    """Whether the arguments of a command begin with the preset or the run of one, or hold the configuration of one."""
    files = [Path(args[0], "config.json")] if args and not args[0].startswith("-") else []
    files += [Path(args[i + 1]) for i, word in enumerate(args[:-1]) if word == "--config"]
    for path in files:
        if path.is_file():
            record = read_json(path)
            return isinstance(record, dict) and "autoencoder" in (record.get("config") or {})
    return bool(args) and args[0] in AUTOENCODERS


def evaluate(args: Sequence[str]) -> None:
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
    if len(runs) > 1:
        return _over_seeds(runs, args[len(runs) :])
    if _of_autoencoder(args):
        return _evaluate_autoencoder(args)
    folder, config, rest = configs.trained_run(Config, "gan", "evaluate", args)
    options = configs.parse(Evaluate(config.evaluation), rest, "python -m gan evaluate RUN")
    config = dataclasses.replace(config, evaluation=options.evaluation)
    trained = _open(config, folder, "best", "last")
    from gan import experiment, page

    return _finish(page.evaluate_run(config, experiment.load(config), trained, folder, _say), folder)


def _evaluate_autoencoder(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(AutoencoderConfig, "gan", "evaluate", args)
    options = configs.parse(EvaluateAutoencoder(config.measurement), rest, "python -m gan evaluate RUN")
    config = dataclasses.replace(config, measurement=options.measurement)
    _start(config)
    from gan import acai_evaluate, acai_experiment

    trained = acai_experiment.open_run(config, folder)
    _finish(acai_evaluate.evaluate_run(config, acai_experiment.load(config), trained, folder, _say), folder)


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
    seeds = [values["seed"] for _, values in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"runs of the seeds {', '.join(map(str, seeds))}: each has to have its own")
    for folder, _ in runs:
        if not (folder.path / "evaluation.json").exists():
            raise UserError(f"{folder.path} is not evaluated yet: python -m gan evaluate {folder.path}")
    found = [read_json(folder.path / "evaluation.json") for folder, _ in runs]
    counts = [numbers.get("best.samples") for numbers in found]
    if len(set(counts)) > 1:
        raise UserError(f"these runs were measured with {', '.join(map(str, counts))} samples: evaluate them alike")
    from gan import page
    from gan.evaluate import over_seeds

    numbers = over_seeds(found)
    if options.out is not None:
        write_json(options.out, {**numbers, "trainings": len(found)})
    _say(f"{page.summary(numbers)}\n\nmean ± standard deviation over {len(found)} trainings")


def sample(args: Sequence[str]) -> None:
    if _of_autoencoder(args):
        raise UserError(f"{args[0]} is an autoencoder, which has no samples of its own: python -m gan interpolate RUN")
    folder, config, rest = configs.trained_run(Config, "gan", "sample", args)
    options = configs.parse(Sample(), rest, "python -m gan sample RUN")
    check_out(options.out, ".png", ".npz", "")
    trained = _open(config, folder, options.checkpoint)
    from gan import commands

    _say(commands.sample(trained[options.checkpoint], options))


def interpolate(args: Sequence[str]) -> None:
    if _of_autoencoder(args):
        return _mix(args)
    folder, config, rest = configs.trained_run(Config, "gan", "interpolate", args)
    options = configs.parse(Interpolate(), rest, "python -m gan interpolate RUN")
    check_out(options.out, ".png")
    trained = _open(config, folder, options.checkpoint)
    from gan import commands

    return _say(commands.interpolate(trained[options.checkpoint], options))


def _mix(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(AutoencoderConfig, "gan", "interpolate", args)
    options = configs.parse(Mix(), rest, "python -m gan interpolate RUN")
    check_out(options.out, ".png")
    _start(config)
    from gan import acai_evaluate, acai_experiment
    from lib import images

    trained, test = acai_experiment.open_run(config, folder), acai_experiment.load(config).test
    sheet = acai_evaluate.strips(trained, test, options.rows, options.columns, options.seed, options.labels)
    images.write(options.out, sheet)
    _say(f"{options.rows} strips between test images: {options.out}")


def pegasus(args: Sequence[str]) -> None:
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
    if not names:
        raise UserError("python -m gan pegasus needs the folders of runs")
    options = configs.parse(Pegasus(), args[len(names) :], "python -m gan pegasus RUN...")
    check_out(options.out, "")
    runs = []
    for name in names:
        folder, values = RunFolder.open(Path(name), "gan")
        kind = AutoencoderConfig if _of_autoencoder([name]) else Config
        runs.append((folder, configs.from_json(kind, values)))
    _start(runs[0][1])
    from gan import pegasus_page

    _say(pegasus_page.write(runs, options, _say))


def _start(config: Config | AutoencoderConfig) -> None:
    from lib import shard

    shard.start(convolutions=isinstance(config, AutoencoderConfig) or config.network.kind != "mlp")


def _open(config: Config, folder: RunFolder, *names: Literal["best", "last"]):
    _start(config)
    from gan import experiment

    return experiment.open_run(config, folder, names)


def _say(text: str) -> None:
    print(text, flush=True)


def plan(args: Sequence[str]) -> None:
    def outline(config: Config | AutoencoderConfig):
        if isinstance(config, AutoencoderConfig):
            from gan import acai_experiment as lab
        else:
            from gan import experiment as lab
        return lab.outline(config)

    planning.main(args, "gan", {**PRESETS, **AUTOENCODERS}, outline)


def _finish(numbers: dict[str, float], folder: RunFolder) -> None:
    from gan import page

    _say("\n" + page.summary(numbers) + f"\n\n{folder.path / 'report.html'}")


COMMANDS = {"train": train, "sample": sample, "interpolate": interpolate, "evaluate": evaluate, "pegasus": pegasus,
            "plan": plan}  # fmt: skip


def main(args: Sequence[str]) -> None:
    dispatch(COMMANDS, HELP, args)


if __name__ == "__main__":
    sys.exit(command(main))
