"""Makes ncsn.npz: what NCSN and NCSNv2 in PyTorch say about random weights and images, for tests/test_ncsn_model.py.

    pip install torch==2.13.0
    PYTHONPATH=.:tests python tests/reference/make_ncsn.py

The networks are written here once more, with PyTorch's own layers, and evaluated in float64. Weights and images come
from tests/ncsn_networks.py.
"""

from pathlib import Path

import ncsn_networks as cases
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

OUT = Path(__file__).with_name("ncsn.npz")


class InstanceNormPlus(nn.Module):
    def __init__(self, channels: int, levels: int | None):
        super().__init__()
        shape = (channels,) if levels is None else (levels, channels)
        self.gamma, self.alpha, self.beta = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.norm = nn.InstanceNorm2d(channels)

    def forward(self, x: torch.Tensor, level: torch.Tensor | None) -> torch.Tensor:
        gamma, alpha, beta = (
            p[:, None, None] if p.ndim == 1 else p[level][:, :, None, None] for p in (self.gamma, self.alpha, self.beta)
        )
        mean = x.mean((2, 3), keepdim=True)
        relative = (mean - mean.mean(1, keepdim=True)) / (torch.var(mean, 1, keepdim=True) + 1e-5).sqrt()
        return gamma * (self.norm(x) + alpha * relative) + beta


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, levels: int | None, dilation: int = 1, down: bool = False):
        super().__init__()
        middle = inputs if down else outputs
        self.norm1, self.norm2 = InstanceNormPlus(inputs, levels), InstanceNormPlus(middle, levels)
        self.conv1 = nn.Conv2d(inputs, middle, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(middle, outputs, 3, padding=dilation, dilation=dilation)
        if down and dilation > 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
        elif down:
            self.shortcut = nn.Conv2d(inputs, outputs, 1)
        self.pool = nn.AvgPool2d(2) if down and dilation == 1 else nn.Identity()

    def forward(self, x: torch.Tensor, level: torch.Tensor | None) -> torch.Tensor:
        h = self.conv1(F.elu(self.norm1(x, level)))
        h = self.pool(self.conv2(F.elu(self.norm2(h, level))))
        return h + (self.pool(self.shortcut(x)) if hasattr(self, "shortcut") else x)


class Refine(nn.Module):
    """All parts of a refinement block; names as in `ncsn.refinenet`, so that weights map one to one."""

    def __init__(self, inputs: list[int], features: int, levels: int | None, last_units: int = 1):
        super().__init__()
        self.levels, self.last_units = levels, last_units
        self.inputs = inputs
        for i, width in enumerate(inputs, 1):
            self._units(f"adapt{i}", width, 2)
            if len(inputs) > 1:
                self._part(f"fusion.norm{i}", f"fusion.conv{i}", width, features, bias=True)
        for i in (1, 2):
            self._part(f"pooling.norm{i}", f"pooling.conv{i}", features, features, bias=False)
        self._units("output", features, last_units)
        self.pool = nn.MaxPool2d(5, 1, 2) if levels is None else nn.AvgPool2d(5, 1, 2)

    def _part(self, norm: str, conv: str, inputs: int, outputs: int, bias: bool) -> None:
        parts = {conv: nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)}
        if self.levels is not None:
            parts[norm] = InstanceNormPlus(inputs, self.levels)
        for name, module in parts.items():
            folder, leaf = name.split(".")
            if not hasattr(self, folder):
                self.add_module(folder, nn.Module())
            getattr(self, folder).add_module(leaf, module)

    def _units(self, name: str, width: int, blocks: int) -> None:
        for i in range(1, blocks + 1):
            for j in (1, 2):
                self._part(f"{name}.norm{i}_{j}", f"{name}.conv{i}_{j}", width, width, bias=False)

    def _norm(self, name: str, x: torch.Tensor, level: torch.Tensor | None) -> torch.Tensor:
        return x if self.levels is None else self.get_submodule(name)(x, level)

    def _run_units(self, name: str, blocks: int, x: torch.Tensor, level: torch.Tensor | None) -> torch.Tensor:
        for i in range(1, blocks + 1):
            h = x
            for j in (1, 2):
                h = self.get_submodule(f"{name}.conv{i}_{j}")(F.elu(self._norm(f"{name}.norm{i}_{j}", h, level)))
            x = x + h
        return x

    def forward(self, xs: list[torch.Tensor], level: torch.Tensor | None) -> torch.Tensor:
        hs = [self._run_units(f"adapt{i}", 2, x, level) for i, x in enumerate(xs, 1)]
        h = hs[0]
        if len(hs) > 1:
            size = xs[0].shape[2:]
            hs = [
                self.get_submodule(f"fusion.conv{i}")(self._norm(f"fusion.norm{i}", h, level))
                for i, h in enumerate(hs, 1)
            ]
            h = sum(F.interpolate(h, size, mode="bilinear", align_corners=True) for h in hs)
        h = path = F.elu(h)
        for i in (1, 2):
            path = self.get_submodule(f"pooling.conv{i}")(self.pool(self._norm(f"pooling.norm{i}", path, level)))
            h = h + path
        return self._run_units("output", self.last_units, h, level)


