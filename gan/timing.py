"""How fast training is, measured on request: the child process of `python -m launch.bench.gan`.

    python -m gan.timing

reads one JSON object a line and answers each with one; it sleeps between requests. `do` is one of

    prepare   problem (one of PROBLEMS), weights: write the initial weights to the npz FILE; answers with all that the
              other side needs. Further arguments are fields of the networks and of the training with other values
    run       cycles: seconds of so many cycles of critic and generator, one program, on the weights as they are then;
              seeds: of so many trainings at once
    record    out: the npz FILE gets images, latents, and the losses and gradients of both players at the first weights
    memory    peak of this process so far, in MiB

What is asked for the first time is compiled then, without the persistent compilation cache.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gan import experiment, loss, spectral
from gan.blocks import STATISTICS
from gan.config import PRESETS, Config
from gan.data import Facts
from gan.model import Gan
from lib.child import peak_memory_mib, work
from lib.data import Resident
from lib.process import UserError, command
from lib.shard import example_keys, make_mesh, place, start
from lib.train import compile_chunk

_ROWS = 2048
PROBLEMS = {
    "dcgan": PRESETS["mnist_dcgan"],
    "sngan": PRESETS["mnist_sngan"],
    "wgan_gp": dataclasses.replace(
        PRESETS["mnist_wgan_gp"], network=dataclasses.replace(PRESETS["mnist_wgan_gp"].network, kernel_px=4)
    ),
}


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    of_network = {field.name for field in dataclasses.fields(config.network)} & set(changes)
    network = dataclasses.replace(config.network, **{name: changes[name] for name in of_network})
    optim = dataclasses.replace(config.optim, **{k: v for k, v in changes.items() if k not in of_network})
    return dataclasses.replace(config, network=network, optim=optim)


def flat(tree: Any, name: str) -> dict[str, np.ndarray]:
    """Arrays by their names, joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join([name, *(key.key for key in path)]): np.asarray(leaf) for path, leaf in leaves}


