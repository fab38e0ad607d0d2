"""ncsn/unet.py and ncsn/blocks.py: sizes, classes, dropout, norms, bfloat16, and the energies of ncsn/model.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ncsn_networks import generator, random_params

from lib.initial import initialised
from lib.process import UserError
from ncsn import unet
from ncsn.blocks import MLP, elu, pixel_mean
from ncsn.model import edm, edm_energy
from ncsn.unet import UNet

KEY = jax.random.key(3)
SIGMA = np.float32([0.1, 1.0, 10.0])
X = np.float32(generator("x").normal(size=(3, 8, 8, 2)))
LABEL = np.array([2, 0, 1])
KEYS = jax.random.split(KEY, 3)


@functools.cache
def small():
    """(model, parameters, compiled denoiser) with everything that the U-Net can have."""
    model = edm(UNet(8, (1, 2), 1, (4,), heads=2, classes=3, dropout=0.5), (8, 8, 2))
    return model, random_params(model), jax.jit(model.denoise)


@pytest.mark.parametrize(("size", "conditioning"), [(28, "additive"), (32, "film")])
def test_shapes(size, conditioning):
    net = UNet(8, (1, 2, 3), 1, (size // 2,), classes=3, features="fourier", conditioning=conditioning)
    model = edm(net, (size, size, 1))
    params = jax.eval_shape(model.init, KEY)
    x = jax.ShapeDtypeStruct((4, size, size, 1), jnp.float32)
    label = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert jax.eval_shape(model.score, params, x, jax.ShapeDtypeStruct((4,), x.dtype), label) == x


def test_starts_as_the_score_of_a_gaussian():
    """The last layers are zero at first."""
    model, _, _ = small()
    params = model.init(KEY)
    denoised = small()[2](params, X, SIGMA, LABEL)
    np.testing.assert_allclose(denoised, X * 0.25 / (0.25 + SIGMA[:, None, None, None] ** 2), rtol=1e-5)


def test_examples_of_a_batch_do_not_touch_each_other():
    _, params, denoise = small()
    plain = denoise(params, X, SIGMA, LABEL)
    x = X.copy()
    x[1] = np.nan
    np.testing.assert_array_equal(denoise(params, x, SIGMA, LABEL)[::2], plain[::2])
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(denoise(params, X[order], SIGMA[order], LABEL[order]), plain[order], atol=1e-5)


def test_the_class_and_the_noise_level_matter():
    _, params, denoise = small()
    plain = denoise(params, X, SIGMA, LABEL)
    for changed in (denoise(params, X, SIGMA, LABEL[::-1]), denoise(params, X, 1.1 * SIGMA, LABEL)):
        assert (np.abs(changed - plain).max((1, 2, 3))[[0, 2]] > 1e-3).all()


@pytest.mark.slow
def test_dropout_by_the_keys_of_examples():
    _, params, denoise = small()
    plain, dropped = denoise(params, X, SIGMA, LABEL), denoise(params, X, SIGMA, LABEL, KEYS)
    assert (np.abs(dropped - plain).max((1, 2, 3)) > 1e-3).all()
    changed = denoise(params, X, SIGMA, LABEL, KEYS.at[1].set(jax.random.key(9)))
    np.testing.assert_array_equal(changed[::2], dropped[::2])
    assert np.abs(changed[1] - dropped[1]).max() > 1e-3


def test_means_over_pixels_and_their_derivatives():
    """Also the second one, in which energies are trained."""
    x, v = (np.float32(generator(name).normal(size=(2, 32, 64, 4))) for name in ("mean", "direction"))

    def derivatives(mean):
        value = lambda x: jnp.sum(mean(x**3) ** 2)  # noqa: E731
        along = lambda x: jnp.sum(v * jax.grad(value)(x))  # noqa: E731
        return jax.jit(lambda x: (mean(x), jax.grad(value)(x), jax.grad(along)(x)))(x)

    expected = derivatives(lambda x: jnp.mean(x, (1, 2), keepdims=True))
    for found, wanted in zip(derivatives(pixel_mean), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_group_norm_of_large_images():
    """Where its sums are matrix products on a CPU."""
    x = np.float32(3 + 2 * generator("large").normal(size=(2, 32, 16, 24)))
    norm = unet.GroupNorm()
    found = norm.apply({"params": {"scale": np.full(24, 2.0, np.float32), "bias": np.ones(24, np.float32)}}, x)
    grouped = x.reshape(2, 32 * 16, 6, 4).astype(np.float64)
    mean, variance = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = 1 + 2 * (grouped - mean) / np.sqrt(variance + unet.EPS)
    np.testing.assert_allclose(found, expected.reshape(x.shape), atol=1e-5)


def test_elu_is_flax_s_up_to_rounding():
    x = np.float32([-100, -1, -1e-4, -0.0, 0, 1e-4, 3, np.inf, -np.inf])
    for found, wanted in ((elu(x), jax.nn.elu(x)), (jax.vmap(jax.grad(elu))(x), jax.vmap(jax.grad(jax.nn.elu))(x))):
        np.testing.assert_allclose(found, wanted, atol=1e-7)


def test_gradients_reach_every_parameter_of_a_block():
    block = unet.Block(4, 0, "additive", 0.0, jnp.float32, "up", heads=1)
    condition = np.float32(generator("condition").normal(size=(3, 8)))
    shapes = jax.eval_shape(initialised(block, X, condition, None), KEY)
    params = jax.tree.map(lambda leaf: np.float32(generator("block").normal(size=leaf.shape)), shapes)
    loss = lambda params: jnp.sum(block.apply(params, X, condition, None) ** 2)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(leaf).all() and leaf.any(), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_bfloat16_is_close_and_keeps_float32_outside():
    plain, half = (edm(UNet(8, (1,), 0, (8,), dtype=dtype), (8, 8, 2)) for dtype in (jnp.float32, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(half.init, KEY))} == {jnp.dtype("float32")}
    params = random_params(plain)
    expected, found = (jax.jit(model.denoise)(params, X, SIGMA) for model in (plain, half))
    assert found.dtype == jnp.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.03


def test_group_norm():
    x = generator("norm").normal(1, 3, size=(2, 4, 4, 12)).astype(np.float32)
    scale, bias = np.float32(generator("affine").normal(size=(2, 12)))
    found = unet.GroupNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
    groups = x.reshape(2, 16, 3, 4)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / groups.std((1, 3), keepdims=True)
    np.testing.assert_allclose(found, scale * expected.reshape(x.shape) + bias, atol=1e-5)


def test_resizing_blocks_pixels():
    x = jnp.asarray(X)
    np.testing.assert_allclose(unet.shrink(unet.enlarge(x)), x, rtol=1e-6)
    np.testing.assert_allclose(unet.shrink(x)[1, 2, 3], X[1, 4:6, 6:8].mean((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(unet.enlarge(x)[1, 5, 6], X[1, 2, 3])


@functools.cache
def flat(build):
    """(model, parameters, compiled score) for 2-D data."""
    model = build(MLP(16, 2, classes=3), (2,))
    return model, random_params(model), jax.jit(model.score)


def test_no_class_is_a_row_of_its_own():
    _, params, score = flat(edm)
    x = np.float32(generator("flat").normal(size=(4, 2)))
    none = score(params, x, SIGMA[1])
    by_label = [score(params, x, SIGMA[1], np.full(4, label)) for label in range(4)]
    np.testing.assert_array_equal(by_label[3], none)
    assert all(np.abs(found - none).max() > 1e-3 for found in by_label[:3])
    mixed = score(params, x, SIGMA[1], np.array([0, 3, 1, 3]))
    np.testing.assert_array_equal(mixed[1::2], none[1::2])


def test_score_of_an_energy_is_minus_its_gradient():
    model, params, score = flat(edm_energy)
    x, direction = np.float32(generator("energy").normal(size=(2, 6, 2)))
    sigma, label = np.float32(np.geomspace(0.2, 5, 6)), np.array([0, 1, 2, 3, 0, 1])
    compiled = jax.jit(model.energy)
    energy = lambda x: np.float64(compiled(params, x, sigma, label))  # noqa: E731
    assert energy(x).shape == (6,)
    h = 1e-2 * sigma[:, None]
    slope = (energy(x + h * direction) - energy(x - h * direction)) / (2 * h[:, 0])
    expected = -np.sum(score(params, x, sigma, label) * direction, -1)
    np.testing.assert_allclose(slope, expected, atol=2e-3 * np.abs(expected).max())


def test_only_the_energys_score_has_no_curl():
    def curl(build):
        _, params, score = flat(build)
        jacobian = jax.jit(jax.jacrev(lambda x: score(params, x[None], 0.4)[0]))(jnp.asarray([0.3, -0.8]))
        return abs(jacobian[0, 1] - jacobian[1, 0])

    assert curl(edm_energy) < 1e-4 < 1e-2 < curl(edm)


@pytest.mark.slow
def test_energies_of_images_can_be_trained():
    """The loss is differentiated twice, through convolutions and attention."""
    model = edm_energy(UNet(4, (1,), 1, (8,)), (8, 8, 1))
    params = jax.eval_shape(model.init, KEY)
    gradient = jax.grad(lambda params: jnp.sum(model.denoise(params, X[..., :1], SIGMA) ** 2))
    assert jax.eval_shape(gradient, params) == params


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (UNet(8, (1, 1, 1, 1, 1)), "5 resolutions need a height and width that 16 divides"),
        (UNet(8, (1, 2), attention=(4,), heads=3), "3 heads do not divide"),
    ],
)
def test_mistakes(net, message):
    with pytest.raises(UserError, match=message):
        edm(net, (8, 8, 1)).init(KEY)