class RefineNet(nn.Module):
    """[b, c, h, w] in [0, 1] -> [b, c, h, w]: NCSN with `levels`, NCSNv2 before the division by sigma without."""

    def __init__(self, channels: int, n: int, levels: int | None):
        super().__init__()
        self.begin, self.end = nn.Conv2d(channels, n, 3, padding=1), nn.Conv2d(n, channels, 3, padding=1)
        self.norm = InstanceNormPlus(n, levels)
        inputs = n
        for i, (outputs, dilation) in enumerate([(n, 1), (2 * n, 1), (2 * n, 2), (2 * n, 4)], 1):
            self.add_module(f"res{i}_1", ResidualBlock(inputs, outputs, levels, dilation, down=i > 1))
            self.add_module(f"res{i}_2", ResidualBlock(outputs, outputs, levels, dilation))
            inputs = outputs
        self.refine1 = Refine([2 * n], 2 * n, levels)
        self.refine2 = Refine([2 * n, 2 * n], 2 * n, levels)
        self.refine3 = Refine([2 * n, 2 * n], n, levels)
        self.refine4 = Refine([n, n], n, levels, last_units=3)

    def forward(self, x: torch.Tensor, level: torch.Tensor | None = None) -> torch.Tensor:
        h, stages = self.begin(2 * x - 1), []
        for i in range(1, 5):
            h = self.get_submodule(f"res{i}_2")(self.get_submodule(f"res{i}_1")(h, level), level)
            stages.append(h)
        h = self.refine1([stages[3]], level)
        h = self.refine2([stages[2], h], level)
        h = self.refine3([stages[1], h], level)
        h = self.refine4([stages[0], h], level)
        return self.end(F.elu(self.norm(h, level)))


def state_dict(params: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """Our parameters under PyTorch's names and in its order of dimensions."""
    state = {}
    for name, value in params.items():
        if isinstance(value, dict):
            state |= state_dict(value, f"{prefix}{name}.")
        elif name == "kernel":
            state[f"{prefix}weight"] = torch.from_numpy(np.ascontiguousarray(value.transpose(3, 2, 0, 1)))
        else:
            state[f"{prefix}{name}"] = torch.from_numpy(value)
    return state


def main() -> None:
    x = torch.from_numpy(cases.images()).permute(0, 3, 1, 2).double()
    sigma = torch.from_numpy(cases.SIGMA).double()[:, None, None, None]
    out = {}
    with torch.no_grad():
        for name, model in cases.refinenets().items():
            levels = len(cases.SIGMAS) if name == "v1" else None
            net = RefineNet(cases.SHAPE[-1], cases.NGF, levels)
            net.load_state_dict(state_dict(cases.random_params(model)["params"]))
            score = net.double()(x, torch.from_numpy(cases.LEVEL) if name == "v1" else None)
            out[name] = (score if name == "v1" else score / sigma).permute(0, 2, 3, 1).float().numpy()
    np.savez_compressed(OUT, **out)
    print({name: (array.shape, float(array.std())) for name, array in out.items()}, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
