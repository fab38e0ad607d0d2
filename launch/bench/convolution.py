"""One SGD training step of eight residual 3x3 convolutions: the engine's scanned chunk against PyTorch.

    python -m launch.bench.convolution [--json FILE]

64 channels, 28x28, batch 64, float32 on the CPU, x + relu(conv(x)) eight times, mean squared error to a
random target. Ours is `lib.train.compile_chunk` on a mesh of one CPU device per core; PyTorch runs eagerly
with as many threads, contiguous and channels_last. Both start from the same parameters and data, which stay
in memory, and take the same steps; the losses after them are compared, so that both are known to have done
the same work. The rounds of the variants are interleaved, so that other load on the machine meets all of them
alike.
"""

import statistics
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from launch.bench.rounds import interleaved, options, torch_on
from lib import layers
from lib.data import FullBatch
from lib.process import UserError, command
from lib.run import environment, write_json
from lib.shard import cores, make_mesh, place, start
from lib.train import compile_chunk, init_state, make_step

LAYERS, CHANNELS, SIZE_PX, BATCH = 8, 64, 28, 64
LEARNING_RATE = 0.01
BAR = 1.05
DESCRIPTION = "One SGD step of eight residual 3x3 convolutions: the engine against PyTorch."

Run = Callable[[], float]


class Residual(nn.Module):
    """x + relu(conv(x)), eight times: [b, h, w, c] -> [b, h, w, c]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(LAYERS):
            x = x + nn.relu(layers.Conv(CHANNELS, (3, 3))(x))
        return x


def problem(seed: int = 0) -> tuple[dict, dict[str, np.ndarray]]:
    """Initial parameters of `Residual`, and inputs and targets [b, h, w, c]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (BATCH, SIZE_PX, SIZE_PX, CHANNELS)
    params = jax.jit(Residual().init)(keys[0], jnp.zeros((1, *shape[1:])))["params"]
    arrays = {"x": jax.random.normal(keys[1], shape), "target": jax.random.normal(keys[2], shape)}
    return jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, arrays)


def ours(params: dict, arrays: dict[str, np.ndarray], devices: int, steps: int) -> Run:
    """A function that takes `steps` steps in one compiled program and returns the last loss."""

    def loss(params: dict, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
        del key
        difference = Residual().apply({"params": params}, batch["x"]) - batch["target"]
        # Three million squares: of four axes XLA's sum is one after the other, and off by 6e-4.
        return jnp.mean(difference.reshape(-1) ** 2), {}

    mesh = make_mesh(devices)
    tx = optax.sgd(LEARNING_RATE)
    source = FullBatch(arrays)
    chunk = compile_chunk(make_step(loss, tx), source, mesh, "jit" if devices == 1 else "shard_map")
    state = place(init_state(params, tx, jax.random.key(0)), mesh)
    constant = place(source.constant, mesh, source.constant_spec)
    xs = place(source.per_step(0, steps), mesh, source.per_step_spec)

    def run() -> float:
        nonlocal state
        state, metrics = chunk(state, constant, xs)
        return float(metrics["loss"][-1])

    return run


def pytorch(params: dict, arrays: dict[str, np.ndarray], steps: int, *, channels_last: bool) -> Run:
    """The same in PyTorch, eager, from the same parameters."""
    import torch

    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(memory_format=memory_format)

    layers = torch.nn.ModuleList(torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(LAYERS))
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.copy_(torch.from_numpy(params[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1).copy()))
            layer.bias.copy_(torch.from_numpy(params[f"Conv_{i}"]["bias"].copy()))
    layers = layers.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(layers.parameters(), lr=LEARNING_RATE)
    x, target = tensor(arrays["x"]), tensor(arrays["target"])

    def run() -> float:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            y = x
            for layer in layers:
                y = y + torch.relu_(layer(y))
            loss = torch.nn.functional.mse_loss(y, target)
            loss.backward()
            optimizer.step()
        return loss.item()

    return run


def measure(variants: dict[str, Run], steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Per variant: median and minimum ms per step, and the last loss."""
    times, losses = interleaved(variants, rounds)
    return {
        name: {
            "median_ms": 1e3 * statistics.median(s) / steps,
            "minimum_ms": 1e3 * min(s) / steps,
            "loss": losses[name],
        }
        for name, s in times.items()
    }


def main(argv: Sequence[str]) -> None:
    args = options(
        argv,
        "launch.bench.convolution",
        DESCRIPTION,
        rounds=(7, "interleaved rounds per variant"),
        steps=(8, "training steps per round"),
    )
    torch = torch_on("cpu")
    devices = cores()
    start(devices)
    params, arrays = problem()
    variants = {
        "ours": ours(params, arrays, devices, args.steps),
        "torch channels_last": pytorch(params, arrays, args.steps, channels_last=True),
        "torch contiguous": pytorch(params, arrays, args.steps, channels_last=False),
    }
    results = measure(variants, args.steps, args.rounds)
    best = {
        kind: min(results[name][kind] for name in variants if name != "ours") for kind in ("median_ms", "minimum_ms")
    }
    ratios = {kind: results["ours"][kind] / best[kind] for kind in best}
    spread = max(abs(r["loss"] / results["ours"]["loss"] - 1) for r in results.values())

    print(f"{'ms per step, ' + str(devices) + ' cores':24}{'median':>10}{'minimum':>10}{'loss':>14}")
    for name, r in results.items():
        print(f"{name:24}{r['median_ms']:10.1f}{r['minimum_ms']:10.1f}{r['loss']:14.8f}")
    print(f"{'ours / best of torch':24}{ratios['median_ms']:10.3f}{ratios['minimum_ms']:10.3f}  (bar {BAR})")
    if args.json:
        write_json(
            args.json,
            {
                "variants": results,
                "ratio_median": ratios["median_ms"],
                "ratio_minimum": ratios["minimum_ms"],
                "loss_relative_difference": spread,
                "cores": devices,
                "rounds": args.rounds,
                "steps_per_round": args.steps,
                "torch": torch.__version__,
                "environment": environment(),
            },
        )
    if spread > 1e-4:
        raise UserError(f"the losses differ by {spread:.1e}: the variants did not do the same work")


if __name__ == "__main__":
    sys.exit(command(main))
