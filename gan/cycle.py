"""One cycle of training, n updates of the critic and one of the generator, as one pure `step(state, batch)`.

A batch holds the n critic batches: {"image": uint8 [n b, h, w, c], "label": int [n b]} or {"x": float [n b, d]}. Row
j n + i belongs to example j of update i, so that spreading a batch over devices changes no update. Everything random
about an example comes from its own key: data, latent, class, and where its penalty is taken.

Real and generated examples pass the critic together. In its batch norm each half has its own statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gan import loss as losses
from gan import spectral
from gan.blocks import STATISTICS
from gan.config import Config, Optim
from gan.model import Gan, one_hot
from lib.pixels import Pixels, split_each
from lib.shard import example_keys, pmean, varying
from lib.train import Metrics, State, Step, warmed_up

_FIRST, _EVERY = 25, 500  # of WGAN's code: its generator's updates that wait for the critic


def start_state(model: Gan, optim: Optim, key: jax.Array) -> State:
    """The state before training: params and opt_state of both networks; `ema` the averaged generator with the running
    statistics of its batch norm; `extra` the running statistics of both and the critic's singular vectors."""
    init_key, vector_key, step_key = jax.random.split(key, 3)
    made = model.init(init_key)
    params = {name: tree["params"] for name, tree in made.items()}
    extra = {STATISTICS: {name: tree[STATISTICS] for name, tree in made.items() if tree[STATISTICS]}}
    if model.spectral:
        extra["vectors"] = spectral.start(params["critic"], vector_key)
    ema = jax.tree.map(jnp.array, made["generator"])
    opt_state = {name: tx.init(params[name]) for name, tx in optimizers(optim).items()}
    return State(jnp.zeros((), jnp.int32), params, opt_state, ema, extra, step_key)


def optimizers(optim: Optim) -> dict[str, optax.GradientTransformation]:
    """Of both networks; learning rates follow the cycles, of which an update of the critic is only a part."""

    def rate(peak: float, per_cycle: int) -> optax.ScalarOrSchedule:
        if optim.decay == "constant":
            return peak
        return lambda count: peak * (1 - (count // per_cycle) / optim.steps)

    def make(peak: float, per_cycle: int) -> optax.GradientTransformation:
        if optim.optimizer == "rmsprop":
            # PyTorch's: alpha 0.99, and epsilon outside the root.
            return optax.rmsprop(rate(peak, per_cycle), decay=0.99, eps=1e-8, eps_in_sqrt=False)
        return optax.adam(rate(peak, per_cycle), b1=optim.b1, b2=optim.b2)

    return {"critic": make(optim.critic_lr or optim.lr, optim.n_critic), "generator": make(optim.lr, 1)}


def make_cycle(
    model: Gan, config: Config, txs: dict[str, optax.GradientTransformation] | None = None, *, pixels: Pixels = Pixels()
) -> Step:
    """The step of a configuration. `txs`: other optimisers than those of `optimizers(config.optim)`."""
    optim, txs = config.optim, txs or optimizers(config.optim)
    decay = warmed_up(optim.ema_decay)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        critic_key, generator_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        batches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, optim.n_critic, *x.shape[1:]), 1, 0), batch)
        per_device = len(jax.tree.leaves(batches)[0][0])
        count = config.generator_batch * per_device // optim.batch_size
        generator_update = _generator_update(model, optim, txs["generator"], generator_key, count)
        critic_update = _critic_update(model, optim, txs["critic"], critic_key, pixels)
        if optim.generator_first:
            state, moved = generator_update(state)
            state, metrics = jax.lax.scan(critic_update, state, (jnp.arange(optim.n_critic), batches))
        else:
            state, metrics = jax.lax.scan(critic_update, state, (jnp.arange(optim.n_critic), batches))
            state, moved = generator_update(state)
        now = {"params": state.params["generator"], STATISTICS: statistics_of(state, "generator")}
        ema = optax.incremental_update(now, state.ema, 1 - decay(state.step))
        return dataclasses.replace(state, step=state.step + 1, ema=ema), jax.tree.map(jnp.mean, metrics) | moved

    return step


