"""What the benchmarks of single functions share: their options, PyTorch beside them, interleaved rounds."""

import argparse
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lib.process import UserError
from lib.shard import cores

T = TypeVar("T")


def options(argv: Sequence[str], prog: str, description: str, **counts: tuple[int, str]) -> argparse.Namespace:
    """`--json FILE`, and an option for each of `counts` (default, help), at least 1."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    for name, (default, text) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    args = parser.parse_args(argv)
    if min(getattr(args, name) for name in counts) < 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in counts)} must be at least 1")
    return args


def need_torch() -> None:
    """Raises UserError where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError('this benchmark compares with PyTorch: pip install -e ".[bench]"')


def torch_device(backend: str) -> str:
    """PyTorch's name of the device that JAX computes on. Raises UserError for others than CPUs and GPUs."""
    if backend not in ("cpu", "gpu"):
        raise UserError(f"this benchmark compares CPUs and GPUs, not {backend}: run it with JAX_PLATFORMS=cpu")
    return "cuda" if backend == "gpu" else "cpu"


def check_same(results: Mapping[str, Any], limits: Mapping[str, float]) -> None:
    """Raises UserError where two sides did not compute the same: {problem: {"differences": {variant: {what: ...}}}}."""
    for name, r in results.items():
        for variant, differences in r["differences"].items():
            for what, value in differences.items():
                if not value <= limits[what]:
                    raise UserError(f"{name}: {what} of {variant} differs by {value:.1e}, more than {limits[what]:g}")


def torch_on(device: str) -> Any:
    """The module, computing on "cpu", with a thread per core, or on "cuda". Raises UserError where it can't."""
    need_torch()
    import torch

    from launch.bench.torch_device import compute_on

    compute_on(device, cores())
    return torch


def interleaved(variants: dict[str, Callable[[], T]], rounds: int) -> tuple[dict[str, list[float]], dict[str, T]]:
    """Per variant the seconds of every round, and what the last call returned.

    Each is called once before; the rounds take turns, so that other load on the machine meets all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    results = {name: run() for name, run in variants.items()}
    for _ in range(rounds):
        for name, run in variants.items():
            begin = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - begin)
    return times, results
