"""From a trained run to its numbers, pictures and report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gan import watch
from gan.config import Config
from gan.experiment import NAME, looks_of
from gan.sampling import Trained, images_per_s
from lib import plot, report
from lib.report import Page
from lib.run import RunFolder, write_evaluation, write_json
from lib.shard import local_mesh
from lib.sources import Dataset

Picture = tuple[Path, str]
_ACROSS = 4  # panels of a row
# Of generators of images, generators of points, and autoencoders.
_MAIN = ("fid", "is", "kid", "precision", "recall", "coverage", "confident", "modes", "good", "misplaced", "cycle",
         "distance", "smoothness", "mse", "accuracy", "clustering")  # fmt: skip


def evaluate_run(
    config: Config, data: Dataset, trained: dict[str, Trained], folder: RunFolder, say: Callable[[str], None]
) -> dict[str, float]:
    """Measures a run; writes evaluation.json, the figures and report.html. Returns the numbers."""
    if config.network.kind == "mlp":
        from gan import point_evaluation

        numbers, pictures = point_evaluation.evaluate(config, data, trained, folder.figures)
        protocol = point_evaluation.PROTOCOL
    else:
        from gan import evaluate

        numbers, pictures, protocol = evaluate.evaluate(config, data, trained, folder.figures, say)
        # A time is another one every time: no part of evaluation.json.
        write_json(folder.path / "speed.json", {"best.images_per_s": images_per_s(trained["best"], local_mesh())})
    found = watch.alarms(looks_of(folder), folder.metrics(), config.optim.loss)
    numbers |= {f"alarms.{alarm.kind}_at_cycle": alarm.step for alarm in found}
    pictures += _curves(folder)
    write_evaluation(folder.path, numbers, protocol)
    _write_page(config, folder, numbers, protocol, found, pictures)
    return numbers


def _curves(folder: RunFolder) -> list[Picture]:
    looks, rows = looks_of(folder), [row for row in folder.metrics() if f"{NAME}.loss" in row]
    figure, axes = plot.panels(1, 2, width=4.6, height=2.8)
    steps = [look["step"] for look in looks]
    for i, (name, label) in enumerate((("score", "fresh latents"), ("fixed_score", "the same latents"))):
        axes[0, 0].semilogy(steps, [look[name] for look in looks], label=label, color=plot.COLORS[i])
    for i, name in enumerate(("coverage", "precision", "spread")):
        axes[0, 1].plot(steps, [look[name] for look in looks], label=name, color=plot.COLORS[i])
    axes[0, 0].set(xlabel="cycle", title="score of the looks (lower is better)")
    axes[0, 1].set(xlabel="cycle", title="variety")
    axes[0, 0].legend()
    axes[0, 1].legend()
    seen = plot.save(figure, folder.figures / "looks.png"), "Looks at fresh samples and at those of the same latents."
    names = [key for key in rows[0] if key.startswith(f"{NAME}.")] if rows else []
    figure, axes = plot.panels(-(-max(1, len(names)) // _ACROSS), _ACROSS, width=2.4, height=2.0)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names, strict=False):
        ax.plot([row["step"] for row in rows], [row.get(name) for row in rows], color=plot.COLORS[0])
        ax.set(title=name.removeprefix(f"{NAME}."), xlabel="cycle")
    game = plot.save(figure, folder.figures / "training.png")
    caption = (
        "Training: losses; mean scores of real and generated examples; ranked: share of pairs whose real example has "
        "the higher score."
    )
    return [seen, (game, caption)]


def summary(numbers: dict[str, float]) -> str:
    """The main columns for the terminal."""
    return report.summary(numbers, _MAIN)


def _write_page(
    config: Config,
    folder: RunFolder,
    numbers: dict[str, float],
    protocol: str,
    alarms: list[watch.Alarm],
    pictures: list[Picture],
) -> None:
    page = Page(
        f"{config.network.kind}, {config.optim.loss}: {config.data.source}",
        "A generator that learned from a critic what the data look like, and the critic from the data.",
    )
    page.numbers({name: value for name, value in numbers.items() if not name.startswith("alarms.")}, protocol)
    page.heading("Alarms")
    for alarm in alarms:
        page.text(f"{alarm.kind} at cycle {alarm.step}: {alarm.message}.")
    if not alarms:
        page.text("None: no collapse, divergence, oscillation or overpowering critic was noticed.")
    page.pictures(pictures)
    page.repeat("gan", folder, numbers)
    page.write(folder.path / "report.html")
