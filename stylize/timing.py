"""How fast this package is, measured on request: the child process of `python -m launch.bench.stylize`.

    python -m stylize.timing

reads one JSON object a line and answers each with one. Between requests it sleeps, so that whoever asks can measure
something else meanwhile. `do` is one of

    prepare  fields of `Problem`, file: build it, write weights and images for the other side to file (npz); answers
             with the problem in plain numbers
    run      calls: seconds of so many calls, how many evaluations they were, and a number that must be finite
    record   out: what the other side must find too (npz)
    memory   peak of this process so far, in MiB

What is asked for the first time is compiled then. Processes that measure memory are asked for one thing only. All of
it runs without the persistent compilation cache.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lib.child import peak_memory_mib, work
from lib.features import weights
from lib.process import UserError, command
from lib.shard import compile_step, make_mesh, place, start
from lib.train import init_state
from stylize import tiles, vgg
from stylize.apply import Stylizer
from stylize.config import Config, Network, Optimization, Perception
from stylize.loss import content_of, everywhere, style_of
from stylize.optimize import TILE_PX, adam_step, compile_trace, objective, transformation
from stylize.training import Trained, build_model

Answer = dict[str, Any]
Arrays = dict[str, np.ndarray]

_PATCH_PX = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is computed, in plain numbers."""

    kind: Literal["network", "lbfgs", "adam", "tiles"]
    """an image through a feed-forward network; pixels optimised by either method; one step of Adam in tiles"""
    size_px: int
    """of a square image"""
    width: int = 16
    """of the network"""
    blocks: int = 5
    """of the network"""
    iterations: int = 5
    """lbfgs, adam: in one program, which is one call"""
    tile_px: int = TILE_PX
    """tiles"""
    vgg: str | None = None
    """file of weights of the loss network (default: that of `Perception`)"""


def picture(seed: int, size_px: int) -> np.ndarray:
    """[size, size, 3] in [-1, 1]: patches of even colour, and grain. Made in little more memory than it has."""
    rng = np.random.default_rng(seed)
    count = -(-size_px // _PATCH_PX)
    patches = rng.uniform(-0.8, 0.8, (count, count, 3)).astype(np.float32)
    image = patches.repeat(_PATCH_PX, 0).repeat(_PATCH_PX, 1)[:size_px, :size_px]
    for row in image:
        row += rng.uniform(-0.2, 0.2, row.shape)
    return np.ascontiguousarray(image)


def random_params(config: Config) -> Any:
    """Activations keep their size, and no two styles are the same."""

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = "/".join(key.key for key in path)
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape, np.float32)
        if name.endswith("kernel"):
            return values / np.float32(math.sqrt(math.prod(leaf.shape[:-1])))
        return np.float32(name.endswith("scale")) + np.float32(0.1) * values

    shapes = jax.eval_shape(
        build_model(config).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, len(config.styles) + 1))
    )
    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


class FeedForward:
    """One image after the other, from NumPy to NumPy."""

    def __init__(self, problem: Problem, mesh: Mesh):
        config = Config(styles=("one",), network=Network(problem.width, problem.blocks, output="tanh"))
        self._params, self._image = random_params(config), picture(0, problem.size_px)
        self._stylize = Stylizer(Trained(config, self._params), mesh)
        self._mix = self._stylize.mix()

    def told(self) -> Answer:
        return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(self._params))}

    def arrays(self) -> Arrays:
        return {**weights.flat(self._params), "image": self._image}

    def run(self, calls: int) -> tuple[int, float]:
        """(images, the mean of the last one)."""
        for _ in range(calls):
            image = self._stylize(self._image, self._mix)
        return calls, float(image.mean())

    def record(self) -> Arrays:
        return {"output": self._stylize(self._image, self._mix)}


