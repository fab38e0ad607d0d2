"""`python -m launch reproduce PACKAGE`: the runs of a package, and the page of their numbers.

Runs are ordinary run folders, started as processes one after the other; finished ones are kept, stopped ones go on.
The page shows all runs that its record, PACKAGE.json, knows, wherever they were done.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.config import options_of, parse
from lib.data import DATA_VARIABLE, data_folder
from lib.process import UserError
from lib.report import metric_table, number
from lib.run import RunFolder, read_json, write_json, write_text


@dataclass(frozen=True)
class Study:
    """What is run, and what is shown of it."""

    title: str
    runs: Mapping[str, tuple[str, ...]]
    """by name: commands, after `python -m PACKAGE`; {run} is the run's folder, {runs} that of all runs, {data} that of
    real data"""
    figures: tuple[str, ...]
    """those of a run's figures whose names begin so"""
    seeds: Mapping[str, int] = field(default_factory=dict)
    """runs that are repeated with several seeds, and how many"""
    compared: tuple[str, ...] = ()
    """what one table shows of all runs: numbers NAME.METRIC, or of the first network that measured them
    NAME.METRIC.NETWORK"""
    note: str = ""
    """what has to be known to compare them"""


def training(preset: str) -> tuple[str, ...]:
    """The commands of a run that is evaluated as soon as it is trained; options may follow the preset."""
    return (f"train {preset} --out {{run}} --resume",)


def narrow(preset: str, width: int, cycles: int) -> tuple[str, ...]:
    """A preset of CIFAR-10 with few channels and cycles, for processors: half an hour instead of days."""
    return training(
        f"{preset} --network.width {width} --network.critic-width {width} --optim.steps {cycles} "
        f"--optim.ema-decay 0.999 --watch.every {cycles // 10} --watch.samples 2000 --evaluation.samples 10000 "
        f"--checkpoint-every {cycles // 10}"
    )


def short(recipe: str, steps: int = 16384) -> tuple[str, ...]:
    """An autoencoder's preset, and options, in few steps: at most a sixteenth of the published ones.

    The learning rate is five times the published one and falls to zero, and ACAI's critic counts a fifth as much: at
    lines its full weight left the error of reconstructions, and with it the distance of all frames, a third higher.
    """
    critic = " --autoencoder.critic-weight 0.1" if "acai" in recipe else ""
    return training(
        f"{recipe}{critic} --autoencoder.steps {steps} --autoencoder.lr 5e-4 --autoencoder.decay linear "
        "--measurement.every 256"
    )


_STARRY, _PHOTOS = "{data}/paintings/starry_night.jpg", "{data}/photos/bsds500"

