"""From a configuration and the facts about its data to a network, its training, and the trained network."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lib.checkpoint import Checkpoints, check_finished, restore_finished
from lib.config import from_json, to_json
from lib.data import Resident
from lib.pixels import Pixels
from lib.plan import Outline, examples
from lib.run import RunFolder, read_json, write_json
from lib.shard import fetch, make_state, most_devices
from lib.sources import Dataset, shape_of
from lib.train import Loss, State, Step, fit, init_state, make_step, warmed_up
from ncsn import loss as losses
from ncsn import model as models
from ncsn.blocks import MLP
from ncsn.config import Config
from ncsn.data import Facts
from ncsn.model import ScoreModel
from ncsn.noise import Draw, geometric, levels_for, log_normal, uniform_level
from ncsn.sde import VE, VP, SubVP, uniform_time
from ncsn.unet import UNet

NAME = "score"
# A dispatch is a matter of seconds on a laptop: signals are acted on and numbers logged in between.
_STEPS_PER_CALL = {"toy_mixture": 100, "digits": 50}


def highest(config: Config, facts: Facts) -> float:
    """The highest noise level of training; `facts` in the units of the network."""
    return facts.largest_distance if config.noise.sigma_max is None else config.noise.sigma_max


def ladder(config: Config, facts: Facts) -> np.ndarray:
    """The noise levels of training, [L] float32: given, or NCSNv2's techniques 1 and 2 from the data.

    `facts` are in the units of the network, like the levels.
    """
    noise = config.noise
    high = highest(config, facts)
    levels = noise.levels or levels_for(high, noise.sigma_min, facts.dimension)
    return geometric(high, noise.sigma_min, levels)


def build_model(config: Config, facts: Facts) -> ScoreModel:
    """The network. Raises UserError where it does not fit the images."""
    net, dtype = config.network, jnp.dtype(config.network.precision)
    if net.kind == "v1":
        return models.ncsn_v1(_image(facts), ladder(config, in_units(config, facts)), net.width, dtype)
    if net.kind == "v2":
        return models.ncsn_v2(_image(facts), net.width, dtype)
    classes = facts.classes if net.class_conditional else 0
    shared: Any = {"classes": classes, "features": net.features, "dropout": net.dropout, "dtype": dtype}
    if net.kind == "mlp":
        inner = MLP(net.width, net.blocks, **shared)
    else:
        options = (net.width, net.multipliers, net.blocks, net.attention, net.heads, net.patch_px)
        inner = UNet(*options, conditioning=net.conditioning, **shared)
    wrap = models.edm_energy if net.energy else models.edm
    return wrap(inner, facts.shape, sigma_data(config, facts))


def check_fits(config: Config, facts: Facts) -> None:
    """Raises UserError where the network cannot take the images; computes nothing."""
    model = build_model(config, facts)
    x, one = jax.ShapeDtypeStruct((1, *facts.shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.eval_shape(lambda x, sigma: model.score(model.init(jax.random.key(0)), x, sigma), x, one)


def sigma_data(config: Config, facts: Facts) -> float:
    return config.noise.sigma_data or in_units(config, facts).size


def in_units(config: Config, facts: Facts) -> Facts:
    """The facts in the units of what the network sees."""
    if config.network.kind == "mlp":
        return facts
    return facts.in_range(*pixel_range(config))


def pixel_range(config: Config) -> tuple[float, float]:
    """What black and white are to the network."""
    return (0.0, 1.0) if config.network.kind in ("v1", "v2") else (-1.0, 1.0)


def _image(facts: Facts) -> tuple[int, int, int]:
    height, width, channels = facts.shape
    return height, width, channels


def noise_levels(config: Config, facts: Facts) -> Draw:
    """How the noise level of a training example is drawn."""
    noise, known = config.noise, in_units(config, facts)
    if noise.training == "ladder":
        return uniform_level(ladder(config, known))
    if noise.training == "log_normal":
        return log_normal(noise.P_mean, noise.P_std)
    return uniform_time(
        {"ve": VE(noise.sigma_min, highest(config, known)), "vp": VP(), "sub_vp": SubVP()}[noise.training]
    )


def build_loss(config: Config, facts: Facts, model: ScoreModel) -> Loss:
    """The objective of a configuration."""
    draw, data = noise_levels(config, facts), config.data
    pixels = Pixels(model.pixel_range, data.dequantize, data.flip)
    if config.optim.loss == "sliced":
        return losses.sliced_noisy(model.score, draw, pixels)
    if config.network.kind == "v1":
        return losses.denoising(model.score, draw, pixels=pixels)
    if config.network.kind == "v2":
        return losses.noise_prediction(model.network, draw, pixels=pixels)
    weight = losses.edm_weight(sigma_data(config, facts))
    options = {"classes": model.classes, "label_dropout": config.optim.label_dropout}
    return losses.edm(model.denoise, draw, weight, pixels, **options)


def optimizer(config: Config) -> optax.GradientTransformation:
    """Adam; the learning rate up over the warm-up, then down on a cosine."""
    optim = config.optim
    warmup = round(optim.warmup * optim.steps)
    rate = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else optim.lr, optim.lr, warmup, optim.steps, optim.final_lr * optim.lr
    )
    adam = optax.adam(rate, b2=optim.b2)
    return adam if optim.clip is None else optax.chain(optax.clip_by_global_norm(optim.clip), adam)


def build_step(config: Config, known: Facts, model: ScoreModel) -> Step:
    """What is done to the state again and again."""
    decay = warmed_up(config.optim.ema_decay)
    return make_step(build_loss(config, known, model), optimizer(config), ema_decay=decay)


def outline(config: Config) -> Outline:
    """The training in shapes. Raises UserError where only the data tell theirs."""
    data, toy = config.data, config.data.source == "toy_mixture"
    shape, classes = ((2,), 0) if toy else shape_of(data.source, data.size_px)
    known = Facts(
        shape, config.optim.batch_size, classes, mean=0.5, std=0.25, largest_distance=math.sqrt(math.prod(shape))
    )
    model = build_model(config, known)
    rows = examples(config.optim.batch_size, shape, labels=config.network.class_conditional)
    return Outline(build_step(config, known, model), jax.eval_shape(lambda: start_state(config, model)), rows)


def start_state(config: Config, model: ScoreModel) -> State:
    """The state before training."""
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    return init_state(model.init(init_key), optimizer(config), step_key, ema=True)


def default_devices(config: Config) -> int:
    """One CPU device for the small matrix products of points; all devices for all else, and with other processes."""
    small = config.network.kind == "mlp" and jax.default_backend() == "cpu"
    return most_devices(lambda count: count == 1 or not small)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network and the averaged weights that samples are made with."""

    model: ScoreModel
    params: Any
    facts: Facts
    """in the units of the network"""


