"""lib/train.py: the loop around a step. What a run computes depends on neither kills, resumes, chunks nor devices."""

import functools
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lib.checkpoint import Checkpoints
from lib.data import FullBatch, Resident, Streamed
from lib.process import UserError
from lib.shard import REPLICA, example_keys, fetch, make_mesh, make_state
from lib.train import State, fit, init_state, make_step

ROOT = Path(__file__).resolve().parents[1]


# A small run with everything in it: minibatches that do not divide the epoch, noise per example, Adam, an average.

TX = optax.adam(1e-2)
RNG = np.random.default_rng(0)
ROWS = {"x": RNG.normal(size=(22, 3)).astype(np.float32), "y": RNG.normal(size=22).astype(np.float32)}
SOURCE = Resident(ROWS, 4, seed=3)  # an epoch is 5.5 steps


def noisy_loss(params, batch, key):
    noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(example_keys(key, batch["y"].shape[0]))
    hidden = jnp.tanh((batch["x"] + 0.3 * noise) @ params["in"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2), {"noise": jnp.mean(noise)}


STEP = make_step(noisy_loss, TX, ema_decay=0.9)


def fresh(seed=0, tx=TX) -> State:
    key = jax.random.key(seed)
    return init_state({"in": jax.random.normal(key, (3, 8)), "out": jnp.ones(8) / 8}, tx, key, ema=True)


def run(state, steps, *, devices=1, source=SOURCE, step=STEP, steps_per_call=10, **options):
    options = {"mesh": make_mesh(devices), "steps_per_call": steps_per_call} | options
    return fit(state, step, source, steps=steps, **options)


def plain(state):
    return fetch(state.replace(key=jax.random.key_data(state.key)))


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, plain(a), plain(b))


@functools.cache
def straight(steps):
    """The uninterrupted run on one device, which the others are compared with."""
    return run(fresh(), steps)


def digest(state):
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(plain(state)))).hexdigest()


# A run that can be followed by hand: the gradient is -1 and the rate 1, so w counts the updates.


def counting_loss(params, batch, key):
    return -params["w"], {"twice": 2 * params["w"]}


def count(steps, *, loss=counting_loss, tx=None, ema_decay=None, source=None, **options):
    tx = tx or optax.sgd(1.0)
    state = init_state({"w": jnp.zeros(())}, tx, jax.random.key(0), ema=ema_decay is not None)
    step = make_step(loss, tx, ema_decay=ema_decay)
    return run(state, steps, source=source or FullBatch(()), step=step, **options)


class Recorder:
    """Stands where Checkpoints does, and writes down when it is called."""

    def __init__(self):
        self.calls = []

    def save(self, step, state):
        self.calls.append(("save", step, float(state.params["w"])))

    def wait(self):
        self.calls.append(("wait",))

    def log(self, step, metrics):
        self.calls.append(("log", step, metrics["loss"], metrics["twice"]))

    def hook(self, name):
        return lambda state, step: self.calls.append((name, step, float(state.params["w"]), int(state.step)))


def test_a_hook_ends_the_training_with_a_checkpoint():
    seen = Recorder()
    got = count(25, hooks=[(10, lambda state, step: step >= 10)], checkpoints=seen, checkpoint_every=100)
    assert int(got.step) == 10 and seen.calls == [("save", 10, 10.0), ("wait",)]


def test_order_of_log_hooks_and_checkpoints():
    seen = Recorder()
    hooks = [(10, seen.hook("tens")), (7, seen.hook("sevens")), (30, seen.hook("never"))]
    got = count(25, log=seen.log, hooks=hooks, checkpoints=seen, checkpoint_every=20)
    assert float(got.params["w"]) == int(got.step) == 25
    assert seen.calls == [
        ("log", 10, -4.5, 9.0),  # means over the losses 0, -1 .. -9
        ("tens", 10, 10.0, 10),
        ("sevens", 10, 10.0, 10),
        ("log", 20, -14.5, 29.0),
        ("tens", 20, 20.0, 20),
        ("sevens", 20, 20.0, 20),
        ("save", 20, 20.0),
        ("log", 25, -22.0, 44.0),
        ("sevens", 25, 25.0, 25),
        ("save", 25, 25.0),
        ("wait",),
    ]


