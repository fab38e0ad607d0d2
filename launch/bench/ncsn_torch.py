"""Eager sampling in PyTorch from the networks of `ncsn`: the other side of `launch.bench.ncsn`.

    python -m launch.bench.ncsn_torch

answers requests as `python -m ncsn.timing` does: prepare, chain, repeat, memory. Nothing of `ncsn` is imported.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from launch.bench.ncsn_torch_nets import MLP, RefineNet, UNet, state_dict
from lib.child import peak_memory_mib, work
from lib.process import UserError, command

Score = Callable[[Tensor, float], Tensor]
"""(x, sigma of all) -> like x"""


def score_function(problem: dict[str, Any], net: nn.Module, rows: int) -> Score:
    """NCSN's network is the score, by the index of sigma; the others are preconditioned as EDM is.

    The network gets the level `rows` times: once, or once for every sample.
    """
    if problem["network"] == "refinenet":
        levels = {sigma: torch.full((rows,), i) for i, sigma in enumerate(problem["sigmas"])}
        return lambda x, sigma: net(x, levels[sigma])
    data = problem["sigma_data"]

    def score(x: Tensor, sigma: float) -> Tensor:
        total = sigma**2 + data**2
        f = net(x * total**-0.5, torch.full((rows,), math.log(sigma) / 4))
        return f.mul(data / sigma * total**-0.5).sub(x, alpha=1 / total)

    return score


def follow(problem: dict[str, Any], score: Score, x: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
    """The chain from x; the noise of its steps is drawn here unless it is given."""
    sigmas = problem["sigmas"]
    if not problem["steps"]:
        return heun(score, x, sigmas)
    for i, sigma in enumerate(np.repeat(sigmas, problem["steps"]).tolist()):
        alpha = problem["step_size"] * (sigma / sigmas[-1]) ** 2
        z = torch.randn_like(x) if noise is None else noise[i]
        x = x.add(score(x, sigma), alpha=alpha).add(z, alpha=(2 * alpha) ** 0.5)
    return x.add(score(x, sigmas[-1]), alpha=sigmas[-1] ** 2)


def heun(score: Score, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """EDM's algorithm 1."""
    for sigma, after in itertools.pairwise(sigmas):
        slope = score(x, sigma).mul(-sigma)
        ahead = x.add(slope, alpha=after - sigma)
        if after > 0:
            slope_after = score(ahead, after).mul(-after)
            ahead = x.add(slope, alpha=(after - sigma) / 2).add(slope_after, alpha=(after - sigma) / 2)
        x = ahead
    return x


class Bench:
    """What is kept between requests."""

    def prepare(
        self, problem: dict[str, Any], weights: str, threads: int, channels_last: bool = False, per_sample: bool = False
    ) -> dict[str, Any]:
        """`per_sample`: the network gets the noise level of every sample, as in NCSN's own loop."""
        torch.set_num_threads(threads)
        self.problem, shape = problem, problem["shape"]
        if problem["network"] == "refinenet":
            net: nn.Module = RefineNet(shape[-1], problem["fields"]["ngf"], len(problem["sigmas"]))
        else:
            net = {"mlp": MLP, "unet": UNet}[problem["network"]](shape, **problem["fields"])
        with np.load(weights, allow_pickle=False) as file:
            net.load_state_dict(state_dict(dict(file)))
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        net = net.eval().to(memory_format=self.format)
        self.score = score_function(problem, net, problem["count"] if per_sample else 1)
        return {"torch": torch.__version__}

    def chain(self) -> dict[str, Any]:
        begin = time.perf_counter()
        with torch.inference_mode():
            *sizes, channels = self.problem["shape"]
            x = torch.empty((self.problem["count"], channels, *sizes)).to(memory_format=self.format).normal_()
            samples = self._channels_last(follow(self.problem, self.score, self.problem["sigmas"][0] * x))
        seconds = time.perf_counter() - begin
        if not np.isfinite(samples).all():
            raise UserError("PyTorch's samples are not finite: nothing to measure")
        return {"seconds": seconds}

    def repeat(self, record: str) -> dict[str, Any]:
        """The recorded chain once more; how far the samples are from those recorded, relative to the largest."""
        with np.load(record, allow_pickle=False) as file, torch.inference_mode():
            start, noise, wanted = (file[name] for name in ("start", "noise", "samples"))
            found = self._channels_last(
                follow(self.problem, self.score, self._tensor(start), [self._tensor(z) for z in noise])
            )
        return {"difference": float(np.abs(found - wanted).max() / np.abs(wanted).max())}

    def memory(self) -> dict[str, Any]:
        return {"peak_mib": peak_memory_mib()}

    def _tensor(self, array: np.ndarray) -> Tensor:
        """[b, ..., c] -> [b, c, ...]."""
        return torch.from_numpy(np.moveaxis(array, -1, 1).copy()).to(memory_format=self.format)

    def _channels_last(self, x: Tensor) -> np.ndarray:
        return np.moveaxis(x.numpy(), 1, -1)


def main(argv: Sequence[str]) -> None:
    bench = Bench()
    work("launch.bench.ncsn_torch", argv, (bench.prepare, bench.chain, bench.repeat, bench.memory))


if __name__ == "__main__":
    sys.exit(command(main))
