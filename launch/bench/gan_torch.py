"""Eager training of the networks of `gan` in PyTorch: the other side of `launch.bench.gan`.

    python -m launch.bench.gan_torch

answers requests as `python -m gan.timing` does: prepare, run, compare, memory. Nothing of `gan` is imported. Networks
and loops are put together as the published codes do, from PyTorch's own layers; spectral norm is
`torch.nn.utils.parametrizations.spectral_norm`.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from launch.bench.torch_device import compute_on
from lib.child import peak_memory_mib, work
from lib.process import UserError, command


class Generator(nn.Module):
    def __init__(self, p: dict[str, Any]):
        super().__init__()
        channels, levels = p["shape"][-1], p["levels"]
        self.side = p["shape"][0] >> levels
        smooth = p["kind"] == "cnn"
        widths = [p["width"] << (levels - i) for i in range(levels + 1)]
        self.dense = nn.Linear(p["latent"], self.side**2 * widths[0], bias=False)
        inner = widths if smooth else widths[:-1]
        self.norms = nn.ModuleList([nn.BatchNorm2d(w) for w in inner])
        self.ups = nn.ModuleList(
            [nn.ConvTranspose2d(a, b, p["kernel_px"], 2, 1, bias=False) for a, b in itertools.pairwise(inner)]
        )
        self.last = nn.Conv2d(widths[-1], channels, 3, padding=1) if smooth else nn.ConvTranspose2d(
            widths[-2], channels, p["kernel_px"], 2, 1
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        h = self.dense(z).view(len(z), self.side, self.side, -1).permute(0, 3, 1, 2)
        h = F.relu(self.norms[0](h))
        for up, norm in zip(self.ups, list(self.norms)[1:], strict=True):
            h = F.relu(norm(up(h)))
        return torch.tanh(self.last(h))


class Critic(nn.Module):
    def __init__(self, p: dict[str, Any]):
        super().__init__()
        channels, levels, width = p["shape"][-1], p["critic_levels"] or p["levels"], p["critic_width"]
        side = -(-p["shape"][0] // 2**levels)
        self.slope, normed = p["slope"], p["critic_norm"] == "batch"
        if p["kind"] == "cnn":
            steps = [(channels, width, 3, 1)]
            for i in range(1, levels + 1):
                steps += [(steps[-1][1], width << i, 4, 2), (width << i, width << i, 3, 1)]
        else:
            steps = [(channels if i == 0 else width << (i - 1), width << i, p["critic_kernel_px"], 2)
                     for i in range(levels)]  # fmt: skip
        norms = [normed and i > 0 for i in range(len(steps))]
        self.convs = nn.ModuleList(
            [nn.Conv2d(a, b, k, s, bias=not n) for (a, b, k, s), n in zip(steps, norms, strict=True)]
        )
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(s[1]) if n else nn.Identity() for s, n in zip(steps, norms, strict=True)]
        )
        self.dense = nn.Linear(side**2 * steps[-1][1], 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            k, stride = conv.kernel_size[0], conv.stride[0]
            total = k - stride if x.shape[-1] % stride == 0 else k - 1
            x = F.pad(x, (total // 2, total - total // 2) * 2)
            x = F.leaky_relu(norm(conv(x)), self.slope)
        return self.dense(x.permute(0, 2, 3, 1).flatten(1))[:, 0]


def critic_loss(game: str, real: Tensor, fake: Tensor) -> Tensor:
    if game == "non_saturating":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if game == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return fake.mean() - real.mean()


def generator_loss(game: str, fake: Tensor) -> Tensor:
    return F.softplus(-fake).mean() if game == "non_saturating" else -fake.mean()


def names(net: Generator | Critic, which: str) -> dict[str, str]:
    """Parameters of ours to those of PyTorch's: linen numbers modules of a kind in the order of their calls."""
    out, count = {}, {"ConvTranspose": 0, "Conv": 0, "BatchNorm": 0}
    out[f"{which}.Dense_0.kernel"] = "dense.weight"
    if net.dense.bias is not None:
        out[f"{which}.Dense_0.bias"] = "dense.bias"
    layers: list[tuple[str, nn.Module]] = []
    for group in ("ups", "convs", "norms"):
        layers += [(f"{group}.{i}", layer) for i, layer in enumerate(getattr(net, group, []))]
    layers += [("last", net.last)] if isinstance(net, Generator) else []
    for name, layer in layers:
        kind = {nn.ConvTranspose2d: "ConvTranspose", nn.Conv2d: "Conv", nn.BatchNorm2d: "BatchNorm"}.get(type(layer))
        if kind is None:
            continue
        ours = f"{which}.{kind}_{count[kind]}"
        count[kind] += 1
        out[f"{ours}.{'scale' if kind == 'BatchNorm' else 'kernel'}"] = f"{name}.weight"
        if layer.bias is not None:
            out[f"{ours}.bias"] = f"{name}.bias"
    return out


def turned(name: str, array: np.ndarray) -> np.ndarray:
    """A kernel of ours in PyTorch's order of axes."""
    if name.endswith("kernel") and array.ndim == 2:
        return array.T
    if ".ConvTranspose_" in name and array.ndim == 4:
        return array[::-1, ::-1].transpose(2, 3, 0, 1)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def load(net: Generator | Critic, arrays: dict[str, np.ndarray], which: str) -> None:
    known = names(net, which)
    mine = {k: v for k, v in arrays.items() if k.startswith(f"{which}.")}
    if set(mine) != set(known):
        raise UserError(f"{which}: other parameters than PyTorch's: {sorted(set(mine) ^ set(known))}")
    state = {known[k]: torch.from_numpy(np.ascontiguousarray(turned(k, v))) for k, v in mine.items()}
    net.load_state_dict(state, strict=False)


