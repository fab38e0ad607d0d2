"""A variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114) whose decoder is the generator of a GAN.

The baseline that an adversarial loss has to beat with the same network: pixels are N(decoder(z), noise_std^2), z is
N(0, I), and the critic's network, with two numbers per latent in the place of a score, is the encoder.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gan.blocks import STATISTICS
from gan.config import Config
from gan.cycle import optimizers, statistics_of
from gan.loss import evidence_bound
from gan.model import Gan
from lib.pixels import Pixels, split_each
from lib.shard import example_keys, pmean, varying
from lib.train import Metrics, State, Step, warmed_up


def make_vae_step(model: Gan, config: Config, *, pixels: Pixels = Pixels()) -> Step:
    """One update of encoder and decoder; the state is that of `gan.cycle.start_state`."""
    optim, txs = config.optim, optimizers(config.optim)
    decay = warmed_up(optim.ema_decay)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        pixel_keys, latent_keys = split_each(example_keys(key, len(batch["image"])), 2)
        x = pixels(batch["image"], pixel_keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, (model.latent,)))(latent_keys)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            given = {name: {"params": params[name], STATISTICS: statistics_of(state, name)} for name in params}
            (mean, log_variance), encoder = model.encode(given["critic"], x, train=True)
            z = mean + jnp.exp(log_variance / 2) * noise
            decoded, decoder = model.generate(given["generator"], z, None, train=True)
            reconstruction, divergence = evidence_bound(x, decoded, mean, log_variance, optim.noise_std)
            value = reconstruction + optim.kl_weight * divergence
            metrics = {"loss": value, "reconstruction": reconstruction, "divergence": divergence}
            kept = {name: tree for name, tree in (("critic", encoder), ("generator", decoder)) if tree}
            return value, (metrics, kept)

        grads, (metrics, statistics) = jax.grad(loss, has_aux=True)(varying(state.params))
        grads, metrics = pmean((grads, metrics))
        params, opt_state = {}, {}
        for name, tx in txs.items():
            updates, opt_state[name] = tx.update(grads[name], state.opt_state[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
        now = {"params": params["generator"], STATISTICS: statistics.get("generator", {})}
        ema = optax.incremental_update(now, state.ema, 1 - decay(state.step))
        extra = state.extra | {STATISTICS: statistics}
        return dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema, extra=extra
        ), metrics

    return step
