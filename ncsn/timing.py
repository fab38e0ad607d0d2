"""How fast sampling is, measured on request: child processes of `python -m launch.bench.ncsn`.

    python -m ncsn.timing PROBLEM

reads one JSON object a line and answers each with one; it sleeps between requests. `do` is one of

    prepare      problem (that of the command), weights: write random weights to the npz FILE; answers with all that the
                 other side needs
    chain        seconds to draw all samples by the compiled chain, to NumPy arrays on the host
    loop         the same by jitted steps that are called from Python
    evaluations  calls: seconds of so many evaluations of the network, called one by one, and in one program
    record       out: the npz FILE gets the start, the noise and the samples of a chain, for the other side to repeat
    memory       peak of this process so far, in MiB

What is asked for the first time is compiled then. Processes that measure memory are asked for one thing only. All of
it runs without the persistent compilation cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lib.child import answers, peak_memory_mib
from lib.process import UserError, command
from lib.rows import on_mesh
from lib.shard import DATA, make_mesh, place, start
from ncsn.blocks import MLP
from ncsn.langevin import annealed_langevin
from ncsn.model import Params, ScoreModel, edm, ncsn_v1
from ncsn.noise import geometric, karras
from ncsn.ode import heun
from ncsn.samplers import NOISE, Sampler, compile_sampler, normal
from ncsn.unet import UNet

SIGMA_DATA = 0.5


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and a chain, in plain numbers, from which the other side builds the same."""

    network: Literal["mlp", "unet", "refinenet"]
    fields: dict[str, Any]
    """of `MLP`, of `UNet`, or the ngf of `ncsn_v1`"""
    shape: tuple[int, ...]
    """of one sample"""
    count: int
    """samples, all side by side"""
    sigmas: list[float]
    """falling; to 0 for Heun's method"""
    steps: int = 0
    """annealed Langevin steps per sigma, NCSN's code's rule with a denoising step at the end; 0: Heun's method"""
    step_size: float = 0.0
    """of those steps, at the last sigma"""

    @property
    def evaluations(self) -> int:
        """Of the network, per sample."""
        return len(self.sigmas) * self.steps + 1 if self.steps else 2 * len(self.sigmas) - 3

    def model(self) -> ScoreModel:
        if self.network == "refinenet":
            return ncsn_v1(self.shape, self.sigmas, **self.fields)  # pyright: ignore[reportArgumentType]
        return edm({"mlp": MLP, "unet": UNet}[self.network](**self.fields), self.shape, SIGMA_DATA)

    def sampler(self, score_fn: Any) -> Sampler:
        if self.steps:
            return annealed_langevin(score_fn, self.sigmas, self.step_size, self.steps)
        return heun(score_fn, self.sigmas)


def _falling(sigmas: np.ndarray) -> list[float]:
    return [float(sigma) for sigma in sigmas]


PROBLEMS = {
    # NCSN, section 3.2.2: its 1,280 chains, levels and steps
    "mlp": Problem("mlp", {"width": 64, "layers": 3}, (2,), 1280, _falling(geometric(20, 1, 10)), 100, 0.1),
    "unet": Problem(
        "unet",
        {"width": 32, "multipliers": (1, 2, 3), "blocks": 2, "attention": (7,)},
        (28, 28, 1),
        16,
        [*_falling(karras(80, 0.002, 18)), 0.0],
    ),
    "refinenet": Problem("refinenet", {"ngf": 32}, (28, 28, 1), 16, _falling(geometric(1, 0.01, 10)), 3, 2e-5),
}


