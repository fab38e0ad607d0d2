"""From a configuration and the facts about its data to networks, their training, and the trained generator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from gan import cycle, vae, watch
from gan.config import Config
from gan.data import Facts, facts, used
from gan.data import load as load_data
from gan.looks import Looker, net_for
from gan.model import Gan, build, parameters
from gan.sampling import Trained
from lib.checkpoint import Checkpoints, check_finished, restore_finished
from lib.config import from_json, to_json
from lib.data import Resident
from lib.judge import check_measurable
from lib.pixels import Pixels
from lib.plan import Outline, examples
from lib.process import UserError
from lib.run import RunFolder, read_json, write_json
from lib.shard import fetch, local_mesh, make_state, most_devices
from lib.sources import Dataset, shape_of
from lib.train import State, Step, fit

NAME, BEST = "gan", "best"
# A dispatch is a matter of seconds on a laptop: signals are acted on and numbers logged in between.
_STEPS_PER_CALL = {"gaussians": 100, "digits": 50}


def build_model(config: Config, known: Facts) -> Gan:
    """The networks. Raises UserError where they do not fit the images."""
    return build(config.network, known, encoder=config.optim.loss == "elbo")


def build_step(config: Config, model: Gan) -> Step:
    """What is done to the state again and again."""
    pixels = Pixels(dequantize=config.data.dequantize, flip=config.data.flip)
    make = vae.make_vae_step if config.optim.loss == "elbo" else cycle.make_cycle
    return make(model, config, pixels=pixels)


def start_state(config: Config, model: Gan) -> State:
    """The state before training."""
    return jax.jit(functools.partial(cycle.start_state, model, config.optim))(jax.random.key(config.seed))


def outline(config: Config) -> Outline:
    """The training in shapes. Raises UserError where only the data tell theirs."""
    data, optim = config.data, config.optim
    shape, classes = ((2,), 0) if data.source == "gaussians" else shape_of(data.source, data.size_px, data.labels)
    model = build_model(config, Facts(shape, optim.batch_size, classes))
    rows = examples(optim.n_critic * optim.batch_size, shape, labels=config.classes_known)
    state = jax.eval_shape(lambda: start_state(config, model))
    return Outline(build_step(config, model), state, rows, unit=optim.n_critic)


def load(config: Config) -> Dataset:
    """The data. Raises UserError as `gan.data.load`, where the networks cannot take the images, and where nothing can
    measure them.
    """
    data = load_data(config)
    known = facts(data)
    build_model(config, known)
    if len(known.shape) == 3:
        net_for(data)
        check_measurable(data, config.data.source)
    return data


def default_devices(config: Config) -> int:
    """One CPU device for the small matrix products of points; else as many as divide both batches. With other processes
    all that there are."""
    if config.network.kind == "mlp" and jax.default_backend() == "cpu":
        return most_devices(lambda count: count == 1)
    return most_devices(lambda count: config.optim.batch_size % count == 0 and config.generator_batch % count == 0)


def check_devices(config: Config, devices: int) -> None:
    """Raises UserError where the batches cannot be spread over so many devices."""
    for name, rows in (("batch_size", config.optim.batch_size), ("generator_batch", config.generator_batch)):
        if rows % devices:
            raise UserError(f"optim.{name} is {rows}, which {devices} devices do not divide: set --devices")


def train(
    config: Config, data: Dataset, folder: RunFolder, mesh: Mesh, say: Callable, *, sharded: bool = False
) -> dict[str, Trained]:
    """Trains, or goes on, with looks at the samples; {"best": ..., "last": ...}.

    The batch is spread over the mesh, with `sharded` the state too.
    """
    known = facts(data)
    if folder.primary:
        write_json(folder.path / "data.json", to_json(known))
    model = build_model(config, known)
    folder_of_best = folder.checkpoints / BEST
    with Checkpoints(folder.checkpoints / NAME) as checkpoints, Checkpoints(folder_of_best, keep=None) as kept:
        fresh = make_state(lambda: start_state(config, model), mesh, sharded=sharded)
        state = checkpoints.restore(fresh)
        state, done = (fresh, 0) if state is None else (state, int(state.step))
        log = folder.logger(NAME, done)
        for step in kept.steps():
            if step > done:  # of what is about to be repeated, on other devices perhaps with other bits
                kept.delete(step)
        looking = _Looking(config, model, data, folder, done, checkpoints, kept, say)
        if done < config.optim.steps and not looking.exhausted:
            _announce(config, known, fresh, done, say)
            state = fit(
                state,
                build_step(config, model),
                Resident(used(config, data), config.optim.n_critic * config.optim.batch_size, config.seed),
                steps=config.optim.steps,
                mesh=mesh,
                sharded=sharded,
                steps_per_call=_STEPS_PER_CALL.get(config.data.source, 10),
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoint_every,
                log=log,
                hooks=[(config.watch.every, looking)],
                progress=NAME,
            )
        if looking.last != int(state.step):
            looking(state, int(state.step))
        if looking.exhausted:
            say(f"ended at cycle {looking.last}: {config.watch.patience} looks brought nothing better")
        best = watch.best(looking.looks)
        if best is None:
            raise UserError("no look had a finite score: the training diverged; a lower optim.lr may help")
        say(f"best: cycle {best['step']:.0f}, score {best['score']:.4g}; last: cycle {looking.last}")
        last = Trained(model, fetch(state.ema), known, int(state.step))
        kept.wait()
        chosen = kept.restore(state, step=int(best["step"]))
    if chosen is None:
        raise UserError(f"{folder_of_best}: the best checkpoint is damaged")
    return {"best": Trained(model, fetch(chosen.ema), known, int(chosen.step)), "last": last}


def _announce(config: Config, known: Facts, state: State, done: int, say: Callable) -> None:
    counts = " and ".join(f"{parameters(state.params[name]):,}" for name in ("generator", "critic"))
    begin = f", from cycle {done}" if done else ""
    say(f"training {config.network.kind}, {config.optim.loss}: {counts} parameters, {known.count:,} examples of "
        f"{config.data.source}, {config.optim.steps:,} cycles{begin}")  # fmt: skip


class _Looking:
    """The hook of `fit`: looks, keeps the best state, says what is alarming, and ends what no longer gets better."""

    def __init__(
        self,
        config: Config,
        model: Gan,
        data: Dataset,
        folder: RunFolder,
        done: int,
        checkpoints: Checkpoints,
        kept: Checkpoints,
        say: Callable,
    ):
        self._config, self._folder, self._checkpoints, self._kept, self._say = config, folder, checkpoints, kept, say
        self.looks = looks_of(folder, up_to=done)
        self._log = folder.logger("look", done)
        pictures = folder.path / "samples" if folder.primary else None
        self._make = functools.cache(lambda: Looker(config, model, data, local_mesh(), pictures))
        self._said = {alarm.kind for alarm in self._alarms()}

    @property
    def last(self) -> int | None:
        return int(self.looks[-1]["step"]) if self.looks else None

    @property
    def exhausted(self) -> bool:
        return watch.exhausted(self.looks, self._config.watch.patience)

    def __call__(self, state: State, step: int) -> bool:
        numbers = self._make()(state, step)
        self.looks.append({"step": step, **numbers})
        self._log(step, numbers)
        found = watch.best(self.looks)
        if found is not None and found["step"] == step and step not in self._kept.steps():
            self._keep(step, state)
        for alarm in self._alarms():
            if alarm.kind not in self._said:
                self._said.add(alarm.kind)
                self._say(f"{alarm.kind} at cycle {alarm.step}: {alarm.message}")
        return self.exhausted

    def _keep(self, step: int, state: State) -> None:
        """Saves the best state; those before it stay that a training would need that goes on from a checkpoint."""
        self._kept.wait()
        for before in watch.superseded(self._kept.steps(), self._checkpoints.steps()):
            self._kept.delete(before)
        self._kept.save(step, state)

    def _alarms(self) -> list[watch.Alarm]:
        return watch.alarms(self.looks, self._folder.metrics(), self._config.optim.loss)


def looks_of(folder: RunFolder, *, up_to: float = float("inf")) -> list[dict[str, float]]:
    """The looks of a run, from metrics.jsonl."""
    prefix, found = "look.", []
    for row in folder.metrics():
        if f"{prefix}score" in row and row["step"] <= up_to:
            numbers = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
            found.append({"step": row["step"]} | {k: float("nan") if v is None else v for k, v in numbers.items()})
    return found


def open_run(config: Config, folder: RunFolder, names: Sequence[Literal["best", "last"]]) -> dict[str, Trained]:
    """Generators of a run, without its data: {"best": ..., "last": ...}, those that are asked for.

    Of a training that is not finished the best one so far. Raises UserError where there is none, for the last one of a
    training that is not finished, and for damaged ones.
    """
    looks = looks_of(folder)
    ends = [int(looks[i]["step"]) for i in range(len(looks)) if watch.exhausted(looks[: i + 1], config.watch.patience)]
    end = ends[0] if ends else config.optim.steps
    if "last" in names:
        check_finished(folder.checkpoints / NAME, end)
    best = watch.best(looks)
    if best is None:
        raise UserError(f"{folder.path}: metrics.jsonl has no look at the samples; train --resume makes it anew")
    known = from_json(Facts, read_json(folder.path / "data.json"), f"{folder.path}/data.json")
    model = build_model(config, known)
    start = functools.partial(start_state, config, model)

    def restored(name: str, step: int) -> Trained:
        state: Any = restore_finished(folder.checkpoints / name, start, step)
        return Trained(model, fetch(state.ema), known, int(state.step))

    places = {"best": (BEST, int(best["step"])), "last": (NAME, end)}
    return {name: restored(*places[name]) for name in names}
