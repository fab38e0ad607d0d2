"""`python -m launch.bench.scaling`: one process and two, each with a core and equally many images; and predictions.

The training is a real one, `python -m ncsn train cifar10_edm` of a smaller network, started by `launch local` and ended
by SIGTERM after some steps; seconds per step are those between the lines of its log. *Weak scaling*: a step of one
process over a step of two.

Predicted are both from `python -m ncsn plan`: operations per second from a third training, with half as many images,
and the time of an all-reduce of the same size between two processes.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench.rounds import options
from lib.cluster import peers
from lib.process import UserError, command
from lib.run import environment, read_json, write_json

SCALING_BAR, PREDICTION_BAR = 0.85, 0.25
IMAGES = 16
"""per process and step"""
_NETWORK = (
    "--network.width 32 --network.multipliers 1 2 --network.blocks 1 --network.precision float32 "
    "--checkpoint-every 100000"
)
_POLL_S, _SKIPPED = 0.5, 1  # the first chunk of steps compiles
_PROBE = "--all-reduce"


def main(argv: Sequence[str]) -> None:
    if argv and argv[0] == _PROBE:
        _all_reduce(int(argv[1]))
        return
    args = options(
        argv, "launch.bench.scaling", str(__doc__),
        rounds=(3, "trainings of each kind"), chunks=(6, "chunks of ten steps that are timed in each"),
    )  # fmt: skip
    result = measure(args.rounds, args.chunks)
    print(table(result))
    if args.json:
        write_json(args.json, {**result, "environment": environment()})


def measure(rounds: int, chunks: int) -> dict[str, Any]:
    """Trainings in turns. Raises UserError where one of them ends by itself."""
    kinds = {"half": (1, IMAGES // 2), "one": (1, IMAGES), "two": (2, IMAGES)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for kind, (processes, images) in kinds.items():
                seconds[kind] += train(Path(folder), processes, images, chunks)
        plans = {kind: planned(Path(folder), processes, images) for kind, (processes, images) in kinds.items()}
    (kind_and_bytes,) = plans["two"]["collectives"]
    size = kind_and_bytes[1]
    per_step = {kind: statistics.median(values) for kind, values in seconds.items()}
    flops_per_s, reduce_s = plans["half"]["flops"] / per_step["half"], all_reduce_s(size)
    predicted = {"one": plans["one"]["flops"] / flops_per_s, "two": plans["two"]["flops"] / flops_per_s + reduce_s}
    return {
        "images": IMAGES,
        "seconds": seconds,
        "step_s": per_step,
        "flops": {kind: plan["flops"] for kind, plan in plans.items()},
        "flops_per_s": flops_per_s,
        "all_reduce_bytes": size,
        "all_reduce_s": reduce_s,
        "predicted_s": predicted,
        "prediction_error": {kind: predicted[kind] / per_step[kind] - 1 for kind in predicted},
        "weak_scaling": per_step["one"] / per_step["two"],
    }


def _recipe(processes: int, images: int) -> list[str]:
    return [*_NETWORK.split(), "--optim.batch-size", str(processes * images)]


def train(folder: Path, processes: int, images: int, chunks: int) -> list[float]:
    """Seconds per step of `chunks` chunks of a training; each of its processes has a core of its own."""
    run = folder / f"run{time.monotonic_ns()}"
    words = [sys.executable, "-m", "ncsn", "train", "cifar10_edm", *_recipe(processes, images), "--out", str(run)]
    launcher = [sys.executable, "-m", "launch", "local", "--processes", str(processes), "--", *words]
    allowed = sorted(os.sched_getaffinity(0))[:processes]
    if len(allowed) < processes:
        raise UserError(f"{processes} processes need as many cores")
    with subprocess.Popen(launcher, preexec_fn=lambda: os.sched_setaffinity(0, allowed)) as process:
        while len(rows := _rows(run)) < chunks + _SKIPPED + 1:
            if process.poll() is not None:
                raise UserError(f"python -m ncsn train ended with exit code {process.returncode}")
            time.sleep(_POLL_S)
        process.send_signal(signal.SIGTERM)
    rows = rows[_SKIPPED:]
    return [(b["wall_s"] - a["wall_s"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(rows)]


def _rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def planned(folder: Path, processes: int, images: int) -> dict[str, Any]:
    """What `python -m ncsn plan` says of the same training."""
    out = folder / f"plan{processes}x{images}"
    words = ["plan", "cifar10_edm", "--devices", str(processes), "--out", str(out), "--", *_recipe(processes, images)]
    subprocess.run([sys.executable, "-m", "ncsn", *words], check=True, stdout=subprocess.DEVNULL)
    return read_json(out / "plan.json")


def all_reduce_s(size: int) -> float:
    """Seconds of an all-reduce of so many bytes between two processes."""
    words = [sys.executable, "-m", "launch.bench.scaling", _PROBE, str(size)]
    launcher = [sys.executable, "-m", "launch", "local", "--processes", "2", "--", *words]
    done = subprocess.run(launcher, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def _all_reduce(size: int) -> None:
    """The probe: one of two processes that only reduce; process 0 prints the median seconds."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from lib import shard

    if peers() is None:
        raise UserError(f"{_PROBE} is for processes of python -m launch local")
    shard.start(convolutions=False)
    mesh = shard.make_mesh()
    reduce = jax.jit(jax.shard_map(lambda x: shard.pmean(shard.varying(x)), mesh=mesh, in_specs=P(), out_specs=P()))
    x = shard.place(jnp.ones(size // 4, jnp.float32), mesh)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        jax.block_until_ready(reduce(x))
        times.append(time.perf_counter() - begin)
    if shard.primary():
        print(statistics.median(times[5:]), flush=True)


def table(r: dict[str, Any]) -> str:
    """What was measured, for people."""
    step_s, predicted, error = r["step_s"], r["predicted_s"], r["prediction_error"]
    return "\n".join(
        [
            f"a step of one process {step_s['one']:.3f} s, of two {step_s['two']:.3f} s: weak scaling "
            f"{r['weak_scaling']:.2f} (bar {SCALING_BAR:g})",
            f"from {r['flops_per_s'] / 1e9:.1f} GFLOP/s and {r['all_reduce_bytes'] / 2**20:.1f} MiB reduced in "
            f"{1e3 * r['all_reduce_s']:.1f} ms are predicted {predicted['one']:.3f} s ({error['one']:+.0%}) and "
            f"{predicted['two']:.3f} s ({error['two']:+.0%}; bar {PREDICTION_BAR:.0%})",
        ]
    )


if __name__ == "__main__":
    sys.exit(command(main))