def test_a_finished_run_is_left_alone():
    seen = Recorder()
    done = count(25)
    again = run(done, 25, source=FullBatch(()), step=lambda *_: pytest.fail("a step was run"), log=seen.log)
    assert again is done and seen.calls == []


def test_chunks_end_at_fixed_steps_after_a_resume():
    seen = Recorder()
    tx = optax.sgd(1.0)
    run(count(13), 40, source=FullBatch(()), step=make_step(counting_loss, tx), log=seen.log)
    assert [call[1] for call in seen.calls] == [20, 30, 40]
    assert seen.calls[0][2] == -16.0  # the mean of 13 .. 19


def test_ema_is_the_closed_form():
    decay, steps = 0.9, 25
    got = count(steps, ema_decay=decay, devices=4)
    k = np.arange(1, steps + 1)
    assert float(got.ema["w"]) == pytest.approx(float(np.sum((1 - decay) * decay ** (steps - k) * k)), rel=1e-5)


def test_the_callers_state_stays_usable():
    state = fresh()
    before = digest(state)
    run(state, 20)
    assert digest(state) == before


@pytest.mark.parametrize("steps_per_call", [7, 100])
def test_chunk_length_changes_little_and_steps_nothing(steps_per_call):
    a, b = straight(50), run(fresh(), 50, steps_per_call=steps_per_call)
    assert int(a.step) == int(b.step) == 50
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a.params, b.params)


def test_streamed_data_train_alike():
    streamed = Streamed(lambda i: {name: rows[i] for name, rows in ROWS.items()}, 22, 4, seed=3)
    a, b = straight(50), run(fresh(), 50, devices=2, source=streamed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a.params, b.params)


# Numbers that stop being finite


def nan_from(w):
    return lambda params, batch, key: (jnp.where(params["w"] >= w, jnp.nan, -params["w"]), {})


def nan_update(number):
    """An optimiser whose update `number` (from 1) is not a number."""
    return optax.sgd(lambda updates: jnp.where(updates == number - 1, jnp.nan, 1.0))


@pytest.mark.parametrize(
    ("options", "step", "saved"),
    [
        ({"loss": nan_from(37)}, 38, 30),  # the loss of step 38 is that of 37 updates
        ({"loss": nan_from(20), "devices": 4}, 21, 20),
        ({"loss": lambda p, b, k: (jnp.where(p["w"] >= 11, jnp.inf, -p["w"]), {})}, 12, 10),
        ({"tx": nan_update(20)}, 20, 10),  # seen in the parameters, before any loss shows it
        ({"tx": nan_update(20), "devices": 4}, 20, 10),
        ({"tx": nan_update(25)}, 26, 20),
    ],
)
def test_nan_stops_and_names_step_and_checkpoint(tmp_path, options, step, saved):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError) as error:
            count(100, checkpoints=checkpoints, checkpoint_every=10, **options)
        text = f"the loss is not finite at step {step}: the last good checkpoint is step {saved}"
        assert str(error.value).startswith(text) and "\n" not in str(error.value)
        tx = options.get("tx", optax.sgd(1.0))
        got = checkpoints.restore(init_state({"w": jnp.ones(())}, tx, jax.random.key(0)))
    assert float(got.params["w"]) == int(got.step) == saved


def test_nan_without_a_checkpoint():
    seen = Recorder()
    with pytest.raises(UserError, match="not finite at step 4: no checkpoint was saved before"):
        count(100, loss=nan_from(3), log=seen.log)
    assert seen.calls == []  # nothing of that chunk is reported as if it were good


# Resuming


