"""The one training loop. A model brings a pure `step(state, batch) -> (state, metrics)`; `fit` runs it.

Many steps are one compiled program (`lax.scan`) over data that stay on the devices, with a donated state. Chunks end at
fixed step numbers, so a resumed run executes the same programs on the same batches as an uninterrupted one, and its
result is bit-identical.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lib import cluster
from lib.checkpoint import Checkpoints
from lib.data import Source
from lib.process import SIGNALS, Stopped, UserError
from lib.shard import REPLICA, How, compile_step, compiler_options, fetch, place, pmean, shard_largest, varying

Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Metrics]]


@flax.struct.dataclass
class State:
    """Everything that training changes, as arrays."""

    step: jax.Array  # int32 [], updates made so far
    params: Any
    opt_state: Any
    ema: Any  # exponential moving average of params, or () where none is kept
    extra: Any  # what a model carries beside: batch statistics, spectral vectors, ...
    key: jax.Array  # the root of all random numbers inside steps; never changes


Step = Callable[[State, Any], tuple[State, Metrics]]
Hook = tuple[int, Callable[[State, int], bool | None]]


class Progress(Protocol):
    def __call__(self, step: int, metrics: dict[str, float]) -> None: ...


def init_state(params: Any, tx: optax.GradientTransformation, key: jax.Array, *, ema: bool = False) -> State:
    """The state before the first step."""
    average = jax.tree.map(jnp.array, params) if ema else ()
    return State(jnp.zeros((), jnp.int32), params, tx.init(params), average, (), key)


def make_step(loss: Loss, tx: optax.GradientTransformation, *, ema_decay: float | optax.Schedule | None = None) -> Step:
    """The plain training step: gradient of `loss(params, batch, key) -> (scalar, metrics)`, then `tx`.

    `ema_decay`: of the average of parameters, a number or a function of the step.

    `key` is `fold_in(state.key, state.step)`; per-example keys come from `lib.shard.example_keys`. Inside a data
    axis the gradient is the mean over devices.
    """

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = gradient(varying(state.params), batch, key)
        grads, metrics = pmean((grads, {"loss": value, **metrics}))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
            ema = optax.incremental_update(params, ema, 1 - decay)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    return step


def warmed_up(decay: float) -> optax.Schedule:
    """A decay of averages that rises to `decay`, so that a short training does not remember its initial weights."""
    return lambda step: jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def compile_chunk(
    step: Step, source: Source, mesh: Mesh, how: How = "shard_map", *, replicas: bool = False, state_spec: Any = P()
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
    """Compiles `chunk(state, source.constant, source.per_step(first, k)) -> (state, metrics [k])`: k steps in one.

    With `replicas`, state and constant have a leading axis of independent runs, which are spread over the devices of a
    mesh with the axis "replica"; metrics become [replicas, k]. Otherwise the batch is spread over the axis "data",
    and the state as `state_spec` says.
    """

    def chunk(state: State, constant: Any, xs: Any) -> tuple[State, Metrics]:
        state, metrics = jax.lax.scan(lambda s, x: step(s, source.select(constant, x)), state, xs)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(state.params)]))
        # The loss of a step is that of the parameters before it: the last update is checked by itself.
        metrics["loss"] = metrics["loss"].at[-1].set(jnp.where(finite, metrics["loss"][-1], jnp.nan))
        return state, metrics

    if not replicas:
        specs = (state_spec, source.constant_spec, source.per_step_spec)
        return compile_step(chunk, mesh, how, in_specs=specs, out_specs=(state_spec, P()))

    def each(state: State, constant: Any, xs: Any) -> tuple[State, Metrics]:
        # A GPU gains from one batched program, a CPU from small programs one after the other.
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda one: chunk(one[0], one[1], xs), (state, constant))
        return jax.vmap(chunk, in_axes=(0, 0, None))(state, constant, xs)

    if mesh.size == 1:
        return compile_step(each, mesh, "jit")
    along = P(REPLICA)
    mapped = jax.shard_map(
        each, mesh=mesh, in_specs=(along, along, P()), out_specs=(along, along), check_vma=False
    )  # no collectives inside, so nothing for the check to find
    return jax.jit(mapped, donate_argnums=0, compiler_options=compiler_options(mesh))


@dataclasses.dataclass(frozen=True)
class _Replicas:
    """Independent runs over devices: padded with copies so that every device has equally many."""

    count: int
    mesh: Mesh

    def spread(self, tree: Any) -> Any:
        padded = math.ceil(self.count / self.mesh.size) * self.mesh.size
        order = np.arange(padded) % self.count
        spec = P(REPLICA) if self.mesh.size > 1 else P()
        return place(jax.jit(lambda tree: jax.tree.map(lambda x: x[order], tree))(tree), self.mesh, spec)

    @functools.cached_property
    def gather(self) -> Callable[[Any], Any]:
        """Leaves the copies out; the result is whole on every device."""
        everywhere = jax.sharding.NamedSharding(self.mesh, P())
        return jax.jit(lambda tree: jax.tree.map(lambda x: x[: self.count], tree), out_shardings=everywhere)


def fit(
    state: State,
    step: Step,
    source: Source,
    *,
    steps: int,
    mesh: Mesh,
    of: int | None = None,
    how: How = "shard_map",
    replicas: int | None = None,
    sharded: bool = False,
    steps_per_call: int = 100,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 1000,
    log: Progress | None = None,
    hooks: Iterable[Hook] = (),
    progress: str | None = None,
) -> State:
    """Trains from `state.step` to `steps` and returns the final state.

    Per chunk of `steps_per_call` steps, in this order: run, check for non-finite numbers, log, hooks, checkpoint, act
    on signals. A hook `(every, fn)` calls `fn(state, step)` at the first chunk end at or after each multiple of
    `every`; where it returns True, training ends there, with a checkpoint.

    `of`: where the whole training ends, if it goes on after `steps`; for messages.
    `replicas`: how many independent runs lead every array of `state` and `source.constant` (mesh axis "replica").
    `sharded`: the state is spread over the devices too (`lib.shard.shard_largest`); XLA divides the work, under `jit`.
    Raises UserError where the loss or the parameters stop being finite, Stopped after a signal; the checkpoint then on
    disk is good in both cases.
    """
    done = int(np.max(fetch(state.step)))
    if done >= steps:
        return state
    runs = _Replicas(replicas, mesh) if replicas else None
    if sharded or (runs is None and how == "shard_map" and mesh.size == 1):
        how = "jit"
    spec = shard_largest(state, mesh) if sharded else P()
    chunk = compile_chunk(step, source, mesh, how, replicas=runs is not None, state_spec=spec)
    if runs:
        state, constant = runs.spread(state), runs.spread(source.constant)
    else:
        # A copy, since the caller's is not donated, without weak types: it comes back without, and would compile twice.
        state = place(jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype), state), mesh, spec)
        constant = place(source.constant, mesh, source.constant_spec) if how != "pmap" else source.constant
    whole = runs.gather if runs else (lambda tree: tree)
    per_step_spec = P() if runs else source.per_step_spec

    def inputs(first: int) -> Any:
        count = min(steps, (first // steps_per_call + 1) * steps_per_call) - first
        xs = source.per_step(first, count)
        return xs if how == "pmap" else place(xs, mesh, per_step_spec)

    with SIGNALS.deferred(), _bar(progress, done, of or steps) as bar, _with_others() as watchdog:
        upcoming = inputs(done)
        while done < steps:
            count = jax.tree.leaves(upcoming)[0].shape[0]
            state, device_metrics = chunk(state, constant, upcoming)
            before, done = done, done + count
            if done < steps:
                upcoming = inputs(done)  # read while the devices compute
            metrics = fetch(whole(device_metrics))
            watchdog.beat()
            _check_finite(metrics["loss"], before, checkpoints)
            summary = {name: float(np.mean(value[..., -count:])) for name, value in metrics.items()}
            if log is not None:
                log(done, summary)
            bar(count, summary["loss"])
            called = [fn(whole(state), done) for every, fn in hooks if before // every < done // every]
            ended = done == steps or _agreed(1 if True in called else None) is not None
            code = _agreed(SIGNALS.code)
            due = before // checkpoint_every < done // checkpoint_every
            if checkpoints is not None and (due or ended or code is not None):
                checkpoints.save(done, whole(state))
            if code is not None:
                if checkpoints is not None:
                    checkpoints.wait()
                raise Stopped(code, f"at step {done} of {of or steps}; --resume goes on from there")
            if ended:
                break
        if checkpoints is not None:
            checkpoints.wait()
    return whole(state)


@contextlib.contextmanager
def _with_others() -> Iterator[cluster.Watchdog]:
    """A watchdog, which watches where there are other processes to wait for; where one of them is lost, it is told."""
    watchdog = cluster.Watchdog(cluster.wait_s())
    if jax.process_count() == 1:
        yield watchdog
    else:
        with cluster.losing_a_peer_ends(), watchdog:
            yield watchdog


def _check_finite(losses: np.ndarray, before: int, checkpoints: Checkpoints | None) -> None:
    bad = ~np.isfinite(losses)
    if not bad.any():
        return
    step = before + 1 + int(np.argmax(bad.any(axis=tuple(range(bad.ndim - 1)))))
    saved = None
    if checkpoints is not None:
        checkpoints.wait()
        saved = max(checkpoints.steps(), default=None)
    last = f"the last good checkpoint is step {saved}" if saved is not None else "no checkpoint was saved before"
    raise UserError(f"the loss is not finite at step {step}: {last}; a lower learning rate may help")


def _agreed(code: int | None) -> int | None:
    """The same answer on all processes, since a collective that only some of them join hangs."""
    if jax.process_count() == 1:
        return code
    from jax.experimental import multihost_utils

    highest = int(np.max(multihost_utils.process_allgather(np.asarray(code or 0))))
    return highest or None


class _bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str | None, done: int, steps: int):
        from tqdm import tqdm

        disable = None if title and jax.process_index() == 0 else True
        self._bar = tqdm(desc=title, initial=done, total=steps, unit="step", disable=disable, leave=False, delay=2)

    def __call__(self, count: int, loss: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3e}", refresh=False)
        self._bar.update(count)

    def __enter__(self) -> _bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
