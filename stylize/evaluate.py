"""How good a trained network is, by the objective that it was trained for and by what it was not.

One evaluator for everything: the run's own loss network, on images as they are in 8-bit files, all of one size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from skimage.metrics import structural_similarity

from lib import images, plot
from lib.shard import place
from stylize import data
from stylize.apply import Stylizer
from stylize.config import BASELINES, Baseline, Evaluation, Optimization
from stylize.loss import (
    Content,
    Style,
    content_losses,
    content_of,
    everywhere,
    perceptual_loss,
    style_losses,
)
from stylize.optimize import begin, compile_iterations, compile_trace, noise
from stylize.training import Trained, style_targets
from stylize.vgg import LossNetwork

Picture = tuple[Path, str]
_SHOWN = 6
_BORDER_PX = 8
_WINDOW_BINS = 6
_TIMED = 5  # photographs

_DESCRIBED: dict[Baseline, str] = {
    "gatys": "gatys: as the published programs, Torch's L-BFGS from noise, memory 100, without a line search, an "
    "evaluation each, pairs that bend down left out, blind to what a file cannot show; the first step is one grey "
    "level in all pixels together.",
    "lbfgs_noise": "lbfgs_noise: L-BFGS (zoom line search) on the pixels of each photograph, from noise.",
    "adam_noise": f"adam_noise: Adam at {Optimization().lr:g}, from noise.",
    "lbfgs_content": "lbfgs_content: L-BFGS (zoom line search) from the photograph itself.",
}
_COMPARED = (
    "All of these are measured between black and white, not rounded. equal_iterations: after how many iterations the "
    "objective is at most the network's, the limit counted where it never is (never_reached: share of photographs; "
    "diverged: share of those where it is not finite in the end). evaluations: of the objective and its gradient. "
    f"seconds: of all iterations, the median over the first {_TIMED} photographs, by a warm program that measures "
    "nothing; those of the network are from image to image. "
)
_EQUALS_ADAM = (
    "equals_adam: how many iterations of L-BFGS come to where all of Adam's do, and their time as a share of Adam's. "
)


class Judge:
    """The objective of 8-bit images against a photograph and the style."""

    def __init__(self, trained: Trained, network: LossNetwork, mesh: Mesh, style: int):
        self.network, self.perception = network, trained.config.perception
        self.params = place(network.params, mesh)
        grams = style_targets(trained.config, network, self.params)
        self.style: Style = everywhere({layer: g[style] for layer, g in grams.items()})

        @jax.jit
        def measured(params: Any, x: jax.Array, style: Style, content: Content) -> dict[str, jax.Array]:
            total, terms = perceptual_loss(network, self.perception, params, x, style, content)
            found = network.features(params, x, network.layers)
            by_style = style_losses(found, style, relative=False)
            by_content = content_losses(found, content, relative=False)
            return {
                "objective": total,
                **terms,
                **{f"style_{layer}": value[0] for layer, value in by_style.items()},
                **{f"content_{layer}": value[0] for layer, value in by_content.items()},
            }

        self._measured = measured

    def content(self, photo: np.ndarray) -> Content:
        return content_of(self.network, self.params, jnp.asarray(photo)[None])

    def __call__(self, image: np.ndarray, photo: np.ndarray) -> dict[str, float]:
        """{"objective", "style", "content", "tv", and the raw losses per layer} of images [h, w, 3]."""
        found = self._measured(self.params, jnp.asarray(as_saved(image))[None], self.style, self.content(photo))
        return {name: float(value) for name, value in found.items()}


def as_saved(image: np.ndarray) -> np.ndarray:
    """What is left of an image in a file: 256 levels."""
    return images.from_uint8(images.to_uint8(image))


def evaluate(
    trained: Trained,
    network: LossNetwork,
    photos: Sequence[Path],
    options: Evaluation,
    mesh: Mesh,
    out: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, float], list[Picture], str]:
    """Numbers NAME.METRIC (means over photographs, with .sd), pictures, and the protocol."""
    chosen = [_square(images.read(path), options.size_px) for path in photos[: options.count]]
    judge = Judge(trained, network, mesh, options.style)
    stylize = Stylizer(trained, mesh)
    mix = stylize.only(options.style)
    say(f"stylising {len(chosen)} photographs of {options.size_px} x {options.size_px} pixels")
    made = [stylize(photo, mix) for photo in chosen]
    rows: dict[str, list[dict[str, float]]] = {}
    style_image = data.load_styles([trained.config.styles[options.style]], None)[0]
    fixed = {
        "style_image": _square(style_image, options.size_px),
        "noise": noise(0, (options.size_px, options.size_px)),
    }
    for photo, image in zip(chosen, made, strict=True):
        for name, x in {"network": image, "photograph": photo, **fixed}.items():
            rows.setdefault(name, []).append({**judge(x, photo), "ssim": _similarity([as_saved(x)], [photo])})
    numbers = _means(rows)
    net = np.array([row["objective"] for row in rows["network"]])
    spent_s = _seconds(lambda: stylize(chosen[0], mix))
    numbers["network.seconds"] = spent_s
    pictures = [_contact_sheet(chosen, made, out, "network", "the network")]
    runs: dict[Baseline, _Runs] = {}
    for name in options.against:
        method = BASELINES[name]
        how = f"{options.iterations} iterations of {method.optimizer} from {method.start}"
        say(f"{name}: {how} on each")
        found = runs[name] = _optimized(judge, chosen, method, options.iterations, mesh, say)
        equal = _reached(found.objective, net)
        numbers |= {
            f"{name}.equal_iterations": float(np.mean(np.minimum(equal, options.iterations))),
            f"{name}.equal_iterations.sd": float(np.std(np.minimum(equal, options.iterations))),
            f"{name}.equal_iterations_least": float(equal.min()),
            f"{name}.never_reached": float(np.mean(equal > options.iterations)),
            f"{name}.diverged": float(np.mean(~np.isfinite(found.objective).all(1))),
            f"{name}.seconds": found.seconds,
            f"{name}.evaluations": float(np.mean(found.evaluations.sum(1))),
            f"{name}.objective": float(np.mean(found.objective[:, -1])),
            f"{name}.seconds_over_network": found.seconds / spent_s,
        }
        pictures.append(_contact_sheet(chosen, found.images, out, name, how))
    if "adam_noise" in runs and "lbfgs_noise" in runs:
        lbfgs, adam = runs["lbfgs_noise"], runs["adam_noise"]
        count = float(np.mean(_reached(lbfgs.objective, adam.objective[:, -1])))
        numbers["lbfgs_noise.equals_adam_iterations"] = count
        numbers["lbfgs_noise.equals_adam_share_of_seconds"] = count / options.iterations * lbfgs.seconds / adam.seconds
    if runs:
        pictures += _curves(runs, float(np.median(net)), spent_s, out)
    dimmed = [_dimmed(photo) for photo in chosen]
    numbers["network.half_contrast_ssim"] = _similarity(made, [stylize(photo, mix) for photo in dimmed])
    numbers["photograph.half_contrast_ssim"] = _similarity(chosen, dimmed)
    numbers["network.spectral_peak"] = spectral_peak(made)
    numbers["photograph.spectral_peak"] = spectral_peak(chosen)
    numbers["network.border_contrast"] = border_contrast(made) / border_contrast(chosen)
    return numbers, pictures, _protocol(trained, network, options, len(chosen))


class _Runs(NamedTuple):
    """An optimiser on the pixels of each photograph."""

    objective: np.ndarray
    """[photographs, iterations + 1]"""
    evaluations: np.ndarray
    """[photographs, iterations]: of each iteration"""
    images: list[np.ndarray]
    """[h, w, 3] each"""
    seconds: float
    """of all iterations, median"""


def _optimized(
    judge: Judge,
    photos: Sequence[np.ndarray],
    method: Optimization,
    iterations: int,
    mesh: Mesh,
    say: Callable[[str], None],
) -> _Runs:
    """Traces come from a program that measures each iteration, the time from one that does not."""
    measured = compile_trace(judge.network, judge.perception, method, mesh, iterations)
    plain = compile_iterations(judge.network, judge.perception, method, mesh, iterations)
    objective, evaluations, results, seconds = [], [], [], []
    for k, photo in enumerate(photos):
        batch = place({"params": judge.params, "style": judge.style, "content": judge.content(photo)}, mesh)
        x = photo if method.start == "content" else noise(k, photo.shape[:2])
        image, values, tries = measured(x, batch)
        objective.append(np.asarray(values))
        evaluations.append(np.asarray(tries))
        results.append(np.clip(np.asarray(image)[0], -1, 1))
        for _ in range((k < _TIMED) + (k == 0)):  # the first one twice: compilation is not counted
            state = jax.block_until_ready(begin(x, method, mesh))
            began = time.perf_counter()
            jax.block_until_ready(plain(state, batch))
            seconds.append(time.perf_counter() - began)
        if (k + 1) % 10 == 0:
            say(f"{k + 1} of {len(photos)}")
    return _Runs(np.stack(objective), np.stack(evaluations), results, float(np.median(seconds[1:])))


def _reached(traces: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[photos]: the first iteration after which the objective is at most the photograph's value.

    `traces` [photos, iterations + 1], `values` [photos]; where it never is, one more than there are iterations.
    """
    below = traces <= values[:, None]
    return np.where(below.any(1), below.argmax(1), traces.shape[1])