@pytest.mark.parametrize("first", [pytest.param(60, marks=pytest.mark.slow), 57])
def test_resume_in_the_middle_of_an_epoch_is_bit_identical(tmp_path, first):
    with Checkpoints(tmp_path) as checkpoints:
        run(fresh(), first, checkpoints=checkpoints)
        restored = checkpoints.restore(fresh(9))
    assert int(restored.step) == first
    resumed = run(restored, 100)
    if first % 10 == 0:
        assert_identical(resumed, straight(100))
    else:  # other chunks are other programs: the same up to the order of sums
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), resumed.params, straight(100).params)


def test_saved_on_four_devices_goes_on_on_one(tmp_path):
    tx = optax.sgd(0.02)
    step = make_step(noisy_loss, tx)
    expected = fetch(run(fresh(tx=tx), 40, step=step).params)
    with Checkpoints(tmp_path) as checkpoints:
        run(fresh(tx=tx), 20, step=step, devices=4, checkpoints=checkpoints)
        resumed = run(checkpoints.restore(fresh(9, tx=tx)), 40, step=step)
    for name, value in expected.items():
        np.testing.assert_allclose(resumed.params[name], value, atol=1e-6 * np.abs(value).max(), rtol=0)


# Replicas: independent runs over devices


@functools.cache
def replicated():
    """Five runs that differ in key and data: each alone, and stacked."""
    states = [fresh(seed) for seed in range(5)]
    rows = [{name: np.roll(x, i, 0) * (1 + i) for name, x in ROWS.items()} for i in range(5)]
    stack = lambda *xs: jnp.stack(xs)  # noqa: E731
    return states, rows, jax.tree.map(stack, *states), jax.tree.map(stack, *rows)


def run_replicas(state, steps, devices, **options):
    source = Resident(replicated()[3], 4, seed=3, row_axis=1)
    return run(state, steps, source=source, mesh=make_mesh(devices, REPLICA), replicas=5, **options)


@functools.cache
def replicas_on(devices):
    """The state after 20 steps, what was logged, and what hooks saw."""
    logged, hooked = [], []
    got = run_replicas(
        replicated()[2], 20, devices,
        log=lambda *row: logged.append(row),
        hooks=[(10, lambda state, step: hooked.append((step, state.params["in"].shape, digest(state))))],
    )  # fmt: skip
    return got, logged, hooked


# A state that is spread over the devices as well; layers wide enough for `shard_largest` to take them apart.


def wide() -> State:
    key = jax.random.key(1)
    return init_state({"in": jax.random.normal(key, (3, 2048)), "out": jnp.ones(2048) / 2048}, TX, key, ema=True)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), plain(a), plain(b))


def test_a_sharded_state_is_made_in_parts_and_trains_like_a_whole_one():
    mesh = make_mesh(4)
    start = make_state(wide, mesh, sharded=True)
    parts = {shard.data.shape for shard in start.params["in"].addressable_shards}
    assert parts == {(3, 512)} and len(start.params["out"].sharding.device_set) == 4
    assert_identical(start, wide())
    trained = run(start, 30, devices=4, sharded=True)
    assert {shard.data.shape for shard in trained.opt_state[0].mu["in"].addressable_shards} == {(3, 512)}
    close(trained, run(wide(), 30))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((4, True), (2, False), marks=pytest.mark.slow),
        pytest.param((1, False), (4, True), marks=pytest.mark.slow),
        ((4, True), (2, True)),
    ],
)
def test_saved_as_parts_or_whole_it_goes_on_as_either_on_any_devices(tmp_path, before, after):
    state = None
    for steps, (devices, sharded) in ((10, before), (30, after)):
        with Checkpoints(tmp_path) as checkpoints:
            start = make_state(wide, make_mesh(devices), sharded=sharded)
            state = checkpoints.restore(start) or start
            state = run(state, steps, devices=devices, sharded=sharded, checkpoints=checkpoints)
    close(state, run(wide(), 30))


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_replicas_are_the_same_on_any_number_of_devices(devices):
    (got, logged, hooked), (expected, expected_logged, expected_hooked) = replicas_on(devices), replicas_on(1)
    assert_identical(got, expected)
    assert logged == expected_logged  # copies that fill up devices are in no mean
    assert hooked == expected_hooked
    assert [row[:2] for row in hooked] == [(10, (5, 3, 8)), (20, (5, 3, 8))]


