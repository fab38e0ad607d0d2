"""What a trained network is used for: samples to files, inpainting, colours, likelihoods, interpolation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lib import images, plot
from lib.images import grid, to_uint8, write, write_gif, write_set
from lib.latents import slerp
from lib.pixels import dequantized
from lib.process import UserError
from lib.rows import compile_rows
from lib.shard import local_mesh
from ncsn import constraints, experiment, guidance, ode
from ncsn.config import Config, Sampling, parse_sampler
from ncsn.experiment import Trained
from ncsn.likelihood import bits_per_dim as to_bits
from ncsn.likelihood import log_likelihood
from ncsn.samplers import Point, Sampler, default_width
from ncsn.sampling import Condition, draw_samples, from_pixels, score_function, to_pixels
from ncsn.sde import Score

if TYPE_CHECKING:
    from ncsn.__main__ import Colorize, Inpaint, Likelihood, Sample

PARTS = ("left", "right", "top", "bottom", "middle")
_MOVIE_FRAMES, _FRAMES_PER_S = 60, 15
_COLUMNS, _ROWS = 9, 6  # of an interpolation


def sample(config: Config, trained: Trained, options: Sample) -> str:
    """Writes samples (and the movie); returns a line for the user."""
    points = len(trained.facts.shape) == 1
    if points and ((options.out.suffix == ".png" and options.movie is not None) or options.interpolate):
        raise UserError("points have no movie and no interpolation: give --out FILE.npz")
    if options.interpolate:
        path, _ = interpolation(config, trained, options.out, seed=options.seed)
        return str(path)
    label = _labels(trained, options.label, options.count, "--label")
    found = draw_samples(
        config, trained, options.sampling, options.count, mesh=local_mesh(), seed=options.seed, label=label,
        frames=_MOVIE_FRAMES if options.movie else 0, progress="sampling",
    )  # fmt: skip
    _write_samples(config, options.out, found.x, points)
    written = [str(options.out)]
    if options.movie is not None:
        frames = found.diagnostics.frames
        assert frames is not None
        sheets = [grid(to_pixels(config, frames[:, t])) for t in range(frames.shape[1])]
        still = [sheets[-1]] * _FRAMES_PER_S  # a second of the result
        write_gif(options.movie, np.stack([*sheets, *still]), frames_per_s=_FRAMES_PER_S)
        written.append(str(options.movie))
    return f"{options.count} samples, {found.nfe:g} evaluations each: {', '.join(written)}"


def _write_samples(config: Config, out: Path, x: np.ndarray, points: bool) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if points:
        if out.suffix == ".png":
            figure, axes = plot.panels(1, 1, width=4, height=4)
            axes[0, 0].scatter(x[:, 0], x[:, 1], s=2)
            plot.save(figure, out)
        else:
            np.savez(out.with_suffix(".npz"), x=x)
        return
    pixels = to_pixels(config, x)
    write_set(out, pixels)


def _labels(trained: Trained, label: int | None, count: int, name: str) -> np.ndarray | None:
    if label is None:
        return None
    classes = trained.model.classes
    if not classes:
        raise UserError(f"{name}: this network knows no classes")
    if not 0 <= label < classes:
        raise UserError(f"{name} is {label}: the classes are 0 to {classes - 1}")
    return np.full(count, label)


def _given(trained: Trained, options: Sampling, label: int | None, count: int) -> tuple[Sampling, np.ndarray | None]:
    """The options and the labels [count] of images whose class is known or (None) not.

    Labels then mean "no class", towards which guidance would have no effect and cost a second evaluation.
    """
    if label is None and trained.model.classes:
        return dataclasses.replace(options, guidance=1.0), np.full(count, trained.model.classes)
    return options, _labels(trained, label, count, "--label")


def missing_part(part: str, shape: tuple[int, ...]) -> np.ndarray:
    """Where an image [h, w, c] is missing, bool [h, w, 1]: one of `PARTS`, or what is white in an image file."""
    height, width = shape[:2]
    missing = np.zeros((height, width, 1), bool)
    if part in PARTS:
        rows = {"top": slice(height // 2), "bottom": slice(height // 2, None)}.get(part, slice(None))
        columns = {"left": slice(width // 2), "right": slice(width // 2, None)}.get(part, slice(None))
        if part == "middle":
            rows, columns = (slice(n // 4, n - n // 4) for n in (height, width))
        missing[rows, columns] = True
        return missing
    path = Path(part)
    if not path.exists():
        raise UserError(f"--mask {part}: choose from {', '.join(PARTS)}, or give an image file")
    white = images.read(path).mean(-1, keepdims=True) > 0
    if white.shape[:2] != (height, width):
        raise UserError(f"{part} is {white.shape[1]} x {white.shape[0]}, the network's images are {width} x {height}")
    if white.all() or not white.any():
        raise UserError(f"{part} is {'all' if white.all() else 'nowhere'} white: white is what is missing")
    return white


def fill(
    config: Config,
    trained: Trained,
    options: Sampling,
    known: np.ndarray,
    missing: np.ndarray,
    *,
    label: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Images [n, h, w, c] in [-1, 1] with what is `missing` [h, w, 1] filled in; the rest is kept to the bit."""
    options, labels = _given(trained, options, label, len(known))
    mask = ~np.broadcast_to(missing, trained.facts.shape)
    found = draw_samples(
        config, trained, options, len(known), mesh=local_mesh(), seed=seed,
        label=labels, condition=_constraint(trained, options, from_pixels(config, known), mask), progress="inpainting",
    )  # fmt: skip
    return np.where(mask, known, to_pixels(config, found.x))


