"""How fast this package is, measured on request: the child process of `python -m launch.bench.hnn`.

    python -m hnn.timing

reads one JSON object a line and answers each with one. Between requests it sleeps, so that whoever asks can measure
something else meanwhile. `do` is one of

    prepare       task, data: simulate, write the npz FILE; answers with the original's recipe and evaluation
    train_block   model, steps: seconds of so many steps of that recipe by the engine's scanned chunk
    rollouts      weights, out: seconds to follow both networks, compilation included; writes the paths
    reference     weights, out: the same in float64 to a tight tolerance, not timed
    time_to_loss  steps: seconds and test loss of the preset's recipe, made for so many steps

All of it runs without the persistent compilation cache.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hnn import model as nets
from hnn.config import PRESETS
from hnn.data import Trajectories, save_npz, simulate
from hnn.evaluate import original_spans
from hnn.evaluate import rollouts as adaptive_rollouts
from hnn.experiment import STEPS_PER_CALL, optimizer
from hnn.loss import derivative_matching
from hnn.systems import SYSTEMS
from lib.child import answers
from lib.data import FullBatch, Resident, Source
from lib.process import UserError, command
from lib.shard import make_mesh, place, start
from lib.train import compile_chunk, init_state, make_step

MODELS = {"hnn": nets.hnn, "baseline": nets.baseline}
ORIGINAL_LEARNING_RATE = 1e-3
EVALUATION_STARTS = 15
REFERENCE_RTOL = 1e-12
# Classical Runge-Kutta as a sequence of stages: how far the next stage looks ahead, and the weight of this one.
RK4_AHEAD = np.array([0.5, 0.5, 1.0, 0.0], np.float32)
RK4_WEIGHTS = np.array([1, 2, 2, 1], np.float32) / 6


@dataclasses.dataclass(frozen=True)
class Task:
    """The original's training and evaluation of one system.

    `points` and `rtol` are those of its notebook's rollouts; `substeps` is how many of our Runge-Kutta steps between
    two points it takes to be at least as accurate as SciPy there.
    """

    batch_size: int | None
    weight_decay: float
    points: int
    rtol: float
    substeps: int


TASKS = {
    "spring": Task(batch_size=None, weight_decay=1e-4, points=100, rtol=1e-12, substeps=13),
    "pendulum": Task(batch_size=None, weight_decay=1e-4, points=100, rtol=1e-12, substeps=4),
    "two_body": Task(batch_size=200, weight_decay=0.0, points=500, rtol=1e-9, substeps=1),
}


class Training:
    """One seed of one model, advanced by the compiled chunk that `lib.train.fit` runs.

    On one CPU device per core, where the batch divides over them, as large models do; else on one.
    """

    def __init__(
        self, model: nets.FieldModel, part: Trajectories, tx: optax.GradientTransformation, batch_size: int | None
    ):
        arrays = observations(part)
        self.source: Source = FullBatch(arrays) if batch_size is None else Resident(arrays, batch_size)
        rows = batch_size or len(arrays["y"])
        self.mesh = make_mesh(len(jax.devices()) if rows % len(jax.devices()) == 0 else 1)
        step = make_step(derivative_matching(model.field), tx)
        self.chunk = compile_chunk(step, self.source, self.mesh, "jit" if self.mesh.size == 1 else "shard_map")
        self.constant = place(self.source.constant, self.mesh, self.source.constant_spec)
        self.start = init_state(model.init(jax.random.key(0)), tx, jax.random.key(1))
        self.restart()

    def restart(self) -> None:
        """Back to the first step, from a copy, because the chunk consumes its state."""
        self.state, self.done = place(jax.tree.map(jnp.copy, self.start), self.mesh), 0

    def advance(self, steps: int) -> float:
        """Seconds that the next `steps` steps take, to the last loss on the host."""
        begin = time.perf_counter()
        for first in range(self.done, self.done + steps, STEPS_PER_CALL):
            xs = self.source.per_step(first, min(STEPS_PER_CALL, self.done + steps - first))
            xs = place(xs, self.mesh, self.source.per_step_spec)
            self.state, metrics = self.chunk(self.state, self.constant, xs)
            losses = np.asarray(metrics["loss"])
            if not np.isfinite(losses).all():
                raise UserError(f"the loss is not finite after step {first}: nothing to measure")
        self.done += steps
        return time.perf_counter() - begin


def observations(part: Trajectories) -> dict[str, np.ndarray]:
    """All observed states and derivatives as rows, float32 [n_traj T, 2n]."""
    return {name: np.float32(a.reshape(-1, a.shape[-1])) for name, a in (("y", part.y), ("dy", part.dy))}


def flax_params(weights: dict[str, np.ndarray], name: str) -> nets.Params:
    """The parameters of `MODELS[name]` out of a PyTorch network's, whose HNN has H as the second of two outputs."""

    def layer(torch_name: str) -> np.ndarray:
        return np.ascontiguousarray(weights[f"{name}.net.{torch_name}"].T)

    last = layer("last.weight")
    return {
        "params": {
            "Dense_0": {"kernel": layer("first.weight"), "bias": layer("first.bias")},
            "Dense_1": {"kernel": layer("second.weight"), "bias": layer("second.bias")},
            "Dense_2": {"kernel": last[:, 1:] if name == "hnn" else last},
        }
    }


