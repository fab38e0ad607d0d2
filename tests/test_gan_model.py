"""The networks: guidelines of DCGAN, shapes of every preset, how a class enters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan import blocks, dcgan, model, resnet
from gan.config import PRESETS, Network
from gan.data import Facts
from lib.process import UserError

SHAPES = {"gaussians": (2,), "digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def facts_of(config):
    shape = SHAPES[config.data.source]
    return Facts(shape, 1000, 0 if len(shape) == 1 else 10)


def built(config):
    return model.build(config.network, facts_of(config), encoder=config.optim.loss == "elbo")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_its_data(name):
    config = PRESETS[name]
    gan = built(config)

    def run():
        variables = gan.init(jax.random.key(0))
        y = jnp.zeros((3, gan.classes)) if gan.classes else None
        x, statistics = gan.generate(variables["generator"], jnp.zeros((3, gan.latent)), y, train=True)
        if config.optim.loss == "elbo":
            return variables, x, gan.encode(variables["critic"], x, train=True)[0], statistics
        return variables, x, gan.score(variables["critic"], x, y)[0], statistics

    variables, x, seen, statistics = jax.eval_shape(run)
    assert x.shape == (3, *gan.shape)
    assert jax.tree.structure(statistics) == jax.tree.structure(variables["generator"]["statistics"])
    if config.optim.loss == "elbo":
        assert [part.shape for part in seen] == [(3, gan.latent)] * 2
    else:
        assert seen.shape == (3,)
        assert bool(variables["critic"]["statistics"]) == (config.network.critic_norm == "batch")
    assert gan.classes == (10 if config.network.conditioning != "none" else 0)


def layers(module, *args):
    """(its modules in the order in which they are called, the primitives that it is made of)."""
    called = []

    def note(call, args, kwargs, context):
        if context.method_name == "__call__" and not (called and called[-1] is context.module):  # not as its base class
            called.append(context.module)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jaxpr = jax.make_jaxpr(lambda: module.init(jax.random.key(0), *args))()
    return called, str(jaxpr)


def of_kind(called, *kinds):
    return [layer for layer in called if isinstance(layer, kinds)]


def test_guidelines_of_dcgan():
    """Radford et al. 2016, section 3: strided convolutions and no pooling, batch norm in both but at the generator's
    output and the critic's input, ReLU and tanh, leaky ReLU of slope 0.2, no hidden dense layers."""
    gan = built(PRESETS["cifar10_dcgan"])
    called, primitives = layers(gan.generator, jnp.zeros((2, gan.latent)), None, True)
    up = of_kind(called, dcgan.ConvTranspose)
    assert len(up) == 4 and {layer.strides for layer in up} == {(2, 2)}
    assert [layer.features for layer in up] == [512, 256, 128, 3]
    order = of_kind(called, dcgan.ConvTranspose, blocks.BatchNorm)
    assert [type(layer).__name__ for layer in order] == [
        "BatchNorm",
        *["ConvTranspose", "BatchNorm"] * 3,
        "ConvTranspose",
    ]
    assert "tanh" in primitives and "reduce_window" not in primitives and len(of_kind(called, nn.Dense)) == 1

    called, primitives = layers(gan.critic, jnp.zeros((2, *gan.shape)), None, True)
    down = of_kind(called, dcgan.Conv)
    assert [layer.features for layer in down] == [64, 128, 256, 512] and {layer.strides for layer in down} == {(2, 2)}
    order = of_kind(called, dcgan.Conv, blocks.BatchNorm)
    assert [type(layer).__name__ for layer in order] == ["Conv", *["Conv", "BatchNorm"] * 3]
    assert "reduce_window" not in primitives and len(of_kind(called, nn.Dense)) == 1
    assert gan.critic.slope == 0.2 and Network().slope == 0.2
    np.testing.assert_allclose(blocks.leaky_relu(0.2)(np.array([-1.0, 2.0])), [-0.2, 2.0])


def test_initial_weights_of_dcgan():
    variables = built(PRESETS["mnist_dcgan"]).init(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path([variables["generator"], variables["critic"]]):
        name = path[-1].key
        if name == "kernel":
            assert (
                abs(np.std(leaf) / 0.02 - 1) < 4 / np.sqrt(2 * leaf.size) and abs(np.mean(leaf)) < 0.1 / leaf.size**0.5
            )
        elif name == "scale":
            assert abs(np.mean(leaf) - 1) < 0.02 and 0.01 < np.std(leaf) < 0.03
        else:
            assert np.all(np.asarray(leaf) == (name == "variance")), name


def test_batch_norm_against_numpy_and_its_running_statistics():
    x = np.float32(np.random.default_rng(0).normal(2, 3, size=(6, 4, 4, 5)))
    norm = blocks.BatchNorm()
    scale, shift = np.arange(5.0) + 1, np.arange(5.0)
    start = {"mean": np.zeros(5), "variance": np.ones(5)}
    variables = {"params": {"scale": scale, "bias": shift}, "statistics": start}
    y, changed = norm.apply(variables, x, True, mutable=["statistics"])
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-5) * scale + shift, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(changed["statistics"]["mean"], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(changed["statistics"]["variance"], 0.9 + 0.1 * variance, rtol=1e-4)
    still = norm.apply(variables, x, False)
    np.testing.assert_allclose(still, x / np.sqrt(1 + 1e-5) * scale + shift, rtol=1e-4, atol=1e-4)


def test_a_mixture_of_classes_mixes_the_rows_of_the_norm():
    x = np.float32(np.random.default_rng(0).normal(size=(2, 3, 3, 4)))
    norm = blocks.BatchNorm(classes=3)
    rows = np.float32(np.random.default_rng(1).normal(size=(2, 3, 4)))
    variables = {"params": {"scale": rows[0], "bias": rows[1]},
                 "statistics": {"mean": np.zeros(4), "variance": np.ones(4)}}  # fmt: skip
    pure = [norm.apply(variables, x, False, np.eye(3)[[i, i]]) for i in range(3)]
    mixed = norm.apply(variables, x, False, np.float32([[0.5, 0.5, 0], [0, 0.2, 0.8]]))
    np.testing.assert_allclose(mixed[0], (pure[0][0] + pure[1][0]) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed[1], 0.2 * pure[1][1] + 0.8 * pure[2][1], rtol=1e-4, atol=1e-5)


def test_the_projection_adds_the_row_of_the_class():
    critic = resnet.Critic(4, 2, "sum", classes=3)
    x = np.float32(np.random.default_rng(0).normal(size=(1, 8, 8, 1))).repeat(4, 0)
    y = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.5, 0.5]])
    init = functools.partial(model.initialised(critic, x, y, True), jax.random.key(0))
    scores = jax.jit(lambda v: critic.apply(v, x, y, True))(init())[:, 0]
    assert np.ptp(scores[:3]) > 1e-3
    np.testing.assert_allclose(scores[3], (scores[1] + scores[2]) / 2, rtol=1e-4)


def test_doubling_and_halving():
    x = np.arange(12.0).reshape(1, 2, 2, 3)
    assert np.array_equal(blocks.doubled(x), x.repeat(2, 1).repeat(2, 2))
    np.testing.assert_allclose(blocks.halved(x), x.mean((1, 2), keepdims=True))
    np.testing.assert_allclose(blocks.halved(blocks.doubled(x)), x)


def test_images_that_cannot_be_halved_so_often_are_refused():
    with pytest.raises(UserError, match=r"network.levels is 4: the images, 28 x 28, need .* that 16 divides"):
        model.build(Network(), Facts((28, 28, 1), 100, 0))