class Bench:
    """What is kept between requests."""

    def prepare(self, problem: str, weights: str, **changes: Any) -> dict[str, Any]:
        if problem not in PROBLEMS:
            raise UserError(f"unknown problem {problem!r}: choose from {', '.join(PROBLEMS)}")
        self.config = config = _changed(PROBLEMS[problem], changes)
        pixels = np.random.default_rng(0).integers(0, 256, (_ROWS, 28, 28, 1), np.uint8)
        self.model = experiment.build_model(config, Facts((28, 28, 1), _ROWS, 0))
        self.first = experiment.start_state(config, self.model)
        np.savez(weights, **flat(self._parameters()["generator"], "generator"),
                 **flat(self._parameters()["critic"], "critic"))  # fmt: skip
        self.mesh = make_mesh(experiment.default_devices(config))
        self.source = Resident({"image": pixels}, config.optim.n_critic * config.optim.batch_size)
        self.constant = place(self.source.constant, self.mesh, self.source.constant_spec)
        self.state = place(jax.tree.map(jnp.array, self.first), self.mesh)
        how = "jit" if self.mesh.size == 1 else "shard_map"
        self.chunk = compile_chunk(experiment.build_step(config, self.model), self.source, self.mesh, how)
        self.done, self.together = 0, None
        return {
            **dataclasses.asdict(config.network),
            **{name: getattr(config.optim, name) for name in ("loss", "n_critic", "batch_size", "lr", "b1", "b2",
                                                             "gradient_penalty", "ema_decay", "generator_first")},
            "dequantize": config.data.dequantize,
            "rows": _ROWS,
            "shape": (28, 28, 1),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.first.params)),
            "backend": jax.default_backend(),
        }  # fmt: skip

    def run(self, cycles: int, seeds: int = 1) -> dict[str, Any]:
        if seeds > 1:
            return self._run_together(cycles, seeds)
        xs = self.source.per_step(self.done, cycles)
        begin = time.perf_counter()
        xs = place(xs, self.mesh, self.source.per_step_spec)
        self.state, metrics = self.chunk(self.state, self.constant, xs)
        losses = np.asarray(metrics["loss"])
        seconds = time.perf_counter() - begin
        self.done += cycles
        if not np.isfinite(losses).all():
            raise UserError("the training has left the numbers: nothing to measure")
        return {"seconds": seconds}

    def _run_together(self, cycles: int, seeds: int) -> dict[str, Any]:
        mesh = make_mesh(1)
        if self.together is None:
            step = experiment.build_step(self.config, self.model)
            made = [experiment.start_state(dataclasses.replace(self.config, seed=k), self.model) for k in range(seeds)]
            states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
            data = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * seeds), self.source.constant)
            chunk = compile_chunk(step, self.source, mesh, replicas=True)
            self.together = chunk, place(states, mesh), place(data, mesh)
        chunk, states, data = self.together
        begin = time.perf_counter()
        states, metrics = chunk(states, data, place(self.source.per_step(0, cycles), mesh))
        np.asarray(metrics["loss"])
        seconds = time.perf_counter() - begin
        self.together = chunk, states, data
        return {"seconds": seconds}

    def record(self, out: str) -> dict[str, Any]:
        config, model, rows = self.config, self.model, self.config.optim.batch_size
        rng = np.random.default_rng(1)
        x = rng.uniform(-1, 1, (rows, *model.shape))
        z = rng.standard_normal((rows, model.latent))
        # In double precision: single, generator gradients through SNGAN's kinks are off by 1e-3 on either side.
        with jax.enable_x64(True):
            keys = example_keys(jax.random.key(2), rows)
            params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), self._parameters())
            found = jax.jit(lambda params: _players(config, model, params, x, z, keys))(params)
            share = np.asarray(jax.vmap(jax.random.uniform)(keys))
        (critic, critic_gradient), (generator, generator_gradient) = found
        np.savez(out, x=x, z=z, share=share, critic_loss=critic,
                 generator_loss=generator, **flat(critic_gradient, "critic"),
                 **flat(generator_gradient, "generator"))  # fmt: skip
        return {}

    def memory(self) -> dict[str, Any]:
        return {"peak_mib": peak_memory_mib()}

    def _parameters(self) -> Any:
        """Of both at the beginning, those of the critic as they count: divided by their norms where that is done."""
        params = dict(self.first.params)
        if self.model.spectral:
            params["critic"] = spectral.normalised(params["critic"], self.first.extra["vectors"])
        return params


def _players(config: Config, model: Gan, params: Any, x: Any, z: Any, keys: Any) -> Any:
    """(loss, gradient) of the critic, and of the generator, in one batch."""

    def generated(params: Any) -> jax.Array:
        return model.generate({"params": params, STATISTICS: {}}, z, None, train=True)[0]

    def score(params: Any, x: jax.Array) -> jax.Array:
        return model.score({"params": params, STATISTICS: {}}, x, None)[0]

    def of_critic(critic: Any) -> jax.Array:
        fake = generated(params["generator"])
        if config.network.critic_norm == "batch":
            real_scores, fake_scores = score(critic, x), score(critic, fake)
        else:
            real_scores, fake_scores = jnp.split(score(critic, jnp.concatenate([x, fake])), 2)
        value = loss.critic_loss(config.optim.loss, real_scores, fake_scores)  # type: ignore[arg-type]
        if config.optim.gradient_penalty:
            penalty = loss.gradient_penalty(lambda x: score(critic, x), x, fake, keys)
            value += config.optim.gradient_penalty * penalty
        return value

    def of_generator(generator: Any) -> jax.Array:
        return loss.generator_loss(config.optim.loss, score(params["critic"], generated(generator)))  # type: ignore[arg-type]

    return jax.value_and_grad(of_critic)(params["critic"]), jax.value_and_grad(of_generator)(params["generator"])


def actions() -> tuple[Callable[..., dict[str, Any]], ...]:
    """What can be asked for."""
    bench = Bench()
    return bench.prepare, bench.run, bench.record, bench.memory


def main(argv: Sequence[str]) -> None:
    start()
    jax.config.update("jax_enable_compilation_cache", False)
    work("gan.timing", argv, actions())


if __name__ == "__main__":
    sys.exit(command(main))
