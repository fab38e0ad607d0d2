"""How well an autoencoder interpolates, and what its latents know of classes; pictures, and the page of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from gan import latents, lines
from gan.acai import interpolate
from gan.acai_config import AutoencoderConfig
from gan.acai_experiment import LOOK, NAME, Trained, test_numbers
from lib import images, plot
from lib.process import UserError
from lib.report import Page
from lib.run import RunFolder, write_evaluation
from lib.sources import Dataset

Picture = tuple[Path, str]
_SHOWN, _ROWS, _FRAMES = 12, 8, 12


def evaluate_run(
    config: AutoencoderConfig, data: Dataset, trained: Trained, folder: RunFolder, say: Callable[[str], None]
) -> dict[str, float]:
    """Measures a run; writes evaluation.json, the figures and report.html. Returns the numbers."""
    if data.train:
        numbers, protocol = _of_images(config, data, trained, say)
    else:
        numbers, protocol = _of_lines(config, folder)
    pictures = _pictures(config, data, trained, folder)
    write_evaluation(folder.path, numbers, protocol)
    kind = "ACAI" if config.autoencoder.critic else "Autoencoder"
    page = Page(f"{kind}: {config.data.source}", "An autoencoder whose latents are to be mixed.")
    page.numbers(numbers, protocol)
    page.pictures(pictures)
    page.repeat("gan", folder, numbers)
    page.write(folder.path / "report.html")
    return numbers


def _of_lines(config: AutoencoderConfig, folder: RunFolder) -> tuple[dict[str, float], str]:
    looks = [row for row in folder.metrics() if f"{LOOK}.distance" in row]
    if not looks:
        raise UserError(f"{folder.path} holds no look at its lines: set --measurement.every below autoencoder.steps")
    numbers = {}
    for name in lines.Score._fields:
        values = [row[f"{LOOK}.{name}"] for row in looks]
        numbers[f"autoencoder.{name}"] = lines.final([np.nan if v is None else v for v in values])
    for name, frames in references(config.measurement.seed).items():
        numbers |= {f"{name}.{key}": value for key, value in lines.score(frames)._asdict().items()}
    return numbers, (
        f"{lines.INTERPOLATIONS} interpolations of {lines.FRAMES} frames between random lines; distance: mean cosine "
        f"distance of frames to the nearest of {lines.REFERENCE_LINES:,} lines; smoothness: the largest step of the "
        "angle as a part of the whole turn, beyond that of an even turn; undefined: the part of interpolations whose "
        f"ends have the same angle, which count as 0. Medians of the last {min(lines.LAST, len(looks))} looks, "
        f"{config.measurement.every} steps apart. perfect: lines that turn evenly; blend: pixels mixed; abrupt: the "
        "one line, and from the middle on the other."
    )


def references(seed: int, count: int = lines.INTERPOLATIONS) -> dict[str, np.ndarray]:
    """Interpolations [count, frames, 32, 32, 1] whose scores the published benchmark is known to give."""
    rng = np.random.Generator(np.random.Philox(seed))
    start, end = 2 * np.pi * rng.random((2, count, 1))
    t = np.linspace(0, 1, lines.FRAMES)
    first, last = lines.draw(start[:, 0])[:, None], lines.draw(end[:, 0])[:, None]
    share = t[None, :, None, None, None]
    perfect = lines.draw((start + t * (end - start)).reshape(-1)).reshape(count, lines.FRAMES, *first.shape[2:])
    return {
        "perfect": perfect,
        "blend": (1 - share) * first + share * last,
        "abrupt": np.where(share < 0.5, first, last),
    }


def _of_images(
    config: AutoencoderConfig, data: Dataset, trained: Trained, say: Callable[[str], None]
) -> tuple[dict[str, float], str]:
    numbers = {f"test.{name}": value for name, value in test_numbers(trained, data.test).items()}
    protocol = f"{len(data.test['image']):,} test images. mse: mean squared error of pixels in [-1, 1]."
    if trained.facts.classes:
        starts, count = config.measurement.kmeans_starts, trained.facts.classes
        say(f"clustering {len(data.train['image']):,} latents, {starts} starts")
        train, test = (latents.of_images(trained.encode, rows["image"]) for rows in (data.train, data.test))
        numbers["test.clustering"] = latents.clustering_accuracy(
            train, test, data.test["label"], count, n_init=starts, seed=config.measurement.seed
        )
        numbers["test.fitted_accuracy"] = latents.fitted_accuracy(train, data.train["label"], test, data.test["label"])
        protocol += (
            " accuracy: of the linear classifier of latents that is trained beside the autoencoder and teaches it "
            "nothing; fitted_accuracy: of one that is fitted to the latents of the training images afterwards "
            f"(logistic regression, weight decay 1). clustering: accuracy of k-means ({count} clusters, {starts} "
            "random starts) on whitened latents of the training images, clusters assigned to classes as suits the test "
            "images best."
        )
    return numbers, protocol


def _pictures(config: AutoencoderConfig, data: Dataset, trained: Trained, folder: RunFolder) -> list[Picture]:
    shown = trained.bordered(data.test["image"][:_SHOWN])
    restored = trained.decode(trained.encode(data.test["image"][:_SHOWN]))
    path = images.write(
        folder.figures / "reconstructions.png", images.grid(np.concatenate([shown, restored]), columns=len(shown))
    )
    pictures = [(path, "Test images, and below each what the autoencoder makes of it.")]
    path = images.write(folder.figures / "interpolations.png", strips(trained, data.test, _ROWS, _FRAMES, 0))
    pictures.append((path, "Between test images (the ends are reconstructions too): latents mixed in even steps."))
    rows = [row for row in folder.metrics() if f"{NAME}.loss" in row]
    names = [key for key in rows[0] if key.startswith(f"{NAME}.")] if rows else []
    series = {
        name.removeprefix(f"{NAME}."): ([row["step"] for row in rows], [row.get(name) for row in rows])
        for name in names
    }
    path = plot.curves(folder.figures / "training.png", series, x="steps", y="losses")
    return [*pictures, (path, "Losses while training; found: what the critic finds in mixed images.")]


def strips(
    trained: Trained, test: dict[str, np.ndarray], rows: int, columns: int, seed: int, labels: Sequence[int] = ()
) -> np.ndarray:
    """A grid, float32 [h, w, c] in [-1, 1]: every row goes from one test image to another by way of their latents.

    `labels`: the classes (first, last) of the two. Raises UserError where there are no such images.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    ends = []
    for i in range(2):
        known = np.arange(len(test["image"])) if not labels else np.flatnonzero(_labels(test) == labels[i])
        if not len(known):
            raise UserError(f"there is no test image of class {labels[i]}")
        ends.append(trained.encode(test["image"][rng.choice(known, rows)]))
    path = np.asarray(interpolate(jax.numpy.asarray(ends[0]), jax.numpy.asarray(ends[1]), columns))
    made = trained.decode(path.swapaxes(0, 1).reshape(-1, *path.shape[2:]))
    return images.grid(made, columns=columns)


def _labels(test: dict[str, np.ndarray]) -> np.ndarray:
    if "label" not in test:
        raise UserError("these images have no labels: leave --labels out")
    return test["label"]
