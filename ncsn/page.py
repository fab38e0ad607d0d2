"""From a trained run to its numbers, pictures and report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lib import plot, report
from lib.report import Page
from lib.run import RunFolder, write_evaluation
from lib.sources import Dataset
from ncsn.config import Config
from ncsn.experiment import Trained

Picture = tuple[Path, str]


def evaluate_run(
    config: Config, data: Dataset, trained: Trained, folder: RunFolder, say: Callable[[str], None]
) -> dict[str, float]:
    """Measures a run; writes evaluation.json, the figures and report.html. Returns the numbers."""
    if config.network.kind == "mlp":
        from ncsn import toy_evaluation

        numbers, pictures = toy_evaluation.evaluate(config, trained, folder.figures)
        protocol = toy_evaluation.PROTOCOL
    else:
        from ncsn import evaluate

        numbers, pictures, protocol = evaluate.evaluate(config, data, trained, folder.figures, say)
    curve = _training_curve(folder)
    if curve:
        pictures.append((curve, "Training: the loss, and the squared error of the predicted noise per dimension."))
    write_evaluation(folder.path, numbers, protocol)
    _write_page(config, folder, numbers, protocol, pictures)
    return numbers


def _training_curve(folder: RunFolder) -> Path | None:
    rows = folder.metrics()
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    series = {
        label: (steps, [row[key] for row in rows])
        for key, label in (("score.loss", "loss"), ("score.noise_error", "noise error"))
        if key in rows[0] and min(row[key] for row in rows) > 0
    }
    return plot.curves(folder.figures / "training.png", series, x="step", y="mean over a chunk of steps")


_MAIN = ("fid", "is", "kid", "confident", "heavy_mode_weight", "bits_per_dim", "nfe", "accuracy")


def summary(numbers: dict[str, float]) -> str:
    """The main columns for the terminal."""
    return report.summary(numbers, _MAIN)


def _write_page(
    config: Config, folder: RunFolder, numbers: dict[str, float], protocol: str, pictures: list[Picture]
) -> None:
    page = Page(
        f"Score network {config.network.kind} on {config.data.source}",
        "A network that learned the gradient of the log-density of noisy data, and the samples that follow it.",
    )
    page.numbers(numbers, protocol)
    page.pictures(pictures)
    page.repeat("ncsn", folder, numbers)
    page.write(folder.path / "report.html")