def train(
    config: Config, data: Dataset, known: Facts, folder: RunFolder, mesh: Mesh, say: Callable, *, sharded: bool = False
) -> Trained:
    """Trains, or goes on. The batch is spread over the mesh, with `sharded` the state too."""
    if folder.primary:
        write_json(folder.path / "data.json", to_json(known))
    model = build_model(config, known)
    with Checkpoints(folder.checkpoints / NAME) as checkpoints:
        fresh = make_state(lambda: start_state(config, model), mesh, sharded=sharded)
        state = checkpoints.restore(fresh)
        done = 0 if state is None else int(state.step)
        if done < config.optim.steps:
            count = sum(x.size for x in jax.tree.leaves(fresh.params))
            begin = f", from step {done}" if done else ""
            say(f"training {config.network.kind}: {count:,} parameters, {known.count:,} examples of "
                f"{config.data.source}, {config.optim.steps:,} steps{begin}")  # fmt: skip
        state = fit(
            fresh if state is None else state,
            build_step(config, known, model),
            Resident(_used(config, data), config.optim.batch_size, config.seed),
            steps=config.optim.steps,
            mesh=mesh,
            sharded=sharded,
            steps_per_call=_STEPS_PER_CALL.get(config.data.source, 10),
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            log=folder.logger(NAME, done),
            progress=NAME,
        )
    return Trained(model, fetch(state.ema), in_units(config, known))


def _used(config: Config, data: Dataset) -> dict[str, np.ndarray]:
    """Without the labels where nobody reads them."""
    return {name: rows for name, rows in data.train.items() if name != "label" or config.network.class_conditional}


def open_run(config: Config, folder: RunFolder) -> Trained:
    """A trained run, without its data. Raises UserError where its training is not finished or damaged."""
    check_finished(folder.checkpoints / NAME, config.optim.steps)
    known = from_json(Facts, read_json(folder.path / "data.json"), f"{folder.path}/data.json")
    model = build_model(config, known)
    start = functools.partial(start_state, config, model)
    state = restore_finished(folder.checkpoints / NAME, start, config.optim.steps)
    return Trained(model, fetch(state.ema), in_units(config, known))