STUDIES = {
    "ncsn": Study(
        "Score networks",
        {name: training(name) for name in ("toy_mixture", "digits_v1", "digits_v2", "digits_edm", "mnist_edm")},
        ("samples", "fields", "quality", "inpainting", "neighbours"),
        {"digits_edm": 5},
    ),
    "stylize": Study(
        "Style transfer",
        {
            "starry_night": (
                f"train small {_STARRY} --photos {_PHOTOS}/train --out {{run}} --resume",
                f"evaluate {{run}} --photos {_PHOTOS}/val --against gatys lbfgs_noise --iterations 75",
            ),
            "movie": (
                f"train movie {_STARRY} {{data}}/paintings/the_scream.jpg --photos {_PHOTOS}/train "
                "--warm-start {runs}/starry_night --out {run} --resume",
                f"evaluate {{run}} --photos {_PHOTOS}/val --against --clips {{data}}/video/bikes.mp4 "
                "{data}/video/bigbuckbunny.mp4",
            ),
        },
        ("network", "objective", "bikes", "bigbuckbunny"),
    ),
    "gan": Study(
        "Adversarial networks",
        {
            **{name: training(name) for name in ("mixture_wgan_gp", "digits_dcgan", "mnist_dcgan", "mnist_cgan")},
            **{
                f"{preset}_narrow": narrow(preset, width, cycles)
                for preset, width, cycles in (
                    ("cifar10_dcgan", 16, 8000),
                    ("cifar10_cgan", 16, 8000),
                    ("cifar10_wgan", 16, 4000),
                    ("cifar10_wgan_gp", 32, 1200),
                    ("cifar10_sngan", 32, 1800),
                    ("cifar10_sngan_projection", 32, 1800),
                    ("cifar10_vae", 16, 4000),
                )
            },
            **{name: short(name) for name in ("lines_acai", "lines_autoencoder", "mnist_acai_32", "mnist_acai_256")},
            # What makes a pegasus (python -m gan pegasus): half an hour each. R1 in the place of the critic's batch
            # norm, as in mnist_cgan.
            "birds_horses_cgan": training(
                "cifar10_cgan --data.flip --network.width 24 --network.critic-width 24 "
                "--network.critic-norm none --optim.steps 10000 --optim.batch-size 64 --optim.lr 5e-4 "
                "--optim.decay linear --optim.r1 0.1 --optim.ema-decay 0.999 --watch.every 1000 --watch.samples 2000 "
                "--evaluation.samples 5000 --checkpoint-every 1000 --data.labels 2 7"
            ),
            **{
                f"birds_horses_{kind}": short(f"cifar10_{kind}_1024 --autoencoder.depth 16 --data.labels 2 7", 6000)
                for kind in ("acai", "autoencoder")
            },
        },
        ("samples_best", "neighbours", "interpolation", "looks", "reconstructions"),
        {"mixture_wgan_gp": 5, "digits_dcgan": 5},
        (
            "real.fid",
            "best.fid",
            "best.precision",
            "best.recall",
            "best.confident",
            "best.smallest_class",
            "best.images_per_s",
        ),
        "Runs named narrow are reductions for two cores: the recipes of their presets with 16 or 32 channels in the "
        "place of 64 to 256, and 1,200 to 8,000 cycles, which differ from preset to preset, in the place of 50,000 to "
        "100,000. Most of them were still getting better when they ended. Their order is one of these runs and says "
        "nothing of that of the published ones, which were trained to their end. images_per_s: of the compiled "
        "generator, median of five blocks of about 500, on the machine of the evaluation.",
    ),
}


@dataclass(frozen=True)
class Reproduce:
    """Do the runs of a study, and write the page of their numbers; what PACKAGE.json holds of other runs stays."""

    only: tuple[str, ...]
    """which ones"""
    runs: Path = Path("runs/reproduce")
    """folder for the run folders"""
    out: Path = Path("docs/results")
    """folder for PACKAGE.md, PACKAGE.json and PACKAGE/*.png"""


def main(package: str, args: Sequence[str]) -> None:
    study = STUDIES[package]
    default = Reproduce(tuple(study.runs))
    options = parse(default, args, f"python -m launch reproduce {package}")
    for name in options.only:
        if name not in study.runs:
            raise UserError(f"unknown run {name!r}: choose from {', '.join(study.runs)}")
    record = options.out / f"{package}.json"
    before = read_json(record) if record.exists() else {}
    found = before | {name: _found(package, study, options, name) for name in options.only}
    found = {name: found[name] for name in study.runs if name in found}
    # Without the places on one machine.
    shown = dataclasses.replace(default, only=tuple(found))
    command = " ".join([f"python -m launch reproduce {package}", *options_of(shown, default)])
    write_json(record, found)
    page = options.out / f"{package}.md"
    write_text(page, _page(package, study, command, found))
    print(page)


def _found(package: str, study: Study, options: Reproduce, name: str) -> dict[str, Any]:
    """What the record and the page hold of one run, which is done if it is not finished."""
    runs, commands = options.runs / package, study.runs[name]
    numbers = run(package, commands, runs / name)
    others = [
        run(package, commands, runs / f"{name}_seed{k}", "--seed", str(k)) for k in range(1, study.seeds.get(name, 1))
    ]
    return {
        "environment": run_environment(runs / name),
        "minutes": _minutes(runs / name),
        "pictures": _pictures(study, runs / name, options.out / package),
        "numbers": numbers,
        "other_seeds": others,
    }


def run(package: str, commands: Sequence[str], folder: Path, *options: str) -> dict[str, Any]:
    """The evaluation of one run, and its speed where that was measured; its commands are executed if it is not
    finished, `options` go to the first."""
    if not (folder / "report.html").exists():
        for k, command in enumerate(commands):
            data = data_folder() if "{data}" in command else None
            places = {"run": folder, "runs": folder.parent, "data": data}
            words = [word.format(**places) for word in command.split()] + list(options if k == 0 else ())
            status = subprocess.run([sys.executable, "-m", package, *words], check=False).returncode
            if status:
                told = " ".join(["python -m", package, *words])
                raise UserError(f"{told} failed with exit code {status}; the same command goes on")
    speed = folder / "speed.json"
    return {**read_json(folder / "evaluation.json"), **(read_json(speed) if speed.exists() else {})}


