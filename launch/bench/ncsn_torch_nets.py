"""The networks of `ncsn` once more in PyTorch, with its own layers and nothing of ours.

Put together as the papers' published codes do (NCSN's; EDM's for the U-Net), under the names of our parameters, so that
weights map one to one. For `launch.bench.ncsn_torch` and for tests/reference/make_ncsn.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALF = 0.5**0.5


class InstanceNormPlus(nn.Module):
    def __init__(self, channels: int, levels: int | None):
        super().__init__()
        shape = (channels,) if levels is None else (levels, channels)
        self.gamma, self.alpha, self.beta = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.norm = nn.InstanceNorm2d(channels)

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
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

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
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

    def _norm(self, name: str, x: Tensor, level: Tensor | None) -> Tensor:
        return x if self.levels is None else self.get_submodule(name)(x, level)

    def _run_units(self, name: str, blocks: int, x: Tensor, level: Tensor | None) -> Tensor:
        for i in range(1, blocks + 1):
            h = x
            for j in (1, 2):
                h = self.get_submodule(f"{name}.conv{i}_{j}")(F.elu(self._norm(f"{name}.norm{i}_{j}", h, level)))
            x = x + h
        return x

    def forward(self, xs: list[Tensor], level: Tensor | None) -> Tensor:
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

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        h, stages = self.begin(2 * x - 1), []
        for i in range(1, 5):
            h = self.get_submodule(f"res{i}_2")(self.get_submodule(f"res{i}_1")(h, level), level)
            stages.append(h)
        h = self.refine1([stages[3]], level)
        h = self.refine2([stages[2], h], level)
        h = self.refine3([stages[1], h], level)
        h = self.refine4([stages[0], h], level)
        return self.end(F.elu(self.norm(h, level)))


class Embedding(nn.Module):
    """c_noise [b] -> [b, 4 width]: positional features through two layers."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.register_buffer("frequencies", 1e4 ** -(torch.arange(half) / max(half - 1, 1)), persistent=False)
        self.dense1, self.dense2 = nn.Linear(2 * half, 4 * width), nn.Linear(4 * width, 4 * width)

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * self.frequencies
        return F.silu(self.dense2(F.silu(self.dense1(torch.cat([angle.cos(), angle.sin()], 1)))))


class MLP(nn.Module):
    """x [b, d], c_noise [b] or [1] -> [b, d]."""

    def __init__(self, shape: Sequence[int], width: int, layers: int):
        super().__init__()
        self.embedding = Embedding(width // 4)
        self.begin, self.end = nn.Linear(shape[0], width), nn.Linear(width, shape[0])
        self.layers = [(nn.Linear(width, 2 * width), nn.Linear(width, width)) for _ in range(layers)]
        for i, (condition, dense) in enumerate(self.layers):
            self.add_module(f"condition{i}", condition)
            self.add_module(f"dense{i}", dense)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        condition, h = self.embedding(c_noise), self.begin(x)
        for to_scale_and_shift, dense in self.layers:
            scale, shift = to_scale_and_shift(condition).chunk(2, 1)
            h = h + dense(F.silu(torch.addcmul(shift, h, scale + 1)))
        return self.end(F.silu(h))


def group_norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in range(min(32, max(channels // 4, 1)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv, self.out = (
            group_norm(channels),
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [b, h w, c]
        q, k, v = self.qkv(pixels).chunk(3, 2)
        y = self.out(F.scaled_dot_product_attention(q, k, v))
        return HALF * (x + y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Block(nn.Module):
    """norm, SiLU, (resize), conv, norm, scale and shift by the noise level, SiLU, conv; plus the input; attention."""

    def __init__(self, inputs: int, outputs: int, embedding: int, resize: str | None, attend: bool):
        super().__init__()
        self.norm1, self.norm2 = group_norm(inputs), group_norm(outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.condition = nn.Linear(embedding, 2 * outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if resize or inputs != outputs else nn.Identity()
        self.resize = {"up": nn.Upsample(scale_factor=2), "down": nn.AvgPool2d(2), None: nn.Identity()}[resize]
        self.attention = Attention(outputs) if attend else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(self.resize(F.silu(self.norm1(x))))
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), scale + 1)))
        return self.attention(HALF * (self.shortcut(self.resize(x)) + h))


class UNet(nn.Module):
    """x [b, c, h, w], c_noise [b] or [1] -> [b, c, h, w]. One attention head, conditioning by scale and shift."""

    def __init__(
        self, shape: Sequence[int], width: int, multipliers: Sequence[int], blocks: int, attention: Sequence[int] = ()
    ):
        super().__init__()
        size, _, channels = shape
        self.blocks, widths = blocks, [width * m for m in multipliers]
        self.embedding = Embedding(width)
        self.begin = nn.Conv2d(channels, width, 3, padding=1)
        self.plan: list[str] = []  # of each block: whether its output is kept, or a kept one joins its input
        count, now, skips = 0, width, [width]

        def add(features: int, use: str, resize: str | None = None, attend: bool = False) -> None:
            nonlocal count, now
            count, inputs = count + 1, now + (skips.pop() if use == "join" else 0)
            self.add_module(f"block{count}", Block(inputs, features, 4 * width, resize, attend))
            self.plan.append(use)
            now = features
            if use == "keep":
                skips.append(now)

        for level, features in enumerate(widths):
            if level:
                size //= 2
                add(now, "keep", "down")
            for _ in range(blocks):
                add(features, "keep", attend=size in attention)
        add(now, "pass", attend=bool(attention))
        add(now, "pass")
        for level, features in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                size *= 2
                add(now, "pass", "up")
            for i in range(blocks + 1):
                add(features, "join", attend=i == blocks and size in attention)
        self.norm, self.end = group_norm(width * multipliers[0]), nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        condition, h = self.embedding(c_noise), self.begin(x)
        skips = [h]
        for i, use in enumerate(self.plan, 1):
            h = torch.cat([h, skips.pop()], 1) if use == "join" else h
            h = self.get_submodule(f"block{i}")(h, condition)
            if use == "keep":
                skips.append(h)
        return self.end(F.silu(self.norm(h)))


def state_dict(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Our parameters, by names joined by dots, under PyTorch's names and in its order of dimensions."""
    state = {}
    for path, value in arrays.items():
        owner, _, name = path.rpartition(".")
        if name == "kernel":
            value = value.transpose(*range(value.ndim - 1, value.ndim - 3, -1), *range(value.ndim - 2))
        name = {"kernel": "weight", "scale": "weight"}.get(name, name)
        state[f"{owner}.{name}"] = torch.from_numpy(np.ascontiguousarray(value))
    return state