def _curves(runs: dict[Baseline, _Runs], network: float, network_s: float, out: Path) -> list[Picture]:
    """The median objective over iterations; and over what they cost, in evaluations and in seconds.

    A mean would show nothing but the photographs on which a descent goes astray.
    """
    steps = {name: range(1, found.objective.shape[1]) for name, found in runs.items()}
    medians = {name: np.median(np.nan_to_num(found.objective, nan=np.inf), axis=0)[1:] for name, found in runs.items()}
    series = {name: (steps[name], list(medians[name])) for name in runs}
    longest = max(steps.values(), key=len)
    series["the network"] = (longest, [network] * len(longest))
    y = "objective, median of photographs"
    over_iterations = plot.curves(out / "objective.png", series, x="iterations", y=y)

    figure, axes = plot.panels(1, 2, width=4.2, height=3.2, sharey=True)
    by_evaluations, by_seconds = axes[0]
    for color, (name, found) in zip(plot.COLORS, runs.items(), strict=False):
        tries = found.evaluations.cumsum(1).mean(0)
        by_evaluations.loglog(tries, medians[name], label=name, color=color)
        by_seconds.loglog(found.seconds * tries / tries[-1], medians[name], color=color)
    for ax in axes[0]:
        ax.axhline(network, label="the network", color=plot.COLORS[-1], linestyle="--")
    by_seconds.plot(network_s, network, "o", color=plot.COLORS[-1])
    by_evaluations.set(xlabel="evaluations of objective and gradient", ylabel=y)
    by_seconds.set(xlabel="seconds a photograph")
    by_evaluations.legend()
    return [
        (over_iterations, "The network's objective beside those of optimised pixels."),
        (plot.save(figure, out / "objective_cost.png"), "The same over what they cost; the dot: the network's time."),
    ]


