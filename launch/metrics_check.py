"""`python -m launch reproduce metrics`: do the metrics order what everyone can order by eye?

Test images against training images, then the same test images blurred or noisy at three strengths, and pure noise.
One strength below those three shows where the metrics stop to see anything; it does not count for the order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage

from lib.config import options_of, parse
from lib.data import load_tfds
from lib.images import from_uint8, to_uint8
from lib.metrics.images import Images, of_array, open_images
from lib.metrics.measure import BETTER, measure
from lib.metrics.result import Result, to_json
from lib.report import number
from lib.run import environment, write_json, write_text

BLUR_PX = (0.5, 1.0, 2.0, 4.0)
NOISE_SD = (8, 24, 48, 96)
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10 (JPEG)"}
CHAINS = {
    "mnist": (("test", "noise"),),
    "cifar10": (
        ("test", *(f"blurred {s:g} px" for s in BLUR_PX)),
        ("test", *(f"noisy {s}/255" for s in NOISE_SD)),
    ),
}
"""sets from best to worst"""
BARELY = (f"blurred {BLUR_PX[0]:g} px", f"noisy {NOISE_SD[0]}/255")


@dataclasses.dataclass(frozen=True)
class Check:
    """Measure images that get worse step by step, and write the table and the plot."""

    out: Path = Path("docs/results")
    """folder for metrics.md, metrics.json and metrics.png"""
    images: int = 10_000
    """test images of each data set"""


def main(args: Sequence[str]) -> None:
    options = parse(Check(), args, "python -m launch reproduce metrics")
    from lib import features, shard

    shard.start()
    found: dict[str, dict[str, dict[str, Result]]] = {}
    for name, net in (("mnist", "mnist_cnn"), ("cifar10", "cifar10_cnn")):
        real, instrument = open_images(f"{name}:train"), features.load(net)
        found[name] = {}
        for label, images in sets(name, load_tfds(name, "test")["image"][: options.images]).items():
            found[name][label] = measure(real, images, instrument, progress=_bar)
    options.out.mkdir(parents=True, exist_ok=True)
    plot(found["cifar10"], options.out / "metrics.png")
    command = " ".join(["python -m launch reproduce metrics", *options_of(options, Check(), without=("out",))])
    record = {"command": command, "environment": {k: v for k, v in environment().items() if k != "argv"}}
    numbers = {name: {label: to_json(results) for label, results in of.items()} for name, of in found.items()}
    write_json(options.out / "metrics.json", record | {"results": numbers})
    write_text(options.out / "metrics.md", page(record, found))
    print(options.out / "metrics.md")


def _bar(label: str, count: int) -> Any:
    from tqdm import tqdm

    return tqdm(desc=label, total=count, unit="image", disable=None, leave=False, delay=2).update


def sets(name: str, test: np.ndarray) -> dict[str, Images]:
    """The judged sets of uint8 [n, h, w, c] test images, by their names in CHAINS."""
    rng = np.random.Generator(np.random.Philox(0))
    out = {"test": test}
    if name == "mnist":
        out["noise"] = rng.integers(0, 256, test.shape, np.uint8)
    else:
        unit = from_uint8(test)
        for label, px in zip(CHAINS[name][0][1:], BLUR_PX, strict=True):
            out[label] = to_uint8(scipy.ndimage.gaussian_filter(unit, (0, px, px, 0)))
        noise = rng.standard_normal(test.shape, np.float32)
        for label, sd in zip(CHAINS[name][1][1:], NOISE_SD, strict=True):
            out[label] = to_uint8(unit + noise * (sd / 127.5))
    return {label: of_array(images, f"{name}:test, {label}") for label, images in out.items()}


def badness(metric: str, value: float, held_out: float) -> float:
    """A number that grows as the metric says worse; `held_out` is what it says of unchanged test images."""
    return {"lower": value, "higher": -value, "as held-out": abs(value - held_out)}[BETTER[metric]]


def disorder(metric: str, chain: Sequence[str], results: dict[str, dict[str, Result]]) -> str:
    """The first step of the chain that the metric does not call worse, as `a, b`; empty where the order is right.

    BARELY is left out. A step between values that are both 0, the end of the range, is right: it cannot fall further.
    """
    chain = [label for label in chain if label not in BARELY]
    values = [next(r.value for key, r in results[label].items() if key.split(".")[0] == metric) for label in chain]
    bad = [badness(metric, value, values[0]) for value in values]
    for i in range(len(chain) - 1):
        at_floor = BETTER[metric] != "lower" and values[i] == values[i + 1] == 0
        if not at_floor and not bad[i + 1] > bad[i]:
            return f"{chain[i]}, {chain[i + 1]}"
    return ""


def page(record: dict[str, Any], found: dict[str, dict[str, dict[str, Result]]]) -> str:
    env = record["environment"]
    lines = [
        "# Metrics on real images that get worse",
        "",
        f"    {record['command']}",
        "",
        f"{env['utc_start'][:10]}, {env['cores']} CPU cores ({env['devices'][0]}), jax {env['versions']['jax']}, "
        f"Python {env['python']}, commit {(env['git_commit'] or 'unknown')[:10]}. All numbers and their protocols: "
        "metrics.json.",
        "",
        "Reference: all training images. Judged: test images as they are, blurred (Gaussian, standard deviation in "
        "pixels) or with Gaussian noise (standard deviation of 255), rounded to 8 bits; for MNIST also uniform noise "
        "instead. Features are those of our own small classifiers, so these are distances of their own kind: no "
        "number compares with a published FID. ± is one standard deviation, of what metrics.json says. *Order*: "
        "whether every step from left to right is called worse (copying: further from that of the test images), or is "
        "at 0 already; "
        f"{' and '.join(BARELY)} do not count: they are there to show which metrics see that little.",
    ]
    for name, results in found.items():
        labels = list(results)
        lines += ["", f"## {NAMES[name]}", "", f"| metric | better | {' | '.join(labels)} | order |"]
        lines.append("|" + "---|" * (len(labels) + 3))
        for key in results["test"]:
            metric = key.split(".")[0]
            wrong = [w for w in (disorder(metric, chain, results) for chain in CHAINS[name]) if w]
            cells = [number(results[label][key].value, results[label][key].uncertainty) for label in labels]
            verdict = "right" if not wrong else "wrong: " + "; ".join(wrong)
            lines.append(f"| {key} | {BETTER[metric]} | {' | '.join(cells)} | {verdict} |")
        protocol = results["test"][key].protocol
        lines += ["", f"{protocol.n_real} real and {protocol.n_generated} judged images; {protocol.features}, weights "
                  f"{protocol.weights_sha256[:12]}, {protocol.preprocessing}."]  # fmt: skip
    lines += ["", f"![{NAMES['cifar10']}: every metric as blur or noise grows](metrics.png)"]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, Result]], path: Path) -> Path:
    """One panel per metric: its value along both chains, with error bars of two standard deviations."""
    from lib.plot import COLORS, panels, save

    keys = list(results["test"])
    figure, axes = panels(2, -(-len(keys) // 2), width=2.9, height=2.5)
    for ax, key in zip(axes.flat, keys, strict=False):
        for color, marker, chain in zip(COLORS, "os", CHAINS["cifar10"], strict=False):
            values = [results[label][key].value for label in chain]
            bars = [2 * results[label][key].uncertainty for label in chain]
            label = chain[1].split()[0]
            ax.errorbar(range(len(chain)), values, bars, label=label, color=color, marker=marker, ms=4, capsize=2)
        metric, test = key.split(".")[0], results["test"][key]
        if metric in ("fid", "kid"):
            # a whole power of ten, or its ticks crowd around zero
            noise = max(abs(test.value), 2 * test.uncertainty, 1e-9)
            ax.set_yscale("symlog", linthresh=10.0 ** np.ceil(np.log10(noise)))
        ax.set_title(f"{metric} ({BETTER[metric]}{' is better' if metric != 'copying' else ''})")
        ax.set_xticks(range(5), ["none", "barely", "weak", "medium", "strong"], fontsize=7)
    axes[0, 0].legend()
    net = results["test"][keys[0]].protocol.features
    figure.suptitle(f"{NAMES['cifar10']}, test against training images, features of {net}", fontsize=11)
    return save(figure, path)
