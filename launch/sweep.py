"""`python -m launch sweep --grid FIELD=A,B ... -- python -m PACKAGE train PRESET`: one run per combination of values.

Runs are ordinary run folders below --out, named after their values. They are executed here, one or a few at a time, or
as a Slurm array; the same command goes on where it was stopped, and leaves out what is finished. At the end (or with
--summary at any time) there is a table over the runs: summary.md and summary.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch import jobs, slurm, status
from lib.config import parse
from lib.process import EXIT_USER_ERROR, UserError
from lib.report import number, text_table
from lib.run import read_json, write_json, write_text

USAGE = "python -m launch sweep --grid FIELD=A,B ... [--out DIR] -- python -m PACKAGE train PRESET..."
_POLL_S = 0.2
_BATCH = slurm.Slurm(name="sweep")


@dataclass(frozen=True)
class Sweep:
    """Trains one run for every combination of values."""

    grid: tuple[str, ...] = ()
    """FIELD=A,B,...: options of the training and their values, e.g. optim.lr=1e-3,3e-4 seed=0,1,2"""
    list: Path | None = None
    """instead of a grid: a file with the options of one run per line"""
    out: Path = Path("runs/sweep")
    """folder for the run folders and the summary"""
    engine: Literal["local", "slurm"] = "local"
    """run them here, or as a Slurm array"""
    jobs: int = 1
    """local: how many at the same time"""
    metrics: tuple[str, ...] = ()
    """columns of the summary (default: all numbers that every finished run has)"""
    summary: bool = False
    """only write the summary of the runs that are there"""
    batch: slurm.Slurm = _BATCH
    """slurm: the job of each run"""
    dry_run: bool = False
    """print what would be executed"""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError("jobs must be at least 1")


def main(args: Sequence[str]) -> None:
    at = list(args).index("--") if "--" in args else len(args)
    options = parse(Sweep(), args[:at], "python -m launch sweep")
    if options.summary:
        return _summarise(options)
    _, command = jobs.split(args, USAGE)
    if not jobs.is_training(command) or "--out" in command:
        raise UserError("a sweep is over trainings without --out, which it gives them: " + USAGE)
    runs = {name: [*command, *words, "--out", str(options.out / name), "--resume"] for name, words in plan(options)}
    if options.dry_run or options.engine == "slurm":
        if options.engine == "slurm":
            return _to_slurm(options, runs)
        return print("\n".join(map(shlex.join, runs.values())))
    _here(options, runs)
    return _summarise(options)


def plan(options: Sweep) -> list[tuple[str, list[str]]]:
    """(name, options) of every run. Raises UserError for a grid that cannot be read, and for two runs of one name."""
    if bool(options.grid) == (options.list is not None):
        raise UserError("either --grid or --list says what is swept over")
    if options.list is not None:
        lines = [line for line in _lines(options.list) if line.strip() and not line.startswith("#")]
        found = [("_".join(shlex.split(line)).replace("--", "").replace("/", "-"), shlex.split(line)) for line in lines]
    else:
        axes = []
        for text in options.grid:
            field, equals, values = text.partition("=")
            if not (field and equals and all(values.split(","))):
                raise UserError(f"--grid {text!r} is not FIELD=A,B,...")
            axes.append([(field, value) for value in values.split(",")])
        found = [
            (
                "_".join(f"{field.rpartition('.')[2]}={value}" for field, value in point).replace("/", "-"),
                [word for field, value in point for word in (f"--{field.replace('_', '-')}", value)],
            )
            for point in itertools.product(*axes)
        ]
    names = [name for name, _ in found]
    if not found:
        raise UserError(f"{options.list} names no run")
    if len(set(names)) < len(names):
        raise UserError("two of the runs have the same name: their folders would be one")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _here(options: Sweep, runs: dict[str, list[str]]) -> None:
    """Some at a time. A user's mistake in one ends all; whatever else fails is told at the end.

    Raises UserError where some have failed.
    """
    waiting = [name for name in runs if status_of(options.out / name) != "finished"]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: dict[str, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                name = waiting.pop(0)
                words = runs[name]
                words = [sys.executable, *words[1:]] if words[0] == "python" else words
                print(f"== {shlex.join(runs[name])}", flush=True)
                running[name] = subprocess.Popen(words)
            time.sleep(_POLL_S)
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code == EXIT_USER_ERROR:
                    raise UserError(f"{name}: {shlex.join(runs[name])} was refused (exit code {code})")
                if code:
                    failed[name] = code
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        told = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {told}; the same command goes on")


def status_of(run: Path) -> str:
    return status.state(run) if (run / "config.json").exists() else "stopped"


def _to_slurm(options: Sweep, runs: dict[str, list[str]]) -> None:
    todo = [shlex.join(words) for name, words in runs.items() if status_of(options.out / name) != "finished"]
    if not todo:
        raise UserError(f"all runs below {options.out} are finished: --summary shows them")
    file = (options.out / "commands.txt").absolute()
    settings = dataclasses.replace(options.batch, dry_run=options.dry_run)
    if options.dry_run:
        print("\n".join(todo))
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(file, "\n".join(todo) + "\n")
    slurm.submit(settings, slurm.script(settings, [str(file)], array=len(todo)), options.out / "sweep.sbatch")


def _summarise(options: Sweep) -> None:
    runs = status.found(options.out)
    finished = {run: read_json(run / "evaluation.json") for run in runs if (run / "evaluation.json").exists()}
    if not finished:
        raise UserError(f"no run below {options.out} is evaluated yet")
    columns = list(options.metrics) or _common(list(finished.values()))
    rows = [[run.name, status_of(run), *(_cell(finished.get(run, {}), m) for m in columns)] for run in runs]
    record: dict[str, Any] = {run.name: {m: finished[run].get(m) for m in columns} for run in finished}
    write_json(options.out / "summary.json", record)
    table = [f"| {' | '.join(cells)} |" for cells in (["run", "state", *columns], ["---"] * (2 + len(columns)), *rows)]
    write_text(options.out / "summary.md", "\n".join(table) + "\n")
    print(text_table(["run", "state", *columns], rows))
    print(options.out / "summary.md")


def _common(found: list[dict[str, Any]]) -> list[str]:
    first = found[0]
    return [
        name for name, value in first.items()
        if isinstance(value, int | float) and not name.endswith(".sd") and all(name in each for each in found)
    ]  # fmt: skip


def _cell(numbers: dict[str, Any], metric: str) -> str:
    value = numbers.get(metric)
    return number(value, numbers.get(f"{metric}.sd")) if isinstance(value, int | float) else ""
