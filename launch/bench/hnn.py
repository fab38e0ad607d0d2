"""Hamiltonian networks: this project against a PyTorch implementation of the original recipe, on the CPU.

    python -m launch.bench.hnn [--tasks spring pendulum two_body] [--rounds N] [--json FILE]

Three comparisons. *Training*: steps per second of the original's recipe, ours on one device per core where the batch
divides over them, PyTorch on one and two threads, with all that the authors' loop does in a step (as shipped: also a
test pass and gradients that nobody uses; the bar) and lean, without those; the faster number of threads counts.
*Rollouts*: the notebook's 15 trajectories of both models, PyTorch one at a time through SciPy at the notebook's
tolerance, ours in one program, timed from before tracing to the paths on the host; starting the process is in neither.
Both follow the same networks, trained here by PyTorch, and are compared with the same networks in float64 at a tight
tolerance. *Time to loss*: until two_body's published test loss, PyTorch's by the original recipe, ours by the preset's
with the shortest schedule of a fixed ladder that gets there.

Both sides work on the same data. Ours is measured in a child process that sleeps while PyTorch works; rounds alternate
between the two, each is warmed up, and medians count. No compilation cache is used.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.bench.rounds import need_torch
from lib.child import Child
from lib.process import UserError, command
from lib.run import environment, write_json

if TYPE_CHECKING:
    from torch import nn

TASKS = ("spring", "pendulum", "two_body")
MODELS = ("hnn", "baseline")
THREADS = (1, 2)
TRAINING_BARS = {"spring": 2.5, "pendulum": 2.5, "two_body": 4.0}
ROLLOUT_BAR = 15.0
TIME_TO_LOSS_BAR = 8.0
STEPS_PER_BLOCK = 100
BLOCKS_PER_ROUND = 3
PAUSE_S = 0.3  # before a block: OpenMP's threads, which spin for a while after their work, are asleep by then
ROLLOUT_TRAINING_STEPS = 2000
MAX_STEPS_TO_LOSS = 20_000
SCHEDULES = (800, 1000, 1200, 1400, 1600, 1800, 2000, 2500, 3000, 4000, 5000)
DESCRIPTION = "Hamiltonian networks: this project against PyTorch with the original recipe."

Numbers = dict[str, Any]


def spread(seconds: list[float], steps: int | None = None) -> Numbers:
    """Median and all values, as steps per second where `steps` is given, else in seconds."""
    if steps is None:
        return {"median_s": statistics.median(seconds), "seconds": seconds}
    rates = [steps / s for s in seconds]
    return {"median_steps_per_s": statistics.median(rates), "steps_per_s": rates}


def load(data: Path) -> list[np.ndarray]:
    """x, dx, x_test, dx_test as rows [n, 2n]."""
    with np.load(data) as file:
        arrays = [file[f"{part}_{name}"] for part in ("train", "test") for name in ("y", "dy")]
    return [array.reshape(-1, array.shape[-1]) for array in arrays]


def training(child: Child, arrays: list[np.ndarray], recipe: Numbers, model: str, rounds: int) -> Numbers:
    """Steps per second of every variant, and how many times faster ours is than the best of PyTorch."""
    import torch

    from launch.bench import hnn_torch

    def blocks(as_shipped: bool) -> Iterator[float]:
        return hnn_torch.timed_blocks(
            model,
            *arrays,
            batch_size=recipe["batch_size"],
            weight_decay=recipe["weight_decay"],
            seed=0,
            as_shipped=as_shipped,
            steps_per_block=STEPS_PER_BLOCK,
        )

    variants = {(threads, shipped): blocks(shipped) for threads in THREADS for shipped in (True, False)}
    for (threads, _), variant in variants.items():
        torch.set_num_threads(threads)
        next(variant)
    child.ask("train_block", model=model, steps=STEPS_PER_BLOCK)
    seconds: dict[Any, list[float]] = {key: [] for key in ("ours", *variants)}
    for _ in range(rounds * BLOCKS_PER_ROUND):
        time.sleep(PAUSE_S)
        seconds["ours"].append(child.ask("train_block", model=model, steps=STEPS_PER_BLOCK)["seconds"])
        for (threads, shipped), variant in variants.items():
            time.sleep(PAUSE_S)
            torch.set_num_threads(threads)
            seconds[threads, shipped].append(next(variant))
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    as_shipped = min(medians[threads, True] for threads in THREADS)
    lean = min(medians[threads, False] for threads in THREADS)
    results = {"ours": spread(seconds["ours"], STEPS_PER_BLOCK)}
    for threads, shipped in variants:
        name = f"torch_{threads}_thread{'s' * (threads > 1)}_{'as_shipped' if shipped else 'lean'}"
        results[name] = spread(seconds[threads, shipped], STEPS_PER_BLOCK)
    results["ratio_as_shipped"] = as_shipped / medians["ours"]
    results["ratio_lean"] = lean / medians["ours"]
    return results


def faster_threads(results: Numbers) -> int:
    """The number of threads with which lean PyTorch trained faster."""
    one, two = (results[f"torch_{name}_lean"]["median_steps_per_s"] for name in ("1_thread", "2_threads"))
    return 2 if two > one else 1


def trained(arrays: list[np.ndarray], recipe: Numbers, steps: int) -> dict[str, nn.Module]:
    """Both models after `steps` steps of the original's recipe."""
    from launch.bench import hnn_torch

    options = {"batch_size": recipe["batch_size"], "weight_decay": recipe["weight_decay"], "seed": 0}
    return {name: hnn_torch.train(name, *arrays, steps=steps, as_shipped=False, **options).model for name in MODELS}