class Gatys:
    """Iterations on pixels, the rows of the image spread over the devices."""

    def __init__(self, problem: Problem, mesh: Mesh):
        self._mesh, self._options = mesh, Perception(weights=problem.vgg, tv_weight=0.0)
        self._network, self._optim = vgg.load(self._options), Optimization(optimizer=problem.kind)
        self._images = {name: picture(i, problem.size_px) for i, name in enumerate(("content", "style", "start"))}
        self._batch = place(self._targets(), mesh)
        self._trace = compile_trace(self._network, self._options, self._optim, mesh, problem.iterations)

    def _targets(self) -> Any:
        network = self._network
        style = everywhere(style_of(network, network.params, [self._images["style"]]))
        content = content_of(network, network.params, self._images["content"][None])
        return {"params": network.params, "style": style, "content": content}

    def told(self) -> Answer:
        network = self._network
        layers = {
            "layers": network.up_to(network.layers),
            "style_layers": network.style_layers,
            "content_layers": network.content_layers,
        }
        factors = {"style_weight": self._options.style_weight, "content_weight": self._options.content_weight}
        return {**layers, **factors, "lr": self._optim.lr, "memory": self._optim.memory}

    def arrays(self) -> Arrays:
        needed = self._network.up_to(self._network.layers)
        params = self._network.params
        # Kernels as they are, without what was computed from them beforehand.
        layers = {name: {part: params[name][part] for part in ("kernel", "bias")} for name in needed if name in params}
        return {**weights.flat({**layers, "mean": params["mean"]}), **self._images}

    def run(self, calls: int) -> tuple[int, float]:
        """(evaluations of value and gradient, the objective before the last iteration).

        Each program also evaluates the objective once more at its end, which is not counted.
        """
        count, last = 0, math.nan
        for _ in range(calls):
            _, values, evaluations = self._trace(self._images["start"], self._batch)
            # A line search leaves value and gradient of its last point to the next iteration; the first has none.
            count += int(np.sum(evaluations)) + (self._optim.optimizer == "lbfgs")
            last = float(values[-2])
        return count, last

    def record(self) -> Arrays:
        loss = objective(self._network, self._options, self._mesh)

        def both(nothing: Any, x: jax.Array, batch: Any) -> tuple[Any, Any]:
            (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(x, batch, jax.random.key(0))
            return nothing, (value, gradient)

        compiled = compile_step(both, self._mesh, "jit", in_specs=(P(), P(), P()))
        x = place(self._images["start"][None], self._mesh)
        value, gradient = compiled((), x, self._batch)[1]
        return {"value": np.asarray(value), "gradient": np.asarray(gradient)[0]}


class Tiles:
    """Steps of Adam on an image that is computed tile by tile; the style image is as large as a tile."""

    def __init__(self, problem: Problem, mesh: Mesh):
        options, optim = Perception(weights=problem.vgg), Optimization(optimizer="adam")
        network, tx = vgg.load(options), transformation(optim)
        step = adam_step(tiles.objective(network, options, mesh, problem.tile_px), tx)
        style = jnp.asarray(picture(1, problem.tile_px))
        grams = style_of(network, network.params, [style])
        image = picture(0, problem.size_px)[None]
        self._batch = place({"params": network.params, "grams": grams, "picture": image}, mesh)
        self._state = place(init_state(jnp.asarray(image), tx, jax.random.key(0)), mesh)
        self._step = compile_step(step, mesh, "jit", in_specs=(P(), P()))

    def told(self) -> Answer:
        return {}

    def arrays(self) -> Arrays:
        raise UserError("tiles are measured alone: there is no other side to write a file for")

    def run(self, calls: int) -> tuple[int, float]:
        """(steps, the objective before the last one)."""
        last = math.nan
        for _ in range(calls):
            self._state, metrics = self._step(self._state, self._batch)
            last = float(jax.block_until_ready((self._state, metrics))[1]["loss"])
        return calls, last

    def record(self) -> Arrays:
        raise UserError("tiles are measured alone: there is nothing to record")


KINDS = {"network": FeedForward, "lbfgs": Gatys, "adam": Gatys, "tiles": Tiles}


class Bench:
    """What is kept between requests: the problem and what is already compiled for it."""

    def prepare(self, file: str | None = None, **fields: Any) -> Answer:
        if fields.get("kind") not in KINDS:
            raise UserError(f"unknown kind {fields.get('kind')!r}: choose from {', '.join(KINDS)}")
        problem = Problem(**fields)
        self._work = KINDS[problem.kind](problem, make_mesh())
        if file is not None:
            np.savez(file, **self._work.arrays())
        return {**dataclasses.asdict(problem), **self._work.told(), "backend": jax.default_backend()}

    def run(self, calls: int) -> Answer:
        begin = time.perf_counter()
        evaluations, value = self._work.run(calls)
        seconds = time.perf_counter() - begin
        if not math.isfinite(value):
            raise UserError("what was computed has left the numbers: nothing to measure")
        return {"seconds": seconds, "evaluations": evaluations, "value": value}

    def record(self, out: str) -> Answer:
        np.savez(out, **self._work.record())
        return {}

    def memory(self) -> Answer:
        return {"peak_mib": peak_memory_mib()}


def actions() -> tuple[Callable[..., dict[str, Any]], ...]:
    """What can be asked for."""
    bench = Bench()
    return bench.prepare, bench.run, bench.record, bench.memory


def main(argv: Sequence[str]) -> None:
    start()
    jax.config.update("jax_enable_compilation_cache", False)
    work("stylize.timing", argv, actions())


if __name__ == "__main__":
    sys.exit(command(main))