def _constraint(
    trained: Trained, options: Sampling, known: Any, mask: np.ndarray, basis: np.ndarray | None = None
) -> Condition:
    """`known` [count, ...] where the mask is true, in the way that the options ask for."""
    guided = options.constraint == "guided"

    def score(score_fn: Score, known: jax.Array) -> Score:
        return guidance.reconstruction(score_fn, known, mask, trained.facts.std, basis=basis) if guided else score_fn

    def sampler(sampler: Sampler, known: jax.Array) -> Sampler:
        return constraints.inpaint(sampler, known, mask, every_step=not guided, basis=basis)

    return Condition(np.asarray(known), score, sampler)


def inpaint(config: Config, trained: Trained, options: Inpaint) -> str:
    """Writes the grid; returns a line for the user."""
    image = _read_for(trained, options.image)
    missing = missing_part(options.mask, image.shape)
    many = np.broadcast_to(image, (options.count, *image.shape))
    filled = fill(config, trained, options.sampling, many, missing, label=options.label, seed=options.seed)
    sheet = grid(np.stack([image, np.where(missing, 0, image), *filled]), columns=options.count + 2)
    return str(write(options.out, sheet))


def colorize(config: Config, trained: Trained, options: Colorize) -> str:
    """Writes the grid; returns a line for the user."""
    if trained.facts.shape[-1] != 3:
        raise UserError("this network's images are grey: it knows no colours")
    grey = _read_for(trained, options.image).mean(-1, keepdims=True)
    many = np.broadcast_to(grey, (options.count, *grey.shape))
    sampling, labels = _given(trained, options.sampling, options.label, options.count)
    found = draw_samples(
        config, trained, sampling, options.count, mesh=local_mesh(), seed=options.seed,
        label=labels, progress="colorizing",
        condition=_constraint(
            trained, sampling, constraints.known_grey(from_pixels(config, many)),
            constraints.GREY_MASK, constraints.GREY,
        ),
    )  # fmt: skip
    shown = [np.repeat(grey, 3, -1), *to_pixels(config, found.x)]
    return str(write(options.out, grid(np.stack(shown), columns=options.count + 1)))


def _read_for(trained: Trained, path: Path) -> np.ndarray:
    """An image of the network's size [h, w, c] in [-1, 1]; larger ones are cropped to its shape and reduced."""
    from PIL import Image, ImageOps

    if len(trained.facts.shape) != 3:
        raise UserError("this network learned points, not images")
    height, width, channels = trained.facts.shape
    image = images.read(path)
    if image.shape[0] < height or image.shape[1] < width:
        raise UserError(f"{path} is {image.shape[1]} x {image.shape[0]}, smaller than the network's {width} x {height}")
    if image.shape[:2] != (height, width):
        fitted = ImageOps.fit(Image.fromarray(to_uint8(image)), (width, height), Image.Resampling.LANCZOS)
        image = images.from_uint8(np.asarray(fitted))
    return image if channels == 3 else image.mean(-1, keepdims=True)