def test_replicas_are_what_each_is_alone():
    states, rows, _, _ = replicated()
    stacked = replicas_on(1)[0]
    assert stacked.params["in"].shape == (5, 3, 8) and np.array_equal(stacked.step, [20] * 5)
    for i in (0, 4):
        alone = run(states[i], 20, source=Resident(rows[i], 4, seed=3))
        one = jax.tree.map(lambda x, i=i: x[i], stacked.params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), one, alone.params)


@pytest.mark.slow
def test_replicas_saved_on_four_devices_go_on_on_two(tmp_path):
    state = replicated()[2]
    with Checkpoints(tmp_path) as checkpoints:
        run_replicas(state, 10, 4, checkpoints=checkpoints)
        resumed = run_replicas(checkpoints.restore(state), 20, 2)
    assert_identical(resumed, replicas_on(1)[0])


def test_a_replica_that_diverges_is_found_at_its_step():
    tx = optax.sgd(1.0)
    one = init_state({"w": jnp.zeros(())}, tx, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.stack([x] * 3), one)
    state = state.replace(params={"w": jnp.asarray([-5.0, 0.0, -5.0])})
    source = FullBatch(jnp.zeros((3, 1)))
    with pytest.raises(UserError, match="not finite at step 18"):
        fit(
            state, make_step(nan_from(17), tx), source,
            steps=40, mesh=make_mesh(2, REPLICA), replicas=3, steps_per_call=10,
        )  # fmt: skip


# Signals and kills, in processes of their own

CHILD = "import sys, test_train; from lib.process import command; sys.exit(command(test_train.child))"


def child(argv):
    """Trains or goes on in the folder argv[0] to argv[1] steps, and at step 30 sends itself the signals argv[2:]."""
    numbers = [int(number) for number in argv[2:]]

    def send(state, step):
        if step == 30:
            for number in numbers:
                os.kill(os.getpid(), number)

    with Checkpoints(Path(argv[0])) as checkpoints:
        state = checkpoints.restore(fresh())
        got = run(
            fresh() if state is None else state, int(argv[1]),
            checkpoints=checkpoints, checkpoint_every=20, hooks=[(10, send)],
            log=lambda step, metrics: print(step, flush=True),
        )  # fmt: skip
    print(digest(got))


def start_child(*argv, cache=""):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = {
        "PYTHONPATH": path,
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),  # as commands have one
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, argv)],
        env=os.environ | variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_at_once_and_the_run_can_go_on(tmp_path, number, code):
    process = start_child(tmp_path / "c", 10**9, int(number))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out.split() == ["10", "20", "30"]
    assert err == f"stopped: at step 30 of {10**9}; --resume goes on from there\n"
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [20, 30]
        resumed = run(checkpoints.restore(fresh(9)), 50)
    assert_identical(resumed, straight(50))


def test_kills_at_random_instants_do_not_change_a_bit(tmp_path):
    steps, kills = 600, 5
    delays = random.Random(0)
    for _ in range(kills):
        process = start_child(tmp_path / "c", steps, cache=tmp_path / "jax")
        try:
            for _ in range(delays.randint(1, 6)):
                line = process.stdout.readline()
                assert line.strip().isdigit(), line
            time.sleep(delays.uniform(0, 0.05))
        finally:
            process.kill()
            out, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, (out, err)
    process = start_child(tmp_path / "c", steps, cache=tmp_path / "jax")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    *lines, last = out.split()
    assert int(lines[0]) > 10  # it went on, it did not start again
    assert last == digest(straight(steps))
