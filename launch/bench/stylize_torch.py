"""Style transfer in PyTorch, eager, with the weights and images of ours: the other side of `launch.bench.stylize`.

    python -m launch.bench.stylize_torch

answers requests as `python -m stylize.timing` does: prepare, run, compare, memory. Nothing of `stylize` is imported.
The feed-forward network is put together as fast_neural_style of PyTorch's examples is, with the tanh of ours at its
end; optimisation of pixels as the usual scripts do it: autograd, Gram matrices by a matrix product, torch.optim.LBFGS
without a line search, which is its default, or Adam.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch.bench.torch_device import compute_on
from lib.child import peak_memory_mib, work
from lib.process import UserError, command

Answer = dict[str, Any]
Arrays = dict[str, np.ndarray]


class ConvLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel_px: int, stride: int = 1, upsample: int = 1):
        super().__init__()
        self.upsample = upsample
        self.pad = nn.ReflectionPad2d(kernel_px // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel_px, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample > 1:
            x = F.interpolate(x, mode="nearest", scale_factor=self.upsample)
        return self.conv(self.pad(x))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.norm1 = ConvLayer(channels, channels, 3), nn.InstanceNorm2d(channels, affine=True)
        self.conv2, self.norm2 = ConvLayer(channels, channels, 3), nn.InstanceNorm2d(channels, affine=True)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(y)) + x


class TransferNet(nn.Module):
    """[b, 3, h, w] in [-1, 1] -> [b, 3, h, w]."""

    def __init__(self, width: int, blocks: int):
        super().__init__()

        def normalised(*args: int) -> list[nn.Module]:
            layer = ConvLayer(*args)
            return [layer, nn.InstanceNorm2d(args[1], affine=True), nn.ReLU()]

        self.layers = nn.Sequential(
            *normalised(3, width, 9),
            *normalised(width, 2 * width, 3, 2),
            *normalised(2 * width, 4 * width, 3, 2),
            *(ResidualBlock(4 * width) for _ in range(blocks)),
            *normalised(4 * width, 2 * width, 3, 1, 2),
            *normalised(2 * width, width, 3, 1, 2),
            ConvLayer(width, 3, 9),
        )
        # Modules come in the order of the computation; ours are numbered in it, each class by itself.
        last = 3 + 2 * blocks
        reflected = [f"Reflected_{i}/conv" for i in range(last)]
        self._convolutions = [*reflected, "Upsampled_0", "Upsampled_1", f"Reflected_{last}/conv"]

    def forward(self, x: Tensor) -> Tensor:
        return 150 / 127.5 * torch.tanh(self.layers(x))

    def load(self, arrays: Arrays, style: int = 0) -> None:
        """Our weights, by their names joined by slashes; scales and shifts are those of one style."""
        convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        norms = [m for m in self.modules() if isinstance(m, nn.InstanceNorm2d)]
        with torch.no_grad():
            for name, layer in zip(self._convolutions, convolutions, strict=True):
                load_convolution(layer, arrays, name)
            for i, norm in enumerate(norms):
                norm.weight.copy_(torch.from_numpy(arrays[f"Norm_{i}/scale"][style]))
                norm.bias.copy_(torch.from_numpy(arrays[f"Norm_{i}/bias"][style]))


def load_convolution(layer: nn.Conv2d, arrays: Arrays, name: str) -> None:
    layer.weight.copy_(torch.from_numpy(arrays[f"{name}/kernel"].transpose(3, 2, 0, 1).copy()))
    assert layer.bias is not None
    layer.bias.copy_(torch.from_numpy(arrays[f"{name}/bias"]))


class FeedForward:
    """One image after the other, from NumPy to NumPy."""

    def __init__(self, problem: Answer, arrays: Arrays, memory_format: torch.memory_format):
        self.image, self.format = arrays["image"], memory_format
        self.net = TransferNet(problem["width"], problem["blocks"])
        self.net.load(arrays)
        self.net = self.net.eval().to(memory_format=memory_format)

    def stylize(self) -> np.ndarray:
        """[h, w, 3]."""
        with torch.inference_mode():
            return self.net(tensor(self.image, self.format)).clamp(-1, 1)[0].movedim(0, -1).cpu().numpy()

    def run(self, calls: int) -> tuple[int, float]:
        for _ in range(calls):
            image = self.stylize()
        return calls, float(image.mean())

    def compare(self, wanted: Arrays) -> dict[str, float]:
        """The largest difference of a pixel, which spans 2."""
        return {"output": float(np.abs(self.stylize() - wanted["output"]).max())}


class Gatys:
    """Iterations on pixels."""

    def __init__(self, problem: Answer, arrays: Arrays, memory_format: torch.memory_format):
        self.problem, self.format = problem, memory_format
        self.mean = torch.tensor(arrays["mean"])[:, None, None]
        self.net = nn.ModuleDict({name: self._layer(name, arrays) for name in problem["layers"]})
        self.net = self.net.requires_grad_(False).to(memory_format=memory_format)
        # What is optimised is contiguous in either case: torch.optim.LBFGS takes nothing else.
        content, style, self.start = (tensor(arrays[name]) for name in ("content", "style", "start"))
        with torch.no_grad():
            found = self.features(content)
            self.wanted = {name: found[name] for name in problem["content_layers"]}
            found = self.features(style)
            self.grams = {name: gram(found[name]) for name in problem["style_layers"]}

    def _layer(self, name: str, arrays: Arrays) -> nn.Module:
        if name.startswith("conv"):
            outputs, inputs = arrays[f"{name}/bias"].size, arrays[f"{name}/kernel"].shape[2]
            layer = nn.Conv2d(inputs, outputs, 3, padding=1)
            with torch.no_grad():
                load_convolution(layer, arrays, name)
            return layer
        # In place, as torchvision's are: only activations after it are compared.
        return nn.ReLU(inplace=True) if name.startswith("relu") else nn.AvgPool2d(2)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Of the layers that are compared."""
        found = {"pixels": (x + 1) / 2}
        x = (x - self.mean).contiguous(memory_format=self.format)
        compared = {*self.problem["style_layers"], *self.problem["content_layers"]}
        for name, layer in self.net.items():
            x = layer(x)
            if name in compared:
                found[name] = x
        return found

    def objective(self, x: Tensor) -> Tensor:
        found = self.features(x)
        style = [((gram(found[name]) - g) ** 2).sum() / (g**2).sum() for name, g in self.grams.items()]
        content = [((found[name] - p) ** 2).sum() / (p**2).sum() for name, p in self.wanted.items()]
        weights = self.problem["style_weight"], self.problem["content_weight"]
        return weights[0] * torch.stack(style).mean() + weights[1] * torch.stack(content).mean()

    def run(self, calls: int) -> tuple[int, float]:
        """(evaluations of value and gradient, the last objective)."""
        count, last = 0, math.nan
        for _ in range(calls):
            steps, last = self.optimize()
            count += steps
        return count, last

    def optimize(self) -> tuple[int, float]:
        x = self.start.clone().requires_grad_(True)
        values: list[float] = []
        optimizer, step_all = self._optimizer(x)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self.objective(x)
            value.backward()
            values.append(value.item())
            return value

        step_all(closure)
        return len(values), values[-1]

    def _optimizer(self, x: Tensor) -> tuple[torch.optim.Optimizer, Callable[[Callable[[], Tensor]], None]]:
        iterations = self.problem["iterations"]
        if self.problem["kind"] == "lbfgs":
            # Without tolerances, so that it does not stop before its last iteration.
            lbfgs = torch.optim.LBFGS(
                [x], max_iter=iterations, history_size=self.problem["memory"], tolerance_grad=0, tolerance_change=0
            )
            return lbfgs, lambda closure: lbfgs.step(closure)
        adam = torch.optim.Adam([x], self.problem["lr"], betas=(0.9, 0.99), eps=1e-6)

        def step_all(closure: Callable[[], Tensor]) -> None:
            for _ in range(iterations):
                adam.step(closure)
                with torch.no_grad():
                    x.clamp_(-1, 1)

        return adam, step_all

    def compare(self, wanted: Arrays) -> dict[str, float]:
        """Relative differences of the value and of the gradient, this one in the Euclidean norm.

        Rounding decides on which side of zero a few activations are, so that single entries differ by more, also from
        those in float64 and between the two memory formats.
        """
        x = self.start.clone().requires_grad_(True)
        value = self.objective(x)
        value.backward()
        assert x.grad is not None
        gradient, expected = x.grad[0].movedim(0, -1).cpu().numpy(), wanted["gradient"]
        return {
            "value": abs(value.item() / float(wanted["value"]) - 1),
            "gradient": float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected)),
        }