def random_params(model: ScoreModel) -> Params:
    """Activations keep their size; unlike at the start of training, no part is zero."""

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = "/".join(key.key for key in path)
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape, np.float32)
        if name.endswith("kernel"):
            return values / np.float32(math.sqrt(math.prod(leaf.shape[:-1])))
        return (1 if name.endswith(("gamma", "alpha", "scale")) else 0) + np.float32(0.1) * values

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def flat(params: Params) -> dict[str, np.ndarray]:
    """Arrays by their names, joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params["params"])
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


class Bench:
    """What is kept between requests: the problem and what is already compiled for it."""

    def prepare(self, problem: str, weights: str, **changes: Any) -> dict[str, Any]:
        """`changes` are fields of `Problem` with other values."""
        if problem not in PROBLEMS:
            raise UserError(f"unknown problem {problem!r}: choose from {', '.join(PROBLEMS)}")
        self.problem = dataclasses.replace(PROBLEMS[problem], **changes)
        self.model = self.problem.model()
        self.mesh = make_mesh()
        params = random_params(self.model)
        np.savez(weights, **flat(params))
        self.params, self.key = place((params, jax.random.key(0)), self.mesh)
        self.width = -(-self.problem.count // self.mesh.size)
        self.draw = compile_sampler(
            lambda params, rows: self._sampler(params), self.problem.shape, self.mesh, width=self.width
        )
        self.begin_all = on_mesh(self._begin, self.mesh, (P(), P(DATA)))
        self.step_all = on_mesh(self._step, self.mesh, (P(DATA), P(), P(DATA), P()), donate=True)
        self.evaluate_all = on_mesh(self._evaluate, self.mesh, (P(DATA), P(), P()))
        self.evaluations_all = on_mesh(self._evaluations, self.mesh, (P(DATA), P(), P()))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        derived = {
            "evaluations": self.problem.evaluations,
            "parameters": parameters,
            "sigma_data": SIGMA_DATA,
            "backend": jax.default_backend(),
        }
        return {**dataclasses.asdict(self.problem), **derived}

    def chain(self) -> dict[str, Any]:
        begin = time.perf_counter()
        samples, told = self.draw(self.params, self.key, self.problem.count)
        seconds = time.perf_counter() - begin
        if not np.isfinite(samples).all() or (told.nfe != self.problem.evaluations).any():
            raise UserError("the chain has left the numbers or counts otherwise than the problem: nothing to measure")
        return {"seconds": seconds}

    def loop(self) -> dict[str, Any]:
        begin = time.perf_counter()
        self._loop()
        return {"seconds": time.perf_counter() - begin}

    def evaluations(self, calls: int) -> dict[str, Any]:
        """Each of those that are called waits for the one before."""
        x = place(np.ones((self.width * self.mesh.size, *self.problem.shape), np.float32), self.mesh, P(DATA))
        params, sigma = place((self.params, np.float32(1.0)), self.mesh)
        sigmas = place(np.ones(calls, np.float32), self.mesh)
        jax.block_until_ready((self.evaluate_all(x, params, sigma), self.evaluations_all(x, params, sigmas)))
        begin = time.perf_counter()
        for _ in range(calls):
            self.evaluate_all(x, params, sigma).block_until_ready()
        middle = time.perf_counter()
        self.evaluations_all(x, params, sigmas).block_until_ready()
        return {"called_seconds": middle - begin, "compiled_seconds": time.perf_counter() - middle}

    def record(self, out: str) -> dict[str, Any]:
        samples, _ = self.draw(self.params, self.key, self.problem.count)
        indices = jnp.arange(self.problem.count)
        keys, state = jax.jit(self._begin)(self.key, indices)
        steps = len(self._sampler(self.params).levels) - 1 if self.problem.steps else 0
        noise = jax.jit(jax.vmap(lambda i: normal(keys, self.problem.shape, NOISE, i)))(jnp.arange(steps))
        looped = self._loop()[: self.problem.count]
        np.savez(out, start=state.x, noise=noise, samples=samples)
        return {"loop_difference": float(np.abs(looped - samples).max() / np.abs(samples).max())}

    def memory(self) -> dict[str, Any]:
        return {"peak_mib": peak_memory_mib()}

    def _sampler(self, params: Params) -> Sampler:
        return self.problem.sampler(functools.partial(self.model.score, params))

    def _begin(self, key: jax.Array, indices: jax.Array) -> tuple[jax.Array, Any]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        return keys, self._sampler(self.params).init(keys, self.problem.shape)

    def _step(self, state: Any, params: Params, keys: jax.Array, i: jax.Array) -> tuple[Any, Any]:
        return self._sampler(params).step(keys, i, state)

    def _loop(self) -> np.ndarray:
        params, key = place((self.params, self.key), self.mesh)
        keys, state = self.begin_all(key, place(np.arange(self.width * self.mesh.size), self.mesh, P(DATA)))
        for i in range(len(self._sampler(self.params).levels) - 1):
            state, _ = self.step_all(state, params, keys, np.int32(i))
        return np.asarray(state.x)

    def _evaluate(self, x: jax.Array, params: Params, sigma: jax.Array) -> jax.Array:
        return self.model.score(params, x, sigma[None])

    def _evaluations(self, x: jax.Array, params: Params, sigmas: jax.Array) -> jax.Array:
        # Each depends on the one before, or they would not be computed one after the other.
        return jax.lax.scan(lambda x, sigma: (x + 1e-6 * self._evaluate(x, params, sigma), None), x, sigmas)[0]


def serve(requests: Iterable[str]) -> Iterator[str]:
    """Answers to request lines, one each. Raises UserError for a request that cannot be met, and then ends."""
    bench = Bench()
    actions = (bench.prepare, bench.chain, bench.loop, bench.evaluations, bench.record, bench.memory)
    return answers(actions, requests)


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1 or argv[0] not in PROBLEMS:
        raise UserError(f"python -m ncsn.timing PROBLEM: one of {', '.join(PROBLEMS)}; requests come from stdin")
    start(convolutions=argv[0] != "mlp")
    jax.config.update("jax_enable_compilation_cache", False)
    for answer in serve(sys.stdin):
        print(answer, flush=True)


if __name__ == "__main__":
    sys.exit(command(main))