def _critic_update(
    model: Gan, optim: Optim, tx: optax.GradientTransformation, key: jax.Array, pixels: Pixels
) -> Callable[[State, Any], tuple[State, Metrics]]:
    def update(state: State, numbered: tuple[jax.Array, Any]) -> tuple[State, Metrics]:
        number, rows = numbered
        drawn = _draw_real(model, pixels, jax.random.fold_in(key, number), rows)
        x, y, z, y_fake, mix_keys = drawn
        fake, _ = model.generate(_variables(state, "generator"), z, y_fake, train=True)
        params, vectors = state.params["critic"], state.extra.get("vectors")
        bound = optim.clip
        if bound is not None:
            params = jax.tree.map(lambda w: jnp.clip(w, -bound, bound), params)
        if vectors is not None:
            vectors = spectral.iterate(params, vectors)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            effective = params if vectors is None else spectral.normalised(params, vectors)
            variables = {"params": effective, STATISTICS: statistics_of(state, "critic")}
            both_y = None if y is None else jnp.concatenate([y, y_fake])
            scores, statistics = model.score(variables, jnp.concatenate([x, fake]), both_y, halves=True)
            real_scores, fake_scores = jnp.split(scores, 2)
            value = losses.critic_loss(optim.loss, real_scores, fake_scores)
            metrics = {
                "critic": value,
                "real": jnp.mean(real_scores),
                "fake": jnp.mean(fake_scores),
                "ranked": jnp.mean(real_scores > fake_scores, dtype=jnp.float32),
            }
            at = lambda x: model.score(variables, x, y)[0]  # noqa: E731
            if optim.gradient_penalty:
                metrics["penalty"] = losses.gradient_penalty(at, x, fake, mix_keys)
                value += optim.gradient_penalty * metrics["penalty"]
            if optim.r1:
                metrics["r1"] = losses.r1(at, x)
                value += optim.r1 * metrics["r1"]
            return value, ({"loss": value, **metrics}, statistics)

        grads, (metrics, statistics) = jax.grad(loss, has_aux=True)(varying(params))
        grads, metrics = pmean((grads, metrics))
        updates, opt_state = tx.update(grads, state.opt_state["critic"], params)
        state = _moved(state, "critic", optax.apply_updates(params, updates), opt_state, statistics)
        if vectors is not None:
            state = dataclasses.replace(state, extra=state.extra | {"vectors": vectors})
        return state, metrics

    return update


def _generator_update(
    model: Gan, optim: Optim, tx: optax.GradientTransformation, key: jax.Array, count: int
) -> Callable[[State], tuple[State, Metrics]]:
    def update(state: State) -> tuple[State, Metrics]:
        z, y = _draw_latents(model, example_keys(key, count))
        critic = _variables(state, "critic")
        if model.spectral:
            critic["params"] = spectral.normalised(critic["params"], state.extra["vectors"])

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, STATISTICS: statistics_of(state, "generator")}
            fake, statistics = model.generate(variables, z, y, train=True)
            return losses.generator_loss(optim.loss, model.score(critic, fake, y)[0]), statistics

        params = state.params["generator"]
        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(varying(params))
        grads, value = pmean((grads, value))
        updates, opt_state = tx.update(grads, state.opt_state["generator"], params)
        new = _moved(state, "generator", optax.apply_updates(params, updates), opt_state, statistics)
        if optim.head_start > 1:
            moves = generator_moves(state.step, optim.head_start)
            new = jax.tree.map(lambda new, old: jnp.where(moves, new, old), new, state)
        return new, {"generator": value}

    return update


def generator_moves(cycle: jax.Array, head_start: int) -> jax.Array:
    """Whether the generator is updated in this cycle, where some of its updates wait for `head_start` cycles.

    Those are its updates 0 to 24, 500, 1000, ... (WassersteinGAN's main.py: 100 updates of the critic instead of 5).
    """
    waiting = cycle < _FIRST * head_start
    # From then on periods of 499 updates at once and one that waits; the first period has 24 of them behind it.
    place = (cycle - _FIRST * head_start + _FIRST - 1) % (_EVERY - 1 + head_start)
    later = (place < _EVERY - 1) | (place == _EVERY - 2 + head_start)
    return jnp.where(waiting, (cycle + 1) % head_start == 0, later)


def _draw_real(model: Gan, pixels: Pixels, key: jax.Array, rows: Any) -> tuple:
    """(x, y, z, class of z, keys for the penalty): everything random about the pairs of an update."""
    raw = rows["image"] if "image" in rows else rows["x"]
    pixel_keys, latent_keys, mix_keys = split_each(example_keys(key, len(raw)), 3)
    x = pixels(raw, pixel_keys) if "image" in rows else raw
    y = one_hot(rows["label"], model.classes) if model.classes else None
    return x, y, *_draw_latents(model, latent_keys), mix_keys


def _draw_latents(model: Gan, keys: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(z, y): a latent and, where there are classes, any of them with the same probability, for every key [b]."""
    z = jax.vmap(lambda key: jax.random.normal(key, (model.latent,)))(keys)
    if not model.classes:
        return z, None
    choose = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), 0, model.classes))
    return z, one_hot(choose(keys), model.classes)


def statistics_of(state: State, name: str) -> Any:
    """The running statistics of a network's batch norm; {} without any."""
    return state.extra[STATISTICS].get(name, {})


def _variables(state: State, name: str) -> dict[str, Any]:
    return {"params": state.params[name], STATISTICS: statistics_of(state, name)}


def _moved(state: State, name: str, params: Any, opt_state: Any, statistics: Any) -> State:
    """The state with these in the place of a network's own."""
    known = state.extra[STATISTICS]
    return dataclasses.replace(
        state,
        params=state.params | {name: params},
        opt_state=state.opt_state | {name: opt_state},
        extra=state.extra | {STATISTICS: known | {name: statistics} if statistics else known},
    )
