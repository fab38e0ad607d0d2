"""`python -m launch.bench`: benchmarks one after the other, and the page of their ratios, docs/results/speed.md.

Run it on a machine that does nothing else. The page shows all benchmarks whose JSON lies in the folder; those asked for
by `--only` are run anew, all others where there is none of theirs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lib.config import parse
from lib.process import UserError, command
from lib.run import read_json, write_text

Name = Literal["convolution", "hnn", "ncsn", "inception", "stylize", "gan", "scaling"]
BENCHMARKS: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class Bench:
    """Measure everything beside PyTorch and write the page of ratios."""

    only: tuple[Name, ...] = ()
    """measure these anew, and nothing else (default: what is not measured yet)"""
    runs: Path = Path("docs/results/speed")
    """folder for the JSON of each benchmark"""
    out: Path = Path("docs/results/speed.md")
    """the page"""


def main(argv: Sequence[str]) -> None:
    options = parse(Bench(), argv, "python -m launch.bench")
    files = {name: options.runs / f"{name}.json" for name in BENCHMARKS}
    for name in options.only or [name for name, file in files.items() if not file.exists()]:
        _measure(name, files[name])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, page({name: read_json(file) for name, file in files.items() if file.exists()}))
    print(options.out)


def _measure(name: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    words = [f"launch.bench.{name}", "--json", str(file), *(["--large"] if name == "stylize" else [])]
    status = subprocess.run([sys.executable, "-m", *words], check=False).returncode
    if status:
        raise UserError(f"python -m launch.bench.{name} failed with exit code {status}")


def page(results: Mapping[str, dict[str, Any]]) -> str:
    """The Markdown page of the benchmarks' JSON, those that there are."""
    lines = [
        "# Speed beside PyTorch",
        "",
        "    python -m launch.bench",
        "",
        "Rounds of both sides alternate on the same data; each is warmed up; medians. Ratios above 1: ours is faster.",
        "",
    ]
    for name in (name for name in BENCHMARKS if name in results):
        title, *section = _SECTIONS[name](results[name])
        lines += [title, "", _measured(results[name]), *section]
    return "\n".join(lines)


def _measured(r: dict[str, Any]) -> str:
    """When, and on what."""
    environment = r["environment"]
    torch = r.get("torch") or next((p["torch"] for p in r.get("problems", {}).values()), None)
    versions = [f"jax {environment['versions']['jax']}", *([f"torch {torch}"] if torch else [])]
    return (
        f"{environment['utc_start'][:10]}, {environment['cores']} CPU cores, {', '.join(versions)}, "
        f"Python {environment['python']}."
    )


def _convolution(r: dict[str, Any]) -> list[str]:
    lines = [
        "## Convolutions",
        "",
        "One SGD step of eight residual 3x3 convolutions, 64 channels, 28x28, batch 64, in chunks of "
        f"{r['steps_per_round']} steps; PyTorch with {r['cores']} threads.",
        "",
        "| variant | ms per step | ratio |",
        "|---|---|---|",
    ]
    ours = r["variants"]["ours"]["median_ms"]
    lines += [f"| {name} | {v['median_ms']:.0f} | {v['median_ms'] / ours:.2f} |" for name, v in r["variants"].items()]
    return [*lines, ""]


def _hnn(tasks: dict[str, Any]) -> list[str]:
    lines = [
        "## Hamiltonian networks",
        "",
        "Training by the original recipe. *As shipped*: PyTorch does all that the authors' loop does in a step, also a "
        "test pass and gradients that nobody uses; *lean*: without those. The faster of one and two threads counts.",
        "",
        "| task | model | ours, steps/s | PyTorch as shipped | ratio | PyTorch lean | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, results in tasks.items():
        for model, r in results["training"].items():
            ours = r["ours"]["median_steps_per_s"]
            shipped, lean = r["ratio_as_shipped"], r["ratio_lean"]
            cells = [task, model, f"{ours:.0f}", f"{ours / shipped:.0f}", f"{shipped:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{ours / lean:.0f}", f"{lean:.2f}"]) + " |")
    lines += [
        "",
        "The notebook's 15 evaluation rollouts of both models, ours from before tracing to the paths on the host:",
        "",
        "| task | ours with compilation, s | compiled, s | PyTorch and SciPy, s | ratio with compilation |",
        "|---|---|---|---|---|",
    ]
    for task, results in tasks.items():
        r = results["rollouts"]
        theirs = min(r["torch_1"]["median_s"], r["torch_2"]["median_s"])
        cells = [f"{r[name]['median_s']:.3f}" for name in ("ours", "ours_compiled")]
        lines.append(f"| {task} | {' | '.join(cells)} | {theirs:.2f} | {r['ratio']:.1f} |")
    for task, results in tasks.items():
        if "time_to_loss" in results:
            r = results["time_to_loss"]
            lines += [
                "",
                f"Time to {task}'s published test loss, {r['target']:.4e}: ours {r['ours']['median_s']:.2f} s "
                f"({r['ours_steps']} steps; {r['ours_with_compilation']['median_s']:.2f} s with compilation), PyTorch "
                f"lean {r['torch_s']:.1f} s ({r['torch_steps']} steps): {r['ratio']:.1f} times shorter, "
                f"{r['ratio_with_compilation']:.1f} with compilation.",
            ]
    return [*lines, ""]


