"""ncsn/model.py and ncsn/refinenet.py: sizes, PyTorch's numbers, norms and pools, EDM's identities, errors."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ncsn_networks import LEVEL, SHAPE, SIGMA, SIGMAS, generator, images, random_params, refinenets

from lib.initial import constant, initialised
from lib.process import UserError
from ncsn import model, refinenet
from ncsn.blocks import MLP
from ncsn.model import edm, ncsn_v1, ncsn_v2
from ncsn.unet import UNet

REFERENCE = np.load(Path(__file__).parent / "reference" / "ncsn.npz")
KEY = jax.random.key(3)
LADDER = np.geomspace(1, 0.01, 10)


# The first three are those of the published PyTorch code. EDM's own DDPM++ has 55,733,891: 1,152 of them see labels of
# augmentation, which are not here.
@pytest.mark.parametrize(
    ("each", "count"),
    [
        (ncsn_v1((32, 32, 3), LADDER), 30_117_635),
        (ncsn_v1((28, 28, 1), LADDER, ngf=64), 7_638_657),
        pytest.param(ncsn_v2((32, 32, 3)), 29_694_083, marks=pytest.mark.slow),
        (edm(UNet(128, (2, 2, 2), 4, (16,), conditioning="additive", dropout=0.13), (32, 32, 3)), 55_732_739),
    ],
)
def test_sizes(each, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(each.init, KEY))) == count


@functools.cache
def compiled(kind):
    """(parameters, compiled score), at random weights."""
    found = refinenets()[kind]
    return random_params(found), jax.jit(found.score)


@pytest.mark.parametrize("kind", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_refinenets_equal_pytorch(kind):
    params, score = compiled(kind)
    found = score(params, images(), SIGMA)
    assert found.dtype == jnp.float32
    assert np.abs(found - REFERENCE[kind]).max() < 1e-5 * np.abs(REFERENCE[kind]).max()


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_examples_of_a_batch_do_not_touch_each_other(kind):
    params, score = compiled(kind)
    x = images()
    x[1] = np.nan
    np.testing.assert_array_equal(score(params, x, SIGMA)[::2], score(params, images(), SIGMA)[::2])


class LevelPlusOne(nn.Module):
    """In place of a RefineNet: says which level it was given."""

    levels: int | None
    dtype: Any
    ngf: int

    def __call__(self, x, level=None):
        return jnp.ones_like(x) if level is None else jnp.ones_like(x) * (1 + level[:, None, None, None])


def test_v1_takes_the_nearest_level_of_the_ladder(monkeypatch):
    monkeypatch.setattr(model, "RefineNet", LevelPlusOne)
    v1, boundary = ncsn_v1(SHAPE, SIGMAS), np.sqrt(0.1 * 0.3)
    for sigma, level in zip(
        (*SIGMAS, 9.0, 1e-5, 0.999 * boundary, 1.001 * boundary), (0, 1, 2, 3, 0, 3, 2, 1), strict=True
    ):
        assert v1.score({}, images(), sigma)[0, 0, 0, 0] == 1 + level
    denoised = v1.denoise({}, images(), SIGMA)
    np.testing.assert_allclose(denoised, images() + (SIGMA**2 * (1 + LEVEL))[:, None, None, None], rtol=1e-6)


def test_v2_is_divided_by_sigma(monkeypatch):
    monkeypatch.setattr(model, "RefineNet", LevelPlusOne)
    v2, sigma = ncsn_v2(SHAPE), SIGMA[:, None, None, None]
    assert (v2.network({}, images(), SIGMA) == 1).all()
    np.testing.assert_allclose(v2.score({}, images(), SIGMA) * sigma, 1, rtol=1e-6)
    np.testing.assert_allclose(v2.denoise({}, images(), SIGMA), images() + sigma, rtol=1e-6)


def test_instance_norm_plus_has_known_moments():
    rng, channels = np.random.default_rng(0), 6
    x = rng.normal(rng.normal(0, 3, (2, 1, 1, channels)), rng.uniform(0.1, 2, channels), (2, 16, 16, channels))
    x[1, ..., 0] = 7  # a constant channel has no deviation to divide by
    gamma, alpha, beta = parts = np.float32(rng.normal(1, 0.5, (3, channels)))
    params = {"params": dict(zip(("gamma", "alpha", "beta"), parts, strict=True))}
    found = np.asarray(refinenet.InstanceNormPlus(None).apply(params, jnp.float32(x), None))
    mean, variance = x.mean((1, 2)), x.var((1, 2))
    relative = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, ddof=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found.mean((1, 2)), gamma * alpha * relative + beta, atol=1e-5)
    np.testing.assert_allclose(found.std((1, 2)), np.abs(gamma) * np.sqrt(variance / (variance + 1e-5)), atol=1e-5)


def test_resize_keeps_corners_and_straight_lines():
    y, x = np.mgrid[0:5, 0:4].astype(np.float32)
    found = refinenet.resize_corners(jnp.asarray(2 * y - x)[None, :, :, None], (9, 10))[0, :, :, 0]
    y, x = np.mgrid[0:9, 0:10] * np.array([4 / 8, 3 / 9])[:, None, None]
    np.testing.assert_allclose(found, 2 * y - x, atol=1e-5)


@pytest.mark.parametrize("outside", [0, -np.inf])
def test_pools(outside):
    x = generator("pool").normal(size=(2, 6, 7, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=outside)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (1, 2))
    if outside == 0:  # which count: 25 pixels everywhere
        np.testing.assert_allclose(refinenet.average_pool5(jnp.asarray(x)), windows.mean((-1, -2)), atol=1e-6)
    else:
        np.testing.assert_array_equal(refinenet.max_pool5(jnp.asarray(x)), windows.max((-1, -2)))


def test_initial_weights_are_pytorchs():
    block = refinenet.ResidualBlock(10, jnp.float32, features=32, dilation=2, down=True)
    params = initialised(block, jnp.zeros((1, 4, 4, 16)), jnp.zeros(1, jnp.int32))(KEY)["params"]
    kernel, bias = np.asarray(params["conv2"]["kernel"]), np.asarray(params["conv2"]["bias"])
    bound = (9 * 16) ** -0.5
    for part in (kernel, bias):
        assert 0.8 * bound < np.abs(part).max() <= bound * (1 + 1e-6)
    assert abs(kernel.std() / bound * 3**0.5 - 1) < 0.02
    for name in ("gamma", "alpha"):
        assert abs(params["norm1"][name].mean() - 1) < 0.01 and abs(params["norm1"][name].std() - 0.02) < 0.005
    assert not params["norm1"]["beta"].any()


def test_initial_weights_depend_on_the_key_alone():
    init = edm(MLP(32, 2, classes=3), (2,)).init
    params, other = init(KEY), init(jax.random.key(4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, jax.jit(init)(KEY))
    drawn, others = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (params, other))
    drawn = drawn[drawn != 0]
    assert len(drawn) > 2000 and len(np.unique(drawn)) > 0.99 * len(drawn)  # no number is used twice
    assert np.isin(drawn, others).mean() < 0.01


def test_initialisers_from_elsewhere_are_refused():
    with pytest.raises(TypeError, match="kernel.*outside"):
        initialised(nn.Dense(3), jnp.zeros((1, 2)))(KEY)


class Echo(nn.Module):
    """F(u) = gain u."""

    classes: int = 0

    @nn.compact
    def __call__(self, u, c_noise, label=None, keys=None):
        return u * self.param("gain", constant(0), ())


def gain(value):
    return {"params": {"gain": jnp.float32(value)}}


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 50.0])
def test_edm_preconditioning(sigma):
    echo, deviation = edm(Echo(), (4,), 0.7), np.hypot(sigma, 0.7)
    x = np.float32(deviation * generator("x").normal(size=(50_000, 4)))
    inputs = np.float64(echo.network(gain(1), x, sigma))
    assert abs(np.std(inputs) - 1) < 0.01  # EDM, eq. 115
    c_skip = np.float64(echo.denoise(gain(0), x, sigma))[0, 0] / x[0, 0]
    c_out = (np.float64(echo.denoise(gain(1), x, sigma))[0, 0] - c_skip * x[0, 0]) / inputs[0, 0]
    if sigma > 0.1:  # else these differences have no digits
        target_variance = ((1 - c_skip) ** 2 * 0.7**2 + c_skip**2 * sigma**2) / c_out**2
        assert abs(target_variance - 1) < 1e-3  # eq. 119
    # Without F the score is that of N(0, sigma_data^2); with it, it is right where (D - x) / sigma^2 would be noise.
    np.testing.assert_allclose(echo.score(gain(0), x, sigma), -x / deviation**2, rtol=1e-5)
    exact = 0.7 / (sigma * deviation) * inputs - np.float64(x) / deviation**2
    np.testing.assert_allclose(echo.score(gain(1), x, sigma), exact, atol=1e-6 * np.abs(exact).max())
    both = x + sigma**2 * exact
    np.testing.assert_allclose(echo.denoise(gain(1), x, sigma), both, atol=1e-6 * np.abs(both).max())


def test_the_denoiser_leaves_what_has_no_noise():
    echo, x = edm(Echo(), (4,)), np.float32(generator("x").normal(size=(5, 4)))
    errors = [np.abs(echo.denoise(gain(3), x, sigma) - x).max() for sigma in (1e-1, 1e-3, 1e-5)]
    assert errors[0] > 0.1
    np.testing.assert_allclose(errors[1:], [1e-2 * errors[0], 1e-4 * errors[0]], rtol=0.5)


def test_convolutions_in_bfloat16():
    """All but the last; what comes out is float32, and so are the parameters."""
    v2 = ncsn_v2((8, 8, 5), ngf=8, dtype=jnp.bfloat16)
    params = jax.eval_shape(v2.init, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(v2.score)(params, jnp.zeros((2, 8, 8, 5)), jnp.ones(2))
    assert jaxpr.out_avals[0].dtype == jnp.float32
    convolutions = [eqn for eqn in jaxpr.eqns if "conv_general_dilated" in str(eqn.params.get("call_jaxpr"))]
    kinds = [str(eqn.outvars[0].aval.dtype) for eqn in convolutions]
    assert set(kinds[:-1]) == {"bfloat16"} and kinds[-1] == "float32" and len(kinds) == 75


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ncsn_v1((7, 8, 1), LADDER), "even height and width, not \\(7, 8, 1\\)"),
        (lambda: ncsn_v2((2,)), "even height and width, not \\(2,\\)"),
        (lambda: ncsn_v1((8, 8, 1), [1.0, 0.0]), "positive numbers"),
        (lambda: ncsn_v1((8, 8, 1), []), "positive numbers"),
        (lambda: edm(Echo(), (4,), 0.0), "sigma_data must be positive, not 0"),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("each", [ncsn_v1(SHAPE, SIGMAS, 4), ncsn_v2(SHAPE, 4), edm(Echo(), SHAPE)])
def test_labels_are_refused_where_there_are_no_classes(each):
    with pytest.raises(ValueError, match="without classes"):
        each.score({}, images(), SIGMA, 0)