class Bench:
    """What is kept between requests."""

    def prepare(
        self, problem: dict[str, Any], weights: str, threads: int, device: str, channels_last: bool = False
    ) -> dict[str, Any]:
        compute_on(device, threads)
        torch.manual_seed(0)
        self.p = problem
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        with np.load(weights, allow_pickle=False) as file:
            self.arrays = dict(file)
        self.generator, self.critic = self._nets()
        self.average = copy.deepcopy(self.generator)
        if problem["critic_norm"] == "spectral":
            for layer in [*self.critic.convs, self.critic.dense]:
                spectral_norm(layer)
        betas = (problem["b1"], problem["b2"])
        self.tx = [torch.optim.Adam(net.parameters(), problem["lr"], betas) for net in (self.critic, self.generator)]
        self.pixels = torch.randint(0, 256, (problem["rows"], *problem["shape"]), dtype=torch.uint8)
        return {"torch": torch.__version__}

    def run(self, cycles: int) -> dict[str, Any]:
        p, (critic_tx, generator_tx) = self.p, self.tx
        begin = time.perf_counter()
        for _ in range(cycles):
            for _ in range(p["n_critic"]):
                rows = torch.randint(0, p["rows"], (p["batch_size"],))
                x = self._image(self.pixels[rows])
                with torch.no_grad():
                    fake = self.generator(torch.randn(p["batch_size"], p["latent"]))
                share = torch.rand(p["batch_size"])
                critic_tx.zero_grad(set_to_none=True)
                self._critic_loss(self.critic, x, fake, share).backward()
                critic_tx.step()
            self.critic.requires_grad_(False)
            generator_tx.zero_grad(set_to_none=True)
            fake = self.generator(torch.randn(p["batch_size"], p["latent"]))
            value = generator_loss(p["loss"], self.critic(fake))
            value.backward()
            generator_tx.step()
            self.critic.requires_grad_(True)
            mine, kept = list(self.generator.parameters()), list(self.average.parameters())
            with torch.no_grad():
                torch._foreach_lerp_(kept, mine, 1 - p["ema_decay"])
        finite = bool(torch.isfinite(value))
        seconds = time.perf_counter() - begin
        if not finite:
            raise UserError("PyTorch's training has left the numbers: nothing to measure")
        return {"seconds": seconds}

    def compare(self, record: str) -> dict[str, Any]:
        """How far losses (relative) and gradients (relative, in the Euclidean norm) are from the recorded ones."""
        with np.load(record, allow_pickle=False) as file:
            r = dict(file)
        generator, critic = (net.double() for net in self._nets())
        x, z, share = self._channels_first(r["x"]), torch.tensor(r["z"]), torch.tensor(r["share"])
        with torch.no_grad():
            fake = generator(z)
        value = self._critic_loss(critic, x, fake, share)
        value.backward()
        found = {"critic_loss": value, **self._gradients(critic, "critic")}
        critic.zero_grad(set_to_none=True)
        value = generator_loss(self.p["loss"], critic(generator(z)))
        value.backward()
        found |= {"generator_loss": value, **self._gradients(generator, "generator")}
        out = {}
        for name in ("critic_loss", "generator_loss"):
            out[name] = abs(float(found[name]) / float(r[name]) - 1)
        for which in ("critic", "generator"):
            keys = [k for k in r if k.startswith(f"{which}.")]
            apart = sum(float(((found[k] - turned(k, r[k])) ** 2).sum()) for k in keys)
            out[f"{which} gradient"] = (apart / sum(float((r[k] ** 2).sum()) for k in keys)) ** 0.5
        return out

    def memory(self) -> dict[str, Any]:
        return {"peak_mib": peak_memory_mib()}

    def _nets(self) -> tuple[Generator, Critic]:
        generator, critic = Generator(self.p), Critic(self.p)
        load(generator, self.arrays, "generator")
        load(critic, self.arrays, "critic")
        return generator.to(memory_format=self.format), critic.to(memory_format=self.format)

    def _critic_loss(self, critic: Critic, x: Tensor, fake: Tensor, share: Tensor) -> Tensor:
        p = self.p
        if p["critic_norm"] == "batch":
            real_scores, fake_scores = critic(x), critic(fake)
        else:
            real_scores, fake_scores = critic(torch.cat([x, fake])).chunk(2)
        value = critic_loss(p["loss"], real_scores, fake_scores)
        if p["gradient_penalty"]:
            between = (x + share.view(-1, 1, 1, 1) * (fake - x)).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            value = value + p["gradient_penalty"] * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        return value

    def _gradients(self, net: Generator | Critic, which: str) -> dict[str, np.ndarray]:
        parameters = dict(net.named_parameters())
        return {ours: parameters[theirs].grad.cpu().numpy() for ours, theirs in names(net, which).items()}  # type: ignore[union-attr]

    def _image(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).float()
        if self.p["dequantize"]:
            x = x + torch.rand_like(x)
            return x.div_(128).sub_(1).to(memory_format=self.format)
        return x.div_(127.5).sub_(1).to(memory_format=self.format)

    def _channels_first(self, array: np.ndarray) -> Tensor:
        return torch.tensor(np.moveaxis(array, -1, 1).copy()).to(memory_format=self.format)


def main(argv: Sequence[str]) -> None:
    bench = Bench()
    work("launch.bench.gan_torch", argv, (bench.prepare, bench.run, bench.compare, bench.memory))


if __name__ == "__main__":
    sys.exit(command(main))
