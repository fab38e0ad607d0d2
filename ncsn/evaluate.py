"""How good the images of a trained network are: every sampler by the metrics of `lib.metrics`, and what else it can do.

All numbers of one run are of the same seed: sample i of every sampler begins with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib import features, images, plot
from lib.features.net import FeatureNet
from lib.judge import CONFIDENT, Judge, neighbours, read
from lib.shard import local_mesh
from lib.sources import Dataset
from ncsn import commands
from ncsn.config import Config, parse_sampler
from ncsn.experiment import Trained
from ncsn.sampling import Samples, draw_samples, to_pixels

Picture = tuple[Path, str]
_SHOWN, _FRAMES, _NEIGHBOURS, _INPAINTED = 100, 8, 8, 500


def evaluate(
    config: Config, data: Dataset, trained: Trained, out: Path, say: Callable[[str], None]
) -> tuple[dict[str, float], list[Picture], str]:
    """Numbers NAME_NFE.METRIC (NAME_NFE.noisy.METRIC: before the last, denoising step), pictures, and the protocol."""
    net = features.load(features.default_for(*trained.facts.shape))
    judge = Judge(net, data)
    numbers, pictures, points = judge.floor(), [], []
    for k, text in enumerate(config.evaluation.samplers):
        options, count = config.evaluation.asked(text, config.sampling)
        label = f"{options.sampler}_{options.nfe}"
        say(f"sampling {count} images by {label}")
        asked = None if k else {"frames": _FRAMES}
        found = draw_samples(
            config, trained, options, count,
            mesh=local_mesh(), seed=config.seed, noisy=options.denoise, progress=label, **(asked or {}),
        )  # fmt: skip
        pixels = images.to_uint8(to_pixels(config, found.x))
        numbers |= _numbers(judge, label, pixels, found.nfe)
        points.append((options.sampler, found.nfe, numbers[f"{label}.fid.{net.name}"]))
        if found.diagnostics.noisy is not None:
            noisy = images.to_uint8(to_pixels(config, found.diagnostics.noisy))
            numbers |= _numbers(judge, f"{label}.noisy", noisy, found.nfe - found.per_score)
        path = images.write(out / f"samples_{label}.png", images.grid(to_pixels(config, found.x[:_SHOWN])))
        pictures.append((path, f"The first {_SHOWN} samples of {label}, uncurated."))
        if k == 0:
            pictures += _of_first(config, data, net, found, pixels, out)
    pictures.append(quality(out / "quality.png", points, numbers[f"real.fid.{net.name}"], net.name))
    numbers |= _inpainting(config, data, trained, judge, out, pictures)
    pictures.append(commands.interpolation(config, trained, out / "interpolation.png"))
    if config.evaluation.likelihood_images:
        say(f"likelihood of {config.evaluation.likelihood_images} test images")
        numbers |= commands.bits_per_dim(config, trained, data.test["image"][: config.evaluation.likelihood_images])
    return numbers, pictures, _protocol(config, net)


def _numbers(judge: Judge, name: str, pixels: np.ndarray, nfe: float) -> dict[str, float]:
    return {**judge.numbers(name, pixels), f"{name}.nfe": nfe, f"{name}.samples": len(pixels)}


def _of_first(
    config: Config, data: Dataset, net: FeatureNet, found: Samples, pixels: np.ndarray, out: Path
) -> list[Picture]:
    """The chain, its diagnostics, and the nearest training images of the first sampler's samples."""
    frames = found.diagnostics.frames
    assert frames is not None
    chain = to_pixels(config, np.swapaxes(frames[:_NEIGHBOURS], 0, 1).reshape(-1, *frames.shape[2:]))
    path = images.write(out / "chain.png", images.grid(chain, columns=_NEIGHBOURS))
    pictures = [(path, "From noise to images, top to bottom, at equal numbers of steps.")]
    figure, axes = plot.panels(1, 2, width=4.2, height=2.6)
    steps = np.arange(len(found.diagnostics.score_norm))
    for ax, name in ((axes[0, 0], "score_norm"), (axes[0, 1], "step_size")):
        ax.semilogy(steps, getattr(found.diagnostics, name), color=plot.COLORS[0])
        ax.set(xlabel="step", title=name.replace("_", " "))
    pictures.append((plot.save(figure, out / "diagnostics.png"), "Along the chain, means over samples."))
    return [*pictures, neighbours(out / "neighbours.png", net, data.train["image"], pixels[:_NEIGHBOURS])]


