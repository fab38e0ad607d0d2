"""Style transfer, ours and PyTorch's, on CPUs or a GPU: images through a network, and optimisation of pixels.

    python -m launch.bench.stylize [--parts networks gatys] [--large] [--rounds N] [--json FILE]

*Networks*: one image through the feed-forward network, from NumPy to NumPy, in two widths and three sizes; PyTorch has
it as fast_neural_style of its examples does, in inference mode. *Gatys*: value and gradient of the objective of Gatys
et al. with VGG-19 (what of it is among the data; the package's own small network where there is none) in L-BFGS and in
Adam, in seconds per evaluation, since the two implementations of L-BFGS evaluate differently often: ours searches along
a line, torch.optim.LBFGS by default does not. Ours is one program for all iterations, and includes one more value at
the end. *Large*, only where asked for: the memory of one step of Adam in tiles, and of the narrower network, at
4096 x 4096, with the seconds of that first call.

Ours spreads the rows of the image over one device per core; PyTorch runs eagerly with a thread per core, contiguous and
channels_last, of which the faster one counts. Weights and images are the same on both sides, random but for VGG, and
what both compute is compared. Every variant is a process of its own, which sleeps while the others work, so that
peak memory is that of the variant; rounds alternate between them, and medians count. The first call of each includes
tracing and compiling (no compilation cache is used).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench.rounds import check_same, need_torch, torch_device
from lib.child import Child
from lib.process import UserError, command
from lib.run import environment, write_json
from lib.shard import cores

PARTS = ("networks", "gatys")
TORCH_WAYS: dict[str, dict[str, bool]] = {"torch contiguous": {}, "torch channels_last": {"channels_last": True}}
LIMITS = {"output": 1e-4, "value": 1e-4, "gradient": 1e-3, "value after Adam": 1e-3}
"""largest differences: of pixels, which span 2; relative ones of objectives and, in the Euclidean norm, of gradients"""
_TF32 = 100.0  # times as much on a GPU, whose products round to ten bits on both sides
LARGE_PX = 4096
PAUSE_S = 0.3  # before a round: OpenMP's threads, which spin for a while after their work, are asleep by then
DESCRIPTION = "Style transfer: feed-forward networks and optimisation of pixels against PyTorch."

Numbers = dict[str, Any]


def measure(problem: Numbers, calls: int, folder: Path, rounds: int) -> Numbers:
    """All numbers of one problem (fields of `stylize.timing.Problem`), with so many calls a round."""
    file, record = str(folder / "problem.npz"), str(folder / "record.npz")
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Child("stylize.timing"))
        theirs = {name: stack.enter_context(Child("launch.bench.stylize_torch")) for name in TORCH_WAYS}
        recipe = ours.ask("prepare", file=file, **problem)
        where = {"threads": cores(), "device": torch_device(recipe["backend"])}
        for name, child in theirs.items():
            answer = child.ask("prepare", problem=recipe, file=file, **where, **TORCH_WAYS[name])
        variants = {"ours": ours, **theirs}
        results: Numbers = {name: {"seconds": []} for name in variants}
        for name, child in variants.items():
            time.sleep(PAUSE_S)
            results[name]["first_s"] = child.ask("run", calls=1)["seconds"]
            results[name]["peak_mib"] = child.ask("memory")["peak_mib"]
        for _ in range(rounds):
            for name, child in variants.items():
                time.sleep(PAUSE_S)
                run = child.ask("run", calls=calls)
                results[name]["seconds"].append(run["seconds"] / run["evaluations"])
                results[name] |= {"evaluations": run["evaluations"], "value": run["value"]}
        ours.ask("record", out=record)
        differences = {name: child.ask("compare", record=record) for name, child in theirs.items()}
    if recipe["kind"] == "adam":
        for name, found in differences.items():
            found["value after Adam"] = abs(results[name]["value"] / results["ours"]["value"] - 1)
    for r in results.values():
        r["median_s"] = statistics.median(r["seconds"])
        r["per_s"] = 1 / r["median_s"]
    return {
        "problem": recipe,
        "calls": calls,
        "variants": results,
        "ratio": min(results[name]["median_s"] for name in theirs) / results["ours"]["median_s"],
        "differences": differences,
        "torch": answer["torch"],
    }


def problems(
    parts: Sequence[str], widths: Sequence[int], sizes_px: Sequence[int], gatys_px: int, iterations: int
) -> dict[str, tuple[Numbers, int]]:
    """Fields of the problem and calls a round, so many that a round of a network is not too short to be timed."""
    chosen: dict[str, tuple[Numbers, int]] = {}
    if "networks" in parts:
        for width in widths:
            for size in sizes_px:
                calls = min(max((max(sizes_px) // size) ** 2, 1), 16)
                problem = {"kind": "network", "size_px": size, "width": width}
                chosen[f"network {width}, {size} px"] = (problem, calls)
    if "gatys" in parts:
        for kind in ("lbfgs", "adam"):
            chosen[f"{kind}, {gatys_px} px"] = ({"kind": kind, "size_px": gatys_px, "iterations": iterations}, 1)
    return chosen


def measure_large(problem: Numbers) -> Numbers:
    """Peak memory and seconds of one call in a process of its own, compilation included."""
    with Child("stylize.timing") as child:
        recipe = child.ask("prepare", **problem)
        run = child.ask("run", calls=1)
        return {"problem": recipe, "peak_gib": child.ask("memory")["peak_mib"] / 1024, "first_s": run["seconds"]}


def table(name: str, r: Numbers) -> str:
    """What was measured for one problem, for people."""
    unit = "images/s" if r["problem"]["kind"] == "network" else "evaluations/s"
    lines = [name, f"  {'':22}{unit:>14}{'median s':>10}{'first s':>9}{'peak MiB':>10}"]
    for variant, v in r["variants"].items():
        lines.append(f"  {variant:22}{v['per_s']:14.3f}{v['median_s']:10.3f}{v['first_s']:9.2f}{v['peak_mib']:10.0f}")
    worst = {what: max(d[what] for d in r["differences"].values()) for what in next(iter(r["differences"].values()))}
    differences = ", ".join(f"{what} {value:.1e}" for what, value in worst.items())
    return "\n".join([*lines, f"  {r['ratio']:.2f} times PyTorch; largest differences: {differences}"])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.bench.stylize", description=DESCRIPTION)
    parser.add_argument("--json", "--out", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--widths", nargs="+", type=int, default=(16, 32), help="of the networks")
    parser.add_argument("--sizes", nargs="+", type=int, default=(256, 512, 1024), metavar="PX", help="of the images")
    parser.add_argument("--gatys", type=int, default=512, metavar="PX", help="size of the optimised image")
    parser.add_argument("--iterations", type=int, default=5, help="of an optimiser, in one round")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds per variant")
    parser.add_argument("--large", action="store_true", help=f"memory at {LARGE_PX} px too, which takes minutes")
    args = parser.parse_args(argv)
    if min(args.rounds, args.iterations, *args.widths) < 1 or min(args.gatys, *args.sizes) < 32:
        raise UserError("--rounds, --iterations and --widths must be at least 1, --sizes and --gatys 32")
    need_torch()
    load_before = os.getloadavg()
    results: dict[str, Numbers] = {}
    chosen = problems(args.parts, args.widths, args.sizes, args.gatys, args.iterations)
    with tempfile.TemporaryDirectory() as folder:
        for name, (problem, calls) in chosen.items():
            results[name] = measure(problem, calls, Path(folder), args.rounds)
            print(table(name, results[name]), flush=True)
    large: dict[str, Numbers] = {}
    if args.large:
        for kind in ("tiles", "network"):
            large[kind] = measure_large({"kind": kind, "size_px": LARGE_PX})
            r = large[kind]
            print(f"{kind}, {LARGE_PX} px: {r['peak_gib']:.2f} GiB, {r['first_s']:.1f} s", flush=True)
    if args.json:
        record = {"problems": results, "large": large, "rounds": args.rounds, "cores": cores()}
        loads = {"load_average_before": load_before, "load_average_after": os.getloadavg()}
        write_json(args.json, {**record, **loads, "environment": environment()})
    on_gpu = any(r["problem"]["backend"] == "gpu" for r in results.values())
    check_same(results, {what: limit * (_TF32 if on_gpu else 1) for what, limit in LIMITS.items()})


if __name__ == "__main__":
    sys.exit(command(main))