def _seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median wall time of a warm call."""
    call()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return float(np.median(found))


def _similarity(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Mean structural similarity of images [h, w, 3] in [-1, 1], pair by pair."""
    pairs = zip(first, second, strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=2.0) for a, b in pairs]))


def _dimmed(photo: np.ndarray) -> np.ndarray:
    """Half as far from the mean of each channel."""
    mean = photo.mean((0, 1))
    return mean + (photo - mean) / 2


def _square(image: np.ndarray, size_px: int) -> np.ndarray:
    """The middle of an image, [size_px, size_px, 3]."""
    h, w = image.shape[:2]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    return images.resize(image[top : top + side, left : left + side], size_px, size_px)


def _means(rows: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    numbers = {}
    for name, found in rows.items():
        for metric in found[0]:
            values = [row[metric] for row in found]
            numbers[f"{name}.{metric}"] = float(np.mean(values))
            if len(values) > 1 and metric in ("objective", "style", "content", "ssim"):
                numbers[f"{name}.{metric}.sd"] = float(np.std(values))
    return numbers


def spectral_peak(made: Sequence[np.ndarray]) -> float:
    """How much the mean power spectrum of images [h, w, 3] stands out at the frequencies of upsampling.

    Images are of one size. A checkerboard is a pattern of period 2 or 4 pixels: the power on the lines of frequency
    1/2 and 1/4, over that of the lines beside them; the largest of the four ratios. Near 1 where there is none.
    """
    h, w = (n // 4 * 4 for n in made[0].shape[:2])
    power = np.zeros((h, w))
    for image in made:
        grey = image[:h, :w].mean(-1)
        window = np.hanning(h)[:, None] * np.hanning(w)
        power = power + np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    ratios = []
    for spectrum in (power, power.T):
        lines = spectrum[:, 2:-1].mean(1)  # without the frequencies along the other axis that are next to none
        n = len(lines)
        for at in (n // 2, n // 4):
            beside = [lines[(at + d) % n] for d in range(-_WINDOW_BINS, _WINDOW_BINS + 1) if abs(d) > 2]
            ratios.append(lines[at] / np.median(beside))
    return float(max(ratios))


def border_contrast(made: Sequence[np.ndarray]) -> float:
    """Mean squared difference of neighbouring pixels near the border (8 pixels), over that inside."""
    edge, inside = [], []
    for image in made:
        grey = image.mean(-1)
        change = np.diff(grey, axis=0)[:, 1:] ** 2 + np.diff(grey, axis=1)[1:] ** 2
        border = np.ones_like(change, bool)
        border[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = False
        edge.append(change[border].mean())
        inside.append(change[~border].mean())
    return float(np.mean(edge) / np.mean(inside))


def _contact_sheet(photos: Sequence[np.ndarray], made: Sequence[np.ndarray], out: Path, name: str, how: str) -> Picture:
    shown = np.stack([*photos[:_SHOWN], *made[:_SHOWN]])
    path = images.write(out / f"{name}.png", images.grid(shown, columns=min(_SHOWN, len(photos))))
    return path, f"The first photographs, and what was made of them by {how}."


def _protocol(trained: Trained, network: LossNetwork, options: Evaluation, photos: int) -> str:
    perception = trained.config.perception
    against = tuple(dict.fromkeys(options.against))
    compared = " ".join(_DESCRIBED[name] for name in against)
    return (
        f"{photos} photographs, the squares in their middles at {options.size_px} pixels, style "
        f"{trained.styles[options.style]}; images rounded to 8 bits. objective: {perception.style_weight:g} style + "
        f"{perception.content_weight:g} content + {perception.tv_weight:g} tv; style: ||G - A||^2 / ||A||^2, mean over "
        f"{', '.join(network.style_layers)}; content: ||F - P||^2 / ||P||^2 at {', '.join(network.content_layers)} "
        f"({perception.pooling} pooling, weights {network.weights_sha256[:12]}); style_LAYER and content_LAYER: mean "
        "squared differences of G = F F^T / (h w c) and of F. photograph, style_image, noise: these themselves in the "
        f"place of the result. {f'{compared} {_COMPARED}' if against else ''}"
        f"{_EQUALS_ADAM if {'lbfgs_noise', 'adam_noise'} <= set(against) else ''}"
        "half_contrast_ssim: structural similarity of what is made of a photograph and of the same at half its "
        "contrast. spectral_peak: power at the frequencies 1/2 and 1/4 over that beside them. border_contrast: of the "
        "outer 8 pixels over the inner, relative to photographs."
    )
