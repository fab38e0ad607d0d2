"""python -m hnn train|evaluate|rollout|simulate: the command line of Hamiltonian networks."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hnn.config import PRESETS, Config
from hnn.systems import SYSTEMS
from lib import config as configs
from lib.process import UserError, command, dispatch
from lib.run import RunFolder


def _wrapped(title: str, names: Iterable[str]) -> str:
    text = f"{title}: {', '.join(names)}"
    return textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False)


HELP = f"""usage: python -m hnn COMMAND ...

  train PRESET --out RUN      simulate, train and evaluate; writes numbers, pictures and RUN/report.html
  train PRESET --out RUN --resume          go on where a stopped run was
  train --config RUN/config.json --out NEW repeat a run
  evaluate RUN                measure a trained run again, with other options if wanted
  rollout RUN --out FILE      follow a trained model from any state; FILE is .npz or .png
  simulate SYSTEM --out FILE.npz           write trajectories of a system

{_wrapped("presets", PRESETS)}
{_wrapped("systems", SYSTEMS)}

`python -m hnn train PRESET --help` lists every field, e.g. --derivative.lr 3e-3 --seeds 3"""


@dataclass(frozen=True, kw_only=True)
class Train(configs.RunOptions):
    """Train and compare models on one system."""

    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Rollout:
    """Follow a trained model from one state."""

    out: Path = Path("rollout.npz")
    """.npz with t [T], y [T, 2n] and, for simulated systems, truth; or .png"""
    model: str | None = None
    """which of the run's models (default: the last one)"""
    seed: int = 0
    """which of the run's seeds"""
    y0: tuple[float, ...] = ()
    """initial state, all q then all p (default: a fresh one from the training range)"""
    t_end: float | None = None
    """time to cover (default: that of the run's evaluation)"""
    points: int = 500
    """times to save"""
    solver: Literal["adaptive", "euler", "midpoint", "verlet", "yoshida"] = "adaptive"
    """Dopri8 with adaptive steps, or a solver with fixed steps; verlet and yoshida need the separable model"""
    dt: float | None = None
    """step size of the fixed-step solvers"""


@dataclass(frozen=True)
class Simulate:
    """Write trajectories of a system."""

    out: Path = Path("trajectories.npz")
    """file to write"""
    n_trajectories: int | None = None
    """train and test together (default: the paper's number)"""
    n_points: int | None = None
    """times per trajectory"""
    t_end: float | None = None
    """time each trajectory covers"""
    noise_std: float | None = None
    """noise on the observed coordinates"""
    seed: int = 0
    """root of the random numbers"""


def train(args: Sequence[str]) -> None:
    if not args:
        raise UserError(f"which preset? choose from {', '.join(PRESETS)}")
    base, where, rest = configs.starting_point(PRESETS, "hnn", args, Config())
    chosen = configs.parse(Train(config=base), rest, "python -m hnn train PRESET")
    if chosen.resume and chosen.out is None and where is None:
        raise UserError("--resume needs --out RUN, the folder of the run to go on with")
    config = chosen.config
    out = chosen.out or where or Path("runs") / f"hnn-{config.system}"

    from lib import shard

    shard.start(convolutions=False)
    if shard.primary():
        RunFolder.check(out, "hnn", configs.to_json(config), resume=chosen.resume)
    from hnn import experiment, page

    experiment.training_mesh(config, chosen.devices)
    from_file = experiment.reads_file(config)
    data = experiment.load_data(config) if from_file else None
    experiment.check_batch_sizes(config, data)
    with RunFolder.start(out, "hnn", configs.to_json(config), resume=chosen.resume, primary=shard.primary()) as folder:
        if data is None:
            data = experiment.load_data(config)
        say = _say if shard.primary() else lambda text: None
        trained = experiment.train(config, data, folder, chosen.devices, say)
        if shard.primary():
            _finish(page.evaluate_run(config, data, trained, folder), folder)


def evaluate(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(Config, "hnn", "evaluate", args)
    import dataclasses

    options = configs.parse(config.evaluation, rest, "python -m hnn evaluate RUN")
    config = dataclasses.replace(config, evaluation=options)

    from lib import shard

    shard.start(convolutions=False)
    from hnn import experiment

    experiment.check_finished(config, folder, config.models)
    data = experiment.load_data(config)
    trained = experiment.load_trained(config, data, folder, config.models)

    from hnn import page  # matplotlib takes a second, which a mistake need not wait for

    _finish(page.evaluate_run(config, data, trained, folder), folder)


def rollout(args: Sequence[str]) -> None:
    folder, config, rest = configs.trained_run(Config, "hnn", "rollout", args)
    options = configs.parse(Rollout(), rest, "python -m hnn rollout RUN")
    from lib import shard

    shard.start(convolutions=False)
    from hnn import follow

    _say(follow.follow(folder, config, options))


def simulate(args: Sequence[str]) -> None:
    if not args or args[0].startswith("-"):
        raise UserError(f"which system? choose from {', '.join(SYSTEMS)}")
    name, *rest = args
    if name not in SYSTEMS:
        raise UserError(f"unknown system {name!r}: choose from {', '.join(SYSTEMS)}")
    options = configs.parse(Simulate(), rest, f"python -m hnn simulate {name}")
    from lib import shard

    shard.start(1, convolutions=False)
    from hnn import follow

    _say(follow.simulate(SYSTEMS[name], options))


def _say(text: str) -> None:
    print(text, flush=True)


def _finish(numbers: dict[str, float], folder: RunFolder) -> None:
    from hnn import page

    _say("\n" + page.summary(numbers) + f"\n\n{folder.path / 'report.html'}")


COMMANDS = {"train": train, "evaluate": evaluate, "rollout": rollout, "simulate": simulate}


def main(args: Sequence[str]) -> None:
    dispatch(COMMANDS, HELP, args)


if __name__ == "__main__":
    sys.exit(command(main))
