"""gan/cycle.py: what a cycle computes, in which order, on any number of devices, and that it goes on where it was."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gan_cases import DIGIT_FACTS, DIGITS, POINT_FACTS, POINTS, digits, points
from jax.sharding import PartitionSpec as P

from gan import cycle, spectral
from gan.model import build
from lib.checkpoint import Checkpoints
from lib.data import Resident
from lib.pixels import Pixels
from lib.shard import compile_step, make_mesh, place
from lib.train import fit

SGD = (0.1, 0.1)  # learning rates of critic and generator: Adam would hide gradients of a wrong size
STILL = (0.0, 0.0)


@functools.cache
def started(config, facts):
    model = build(config.network, facts)
    state = jax.jit(lambda: cycle.start_state(model, config.optim, jax.random.key(0)))()
    return model, jax.tree.map(np.asarray, state.replace(key=()))


def start(config, facts):
    model, state = started(config, facts)
    return model, state.replace(key=jax.random.key(1))


@functools.cache
def compiled(config, facts, devices, how, rates, pixels):
    txs = {"critic": optax.sgd(rates[0]), "generator": optax.sgd(rates[1])}
    step = cycle.make_cycle(started(config, facts)[0], config, txs, pixels=pixels)
    return compile_step(step, make_mesh(devices), how), txs


def run(config, facts, batch, *, devices=1, how="jit", rates=SGD, steps=1, pixels=Pixels(), scale=1.0):
    """`scale`: of the generator's first parameters."""
    step, txs = compiled(config, facts, devices, how, rates, pixels)
    _, state = start(config, facts)
    scaled = jax.tree.map(lambda w: scale * w, state.params["generator"])
    state = state.replace(params=state.params | {"generator": scaled})
    state = state.replace(opt_state={name: tx.init(state.params[name]) for name, tx in txs.items()})
    if how != "pmap":
        mesh = make_mesh(devices)
        state, batch = place(state, mesh), place(batch, mesh, P("data"))
    for _ in range(steps):
        state, metrics = step(state, batch)
    return jax.tree.map(np.asarray, (state.replace(key=()), metrics))


