"""lib/plan.py: what is read from compiled programs, against what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lib.plan import Cost, Machine, collectives, cost, predicted_s
from lib.process import UserError
from lib.shard import compile_step, fetch, make_mesh, place, shard_largest
from lib.train import init_state, make_step

TX = optax.adam(1e-2)
WIDTH, ROWS = 64, 32


def loss(params, batch, key):
    h = jnp.tanh(batch["x"] @ params["inner"] + params["bias"])
    return jnp.mean((h @ params["outer"] - batch["y"]) ** 2), {}


def problem():
    rng = np.random.default_rng(0)
    params = {
        "inner": jnp.asarray(rng.normal(size=(WIDTH, 128)), jnp.float32),
        "outer": jnp.asarray(rng.normal(size=(128, WIDTH)), jnp.float32),
        "bias": jnp.zeros(128),
    }
    batch = {name: jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32) for name in ("x", "y")}
    return init_state(params, TX, jax.random.key(0)), batch


NUMBERS = 2 * WIDTH * 128 + 128


@pytest.mark.parametrize("devices", [2, 4])
def test_data_parallel_training_has_one_collective_of_the_size_of_the_gradient(devices):
    state, batch = problem()
    found = cost(make_step(loss, TX), state, batch, make_mesh(devices))
    assert [kind for kind, _ in found.collectives] == ["all-reduce"]
    assert found.communicated_bytes == 4 * (NUMBERS + 1)  # gradients, and the loss
    assert found.state_bytes == pytest.approx(3 * 4 * NUMBERS, rel=0.01)  # parameters and two moments


def test_operations_are_counted():
    state, batch = problem()
    found = [cost(make_step(loss, TX), state, batch, make_mesh(devices)).flops for devices in (2, 4)]
    # Two products forward, and for each two backward but that to the input; what does not depend on the batch, the
    # optimiser, is the same on both meshes.
    assert found[0] - found[1] == pytest.approx(5 * 2 * (ROWS / 2 - ROWS / 4) * WIDTH * 128, rel=0.02)


def test_one_device_has_no_collective():
    state, batch = problem()
    assert cost(make_step(loss, TX), state, batch, make_mesh(1)).collectives == ()


def test_shapes_suffice():
    state, batch = jax.eval_shape(problem)
    assert cost(make_step(loss, TX), state, batch, make_mesh(2)).devices == 2


def test_a_sharded_state_is_a_part_on_each_device_and_trains_the_same():
    state, batch = problem()
    mesh = make_mesh(4)
    specs = shard_largest(state, mesh)
    assert specs.params == {"inner": P(None, "data"), "outer": P("data"), "bias": P()} and specs.key == P()
    found = cost(make_step(loss, TX), state, batch, mesh, state_spec=specs, how="jit")
    assert found.state_bytes == pytest.approx(3 * 4 * NUMBERS / 4, rel=0.05)

    step = make_step(loss, TX)
    alone, _ = jax.jit(step)(state, batch)
    spread = compile_step(step, mesh, "jit", in_specs=(specs, P("data")), out_specs=(specs, P()))
    apart, _ = spread(place(state, mesh, specs), place(batch, mesh, P("data")))
    assert apart.params["inner"].addressable_shards[0].data.shape == (WIDTH, 32)
    for name, value in fetch(alone.params).items():
        np.testing.assert_allclose(fetch(apart.params)[name], value, rtol=1e-5, atol=1e-6)


def test_collectives_in_the_text_of_a_program():
    text = """
  %all-reduce.1 = f32[1000]{0} all-reduce(%x), channel_id=1
  %ag = (bf16[8,4]{1,0}, f32[2]{0}) all-gather-start(%y, %z), dimensions={0}
  %done = bf16[8,4]{1,0} all-gather-done(%ag)
  %add = f32[3]{0} add(%a, %b)
"""
    assert collectives(text) == [("all-reduce", 4000), ("all-gather", 72)]


def test_predicted_seconds():
    machine = Machine(flops_per_s=1e3, link_bytes_per_s=100.0, network_bytes_per_s=50.0, per_host=2, latency_s=0.5)
    assert predicted_s(Cost(1, 2e3, (), 0, 0, 0), machine) == 2
    assert predicted_s(Cost(2, 1e3, (("all-reduce", 100),), 0, 0, 0), machine) == pytest.approx(1 + 0.5 + 1)
    assert predicted_s(Cost(4, 1e3, (("all-gather", 100),), 0, 0, 0), machine) == pytest.approx(1 + 0.5 + 0.5 + 1)


def test_what_cannot_be():
    state, batch = problem()
    with pytest.raises(UserError, match="32 examples do not divide evenly over 3 devices"):
        cost(make_step(loss, TX), state, batch, make_mesh(3))
    with pytest.raises(UserError, match="must be positive"):
        Machine(0.0, 1.0)
    with pytest.raises(UserError, match="a latency must not be negative"):
        Machine(1.0, 1.0, latency_s=-1e-6)