NETWORKS = {
    "mlp": "MLP, annealed Langevin",
    "unet": "EDM's U-Net, Heun's method",
    "refinenet": "NCSN's RefineNet, annealed Langevin",
}


def _ncsn(r: dict[str, Any]) -> list[str]:
    lines = [
        "## Sampling from score networks",
        "",
        "The whole chain as one program, the same steps compiled and called from Python, both with the samples spread "
        f"over {r['cores']} CPU devices, and PyTorch, eager, with {r['cores']} threads; random weights, the same on "
        "all sides. First calls include compilation; peak memory is that of a process with this variant alone. The "
        "published code of NCSN and of score-based SDEs gives the network the noise level of every sample; with *one "
        "level*, as in EDM's, what depends on it alone is computed once.",
        "",
        "| network | variant | samples/s | chain / it | first call, s | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, problem in r["problems"].items():
        variants = problem["variants"]
        for variant, v in variants.items():
            ratio = variants["chain"]["samples_per_s"] / v["samples_per_s"]
            cells = [f"{v['samples_per_s']:.1f}", f"{ratio:.2f}", f"{v['first_s']:.1f}", f"{v['peak_mib']:.0f}"]
            lines.append("| " + " | ".join([NETWORKS[name], variant, *cells]) + " |")
    lines += [
        "",
        "The chain beside as many evaluations of its network, called one by one and as one program:",
        "",
        "| network | parameters | samples | evaluations of each | chain / called | chain / one program |",
        "|---|---|---|---|---|---|",
    ]
    for name, p in r["problems"].items():
        counts = [f"{p[key]:,}" for key in ("parameters", "count", "evaluations")]
        ratios = [f"{p[key]:.2f}" for key in ("chain_per_evaluations", "chain_per_compiled_evaluations")]
        lines.append("| " + " | ".join([NETWORKS[name], *counts, *ratios]) + " |")
    return [*lines, ""]


def _inception(r: dict[str, Any]) -> list[str]:
    lines = [
        "## Inception features",
        "",
        f"uint8 images to 2048 features at 299 px, batch {r['batch']}, the same random weights on both sides; PyTorch "
        f"with {r['cores']} threads on a CPU.",
        "",
        "| variant | features per s | ours / it |",
        "|---|---|---|",
    ]
    ours = r["variants"]["ours"]["median_per_s"]
    lines += [
        f"| {name} | {v['median_per_s']:.2f} | {ours / v['median_per_s']:.2f} |" for name, v in r["variants"].items()
    ]
    return [*lines, ""]


OPTIMIZERS = {"lbfgs": "L-BFGS", "adam": "Adam"}


def _stylize(r: dict[str, Any]) -> list[str]:
    lines = [
        "## Style transfer",
        "",
        "One image through the feed-forward network, beside fast_neural_style of PyTorch's examples with the same "
        f"weights; the rows of the image spread over {r['cores']} CPU devices, PyTorch with {r['cores']} threads, the "
        "faster of contiguous and channels_last. First calls include compilation; peak memory is that of a process "
        "with this variant alone.",
        "",
        "| channels | size, px | ours, images/s | PyTorch | ratio | first call, s | peak memory, MiB | PyTorch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    problems = r["problems"].values()
    for p in (p for p in problems if p["problem"]["kind"] == "network"):
        lines.append(_row([str(p["problem"]["width"]), str(p["problem"]["size_px"])], p))
    lines += [
        "",
        "Optimisation of pixels: value and gradient of Gatys' objective within L-BFGS (PyTorch's searches along no "
        "line, so evaluations are counted) and Adam, all iterations as one program:",
        "",
        "| optimiser | size, px | layers to | ours, evaluations/s | PyTorch | ratio | first run, s | memory, MiB | "
        "PyTorch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in (p for p in problems if p["problem"]["kind"] in OPTIMIZERS):
        recipe = p["problem"]
        lines.append(_row([OPTIMIZERS[recipe["kind"]], str(recipe["size_px"]), recipe["layers"][-1]], p))
    if r["large"]:
        size = r["large"]["tiles"]["problem"]["size_px"]
        gib = {kind: f"{found['peak_gib']:.1f} GiB" for kind, found in r["large"].items()}
        lines += [
            "",
            f"Peak memory at {size} x {size} pixels: {gib['tiles']} for a step of Adam in tiles of "
            f"{r['large']['tiles']['problem']['tile_px']}, {gib['network']} for the network of "
            f"{r['large']['network']['problem']['width']} channels.",
        ]
    return [*lines, ""]


def _row(first: list[str], p: dict[str, Any]) -> str:
    variants = p["variants"]
    ours = variants["ours"]
    theirs = min((v for name, v in variants.items() if name != "ours"), key=lambda v: v["median_s"])
    rates = [f"{ours['per_s']:.2f}", f"{theirs['per_s']:.2f}", f"{p['ratio']:.2f}"]
    costs = [f"{ours['first_s']:.1f}", f"{ours['peak_mib']:.0f}", f"{theirs['peak_mib']:.0f}"]
    return "| " + " | ".join([*first, *rates, *costs]) + " |"


GANS = {"dcgan": "DCGAN", "sngan": "SNGAN's CNN", "wgan_gp": "WGAN-GP"}


def _gan(r: dict[str, Any]) -> list[str]:
    lines = [
        "## Training of GANs",
        "",
        "Cycles of critic and generator on 28x28 images, ours as one program; PyTorch, eager, with "
        f"{r['cores']} threads, the faster of contiguous and channels_last. Losses and gradients of both players are "
        "compared beforehand. First calls include compilation.",
        "",
        "| network | parameters | batch | critic per generator | ours, cycles/s | PyTorch | ratio | first call, s | "
        "memory, MiB | PyTorch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, p in r["problems"].items():
        recipe = p["problem"]
        first = [GANS[name], f"{recipe['parameters']:,}", str(recipe["batch_size"]), str(recipe["n_critic"])]
        lines.append(_row(first, p))
    return [*lines, ""]


def _scaling(r: dict[str, Any]) -> list[str]:
    step_ms = {kind: f"{1e3 * seconds:.0f}" for kind, seconds in r["step_s"].items()}
    predicted_ms = {kind: f"{1e3 * seconds:.0f}" for kind, seconds in r["predicted_s"].items()}
    errors = {kind: f"{error:+.0%}" for kind, error in r["prediction_error"].items()}
    return [
        "## Processes",
        "",
        f"EDM's U-Net of 32 channels on CIFAR-10's images, {r['images']} of them in each process, which has one core. "
        f"*Weak scaling*, a step of one process over a step of two: {r['weak_scaling']:.2f}. Predicted as by "
        f"`launch plan`, from {r['flops_per_s'] / 1e9:.1f} GFLOP/s, measured with half as many images, and "
        f"{r['all_reduce_bytes'] / 2**20:.1f} MiB reduced in {1e3 * r['all_reduce_s']:.1f} ms.",
        "",
        "| processes | ms per step | predicted | error |",
        "|---|---|---|---|",
        f"| 1 | {step_ms['one']} | {predicted_ms['one']} | {errors['one']} |",
        f"| 2 | {step_ms['two']} | {predicted_ms['two']} | {errors['two']} |",
        "",
    ]


_SECTIONS = {
    "convolution": _convolution,
    "hnn": lambda r: _hnn(r["tasks"]),
    "ncsn": _ncsn,
    "inception": _inception,
    "stylize": _stylize,
    "gan": _gan,
    "scaling": _scaling,
}

if __name__ == "__main__":
    sys.exit(command(main))