def interpolation(config: Config, trained: Trained, path: Path, *, seed: int = 0) -> tuple[Path, str]:
    """Rows of images between two latents of the probability-flow ODE each, on the arc between them."""
    ends = jax.random.normal(jax.random.key(seed), (2, _ROWS, *trained.facts.shape))
    weights = jnp.linspace(0, 1, _COLUMNS)
    between = jnp.concatenate([slerp(a, b, weights) for a, b in zip(*ends, strict=True)])
    classes = trained.model.classes
    label = np.repeat(np.arange(_ROWS) % classes, _COLUMNS) if classes else None
    options = parse_sampler("heun:35", config.sampling)
    high = options.sigma_max or experiment.highest(config, trained.facts)
    latents = np.asarray(trained.facts.mean + np.hypot(high, trained.facts.std) * between, np.float32)
    found = draw_samples(
        config, trained, options, len(latents), mesh=local_mesh(), label=label,
        condition=Condition(latents, sampler=lambda sampler, x: sampler._replace(init=lambda keys, shape: Point(x))),
    )  # fmt: skip
    write(path, grid(to_pixels(config, found.x), columns=_COLUMNS))
    return path, "Between two latents of the probability-flow ODE, on the arc from left to right, a pair per row."


def bits_per_dim(
    config: Config,
    trained: Trained,
    pixels: np.ndarray,
    *,
    label: np.ndarray | None = None,
    probes: int | None = 1,
    rtol: float = 1e-4,
    seed: int = 0,
) -> dict[str, float]:
    """{"likelihood.bits_per_dim": mean, ".sd": standard error, ".nfe"} of uint8 images, uniformly dequantised."""
    model, low_high = trained.model, experiment.pixel_range(config)
    high, low = experiment.highest(config, trained.facts), config.noise.sigma_min
    how = ode.Adaptive(rtol, rtol, trained.facts.size)
    dims = trained.facts.dimension

    def one_block(shared: tuple[Any, jax.Array], numbers: jax.Array, rows: Any) -> Any:
        params, key = shared
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        label = rows[1] if model.classes else ()
        score_fn = score_function(trained, params, label, 1.0)
        unit = dequantized(rows[0], keys)
        x = low_high[0] + (low_high[1] - low_high[0]) * unit
        found = log_likelihood(score_fn, x, keys, low, high, probes=probes, how=how)
        return found.log_density, found.nfe

    labels = np.full(len(pixels), model.classes) if label is None else label
    mesh = local_mesh()
    width = min(default_width(trained.facts.shape, mesh), -(-len(pixels) // mesh.size))
    call = compile_rows(one_block, mesh, width)
    rows = (pixels, np.asarray(labels, np.int32))
    density, nfe = call((trained.params, jax.random.key(seed)), rows, progress="likelihood")
    bits = np.asarray(to_bits(density, dims, low_high[1] - low_high[0]), np.float64)
    return {
        "likelihood.bits_per_dim": float(bits.mean()),
        "likelihood.bits_per_dim.sd": float(bits.std(ddof=1) / np.sqrt(len(bits))) if len(bits) > 1 else float("nan"),
        "likelihood.images": float(len(bits)),
        "likelihood.nfe": float(nfe.mean()),
    }


def likelihood(config: Config, trained: Trained, options: Likelihood) -> str:
    """Bits per dimension of test images; a line for the user."""
    from ncsn import data

    if len(trained.facts.shape) != 3:
        raise UserError("bits per dimension are of images; this network learned points")
    test = data.load(dataclasses.replace(config)).test
    if options.count > len(test["image"]):
        raise UserError(f"count is {options.count}, but there are {len(test['image'])} test images")
    found = bits_per_dim(
        config, trained, test["image"][: options.count], probes=options.probes, rtol=options.rtol, seed=options.seed
    )
    return (
        f"{found['likelihood.bits_per_dim']:.4f} ± {found['likelihood.bits_per_dim.sd']:.4f} bits per dimension, "
        f"{options.count} test images, {found['likelihood.nfe']:.0f} evaluations each"
    )
