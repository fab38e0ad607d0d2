"""From the numbers of a trained network to evaluation.json and report.html."""

from __future__ import annotations

import json
from pathlib import Path

from lib import plot
from lib.report import Page, metric_table, text_table
from lib.run import RunFolder, write_json
from stylize.training import NAME, Trained

_MAIN = ("objective", "style", "content", "ssim", "seconds", "equal_iterations", "never_reached", "E_warp")


def write(
    trained: Trained,
    folder: RunFolder,
    out: Path,
    numbers: dict[str, float],
    pictures: list[tuple[Path, str]],
    protocol: str,
) -> str:
    """Writes both; returns what the terminal shows."""
    write_json(out / "evaluation.json", {**numbers, "protocol": protocol})
    page = Page(
        f"Style transfer: {', '.join(trained.styles)}",
        "A network that was trained to make of any photograph, at once, what optimisation makes of it step by step.",
    )
    page.heading("Numbers")
    page.table(*metric_table(numbers))
    page.text(protocol)
    page.heading("Pictures")
    for path, caption in [*pictures, (_training_curve(folder, out), "Training: the objective and its terms.")]:
        page.figure(path, caption)
    page.heading("How to repeat it")
    page.code(f"python -m stylize train --config {folder.path.name}/config.json --out NEW_FOLDER")
    page.code((folder.path / "config.json").read_text(encoding="utf-8"), summary="configuration")
    page.code((folder.path / "environment.json").read_text(encoding="utf-8"), summary="environment")
    page.code(json.dumps(numbers, indent=2), summary="all numbers")
    page.write(out / "report.html")
    columns, rows = metric_table(numbers)
    keep = [0, *(j for j, column in enumerate(columns) if column in _MAIN)]
    table = text_table([columns[j] for j in keep], [[row[j] for j in keep] for row in rows])
    return f"\n{table}\n\n{out / 'report.html'}"


def _training_curve(folder: RunFolder, out: Path) -> Path:
    rows = [row for row in folder.metrics() if f"{NAME}.loss" in row]
    steps = [row["step"] for row in rows]
    terms = {name: [row[f"{NAME}.{name}"] for row in rows] for name in ("loss", "style", "content")}
    series = {name: (steps, values) for name, values in terms.items()}
    return plot.curves(out / "figures" / "training.png", series, x="step", y="mean over a chunk of steps")
