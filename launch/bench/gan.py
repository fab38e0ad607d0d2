"""Training of GANs, ours and PyTorch's, on CPUs or a GPU: cycles of critic and generator per second.

    python -m launch.bench.gan [--problems dcgan sngan wgan_gp] [--seeds N] [--rounds N] [--json FILE]

Networks of 28x28 images with the recipes of the presets mnist_dcgan, mnist_sngan and mnist_wgan_gp: batch norm in both
players; spectral norm in the critic; five updates of a critic with a penalty on its gradient, whose gradient is of
second order, for every one of the generator. Ours is one program for all cycles of a round, the batch spread over one
device per core, with the data on the device; PyTorch runs eagerly with a thread per core, contiguous and channels_last,
of which the faster one counts, and keeps an average of the generator as ours does.

With --seeds, ours also trains so many generators of different seeds at once: on a GPU as one batched program, on CPUs
one after the other.

Both begin with the same weights; losses and gradients of both players on one batch are compared, in double precision.
Every variant is a process of its own, which sleeps while the others work; rounds alternate between them, and medians
count. The first call of each includes tracing and compiling (no compilation cache is used).
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

CYCLES = {"dcgan": 20, "sngan": 10, "wgan_gp": 5}
TORCH_WAYS: dict[str, dict[str, bool]] = {"torch contiguous": {}, "torch channels_last": {"channels_last": True}}
LIMITS = dict.fromkeys(("critic_loss", "generator_loss", "critic gradient", "generator gradient"), 1e-8)
"""largest differences, relative, in double precision"""
_ON_GPU = 20  # times as many cycles a round, which would be too short to be timed
BARS = {"cpu": 1.0, "gpu": 2.0}
SEEDS_BAR = 2.0  # on a GPU: four seeds at once in at most twice the time of one
PAUSE_S = 0.3  # before a round: OpenMP's threads, which spin for a while after their work, are asleep by then
DESCRIPTION = "Training of GANs: cycles of critic and generator against PyTorch."

Numbers = dict[str, Any]


def measure(problem: str, cycles: int, folder: Path, rounds: int, seeds: int = 1, **changes: Any) -> Numbers:
    """All numbers of one problem; `changes` are fields of its networks and its training with other values."""
    weights, record = str(folder / f"{problem}.npz"), str(folder / f"{problem}_record.npz")
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Child("gan.timing"))
        theirs = {name: stack.enter_context(Child("launch.bench.gan_torch")) for name in TORCH_WAYS}
        recipe = ours.ask("prepare", problem=problem, weights=weights, **changes)
        cycles *= _ON_GPU if recipe["backend"] == "gpu" else 1
        where = {"threads": cores(), "device": torch_device(recipe["backend"])}
        for name, child in theirs.items():
            answer = child.ask("prepare", problem=recipe, weights=weights, **where, **TORCH_WAYS[name])
        ours.ask("record", out=record)
        differences = {name: child.ask("compare", record=record) for name, child in theirs.items()}
        variants = {"ours": ours, **theirs}
        results: Numbers = {name: {"seconds": []} for name in variants}
        for name, child in variants.items():
            time.sleep(PAUSE_S)
            results[name]["first_s"] = child.ask("run", cycles=cycles)["seconds"]
        for _ in range(rounds):
            for name, child in variants.items():
                time.sleep(PAUSE_S)
                results[name]["seconds"].append(child.ask("run", cycles=cycles)["seconds"])
        for name, child in variants.items():
            results[name]["peak_mib"] = child.ask("memory")["peak_mib"]
        repeats = rounds + 1 if seeds > 1 else 0  # the first compiles
        together = [ours.ask("run", cycles=cycles, seeds=seeds)["seconds"] for _ in range(repeats)]
    for r in results.values():
        r["median_s"] = statistics.median(r["seconds"])
        r["per_s"] = cycles / r["median_s"]
    found: Numbers = {
        "problem": recipe,
        "cycles": cycles,
        "variants": results,
        "ratio": min(results[name]["median_s"] for name in theirs) / results["ours"]["median_s"],
        "differences": differences,
        "torch": answer["torch"],
    }
    if together:
        found |= {"seeds": seeds, "seeds_over_one": statistics.median(together[1:]) / results["ours"]["median_s"]}
    return found


def table(name: str, r: Numbers) -> str:
    """What was measured for one problem, for people."""
    lines = [
        f"{name}: {r['problem']['parameters']} parameters, batch {r['problem']['batch_size']}, "
        f"{r['problem']['n_critic']} updates of the critic per cycle",
        f"  {'':22}{'cycles/s':>10}{'first s':>9}{'peak MiB':>10}",
    ]
    for variant, v in r["variants"].items():
        lines.append(f"  {variant:22}{v['per_s']:10.2f}{v['first_s']:9.1f}{v['peak_mib']:10.0f}")
    worst = {what: max(d[what] for d in r["differences"].values()) for what in LIMITS}
    differences = ", ".join(f"{what} {value:.1e}" for what, value in worst.items())
    bar = BARS[r["problem"]["backend"]]
    lines.append(f"  {r['ratio']:.2f} times PyTorch (bar {bar:g}); differences: {differences}")
    if "seeds" in r:
        ratio = f"{r['seeds_over_one']:.2f} times the time of one (bar of four on a GPU: {SEEDS_BAR:g})"
        lines.append(f"  {r['seeds']} seeds in {ratio}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.bench.gan", description=DESCRIPTION)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--problems", nargs="+", choices=tuple(CYCLES), default=tuple(CYCLES), help="what to measure")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per variant")
    parser.add_argument("--seeds", type=int, default=1, help="train so many at once, too")
    args = parser.parse_args(argv)
    if min(args.rounds, args.seeds) < 1:
        raise UserError("--rounds and --seeds must be at least 1")
    need_torch()
    load_before = os.getloadavg()
    results: dict[str, Numbers] = {}
    with tempfile.TemporaryDirectory() as folder:
        for problem in args.problems:
            results[problem] = measure(problem, CYCLES[problem], Path(folder), args.rounds, args.seeds)
            print(table(problem, results[problem]), flush=True)
    if args.json:
        loads = {"load_average_before": load_before, "load_average_after": os.getloadavg()}
        record = {"problems": results, "rounds": args.rounds, "cores": cores(), **loads}
        write_json(args.json, {**record, "environment": environment()})
    check_same(results, LIMITS)


if __name__ == "__main__":
    sys.exit(command(main))