def quality(path: Path, points: list[tuple[str, float, float]], floor: float, net: str) -> Picture:
    """Fréchet distance against the number of evaluations, a line per sampler."""
    figure, axes = plot.panels(1, 1, width=5.5, height=3.2)
    ax = axes[0, 0]
    for i, name in enumerate(dict.fromkeys(name for name, _, _ in points)):
        line = sorted((nfe, fid) for sampler, nfe, fid in points if sampler == name)
        ax.loglog(*zip(*line, strict=True), "o-", label=name, color=plot.COLORS[i % len(plot.COLORS)])
    ax.axhline(floor, color="0.5", ls="--", label="real test images")
    ax.set(xlabel="evaluations of the network per sample", ylabel=f"fid.{net}")
    ax.legend()
    return plot.save(figure, path), "Quality against cost; dashed: what real test images score."


def _inpainting(
    config: Config, data: Dataset, trained: Trained, judge: Judge, out: Path, pictures: list[Picture]
) -> dict[str, float]:
    """The right half of test images filled in, without telling the class, against filling with the mean image."""
    count = min(_INPAINTED, config.evaluation.samples, len(data.test["image"]))
    pixels = data.test["image"][:count]
    known = images.from_uint8(pixels)
    missing = commands.missing_part("right", known.shape[1:])
    options = parse_sampler(config.evaluation.inpainting, config.sampling)
    filled = commands.fill(config, trained, options, known, missing, seed=config.seed)
    mean = np.where(missing, images.from_uint8(data.train["image"].mean(0)), known)
    rows = np.stack([known, np.where(missing, 0, known), mean, filled], axis=1)[:_NEIGHBOURS]
    sheet = images.grid(np.swapaxes(rows, 0, 1).reshape(-1, *known.shape[1:]), columns=_NEIGHBOURS)
    caption = "Test images; what is known of them; filled with the mean image; filled in by the network."
    pictures.append((images.write(out / "inpainting.png", sheet), caption))
    exact = np.array_equal(np.where(missing, 0, filled), np.where(missing, 0, known))
    numbers = {"inpainting.known_pixels_exact": float(exact)}
    if judge.reads:
        labels = data.test["label"][:count]
        for name, x in (("real_whole", known), ("inpainting", filled), ("mean_fill", mean)):
            _, logits = read(judge.net, images.to_uint8(x))
            numbers[f"{name}.accuracy"] = float(np.mean(logits.argmax(-1) == labels))
    return numbers


def _protocol(config: Config, net: FeatureNet) -> str:
    guided = f" and guidance {config.sampling.guidance:g}" if config.network.class_conditional else ""
    return (
        f"Samples of seed {config.seed}{guided}, rounded to 8 bits, against all "
        f"training images; features of {net.name} (weights {net.weights_sha256[:12]}): scores compare with nothing "
        "but scores of the same features. real: test images in the place of samples. noisy: samples before the last, "
        f"denoising step. confident: share of samples that {net.name} reads with a probability above "
        f"{CONFIDENT:g}; smallest_class and largest_class: share of the rarest and the commonest class among its "
        "readings, over 1 / number of classes. nfe: evaluations of the network per sample. copying: 1 for copies of "
        "training images, for fresh samples what test images score. inpainting: the right half of test images by "
        f"{config.evaluation.inpainting} ({config.sampling.constraint}), without telling the class."
    )