def scipy_rollouts(models: dict[str, nn.Module], recipe: Numbers) -> dict[str, np.ndarray]:
    """Every model from every start as in the original's notebook, [n, points, 2n]."""
    from launch.bench import hnn_torch

    def one(model: nn.Module, start: np.ndarray, end: float) -> np.ndarray:
        times = np.linspace(0.0, end, recipe["points"])
        return hnn_torch.rollouts(model, start[None], (0.0, end), times, rtol=recipe["rtol"])

    starts = np.array(recipe["y0"])
    return {
        name: np.concatenate([one(model, start, end) for start, end in zip(starts, recipe["span"], strict=True)])
        for name, model in models.items()
    }


def rollouts(child: Child, models: dict[str, nn.Module], recipe: Numbers, folder: Path, rounds: int) -> Numbers:
    """Seconds for 15 trajectories of both models, and the errors of both sides against the reference."""
    import torch

    weights, ours, reference = (folder / f"{name}.npz" for name in ("weights", "ours", "reference"))
    np.savez(weights, **{f"{k}.{n}": p.numpy(force=True) for k, m in models.items() for n, p in m.named_parameters()})
    child.ask("reference", weights=str(weights), out=str(reference))
    child.ask("rollouts", weights=str(weights), out=str(ours))
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", "ours_compiled", "torch_1", "torch_2")}
    paths = scipy_rollouts(models, recipe)
    for _ in range(rounds):
        answer = child.ask("rollouts", weights=str(weights), out=str(ours))
        seconds["ours"].append(answer["seconds"])
        seconds["ours_compiled"].append(answer["seconds_compiled"])
        for threads in THREADS:
            torch.set_num_threads(threads)
            begin = time.perf_counter()
            paths = scipy_rollouts(models, recipe)
            seconds[f"torch_{threads}"].append(time.perf_counter() - begin)
    results: Numbers = {name: spread(values) for name, values in seconds.items()}
    fastest = min(results["torch_1"]["median_s"], results["torch_2"]["median_s"])
    results["ratio"] = fastest / results["ours"]["median_s"]
    results["ratio_compiled"] = fastest / results["ours_compiled"]["median_s"]
    with np.load(ours) as ours_paths, np.load(reference) as exact:
        for name in MODELS:
            for side, path in (("ours", ours_paths[name]), ("torch", paths[name])):
                error = path - exact[name]
                results[f"{name}_error_{side}"] = {
                    "rms": float(np.sqrt(np.mean(error**2))),
                    "max": float(np.max(np.abs(error))),
                }
    return results


