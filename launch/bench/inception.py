"""Inception features per second: the sharded network beside the same one in PyTorch.

    python -m launch.bench.inception [--json FILE]

uint8 images of 32x32 to 2048 features, float32, random weights, pytorch-fid's preprocessing. Ours runs on a mesh of
all devices (on a CPU one per core) with the batch sharded over it; PyTorch runs eagerly in inference mode, as
pytorch-fid and torch-fidelity do, with as many threads, contiguous and channels_last, and on the GPU where there is
one. The features of both are compared, so that both are known to have done the same work. The rounds are interleaved,
so that other load on the machine meets all variants alike.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from launch.bench.rounds import interleaved, options, torch_device, torch_on
from lib.features import inception
from lib.process import UserError, command
from lib.run import environment, write_json
from lib.shard import DATA, compiler_options, cores, make_mesh, place, start

SIZE_PX = 32
BAR_CPU, BAR_GPU = 0.9, 1.5
DESCRIPTION = "Inception features per second: ours against PyTorch."

Run = Callable[[], np.ndarray]


def problem(batch: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Flat random weights of our network, and images uint8 [batch, 32, 32, 3]."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in inception.shapes().items():
        scale = np.sqrt(2 / np.prod(shape[:-1])) if name.endswith("/kernel") else 0.1
        arrays[name] = np.float32(scale) * rng.standard_normal(shape, np.float32)
    return arrays, rng.integers(0, 256, (batch, SIZE_PX, SIZE_PX, 3), np.uint8)


def ours(arrays: dict[str, np.ndarray], images: np.ndarray, devices: int | None) -> Run:
    net = inception.feature_net("inception.pytorch_fid", arrays, "")
    mesh = make_mesh(devices)
    sharded = jax.shard_map(
        lambda params, x: net.apply(params, x).pool, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(DATA)
    )
    features = jax.jit(sharded, compiler_options=compiler_options(mesh))
    params = place(net.params, mesh)
    return lambda: np.asarray(features(params, place(images, mesh, P(DATA))))


def pytorch(arrays: dict[str, np.ndarray], images: np.ndarray, device: str, *, channels_last: bool) -> Run:
    """The same network, convolution, batch normalisation and ReLU after each other."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def basic(conv: inception.Conv, name: str) -> nn.Sequential:
        """Our folded weights with a batch normalisation around them that changes nothing."""
        kernel = torch.from_numpy(arrays[f"{name}/kernel"].transpose(3, 2, 0, 1).copy())
        padding = tuple(k // 2 for k in conv.kernel) if conv.padding == "SAME" else 0
        layer = nn.Conv2d(kernel.shape[1], conv.features, conv.kernel, conv.strides, padding, bias=False)
        norm = nn.BatchNorm2d(conv.features, eps=inception.BATCH_NORM_EPS)
        with torch.no_grad():
            layer.weight.copy_(kernel)
            norm.bias.copy_(torch.from_numpy(arrays[f"{name}/bias"]))
        torch.nn.init.constant_(norm.running_var, 1 - inception.BATCH_NORM_EPS)
        return nn.Sequential(layer, norm, nn.ReLU(inplace=True))

    pools = {
        "max_halving": lambda x: F.max_pool2d(x, 3, 2),
        "max": lambda x: F.max_pool2d(x, 3, 1, 1),
        "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    }
    layers = nn.ModuleDict()

    def build(stage: Any, prefix: str = "") -> Callable[[Any], Any]:
        if isinstance(stage, str):
            return pools[stage]
        if not isinstance(stage, inception.Conv):
            parts = [build(part, prefix) for part in stage]
            return lambda x: torch.cat([part(x) for part in parts], 1)
        key = (prefix + stage.name).replace(".", "-")
        layers[key] = basic(stage, prefix + stage.name)
        return lambda x: layers[key](x)

    stem = [build(stage) for stage in inception.STEM]
    blocks = [
        [[build(stage, f"{name}.") for stage in branch] for branch in branches]
        for name, branches in inception.BLOCKS.items()
    ]
    layers.eval().to(device=device, memory_format=memory_format)

    def through(stages: list[Callable[[Any], Any]], x: Any) -> Any:
        for stage in stages:
            x = stage(x)
        return x

    def run() -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).to(device).float() / 255
            size = (inception.SIZE_PX, inception.SIZE_PX)
            x = 2 * F.interpolate(x, size, mode="bilinear", align_corners=False) - 1
            x = through(stem, x.to(memory_format=memory_format))
            for branches in blocks:
                x = torch.cat([through(branch, x) for branch in branches], 1)
            return x.mean((2, 3)).cpu().numpy()

    return run


def measure(variants: dict[str, Run], batch: int, rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """(per variant features per second; largest relative difference to ours)."""
    times, features = interleaved(variants, rounds)
    rates = {
        name: {"median_per_s": batch / statistics.median(s), "best_per_s": batch / min(s)} for name, s in times.items()
    }
    wanted = features["ours"]
    return rates, max(float(np.abs(found - wanted).max() / np.abs(wanted).max()) for found in features.values())


def main(argv: Sequence[str]) -> None:
    args = options(
        argv,
        "launch.bench.inception",
        DESCRIPTION,
        rounds=(7, "interleaved rounds per variant"),
        batch=(32, "images per round"),
    )
    start()
    device = torch_device(jax.default_backend())
    torch = torch_on(device)
    gpu = device == "cuda"
    arrays, images = problem(args.batch)
    variants = {
        "ours": ours(arrays, images, None),
        "torch channels_last": pytorch(arrays, images, device, channels_last=True),
        "torch contiguous": pytorch(arrays, images, device, channels_last=False),
    }
    results, difference = measure(variants, args.batch, args.rounds)
    best = {kind: max(results[name][kind] for name in variants if name != "ours") for kind in results["ours"]}
    ratios = {kind: results["ours"][kind] / best[kind] for kind in best}

    print(f"{'features per s, ' + jax.default_backend():24}{'median':>10}{'best':>10}")
    for name, r in results.items():
        print(f"{name:24}{r['median_per_s']:10.2f}{r['best_per_s']:10.2f}")
    ratio_line = f"{'ours / best of torch':24}{ratios['median_per_s']:10.3f}{ratios['best_per_s']:10.3f}"
    print(f"{ratio_line}  (bar {BAR_GPU if gpu else BAR_CPU})")
    if args.json:
        write_json(
            args.json,
            {
                "variants": results,
                "ratio_median": ratios["median_per_s"],
                "ratio_best": ratios["best_per_s"],
                "feature_relative_difference": difference,
                "cores": cores(),
                "rounds": args.rounds,
                "batch": args.batch,
                "torch": torch.__version__,
                "environment": environment(),
            },
        )
    if difference > (1e-2 if gpu else 1e-4):  # PyTorch's convolutions on a GPU round to TF32
        raise UserError(f"the features differ by {difference:.1e}: the variants did not do the same work")


if __name__ == "__main__":
    sys.exit(command(main))
