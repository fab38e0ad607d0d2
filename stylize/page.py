"""From numbers and pictures to evaluation.json and report.html."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lib import images, plot
from lib.report import Page, metric_table, text_table
from lib.run import RunFolder, write_evaluation
from stylize.optimize import Task
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
    write_evaluation(out, numbers, protocol)
    page = Page(
        f"Style transfer: {', '.join(trained.styles)}",
        "A network that was trained to make of any photograph, at once, what optimisation makes of it step by step.",
    )
    page.numbers(numbers, protocol)
    page.pictures([*pictures, (_training_curve(folder, out), "Training: the objective and its terms.")])
    page.repeat("stylize", folder, numbers)
    page.write(out / "report.html")
    columns, rows = metric_table(numbers)
    keep = [0, *(j for j, column in enumerate(columns) if column in _MAIN)]
    table = text_table([columns[j] for j in keep], [[row[j] for j in keep] for row in rows])
    return f"\n{table}\n\n{out / 'report.html'}"


def write_image(folder: RunFolder, out: Path, task: Task, result: np.ndarray) -> None:
    """evaluation.json and report.html of an image that was optimised."""
    rows, numbers = folder.metrics(), {}
    series = {}
    for name in dict.fromkeys(key.removesuffix(".loss") for row in rows for key in row if key.endswith(".loss")):
        of_scale = [row for row in rows if f"{name}.loss" in row]
        series[name] = ([row["step"] for row in of_scale], [row[f"{name}.loss"] for row in of_scale])
        numbers |= {
            f"{name}.objective": of_scale[-1][f"{name}.loss"],
            f"{name}.iterations": len(of_scale),
            f"{name}.evaluations": sum(row[f"{name}.evaluations"] for row in of_scale),
            f"{name}.wall_s": of_scale[-1]["wall_s"],
        }
    protocol = "Per scale: the objective before the last iteration, and wall_s with compilation."
    write_evaluation(folder.path, numbers, protocol)
    page = Page(f"Style transfer: {out.name}", "The pixels of an image, moved until a network sees the style in them.")
    page.heading("Pictures")
    height = 256
    widths = [round(x.shape[1] * height / x.shape[0]) for x in (task.content, *task.styles)]
    shown = [
        images.resize(x, height, min(max(width, height // 8), 8 * height))  # however thin they are
        for x, width in zip((task.content, *task.styles), widths, strict=True)
    ]
    strip = images.write(folder.figures / "inputs.png", np.concatenate(shown, axis=1))
    page.figure(strip, "The photograph, and the style.")
    page.figure(images.write(folder.figures / "result.png", images.from_uint8(result)), "The result.")
    curve = plot.curves(folder.figures / "objective.png", series, x="iteration", y="objective")
    page.figure(curve, "The objective, scale by scale.")
    page.numbers(numbers, protocol)
    page.records(folder, numbers)
    page.write(folder.path / "report.html")


def _training_curve(folder: RunFolder, out: Path) -> Path:
    rows = [row for row in folder.metrics() if f"{NAME}.loss" in row]
    steps = [row["step"] for row in rows]
    terms = {name: [row[f"{NAME}.{name}"] for row in rows] for name in ("loss", "style", "content")}
    series = {name: (steps, values) for name, values in terms.items()}
    return plot.curves(out / "figures" / "training.png", series, x="step", y="mean over a chunk of steps")
