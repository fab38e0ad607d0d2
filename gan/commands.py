"""What a trained generator is used for: samples to files, strips between latents and between classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gan.point_evaluation import picture
from gan.sampling import Trained, classes_of, compile_generator, draw_samples, latents, slerp_rows
from lib import images
from lib.process import UserError
from lib.shard import local_mesh

if TYPE_CHECKING:
    from gan.__main__ import Interpolate, Sample

Picture = tuple[Path, str]
_COLUMNS, _ROWS, _WALK_ROWS, _PER_CLASS = 9, 6, 4, 3
_ENDS = (101, 102)  # streams of latents, apart from those of samples


def sample(trained: Trained, options: Sample) -> str:
    """Writes samples; returns a line for the user."""
    x = draw_samples(trained, options.count, mesh=local_mesh(), seed=options.seed, label=options.label)
    if len(trained.model.shape) == 3:
        images.write_set(options.out, x)
    elif options.out.suffix == ".npz":
        np.savez(options.out, x=x)
    elif options.out.suffix == ".png":
        picture(options.out, {"samples": x})
    else:
        raise UserError(f"{options.out}: points are written to .png or .npz")
    return f"{options.count} samples of cycle {trained.step}: {options.out}"


def interpolate(trained: Trained, options: Interpolate) -> str:
    """Writes a grid; returns a line for the user."""
    if len(trained.model.shape) != 3:
        raise UserError("this generator makes points: between them there is nothing to see")
    if options.classes:
        sheet = class_walk(trained, options.rows, options.seed)
        what = "from class to class"
    else:
        label = options.label
        sheet = between_latents(trained, options.rows, options.columns, options.seed, label)
        what = "between latents"
    images.write(options.out, sheet)
    return f"{options.rows} strips {what}: {options.out}"


def between_latents(trained: Trained, rows: int, columns: int, seed: int, label: int | None = None) -> np.ndarray:
    """A grid, float32 [h, w, c] in [-1, 1]: every row on the arc between two latents, its class the same all along."""
    a, b = (latents(trained.model, seed, rows, stream) for stream in _ENDS)
    y = classes_of(trained.model, rows, label)
    made = _made(trained, slerp_rows(a, b, columns), None if y is None else y.repeat(columns, 0))
    return images.grid(made, columns=columns)


def class_walk(trained: Trained, rows: int, seed: int) -> np.ndarray:
    """A grid: every row has one latent and goes through all classes, two of them mixed between any neighbours.

    Raises UserError where the networks know no classes.
    """
    classes = trained.model.classes
    if not classes:
        raise UserError("this network knows no classes: leave --classes out")
    place = np.linspace(0, classes - 1, _PER_CLASS * (classes - 1) + 1)
    weights = np.float32(np.maximum(0, 1 - np.abs(place[:, None] - np.arange(classes))))
    z = latents(trained.model, seed, rows, _ENDS[0])
    made = _made(trained, z.repeat(len(place), 0), np.tile(weights, (rows, 1)))
    return images.grid(made, columns=len(place))


def strips(trained: Trained, out: Path, *, seed: int) -> list[Picture]:
    """The pictures of a report."""
    path = images.write(out / "interpolation.png", between_latents(trained, _ROWS, _COLUMNS, seed))
    found = [(path, "Between two latents, on the arc from left to right, a pair per row.")]
    if trained.model.classes:
        path = images.write(out / "class_walk.png", class_walk(trained, _WALK_ROWS, seed))
        found.append((path, "One latent per row, through all classes; between two of them both are mixed."))
    return found


def _made(trained: Trained, z: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    return compile_generator(trained.model, local_mesh())(trained.variables, z, y)