def time_to_loss(child: Child, arrays: list[np.ndarray], recipe: Numbers, threads: int, rounds: int) -> Numbers:
    """Seconds until the test loss is at most the published one; lean PyTorch, once."""
    import torch

    from launch.bench import hnn_torch

    target = hnn_torch.TWO_BODY_PUBLISHED_TEST_LOSS
    steps, answer = None, {}
    tried = {}
    for steps in SCHEDULES:
        answer = child.ask("time_to_loss", steps=steps)
        tried[steps] = answer["test_loss"]
        if answer["test_loss"] <= target:
            break
    if tried[steps] > target:
        raise UserError(f"our test loss is still {tried[steps]:.3e} after {steps} steps, above {target:.3e}")
    # Half of the repetitions before PyTorch's long run, half after it, so that a change of load shows.
    before = [child.ask("time_to_loss", steps=steps) for _ in range((rounds + 1) // 2)]
    torch.set_num_threads(threads)
    theirs = hnn_torch.time_to_loss(
        "hnn",
        *arrays,
        target=target,
        max_steps=MAX_STEPS_TO_LOSS,
        batch_size=recipe["batch_size"],
        weight_decay=recipe["weight_decay"],
        seed=0,
        as_shipped=False,
    )
    answers = before + [child.ask("time_to_loss", steps=steps) for _ in range((rounds + 1) // 2)]
    run = spread([a["seconds"] for a in answers])
    whole = spread([a["seconds"] + a["compile_seconds"] for a in answers])
    return {
        "target": target,
        "ours_steps": steps,
        "ours_test_loss": answer["test_loss"],
        "ours_test_loss_by_schedule": tried,
        "ours": run,
        "ours_with_compilation": whole,
        "torch_threads": threads,
        "torch_steps": theirs.run_steps,
        "torch_s": theirs.run_wall_s,
        "torch_reached": theirs.wall_s is not None,
        "torch_best_test_loss": theirs.best_test_loss,
        "ratio": theirs.run_wall_s / run["median_s"],
        "ratio_with_compilation": theirs.run_wall_s / whole["median_s"],
    }


def measure(child: Child, task: str, folder: Path, rounds: int) -> Numbers:
    """All comparisons of one task."""
    import torch

    recipe = child.ask("prepare", task=task, data=str(folder / f"{task}.npz"))
    arrays = load(folder / f"{task}.npz")
    results: Numbers = {"training": {m: training(child, arrays, recipe, m, rounds) for m in MODELS}}
    threads = faster_threads(results["training"]["hnn"])
    torch.set_num_threads(threads)
    models = trained(arrays, recipe, ROLLOUT_TRAINING_STEPS)
    results["rollouts"] = rollouts(child, models, recipe, folder, rounds)
    if task == "two_body":
        results["time_to_loss"] = time_to_loss(child, arrays, recipe, threads, rounds)
    return results


def table(task: str, results: Numbers) -> str:
    """What was measured for one task, for people."""
    lines = [task]
    for model, r in results["training"].items():
        bar = f"  (bar {TRAINING_BARS[task]:g})" if model == "hnn" else ""
        lines.append(
            f"  training {model}: {r['ratio_as_shipped']:.2f} times the steps/s of the original recipe{bar};"
            f" {r['ratio_lean']:.2f} without what its loop spends beside training"
        )
        rates = {name: v["median_steps_per_s"] for name, v in r.items() if isinstance(v, dict)}
        lines += [f"    {name.replace('_', ' '):32}{rate:8.0f} steps/s" for name, rate in rates.items()]
    r = results["rollouts"]
    bar = f"  (bar {ROLLOUT_BAR:g})" if task != "two_body" else ""
    lines.append(f"  15 rollouts of both models: {r['ratio']:.1f} times faster with compilation{bar}")
    lines.append(
        f"    ours {r['ours']['median_s']:.3f} s (compiled {r['ours_compiled']['median_s']:.3f} s),"
        f" PyTorch {r['torch_1']['median_s']:.2f} s on 1 thread, {r['torch_2']['median_s']:.2f} s on 2"
    )
    for name in MODELS:
        ours, theirs = r[f"{name}_error_ours"], r[f"{name}_error_torch"]
        lines.append(
            f"    {name} rms (largest) error: ours {ours['rms']:.1e} ({ours['max']:.1e}),"
            f" PyTorch {theirs['rms']:.1e} ({theirs['max']:.1e})"
        )
    if "time_to_loss" in results:
        r = results["time_to_loss"]
        reached = "" if r["torch_reached"] else f", where it was still {r['torch_best_test_loss']:.3e}"
        lines.append(
            f"  time to test loss {r['target']:.4e}: {r['ratio']:.1f} times shorter,"
            f" {r['ratio_with_compilation']:.1f} with compilation  (bar {TIME_TO_LOSS_BAR:g})"
        )
        lines.append(
            f"    ours {r['ours']['median_s']:.2f} s ({r['ours_with_compilation']['median_s']:.2f} s with compilation)"
            f" for {r['ours_steps']} steps to {r['ours_test_loss']:.3e},"
            f" PyTorch {r['torch_s']:.1f} s for {r['torch_steps']} steps{reached}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.bench.hnn", description=DESCRIPTION)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="systems to measure")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds per comparison")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    need_torch()
    import torch

    results: Numbers = {}
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder, Child("hnn.timing") as child:
        for task in args.tasks:
            results[task] = measure(child, task, Path(folder), args.rounds)
            print(table(task, results[task]), flush=True)
    if args.json:
        record = {"rounds": args.rounds, "steps_per_block": STEPS_PER_BLOCK, "torch": torch.__version__}
        loads = {"load_average_before": load_before, "load_average_after": os.getloadavg()}
        write_json(args.json, {"tasks": results, **record, **loads, "environment": environment()})


if __name__ == "__main__":
    sys.exit(command(main))
