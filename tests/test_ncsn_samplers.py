"""The driver: the same samples to the bit for any number of samples and devices, and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.process import UserError
from lib.shard import make_mesh
from ncsn.constraints import inpaint
from ncsn.langevin import ladder, predictor_corrector, reverse_diffusion
from ncsn.samplers import compile_sampler, default_width, uniform

SHAPE, WIDTH, KEY = (5,), 4, jax.random.key(3)
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(6, 32)).astype(np.float32), "v": RNG.normal(size=(32, 5)).astype(np.float32) / 32}
KNOWN = RNG.normal(size=(11, 5)).astype(np.float32)
MASK = np.asarray([True, True, False, False, False])
LEVELS = [4.0, 2.0, 1.0, 0.5, 0.0]


def network(params, x, sigma):
    """A score whose matrix products sum in an order that depends on their shape."""
    inputs = jnp.concatenate([x, jnp.broadcast_to(jnp.log(sigma)[:, None], (len(x), 1))], axis=1)
    return (jnp.tanh(inputs @ params["w"]) @ params["v"] - x) / (1 + sigma[:, None] ** 2)


def build(params, rows):
    score = lambda x, sigma: network(params, x, sigma)  # noqa: E731
    sampler = predictor_corrector(score, reverse_diffusion(ladder(LEVELS)), corrector_steps=2)
    return inpaint(sampler, rows["known"], MASK)


@pytest.fixture(scope="module")
def draws():
    """One compiled driver per number of devices."""
    return {n: compile_sampler(build, SHAPE, make_mesh(n), width=WIDTH, frames=2) for n in (1, 2, 4)}


@pytest.fixture(scope="module")
def whole(draws):
    return draws[1](PARAMS, KEY, 11, {"known": KNOWN})


def rows(first, count):
    return {"known": KNOWN[first : first + count]}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_number_of_samples_changes_none_of_them(draws, whole, count):
    x, diagnostics = draws[1](PARAMS, KEY, count, rows(0, count))
    np.testing.assert_array_equal(x, whole[0][:count])
    np.testing.assert_array_equal(diagnostics.frames, whole[1].frames[:count])


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize(("first", "count"), [(0, 11), (0, 3), (6, 5)])
def test_devices_and_parts_change_no_sample(draws, whole, devices, first, count):
    x, diagnostics = draws[devices](PARAMS, KEY, count, rows(first, count), first=first)
    np.testing.assert_array_equal(x, whole[0][first : first + count])
    if count == 11:
        np.testing.assert_allclose(diagnostics.score_norm, whole[1].score_norm, rtol=1e-12)
        np.testing.assert_allclose(diagnostics.step_size, whole[1].step_size, rtol=1e-12)


def test_what_is_reported(whole):
    x, diagnostics = whole
    assert x.shape == (11, 5) and x.dtype == np.float32
    assert diagnostics.nfe.tolist() == [12] * 11
    assert diagnostics.score_norm.shape == diagnostics.step_size.shape == (4,)
    assert (diagnostics.score_norm > 0).all() and (diagnostics.step_size > 0).all()
    assert diagnostics.frames is not None and diagnostics.frames.shape == (11, 2, 5)
    np.testing.assert_array_equal(diagnostics.frames[:, 1], x)
    np.testing.assert_array_equal(x[:, :2], KNOWN[:, :2])


def test_samples_differ_from_each_other_and_between_keys(draws, whole):
    other, _ = draws[1](PARAMS, jax.random.key(4), 11, rows(0, 11))
    assert len(np.unique(whole[0][:, 2:])) == 33
    assert (other[:, 2:] != whole[0][:, 2:]).all()


def test_long_chains_in_pieces_are_the_same_chain():
    """64 steps run as two pieces of 32; the state passes between them, and steps keep their numbers."""
    levels = np.geomspace(4, 0.1, 65)
    sampler = predictor_corrector(lambda x, sigma: -x, reverse_diffusion(ladder(levels)), corrector_steps=0)
    x, diagnostics = compile_sampler(lambda params, rows: sampler, (2,), make_mesh(1), width=2)((), KEY, 2)

    @jax.jit
    def run(keys):
        state = sampler.init(keys, (2,))
        return jax.lax.scan(lambda state, i: sampler.step(keys, i, state), state, jnp.arange(64))

    state, info = run(jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(2)))
    np.testing.assert_allclose(x, state.x, rtol=1e-6)
    np.testing.assert_allclose(diagnostics.score_norm, info.score_norm.mean(axis=1), rtol=1e-6)
    assert diagnostics.frames is None


def test_uniform_starts_and_widths():
    x = jax.jit(lambda keys: uniform(-8, 8)(keys, (2,)))(jax.random.split(KEY, 500))
    assert x.min() >= -8 and x.max() < 8 and abs(float(x.mean())) < 0.5
    assert default_width((2,), make_mesh(1)) == 1024
    assert default_width((32, 32, 3), make_mesh(1)) == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda draw: draw(PARAMS, KEY, 0, rows(0, 0)), "0 samples"),
        (lambda draw: draw(PARAMS, KEY, 2, rows(0, 3)), "3 conditions for 2 samples"),
        (lambda draw: draw(PARAMS, KEY, 2, rows(0, 2), first=-1), "number >= 0"),
        (lambda draw: compile_sampler(build, SHAPE, make_mesh(1), frames=9)(PARAMS, KEY, 1, rows(0, 1)), "4 at most"),
        (lambda draw: compile_sampler(build, SHAPE, make_mesh(1), width=-1), "width"),
    ],
)
def test_bad_arguments_are_named(draws, call, message):
    with pytest.raises(UserError, match=message):
        call(draws[1])