def run_environment(folder: Path) -> dict[str, Any]:
    """Where a run comes from, without the paths of the machine in its command line; and where its evaluation does."""
    file = folder / "evaluated.json"
    trained, evaluated = read_json(folder / "environment.json")[0], read_json(file) if file.exists() else {}
    of_evaluation = {f"evaluation_{key}": evaluated[key] for key in ("utc_start", "git_commit") if key in evaluated}
    return {key: value for key, value in (trained | of_evaluation).items() if key != "argv"}


def _pictures(study: Study, run: Path, out: Path) -> list[str]:
    """Copies what is shown of a run to `out`; returns the names of the copies."""
    found = [p for prefix in study.figures for p in sorted((run / "figures").glob(f"{prefix}*.png"))]
    out.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(path, out / f"{run.name}_{path.name}")).name for path in found]


def _minutes(run: Path) -> float:
    """Spent in training, without what lies between a stop and going on."""
    return max((row["wall_s"] for row in RunFolder(run).metrics()), default=0.0) / 60


def _page(package: str, study: Study, command: str, found: dict[str, dict[str, Any]]) -> str:
    record = (
        f"Commit and environment of each run, and commit of its evaluation: {package}.json. Minutes are by the clock: "
        "what else the machine did meanwhile is in them."
    )
    lines = [f"# {study.title}", "", f"    {command}", "", record, ""]
    lines += _compared(study, {name: of["numbers"] for name, of in found.items()})
    for name, of in found.items():
        environment, numbers = of["environment"], of["numbers"]
        told = [text.replace(" --out {run}", "").removesuffix(" --resume") for text in study.runs[name]]
        lines += [
            f"## {name}",
            "",
            *(
                f"    python -m {package} {text.format(run='RUN', runs='RUNS', data='$' + DATA_VARIABLE)}"
                for text in told
            ),
            "",
            f"{environment['utc_start'][:10]}, {environment['cores']} CPU cores ({environment['devices'][0]}), jax "
            f"{environment['versions']['jax']}; {of['minutes']:.0f} minutes of training.",
            "",
        ]
        columns, rows = metric_table({key: value for key, value in numbers.items() if key != "protocol"})
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", numbers["protocol"], ""]
        if of["other_seeds"]:
            lines += _seeds([numbers, *of["other_seeds"]])
        lines += [f"![{picture.removesuffix('.png')}]({package}/{picture})\n" for picture in of["pictures"]]
    return "\n".join(lines)


def _compared(study: Study, found: dict[str, dict[str, Any]]) -> list[str]:
    """The table of all runs that have any of its numbers."""
    rows = []
    for run, numbers in found.items():
        cells = []
        for wanted in study.compared:
            key = next((k for k in numbers if f"{k}.".startswith(f"{wanted}.") and not k.endswith(".sd")), None)
            cells.append("" if key is None else number(numbers[key], numbers.get(f"{key}.sd")))
        if any(cells):
            rows.append(f"| {run} | {' | '.join(cells)} |")
    head = [f"| | {' | '.join(study.compared)} |", "|" + "---|" * (len(study.compared) + 1)]
    return [*head, *rows, "", *([study.note, ""] if study.note else [])] if rows else []


def _seeds(runs: list[dict[str, Any]]) -> list[str]:
    """How much every number differs between runs that differ in their seed."""
    lines = [
        f"Trained and sampled with the seeds 0 to {len(runs) - 1}:",
        "",
        "| | mean ± standard deviation over seeds | least | most |",
        "|---|---|---|---|",
    ]
    for key, first in runs[0].items():
        values = [numbers[key] for numbers in runs]
        if isinstance(first, float) and not key.endswith(".sd") and min(values) < max(values):
            cells = number(statistics.mean(values), statistics.stdev(values)), number(min(values)), number(max(values))
            lines.append(f"| {key} | {' | '.join(cells)} |")
    return [*lines, ""]
