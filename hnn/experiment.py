"""One study: its data, its models, and the training of each over seeds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hnn import model as nets
from hnn.config import Config, Optim, Rollout
from hnn.data import (
    Dataset,
    PixelDataset,
    Trajectories,
    load_npz,
    load_real_pendulum,
    simulate,
    simulate_films,
    split_indices,
)
from hnn.evaluate import Trained
from hnn.loss import derivative_matching, latent_dynamics, next_observation
from hnn.pixels import SIZE_PX
from hnn.shooting import multiple_shooting, segments, shooting_optimizer
from hnn.systems import SYSTEMS
from lib import checkpoint
from lib.checkpoint import Checkpoints, restore_finished
from lib.data import FullBatch, Resident, Source, Windows
from lib.process import UserError
from lib.run import RunFolder
from lib.shard import REPLICA, cores, fetch, make_mesh, most_devices, place
from lib.train import Loss, State, fit, init_state, make_step

STEPS_PER_CALL = 100


def seed_keys(config: Config) -> jax.Array:
    """One key per repetition, [seeds]."""
    return jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))(jax.random.key(config.seed), np.arange(config.seeds))


def reads_file(config: Config) -> bool:
    """Whether the data come from a file (and can be checked before anything is written)."""
    return config.data.path is not None or config.system == "real_pendulum"


def load_data(config: Config) -> Dataset | PixelDataset:
    """Train and test trajectories (or films) with a leading axis of seeds.

    Raises UserError for files that are missing or do not fit the system.
    """
    if config.data.per_seed and not reads_file(config):
        draws = [_draw(config, key) for key in seed_keys(config)]
    else:
        draws = [_draw(config, jax.random.key(config.seed))]

    def join(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
        return np.stack([first, *others]) if others else np.broadcast_to(first, (config.seeds, *first.shape))

    times = (draws[0].train.t, draws[0].test.t)
    joined = jax.tree.map(join, *draws)
    return type(joined)(*(part._replace(t=t) for part, t in zip(joined, times, strict=True)))


def _draw(config: Config, key: jax.Array) -> Dataset | PixelDataset:
    system, options = SYSTEMS[config.system], config.data
    if config.system == "real_pendulum":
        return load_real_pendulum(options.path)
    if config.system == "pixel_pendulum":
        return simulate_films(key, n_trajectories=options.n_trajectories)
    if options.path is not None:
        return load_npz(options.path, system)[0]
    return simulate(system, key, n_trajectories=options.n_trajectories, noise_std=options.noise_std)


def interval(part: Trajectories) -> float:
    """The sampling interval (the most common one, where a recording has gaps)."""
    return float(np.median(np.diff(part.t)))


@functools.cache
def build_model(name: str, dimension: int, hidden: int) -> nets.FieldModel | nets.SequenceModel:
    """The network of a model name on coordinates; `hnn` and `hnn_rollout` are the same one."""
    if name == "lstm":
        return nets.SequenceModel(dimension, hidden)
    if name == "hnn_rollout":
        return build_model("hnn", dimension, hidden)
    return {
        "baseline": nets.baseline,
        "hnn": nets.hnn,
        "separable": nets.separable,
        "dissipative": nets.dissipative,
    }[name](dimension, hidden)


def optimizer(optim: Optim) -> optax.GradientTransformation:
    """Adam with coupled weight decay; learning rate up over the warm-up, then down on a cosine."""
    adam = optax.adam(schedule(optim, optim.lr), b2=optim.b2)
    return optax.chain(optax.add_decayed_weights(optim.weight_decay), adam)


def schedule(optim: Optim, peak: float) -> optax.Schedule:
    """The learning rate: up to `peak` over the warm-up, then down on a cosine."""
    warmup = round(optim.warmup * optim.steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, optim.steps, optim.final_lr * peak)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one model is trained: loss, optimiser, data, number of steps, and `init(key, start) -> params` of one seed.

    `start`: arrays with a leading axis of seeds that the initial parameters are made of, where data enter them.
    """

    init: Callable[[jax.Array, Any], Any]
    loss: Loss
    tx: optax.GradientTransformation
    source: Source
    steps: int
    start: Any = None