def tensor(image: np.ndarray, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """[h, w, 3] -> [1, 3, h, w]; channels_last without a copy on a CPU."""
    x = torch.from_numpy(image).to(torch.get_default_device())
    return x[None].movedim(-1, 1).contiguous(memory_format=memory_format)


def gram(features: Tensor) -> Tensor:
    """[1, c, h, w] -> [c, c]; no copy is made in either memory format."""
    rows = features[0].movedim(0, -1).flatten(0, 1)
    return rows.T @ rows / rows.numel()


class Bench:
    """What is kept between requests."""

    def prepare(self, problem: Answer, file: str, threads: int, device: str, channels_last: bool = False) -> Answer:
        compute_on(device, threads)
        with np.load(file, allow_pickle=False) as saved:
            arrays = dict(saved)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        kind = FeedForward if problem["kind"] == "network" else Gatys
        self._work = kind(problem, arrays, memory_format)
        return {"torch": torch.__version__}

    def run(self, calls: int) -> Answer:
        begin = time.perf_counter()
        evaluations, value = self._work.run(calls)
        seconds = time.perf_counter() - begin
        if not math.isfinite(value):
            raise UserError("what PyTorch computed has left the numbers: nothing to measure")
        return {"seconds": seconds, "evaluations": evaluations, "value": value}

    def compare(self, record: str) -> Answer:
        """How far this side is from what ours recorded."""
        with np.load(record, allow_pickle=False) as saved:
            return self._work.compare(dict(saved))

    def memory(self) -> Answer:
        return {"peak_mib": peak_memory_mib()}


def main(argv: Sequence[str]) -> None:
    bench = Bench()
    work("launch.bench.stylize_torch", argv, (bench.prepare, bench.run, bench.compare, bench.memory))


if __name__ == "__main__":
    sys.exit(command(main))
