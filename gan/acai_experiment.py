"""From a configuration to a trained autoencoder, with looks at it on the way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gan import latents, lines
from gan.acai import Model, build, optimiser, pixels
from gan.acai_config import AutoencoderConfig
from gan.data import Facts, facts
from lib.checkpoint import Checkpoints, check_finished, restore_finished
from lib.config import from_json, to_json
from lib.data import Resident
from lib.plan import Outline, examples
from lib.process import UserError
from lib.run import RunFolder, read_json, write_json
from lib.shard import fetch, make_state, most_devices
from lib.sources import Dataset, load_images, shape_of
from lib.train import State, fit, init_state, make_step

NAME, LOOK = "autoencoder", "look"
_STEPS_PER_CALL = 16
_LINES = 1000  # to be shown and measured
_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Trained:
    """An autoencoder at the end of its training."""

    model: Model
    params: Any
    facts: Facts

    @functools.cached_property
    def encode(self) -> Callable[[np.ndarray], np.ndarray]:
        """uint8 or float32 images [n, h, w, c] -> latents float32 [n, w, w, channels]."""
        run = jax.jit(self.model.encode)
        return lambda x: latents.in_batches(lambda rows: run(self.params, rows), x, min(_BATCH, len(x)))

    @functools.cached_property
    def decode(self) -> Callable[[np.ndarray], np.ndarray]:
        """latents [n, w, w, channels] -> images [n, size, size, c] in [-1, 1]."""
        run = jax.jit(self.model.decode)
        clipped = lambda rows: jnp.clip(run(self.params, rows), -1, 1)  # noqa: E731
        return lambda z: latents.in_batches(clipped, z, min(_BATCH, len(z)))

    def bordered(self, x: np.ndarray) -> np.ndarray:
        """Images as the autoencoder sees them, float32 in [-1, 1]."""
        return np.asarray(pixels(jnp.asarray(x), self.model.options.size_px))


def load(config: AutoencoderConfig) -> Dataset:
    """Training and test images; of lines, which are drawn anew for every step, only test images.

    Raises UserError for images that are missing, damaged, too small, larger than the autoencoder's, or fewer than a
    batch, and for classes that they have not.
    """
    if config.data.source == "lines":
        batch = lines.batch(jax.random.key(config.measurement.seed), _LINES)
        return Dataset({}, {name: np.asarray(rows) for name, rows in batch.items()})
    found = load_images(config.data.source, config.data.size_px, labels=config.data.labels, others=("lines",))
    count, *shape = found.train["image"].shape
    size, rows = config.autoencoder.size_px, config.autoencoder.batch_size
    if max(shape[:2]) > size:
        raise UserError(f"images of {shape[0]} x {shape[1]} pixels are larger than autoencoder.size_px, {size}")
    if rows > count:
        raise UserError(f"autoencoder.batch_size is {rows}, but there are only {count} images")
    return found


def facts_of(data: Dataset) -> Facts:
    return facts(data if data.train else Dataset(data.test, data.test))


def default_devices(config: AutoencoderConfig) -> int:
    """As many as give each of them pairs of images; with other processes all that there are."""
    return most_devices(lambda count: config.autoencoder.batch_size // 2 % count == 0)


def check_devices(config: AutoencoderConfig, devices: int) -> None:
    """Raises UserError where the batch cannot be spread over so many devices in pairs."""
    rows = config.autoencoder.batch_size
    if rows // 2 % devices:
        raise UserError(f"autoencoder.batch_size is {rows}, no pairs for each of {devices} devices: set --devices")


def build_model(config: AutoencoderConfig, known: Facts) -> Model:
    return build(config.autoencoder, known.shape[-1], known.classes)


def outline(config: AutoencoderConfig) -> Outline:
    """The training in shapes. Raises UserError where only the data tell theirs."""
    data, rows = config.data, config.autoencoder.batch_size
    if data.source == "lines":
        known = Facts((lines.SIZE_PX, lines.SIZE_PX, 1), rows, lines.CLASSES)
        batch = jax.eval_shape(lambda key: lines.batch(key, rows), jax.random.key(0))
    else:
        shape, classes = shape_of(data.source, data.size_px, data.labels)
        known, batch = Facts(shape, rows, classes), examples(rows, shape, labels=True)
    model = build_model(config, known)
    state = jax.eval_shape(lambda: start_state(config, model))
    return Outline(make_step(model.loss, optimiser(config.autoencoder)), state, batch, unit=2)


def start_state(config: AutoencoderConfig, model: Model) -> State:
    """The state before training."""
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    return init_state(jax.jit(model.init)(init_key), optimiser(config.autoencoder), step_key)


def train(
    config: AutoencoderConfig, data: Dataset, folder: RunFolder, mesh: Mesh, say: Callable, *, sharded: bool = False
) -> Trained:
    """Trains, or goes on. The batch is spread over the mesh, with `sharded` the state too."""
    known, options = facts_of(data), config.autoencoder
    if folder.primary:
        write_json(folder.path / "data.json", to_json(known))
    model = build_model(config, known)
    look = _looks(config, model, data)
    with Checkpoints(folder.checkpoints / NAME) as checkpoints:
        fresh = make_state(lambda: start_state(config, model), mesh, sharded=sharded)
        state = checkpoints.restore(fresh)
        state, done = (fresh, 0) if state is None else (state, int(state.step))
        log_look = folder.logger(LOOK, done)
        if done < options.steps:
            count = sum(leaf.size for leaf in jax.tree.leaves(fresh.params))
            begin = f", from step {done}" if done else ""
            say(f"training {'ACAI' if options.critic else 'an autoencoder'}: {count:,} parameters, "
                f"{config.data.source}, {options.steps:,} steps{begin}")  # fmt: skip
        batches = (
            Resident(data.train, options.batch_size, config.seed)
            if data.train
            else lines.Lines(options.batch_size, config.seed)
        )
        state = fit(
            state,
            make_step(model.loss, optimiser(options)),
            batches,
            steps=options.steps,
            mesh=mesh,
            sharded=sharded,
            steps_per_call=_STEPS_PER_CALL,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            log=folder.logger(NAME, done),
            hooks=[(config.measurement.every, lambda state, step: log_look(step, look(fetch(state.params), step)))],
            progress=NAME,
        )
    return Trained(model, fetch(state.params), known)


def _looks(config: AutoencoderConfig, model: Model, data: Dataset) -> Callable[[Any, int], dict[str, float]]:
    """`look(params, step)`: the scores of the lines benchmark, or what test images say."""
    if not data.train:
        frames = jax.jit(
            lambda params, key: lines.interpolations(
                functools.partial(model.encode, params), functools.partial(model.decode, params), key
            )
        )
        root = jax.random.key(config.measurement.seed)
        return lambda params, step: lines.score(np.asarray(frames(params, jax.random.fold_in(root, step))))._asdict()

    def look(params: Any, step: int) -> dict[str, float]:
        del step
        return test_numbers(Trained(model, params, facts_of(data)), data.test)

    return look


def test_numbers(trained: Trained, test: dict[str, np.ndarray]) -> dict[str, float]:
    """{"mse", and "accuracy" of the classifier where there are labels} of test images."""
    z = trained.encode(test["image"])
    numbers = {"mse": float(np.mean((trained.decode(z) - trained.bordered(test["image"])) ** 2))}
    if trained.model.classify is not None:
        logits = trained.model.classify(trained.params, z)
        numbers["accuracy"] = latents.classifier_accuracy(np.asarray(logits), test["label"])
    return numbers


def open_run(config: AutoencoderConfig, folder: RunFolder) -> Trained:
    """A trained run, without its data. Raises UserError where its training is not finished or damaged."""
    steps = config.autoencoder.steps
    check_finished(folder.checkpoints / NAME, steps)
    known = from_json(Facts, read_json(folder.path / "data.json"), f"{folder.path}/data.json")
    model = build_model(config, known)
    state = restore_finished(folder.checkpoints / NAME, functools.partial(start_state, config, model), steps)
    return Trained(model, fetch(state.params), known)