def pixel_model(name: str, config: Config) -> nets.PixelModel:
    """The autoencoder with latent dynamics, conservative unless it is the baseline."""
    return nets.PixelModel(SIZE_PX**2, conservative=name != "baseline", hidden=config.hidden, gain=config.pixels.gain)


def recipe(name: str, config: Config, data: Dataset | PixelDataset) -> Recipe:
    """The training of one model on `data` (arrays with a leading axis of seeds)."""
    if isinstance(data, PixelDataset):
        return _pixel_recipe(name, config, data)
    system, optim = SYSTEMS[config.system], config.derivative
    model = build_model(name, system.dimension, config.hidden)
    if isinstance(model, nets.SequenceModel):
        optim = config.sequence
        init = lambda key, _: model.init(key, model.start(), jnp.zeros(2 * system.dimension))  # noqa: E731
        source = _source({"y": data.train.y}, optim, config.seed)
        return Recipe(init, next_observation(model), optimizer(optim), source, optim.steps)
    if name in ("hnn_rollout", "dissipative"):
        return _shooting_recipe(model, config.rollout, data)
    rows = {"y": _rows(data.train.y), "dy": _rows(data.train.dy)}
    loss = derivative_matching(model.field, optim.robust_scale)
    source = _source(rows, optim, config.seed)
    return Recipe(lambda key, _: model.init(key), loss, optimizer(optim), source, optim.steps)


def _shooting_recipe(model: nets.FieldModel, options: Rollout, data: Dataset) -> Recipe:
    step = interval(data.train)
    train = data.train
    seeds = [
        segments(Trajectories(train.t, train.y[i], train.y_true[i], train.dy[i]), step, options.segment_points)
        for i in range(train.y.shape[0])
    ]
    arrays = {name: np.stack([cut[name] for cut, _ in seeds]) for name in ("y", "dy", "mask")}
    starts = np.stack([first for _, first in seeds])
    tx = shooting_optimizer(options, lambda lr: optax.adam(schedule(options, lr), b2=options.b2))
    init = lambda key, start: {"net": model.init(key), "starts": start}  # noqa: E731
    source = FullBatch(arrays, step_name="step")
    return Recipe(init, multiple_shooting(model, options, step), tx, source, options.steps, starts)


def _pixel_recipe(name: str, config: Config, data: PixelDataset) -> Recipe:
    optim, model = config.pixels, pixel_model(name, config)
    init = lambda key, _: model.init(key, jnp.zeros(2 * SIZE_PX**2))  # noqa: E731
    arrays = {"frames": data.train.frames}
    source = Windows(arrays, optim.window + 1, optim.batch_size or 1, config.seed, row_axis=1)
    return Recipe(init, latent_dynamics(model, optim), optimizer(optim), source, optim.steps)


def _rows(array: np.ndarray) -> np.ndarray:
    """[S, n_traj, T, d] to [S, n_traj T, d]."""
    return array.reshape(array.shape[0], -1, array.shape[-1])


def _source(arrays: dict[str, np.ndarray], optim: Optim, seed: int) -> Source:
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    if optim.batch_size is None:
        return FullBatch(arrays)
    return Resident(arrays, optim.batch_size, seed, row_axis=1)


def optim_field(name: str, config: Config) -> str:
    """Which field of the configuration says how a model is trained."""
    if config.system == "pixel_pendulum":
        return "pixels"
    return {"lstm": "sequence", "hnn_rollout": "rollout", "dissipative": "rollout"}.get(name, "derivative")


