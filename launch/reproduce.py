"""`python -m launch reproduce hnn`: every study of the paper, by its own recipe and by ours, and the table of both.

Runs are ordinary run folders, started as processes one after the other; finished ones are kept, stopped ones go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.published import HNN
from launch.studies import run, run_environment, training
from lib.config import options_of, parse
from lib.process import UserError
from lib.report import number
from lib.run import write_json, write_text

_MODELS = ("baseline", "hnn", "hnn_rollout", "dissipative")


@dataclass(frozen=True)
class Reproduce:
    """Run the studies of a paper and write the table of published, reproduced and own numbers."""

    runs: Path = Path("runs/reproduce")
    """folder for the run folders"""
    out: Path = Path("docs/results")
    """folder for hnn.md and hnn.json"""
    tasks: tuple[str, ...] = tuple(HNN)
    """which studies"""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in HNN:
                raise UserError(f"unknown task {task!r}: choose from {', '.join(HNN)}")


def main(args: Sequence[str]) -> None:
    options = parse(Reproduce(), args, "python -m launch reproduce hnn")
    results: dict[str, Any] = {}
    for task in options.tasks:
        results[task] = {
            "published": HNN[task],
            "original_recipe": run("hnn", training(f"{task}_original"), options.runs / f"{task}_original"),
            "ours": run("hnn", training(task), options.runs / task),
        }
    # Without those that are places on one machine.
    command = " ".join(["python -m launch reproduce hnn", *options_of(options, Reproduce(), without=("runs", "out"))])
    options.out.mkdir(parents=True, exist_ok=True)
    runs = {
        preset: run_environment(options.runs / preset)
        for task in options.tasks
        for preset in (task, f"{task}_original")
    }
    environment = runs[options.tasks[-1]]
    write_json(options.out / "hnn.json", {"command": command, "environments": runs, "results": results})
    write_text(options.out / "hnn.md", _page(command, environment, results))
    print(f"{options.out / 'hnn.md'}")


def _page(command: str, environment: dict[str, Any], results: dict[str, Any]) -> str:
    lines = [
        "# Hamiltonian networks: published, reproduced, ours",
        "",
        f"    {command}",
        "",
        f"{environment['utc_start'][:10]}, {environment['cores']} CPU cores ({environment['devices'][0]}), jax "
        f"{environment['versions']['jax']}, Python {environment['python']}. "
        "All numbers, and commit and environment of each run: hnn.json.",
        "",
        "*Published*: the README of the paper's code. *Original recipe here*: that code's training (derivative "
        "matching, Adam at 1e-3, its steps, batches and weight decay) and its own energy metric, by our "
        "implementation. *Ours*: our presets. Mean ± standard deviation over seeds. A dash: not "
        "published, or not defined.",
        "",
        "## By the paper's metric",
        "",
        "Energy is what the paper's notebooks measure, their defects included: the spring's horizon grows from call to "
        "call, and the pendulum's energy is q² + p², which a pendulum does not conserve.",
        "",
        "| task | model | test loss: published | original recipe here | ours | energy MSE: published | original recipe "
        "here | ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, found in results.items():
        for model in _present(found):
            printed = found["published"].get(model, {})
            cells = [_plain(printed.get("test"))]
            cells += [_cell(found[kind], model, "test_loss") for kind in ("original_recipe", "ours")]
            cells += [_plain(printed.get("energy"))]
            cells += [_cell(found[kind], model, "energy_mse_original_recipe") for kind in ("original_recipe", "ours")]
            lines.append(f"| {task} | {model} | {' | '.join(cells)} |")
    lines += [
        "",
        "## By corrected metrics",
        "",
        "True energy and coordinates along rollouts from fresh initial conditions inside the training range, and, "
        "where the original's test set mixes them in, outside. Three bodies: median over initial conditions.",
        "",
        "| task | model | recipe | energy MSE | coordinate MSE | energy MSE outside | coordinate MSE outside |",
        "|---|---|---|---|---|---|---|",
    ]
    metrics = ("energy_mse", "coordinate_mse", "energy_mse_extrapolation", "coordinate_mse_extrapolation")
    for task, found in results.items():
        for kind in ("original_recipe", "ours"):
            for model in _MODELS:
                if f"{model}.energy_mse" in found[kind]:
                    cells = [_cell(found[kind], model, metric) for metric in metrics]
                    lines.append(f"| {task} | {model} | {kind.replace('_', ' ')} | {' | '.join(cells)} |")
    protocols = [f"- **{task}**: {found['ours']['protocol']}" for task, found in results.items()]
    return "\n".join([*lines, "", "## Protocols", "", *protocols]) + "\n"


def _present(found: dict[str, Any]) -> list[str]:
    return [m for m in _MODELS if any(f"{m}.energy_mse" in found[kind] for kind in ("original_recipe", "ours"))]


def _plain(value: float | None) -> str:
    return "–" if value is None else number(value)


def _cell(numbers: dict[str, Any], model: str, metric: str) -> str:
    key = f"{model}.{metric}"
    return number(numbers[key], numbers.get(f"{key}.sd")) if key in numbers else "–"
