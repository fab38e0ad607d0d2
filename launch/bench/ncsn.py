"""Sampling from score networks: the compiled chain, the same steps called from Python, and PyTorch, on the CPU.

    python -m launch.bench.ncsn [--problems mlp unet refinenet] [--rounds N] [--json FILE]

Three networks of different size, with random weights: an MLP on two numbers, sampled by a thousand steps of annealed
Langevin dynamics; a U-Net on 28x28 images, by 18 steps of Heun's method as EDM has it; NCSN's RefineNet on 28x28
images, by annealed Langevin dynamics again. *Chain* is one program for all steps, *loop* the same steps, each one
compiled, called from Python; both have the samples spread over one device per core. PyTorch runs eagerly in inference
mode with a thread per core and its own random numbers, in two ways: images contiguous and channels_last, of which the
faster one counts; the MLP with the noise level for every sample, as the code of NCSN and of the SDE paper has it, which
is the one to compare with, and once for all samples, as EDM's code has it and ours, so that what depends on it alone is
computed once per step.

All draw the same number of samples with the same weights; once PyTorch also repeats a chain with our start and our
noise, and must end at our samples. Every variant is a process of its own, which sleeps while the others work, so that
peak memory is that of the variant; rounds alternate between them, and medians count. The first call of each includes
tracing and compiling (no compilation cache is used). Beside them: the time of as many evaluations of the network as the
chain has, called one by one, and as one program.
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

from launch.bench.rounds import need_torch
from lib.child import Child
from lib.process import UserError, command
from lib.run import environment, write_json
from lib.shard import cores

PROBLEMS = ("mlp", "unet", "refinenet")
TORCH_BARS = {"mlp": 3.0, "unet": 1.0, "refinenet": 1.0}
EVALUATIONS_BAR = 1.1
MOST_CALLS = {"mlp": 1000, "unet": 10, "refinenet": 10}  # evaluations that are timed beside a chain
TORCH_WAYS: dict[str, dict[str, dict[str, bool]]] = {
    "mlp": {"torch, level per sample": {"per_sample": True}, "torch, one level": {}},
    "images": {"torch contiguous": {}, "torch channels_last": {"channels_last": True}},
}
LARGEST_DIFFERENCE = 1e-3  # of samples, relative to the largest: rounding, through up to a thousand steps
PAUSE_S = 0.3  # before a round: OpenMP's threads, which spin for a while after their work, are asleep by then
DESCRIPTION = "Sampling from score networks: the compiled chain against jitted steps and PyTorch."

Numbers = dict[str, Any]


def measure(problem: str, folder: Path, rounds: int, **changes: Any) -> Numbers:
    """All numbers of one problem; `changes` are fields of `ncsn.timing.Problem` with other values."""
    weights = [str(folder / f"{problem}_{i}.npz") for i in range(2)]
    record = str(folder / f"{problem}_record.npz")
    with contextlib.ExitStack() as stack:
        ours = {name: stack.enter_context(Child("ncsn.timing", problem)) for name in ("chain", "loop")}
        ways = TORCH_WAYS["mlp" if problem == "mlp" else "images"]
        theirs = {name: stack.enter_context(Child("launch.bench.ncsn_torch")) for name in ways}
        for child, file in zip(ours.values(), weights, strict=True):
            recipe = child.ask("prepare", problem=problem, weights=file, **changes)
        for name, child in theirs.items():
            answer = child.ask("prepare", problem=recipe, weights=weights[0], threads=cores(), **ways[name])
        if recipe["backend"] != "cpu":
            raise UserError("this benchmark compares CPUs: run it with JAX_PLATFORMS=cpu")
        draws = {"chain": (ours["chain"], "chain"), "loop": (ours["loop"], "loop")}
        draws |= {name: (child, "chain") for name, child in theirs.items()}
        results: Numbers = {name: {"seconds": []} for name in draws}
        for name, (child, do) in draws.items():
            time.sleep(PAUSE_S)
            results[name]["first_s"] = child.ask(do)["seconds"]
            results[name]["peak_mib"] = child.ask("memory")["peak_mib"]
        calls = min(recipe["evaluations"], MOST_CALLS[problem])
        evaluations = [ours["loop"].ask("evaluations", calls=calls)]
        for _ in range(rounds):
            for name, (child, do) in draws.items():
                time.sleep(PAUSE_S)
                results[name]["seconds"].append(child.ask(do)["seconds"])
            time.sleep(PAUSE_S)
            evaluations.append(ours["loop"].ask("evaluations", calls=calls))
        recorded = ours["chain"].ask("record", out=record)
        differences = {name: child.ask("repeat", record=record)["difference"] for name, child in theirs.items()}
    for r in results.values():
        r["median_s"] = statistics.median(r["seconds"])
        r["samples_per_s"] = recipe["count"] / r["median_s"]
    chain_s = results["chain"]["median_s"]
    published = [name for name, way in ways.items() if way.get("per_sample")] or list(ways)
    torch_s = min(results[name]["median_s"] for name in published)
    per_chain = {
        key: recipe["evaluations"] / calls * statistics.median(e[f"{key}_seconds"] for e in evaluations[1:])
        for key in ("called", "compiled")
    }
    return {
        **{name: recipe[name] for name in ("parameters", "count", "evaluations", "fields", "shape")},
        "variants": results,
        "evaluations_called_s": per_chain["called"],
        "evaluations_compiled_s": per_chain["compiled"],
        "ratio_torch": torch_s / chain_s,
        "ratio_loop": results["loop"]["median_s"] / chain_s,
        "chain_per_evaluations": chain_s / per_chain["called"],
        "chain_per_compiled_evaluations": chain_s / per_chain["compiled"],
        "differences": {**differences, "loop": recorded["loop_difference"]},
        "torch": answer["torch"],
    }


def table(problem: str, r: Numbers) -> str:
    """What was measured for one problem, for people."""
    shape = "x".join(map(str, r["shape"]))
    lines = [
        f"{problem}: {r['parameters']} parameters, {r['count']} samples of {shape}, {r['evaluations']} evaluations",
        f"  {'':24}{'samples/s':>10}{'median s':>10}{'first s':>9}{'peak MiB':>10}",
    ]
    for name, v in r["variants"].items():
        columns = f"{v['samples_per_s']:10.1f}{v['median_s']:10.3f}{v['first_s']:9.2f}{v['peak_mib']:10.0f}"
        lines.append(f"  {name:24}{columns}")
    lines += [
        f"  {r['ratio_torch']:.2f} times PyTorch (bar {TORCH_BARS[problem]:g}), {r['ratio_loop']:.2f} times the loop",
        f"  the chain takes {r['chain_per_evaluations']:.2f} times its evaluations called one by one (bar at most "
        f"{EVALUATIONS_BAR:g}), {r['chain_per_compiled_evaluations']:.2f} times those of one program",
        "  largest relative difference of samples: "
        + ", ".join(f"{name} {value:.1e}" for name, value in r["differences"].items()),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.bench.ncsn", description=DESCRIPTION)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS, help="networks to measure")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds per variant")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    need_torch()
    load_before = os.getloadavg()
    results: Numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        for problem in args.problems:
            results[problem] = measure(problem, Path(folder), args.rounds)
            print(table(problem, results[problem]), flush=True)
    if args.json:
        loads = {"load_average_before": load_before, "load_average_after": os.getloadavg()}
        record = {"problems": results, "rounds": args.rounds, "cores": cores(), **loads}
        write_json(args.json, {**record, "environment": environment()})
    worst = max(max(r["differences"].values()) for r in results.values())
    if not worst <= LARGEST_DIFFERENCE:
        raise UserError(f"the samples differ by {worst:.1e}: the variants did not do the same work")


if __name__ == "__main__":
    sys.exit(command(main))