def check_batch_sizes(config: Config, data: Dataset | PixelDataset | None) -> None:
    """Raises UserError for batches larger than the training data, which are still to be simulated where None."""
    if config.system == "pixel_pendulum":
        return
    system = SYSTEMS[config.system]
    if isinstance(data, Dataset):
        trajectories, points = data.train.y.shape[1:3]
    else:
        count = config.data.n_trajectories or system.n_trajectories
        trajectories, points = len(range(count)[split_indices(system, count)[0]]), system.n_points
    for name in config.models:
        field, rows = optim_field(name, config), trajectories if name == "lstm" else trajectories * points
        size = getattr(config, field).batch_size
        if size is not None and size > rows:
            raise UserError(f"{field}.batch_size is {size}, but there are only {rows} rows to train {name} on")


def start_state(config: Config, study: Recipe) -> State:
    """The states of all seeds before training, [seeds, ...]."""

    def one(key: jax.Array, start: Any) -> State:
        init_key, step_key = jax.random.split(key)
        return init_state(study.init(init_key, start), study.tx, step_key)

    keys = jax.jit(jax.vmap(lambda k: jax.random.fold_in(k, 1)))(seed_keys(config))
    # One seed after the other: XLA's CPU backend runs a batch of QR factorisations (orthogonal initialisation) on the
    # threads that wait for it, and on two cores two of them at once have been seen to wait for ever.
    return jax.jit(lambda *args: jax.lax.map(lambda a: one(*a), args))(keys, study.start)


def default_devices(config: Config) -> int:
    """On a CPU one device per core, but no more than there are seeds; all of them elsewhere.

    These programs are too small to be split over a batch (measured: slower on two cores than on one), but seeds are
    independent of each other.
    """
    return most_devices(lambda count: jax.default_backend() != "cpu" or count <= min(cores(), config.seeds))


def training_mesh(config: Config, devices: int | None) -> Mesh:
    """The devices that the seeds are spread over. Raises UserError where there are not so many."""
    return make_mesh(default_devices(config) if devices is None else devices, REPLICA)


def train(
    config: Config, data: Dataset | PixelDataset, folder: RunFolder, devices: int | None, say: Callable[[str], None]
) -> dict[str, Trained]:
    """Trains every model of `config` that is not yet trained; each has its own checkpoints in the run folder."""
    mesh = training_mesh(config, devices)
    trained = {}
    for name in config.models:
        study = recipe(name, config, data)
        with Checkpoints(folder.checkpoints / name) as checkpoints:
            fresh = place(start_state(config, study), mesh)
            state = checkpoints.restore(fresh)
            done = 0 if state is None else int(np.max(state.step))
            if done < study.steps:
                begin = f", from step {done}" if done else ""
                say(f"training {name}: {config.seeds} seeds, {study.steps} steps{begin}")
            state = fit(
                fresh if state is None else state,
                make_step(study.loss, study.tx),
                study.source,
                steps=study.steps,
                mesh=mesh,
                replicas=config.seeds,
                steps_per_call=STEPS_PER_CALL,
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoint_every,
                log=folder.logger(name, done),
                progress=name,
            )
        trained[name] = _trained(name, config, state)
    return trained


def check_finished(config: Config, folder: RunFolder, names: Iterable[str]) -> None:
    """Raises UserError where a model has no checkpoint of its last step; reads no array."""
    for name in names:
        checkpoint.check_finished(folder.checkpoints / name, getattr(config, optim_field(name, config)).steps)


def load_trained(
    config: Config, data: Dataset | PixelDataset, folder: RunFolder, names: Iterable[str]
) -> dict[str, Trained]:
    """The trained models of a run that `check_finished`. Raises UserError where the last checkpoint is damaged."""
    out = {}
    for name in names:
        study = recipe(name, config, data)
        start = functools.partial(start_state, config, study)
        out[name] = _trained(name, config, restore_finished(folder.checkpoints / name, start, study.steps))
    return out


def _trained(name: str, config: Config, state: State) -> Trained:
    """The network with its weights as NumPy arrays, without the states of trajectories that were fitted with them."""
    if config.system == "pixel_pendulum":
        model = pixel_model(name, config)
    else:
        model = build_model(name, SYSTEMS[config.system].dimension, config.hidden)
    return Trained(model, fetch(state.params.get("net", state.params)))