def assert_close(one, other, rtol=2e-4, atol=2e-6):
    flat = jax.tree_util.tree_leaves_with_path(one)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(flat, jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


WAYS = [pytest.param(2, "shard_map", marks=pytest.mark.slow), (4, "shard_map"), (4, "pmap")]


@pytest.fixture(scope="module")
def alone():
    return run(POINTS, POINT_FACTS, points(16)), run(DIGITS, DIGIT_FACTS, digits(8), pixels=Pixels(dequantize=True))


@pytest.mark.parametrize(("devices", "how"), WAYS)
def test_the_number_of_devices_changes_nothing_of_spectral_norm_and_penalty(alone, devices, how):
    assert_close(run(POINTS, POINT_FACTS, points(16), devices=devices, how=how), alone[0])


def test_the_number_of_devices_changes_nothing_of_batch_norm_and_classes(alone):
    found = run(DIGITS, DIGIT_FACTS, digits(8), devices=4, how="shard_map", pixels=Pixels(dequantize=True))
    assert_close(found, alone[1], rtol=2e-3, atol=2e-5)


def test_generated_examples_are_not_seen_by_the_batch_norm_of_real_ones(alone):
    _, metrics = run(DIGITS, DIGIT_FACTS, digits(8), pixels=Pixels(dequantize=True), scale=2.0)
    assert metrics["real"] == pytest.approx(float(alone[1][1]["real"]), rel=1e-5)
    assert abs(metrics["fake"] - alone[1][1]["fake"]) > 1e-4


def test_one_power_iteration_per_update_of_the_critic():
    _, before = start(POINTS, POINT_FACTS)
    after, metrics = run(POINTS, POINT_FACTS, points(16), rates=STILL)
    expected = before.extra["vectors"]
    for _ in range(POINTS.optim.n_critic):
        expected = jax.jit(spectral.iterate)(before.params["critic"], expected)
    assert_close(after.extra["vectors"], expected, rtol=1e-4, atol=1e-5)
    assert_close(after.params, jax.tree.map(np.asarray, before.params))
    assert {"loss", "critic", "generator", "real", "fake", "ranked", "penalty"} <= set(metrics)


@pytest.mark.slow
def test_the_order_of_a_cycle():
    """First, the generator does not see what the critic learns in the same cycle."""

    network = replace(POINTS.network, critic_norm="none")

    def generator(first, rate):
        config = replace(POINTS, network=network, optim=replace(POINTS.optim, generator_first=first))
        return run(config, POINT_FACTS, points(16), rates=(rate, 0.1))[0].params["generator"]

    initial_critic = generator(False, 0.0)
    assert_close(generator(True, 0.5), initial_critic, rtol=1e-5)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(generator(False, 0.5), initial_critic, rtol=1e-3)


def test_updates_take_their_own_rows():
    """Row j n + i is of update i: rows that only differ in update 1 leave the loss of update 0 alone."""
    config = replace(POINTS, optim=replace(POINTS.optim, n_critic=2, gradient_penalty=0.0))
    batch = points(16)
    other = {"x": batch["x"].copy()}
    other["x"][1::2] = other["x"][0::2]
    again = {"x": other["x"][::-1].copy()}  # the same examples for both updates, in another order
    real = [run(config, POINT_FACTS, b, rates=STILL)[1]["real"] for b in (batch, other, again)]
    # sigma changes between the updates, so only sums over the same rows in both are equal.
    assert real[1] == pytest.approx(float(real[2]), rel=1e-5) and abs(real[0] - real[1]) > 1e-4


def test_a_critics_head_start_is_that_of_the_published_code():
    cycles, made = [], 0
    while len(cycles) < 30_000:  # main.py: Diters = 100 if gen_iterations < 25 or gen_iterations % 500 == 0 else 5
        waits = 20 if made < 25 or made % 500 == 0 else 1
        cycles += [False] * (waits - 1) + [True]
        made += 1
    found = cycle.generator_moves(jnp.arange(len(cycles)), 20)
    np.testing.assert_array_equal(found, cycles)


def test_clipping_and_a_generator_that_waits():
    optim = replace(POINTS.optim, loss="wasserstein", clip=0.01, head_start=3, gradient_penalty=0.0)
    config = replace(POINTS, network=replace(POINTS.network, critic_norm="none"), optim=optim)
    _, before = start(config, POINT_FACTS)
    twice, _ = run(config, POINT_FACTS, points(16), rates=(1e-4, 0.1), steps=2)
    assert_close(twice.params["generator"], jax.tree.map(np.asarray, before.params["generator"]))
    assert max(np.abs(w).max() for w in jax.tree.leaves(twice.params["critic"])) < 0.0101
    thrice, _ = run(config, POINT_FACTS, points(16), rates=(1e-4, 0.1), steps=3)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), thrice.params["generator"], twice.params["generator"])
    assert max(jax.tree.leaves(moved)) > 0


def test_the_average_follows_weights_and_running_statistics(alone):
    state = alone[1][0]
    _, before = start(DIGITS, DIGIT_FACTS)
    now = {"params": state.params["generator"], "statistics": state.extra["statistics"]["generator"]}
    first = {"params": before.params["generator"], "statistics": before.extra["statistics"]["generator"]}
    # The decay of averages begins at 1/10.
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * np.asarray(b), now, first)
    assert_close(state.ema, expected, rtol=1e-4, atol=1e-6)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (now, first)), strict=True))


@pytest.mark.slow
def test_training_goes_on_to_the_bit(tmp_path):
    """Interrupted at cycle 4 of 12, in the middle of a falling learning rate."""
    model, state = start(POINTS, POINT_FACTS)
    step = cycle.make_cycle(model, POINTS)
    source = Resident(points(64), POINTS.optim.n_critic * POINTS.optim.batch_size, 0)
    train = lambda state, steps, **options: fit(  # noqa: E731
        state, step, source, steps=steps, mesh=make_mesh(1), steps_per_call=4, checkpoint_every=4, **options
    )
    whole = train(state, 12)
    with Checkpoints(tmp_path / "c") as checkpoints:
        train(state, 4, checkpoints=checkpoints)
        restored = checkpoints.restore(state)
    assert int(restored.step) == 4
    resumed = train(restored, 12)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert (
            np.array_equal(jax.random.key_data(a), jax.random.key_data(b))
            if a.dtype == whole.key.dtype
            else (np.array_equal(a, b))
        )
    assert float(np.abs(jax.tree.leaves(whole.params["critic"])[0]).max()) > 0
