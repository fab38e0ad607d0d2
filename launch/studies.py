"""`python -m launch reproduce PACKAGE`: the runs of a package by its own presets, and the page of their numbers.

Runs are ordinary run folders, started as processes one after the other; finished ones are kept, stopped ones go on.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.config import options_of, parse
from lib.report import metric_table, number
from lib.run import RunFolder, UserError, read_json, write_json, write_text


@dataclass(frozen=True)
class Study:
    """What is run, and what is shown of it."""

    title: str
    presets: tuple[str, ...]
    figures: tuple[str, ...]
    """those of a run's figures whose names begin so"""
    seeds: Mapping[str, int] = field(default_factory=dict)
    """presets that are run with several seeds, and how many"""


STUDIES = {
    "ncsn": Study(
        "Score networks",
        ("toy_mixture", "digits_v1", "digits_v2", "digits_edm", "mnist_edm"),
        ("samples", "fields", "quality", "inpainting", "neighbours"),
        {"digits_edm": 5},
    ),
}


@dataclass(frozen=True)
class Reproduce:
    """Train and evaluate the presets, and write the page of their numbers."""

    presets: tuple[str, ...]
    """which ones"""
    runs: Path = Path("runs/reproduce")
    """folder for the run folders"""
    out: Path = Path("docs/results")
    """folder for PACKAGE.md, PACKAGE.json and PACKAGE/*.png"""


def main(package: str, args: Sequence[str]) -> None:
    study = STUDIES[package]
    default = Reproduce(study.presets)
    options = parse(default, args, f"python -m launch reproduce {package}")
    for preset in options.presets:
        if preset not in study.presets:
            raise UserError(f"unknown preset {preset!r}: choose from {', '.join(study.presets)}")
    found = {preset: run(package, preset, options.runs / package / preset) for preset in options.presets}
    repeated = {
        preset: [found[preset], *(_with_seed(package, preset, options.runs, seed) for seed in range(1, count))]
        for preset, count in study.seeds.items()
        if preset in options.presets
    }
    pictures = options.out / package
    shown = {preset: _pictures(study, options.runs / package / preset, pictures) for preset in options.presets}
    # Without the places on one machine.
    command = " ".join(
        [f"python -m launch reproduce {package}", *options_of(options, default, without=("runs", "out"))]
    )
    runs = {preset: run_environment(options.runs / package / preset) for preset in options.presets}
    record = {"command": command, "environments": runs, "results": found, "seeds": repeated}
    write_json(options.out / f"{package}.json", record)
    page = options.out / f"{package}.md"
    write_text(page, _page(package, study, command, options, found, repeated, shown))
    print(page)


def _with_seed(package: str, preset: str, runs: Path, seed: int) -> dict[str, Any]:
    return run(package, preset, runs / package / f"{preset}_seed{seed}", "--seed", str(seed))


def run(package: str, preset: str, folder: Path, *options: str) -> dict[str, Any]:
    """The evaluation of one run, which is trained if it is not finished."""
    if not (folder / "report.html").exists():
        command = [sys.executable, "-m", package, "train", preset, *options, "--out", str(folder), "--resume"]
        status = subprocess.run(command, check=False).returncode
        if status:
            raise UserError(
                f"python -m {package} train {preset} failed with exit code {status}; the same command goes on"
            )
    return read_json(folder / "evaluation.json")


def run_environment(folder: Path) -> dict[str, Any]:
    """Where a run comes from, without the paths of the machine in its command line."""
    return {key: value for key, value in read_json(folder / "environment.json")[0].items() if key != "argv"}


def _pictures(study: Study, run: Path, out: Path) -> list[Path]:
    """Copies what is shown of a run to `out`; returns the copies."""
    found = [p for prefix in study.figures for p in sorted((run / "figures").glob(f"{prefix}*.png"))]
    out.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(path, out / f"{run.name}_{path.name}")) for path in found]


def _minutes(run: Path) -> float:
    """Spent in training, without what lies between a stop and going on."""
    return max((row["wall_s"] for row in RunFolder(run).metrics()), default=0.0) / 60


def _page(
    package: str,
    study: Study,
    command: str,
    options: Reproduce,
    found: dict[str, Any],
    repeated: dict[str, list[dict[str, Any]]],
    shown: dict[str, list[Path]],
) -> str:
    lines = [f"# {study.title}", "", f"    {command}", "", f"Commit and environment of each run: {package}.json.", ""]
    for preset, numbers in found.items():
        folder = options.runs / package / preset
        record = run_environment(folder)
        lines += [
            f"## {preset}",
            "",
            f"    python -m {package} train {preset}",
            "",
            f"{record['utc_start'][:10]}, {record['cores']} CPU cores ({record['devices'][0]}), jax "
            f"{record['versions']['jax']}; {_minutes(folder):.0f} minutes of training.",
            "",
        ]
        columns, rows = metric_table({key: value for key, value in numbers.items() if key != "protocol"})
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", numbers["protocol"], ""]
        if preset in repeated:
            lines += _seeds(repeated[preset])
        lines += [f"![{preset}: {path.stem}]({package}/{path.name})\n" for path in shown[preset]]
    return "\n".join(lines)


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