def follow(
    field: Callable[[jax.Array], jax.Array], y0: jax.Array, span: jax.Array, points: int, substeps: int
) -> jax.Array:
    """Classical Runge-Kutta from y0 [n, 2n] over spans [n]: [n, points, 2n]; `field` takes the whole batch.

    The stages are iterations of the innermost loop rather than written out, so that the network is compiled once:
    in rollouts as short as these, compilation is most of the time.
    """
    dt = (span / ((points - 1) * substeps))[:, None]
    coefficients = (np.tile(RK4_AHEAD, substeps), np.tile(RK4_WEIGHTS, substeps))

    def stage(carry: tuple[jax.Array, ...], coefficient: tuple[jax.Array, jax.Array]):
        start, here, total = carry
        ahead, weight = coefficient
        slope = field(here)
        total = total + dt * weight * slope
        complete = ahead == 0
        here = jnp.where(complete, total, start + dt * ahead * slope)
        return (jnp.where(complete, total, start), here, total), None

    def interval(y: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        (y, _, _), _ = jax.lax.scan(stage, (y, y, y), coefficients)
        return y, y

    _, ys = jax.lax.scan(interval, y0, length=points - 1)
    return jnp.concatenate([y0[None], ys]).swapaxes(0, 1)


class Bench:
    """What is kept between requests: the task, its data and the trainings that are already compiled."""

    def prepare(self, task: str, data: str, n_trajectories: int | None = None) -> dict[str, Any]:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
        self.name, self.task, self.system = task, TASKS[task], SYSTEMS[task]
        self.data = simulate(self.system, jax.random.key(0), n_trajectories=n_trajectories)
        save_npz(data, self.data, task)
        sampler = self.system.sample_original_test or self.system.sample_initial
        assert sampler is not None
        with jax.enable_x64(True):
            self.y0 = np.asarray(sampler(jax.random.key(1), EVALUATION_STARTS))
        self.span = original_spans(self.system)
        self.trainings: dict[str, Training] = {}
        return {**dataclasses.asdict(self.task), "y0": self.y0.tolist(), "span": self.span.tolist()}

    def train_block(self, model: str, steps: int) -> dict[str, Any]:
        """The first block of a model is preceded by an untimed one, which compiles."""
        if model not in self.trainings:
            decay = optax.add_decayed_weights(self.task.weight_decay)
            tx = optax.chain(decay, optax.adam(ORIGINAL_LEARNING_RATE))
            network = MODELS[model](self.system.dimension)
            self.trainings[model] = Training(network, self.data.train, tx, self.task.batch_size)
            self.trainings[model].advance(steps)
        return {"seconds": self.trainings[model].advance(steps)}

    def rollouts(self, weights: str, out: str) -> dict[str, Any]:
        """Both models from all starts, as one program in float32; once with tracing and compiling, once without."""
        arrays = _load(weights)
        self.trainings.clear()  # their programs are forgotten with all others
        jax.clear_caches()
        begin = time.perf_counter()
        y0, span = np.float32(self.y0), np.float32(self.span)
        params = {name: flax_params(arrays, name) for name in MODELS}

        # It runs once: half the time to compile is worth more than code that is a little better.
        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
        def program(params: nets.Params, y0: jax.Array, span: jax.Array) -> dict[str, jax.Array]:
            paths = {}
            for name, build in MODELS.items():
                one = build(self.system.dimension).field
                field = jax.vmap(lambda y, one=one, p=params[name]: one(p, y))
                paths[name] = follow(field, y0, span, self.task.points, self.task.substeps)
            return paths

        paths = jax.tree.map(np.asarray, program(params, y0, span))
        compiled = time.perf_counter()
        jax.tree.map(np.asarray, program(params, y0, span))
        end = time.perf_counter()
        np.savez(out, **paths)
        return {"seconds": compiled - begin, "seconds_compiled": end - compiled}

    def reference(self, weights: str, out: str) -> dict[str, Any]:
        arrays, paths = _load(weights), {}
        for name, build in MODELS.items():
            params = jax.tree.map(lambda p: p[None], flax_params(arrays, name))
            field = build(self.system.dimension).field
            followed = adaptive_rollouts(field, params, self.y0[None], self.span, self.task.points, REFERENCE_RTOL)
            paths[name] = followed[0]
        np.savez(out, **paths)
        return {}

    def time_to_loss(self, steps: int) -> dict[str, Any]:
        """`compile_seconds` also covers the chunk that was run to compile it."""
        if steps > STEPS_PER_CALL and steps % STEPS_PER_CALL:
            raise UserError(f"steps must be a multiple of {STEPS_PER_CALL}, not {steps}")
        # A run this short wants a larger step and a shorter memory than the preset's.
        optim = dataclasses.replace(PRESETS[self.name].derivative, steps=steps, lr=1.2e-2, b2=0.98, warmup=0.1)
        network = nets.hnn(self.system.dimension)
        training = Training(network, self.data.train, optimizer(optim), optim.batch_size)
        compile_s = training.advance(min(steps, STEPS_PER_CALL))
        training.restart()
        seconds = training.advance(steps)
        test = observations(self.data.test)
        loss = jax.jit(derivative_matching(network.field))(training.state.params, test, jax.random.key(0))[0]
        return {"seconds": seconds, "compile_seconds": compile_s, "test_loss": float(loss)}


def _load(path: str) -> dict[str, np.ndarray]:
    with np.load(Path(path), allow_pickle=False) as file:
        return dict(file)


def serve(requests: Iterable[str]) -> Iterator[str]:
    """Answers to request lines, one each. Raises UserError for a request that cannot be met, and then ends."""
    bench = Bench()
    return answers((bench.prepare, bench.train_block, bench.rollouts, bench.reference, bench.time_to_loss), requests)


def main(argv: Sequence[str]) -> None:
    if argv:
        raise UserError("python -m hnn.timing takes no arguments: it reads requests from stdin")
    start(convolutions=False)
    jax.config.update("jax_enable_compilation_cache", False)
    for answer in serve(sys.stdin):
        print(answer, flush=True)


if __name__ == "__main__":
    sys.exit(command(main))
