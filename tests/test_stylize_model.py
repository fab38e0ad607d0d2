"""stylize/model.py: shapes, borders, styles, and rows spread over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lib.shard import make_mesh
from stylize.config import Network
from stylize.model import Norm, Rows, TransferNet, Transposed, Upsampled, mixture
from tests.stylize_cases import smooth

X = jnp.asarray(smooth(0, 32, 48))[None]
MIX = jnp.array([[0.7, 0.3]])


def trained_looking(params, seed=0):
    """Parameters with biases and scales away from their first values."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module", params=["nearest", "transposed"])
def net(request):
    model = TransferNet(Network(width=4, blocks=2, upsampling=request.param), 2)
    return model, trained_looking(jax.jit(model.init)(jax.random.key(0), X, MIX))


def test_the_number_of_parameters_is_that_of_the_paper():
    """fast-neural-style: 1,679,235 with the biases of its convolutions and one set of scales and shifts."""
    model = TransferNet(Network(), 1)
    params = jax.eval_shape(model.init, jax.random.key(0), X, jnp.ones((1, 1)))
    convolutions = 9 * 9 * 3 * 32 + 9 * (32 * 64 + 64 * 128 + 10 * 128 * 128 + 128 * 64 + 64 * 32) + 9 * 9 * 32 * 3
    biases = 32 + 64 + 128 + 10 * 128 + 64 + 32 + 3
    assert sum(p.size for p in jax.tree.leaves(params)) == convolutions + biases + 2 * (biases - 3)


def test_what_comes_out_has_the_size_of_what_went_in(net):
    model, variables = net
    y = jax.jit(model.apply)(variables, X, MIX)
    assert y.shape == X.shape
    bounded = TransferNet(dataclasses.replace(model.config, output="tanh"), 2)
    np.testing.assert_allclose(
        jax.jit(bounded.apply)(variables, X, MIX), 150 / 127.5 * jnp.tanh(y), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_over_devices_give_the_same_image(net, devices):
    model, variables = net
    spread = model.clone(rows=Rows("data", devices))
    rows = P(None, "data")
    mapped = jax.shard_map(spread.apply, mesh=make_mesh(devices), in_specs=(P(), rows, P()), out_specs=rows)
    np.testing.assert_allclose(jax.jit(mapped)(variables, X, MIX), model.apply(variables, X, MIX), atol=2e-5)


@pytest.mark.slow
def test_an_even_image_stays_even_up_to_its_borders():
    """Zeros beyond the border would show as a frame, a transposed convolution as a checkerboard."""
    model = TransferNet(Network(width=4, blocks=2), 2)
    variables = trained_looking(model.init(jax.random.key(0), X, MIX))
    y = model.apply(variables, jnp.full_like(X, 0.3), MIX)
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1, :1], y.shape), atol=1e-3)


def test_upsampling_is_nearest_neighbour_and_a_mirrored_convolution():
    x = jnp.asarray(smooth(1, 6, 7, 5))[None]
    layer = Upsampled(4)
    variables = trained_looking(layer.init(jax.random.key(0), x))
    large = jnp.pad(x.repeat(2, 1).repeat(2, 2), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    expected = jax.lax.conv_general_dilated(large, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(layer.apply(variables, x), expected + bias, atol=1e-5)


def test_transposed_convolution_inside_is_the_plain_one():
    x = jnp.asarray(smooth(1, 6, 8, 5))[None]
    layer = Transposed(4)
    variables = layer.init(jax.random.key(0), x)
    kernel = variables["params"]["conv"]["kernel"]
    plain = jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(layer.apply(variables, x)[:, 2:-2, 2:-2], plain[:, 2:-2, 2:-2], atol=1e-5)


def test_instance_norm_by_its_moments_and_the_mixture_of_styles():
    x = jnp.asarray(smooth(2, 8, 8, 4)).reshape(1, 8, 8, 4) * 3 + 1
    scale, bias = jnp.array([[2.0] * 4, [4.0] * 4]), jnp.array([[1.0] * 4, [-1.0] * 4])
    y = Norm(2).apply({"params": {"scale": scale, "bias": bias}}, x, jnp.array([[0.25, 0.75]]))
    np.testing.assert_allclose(jnp.mean(y, (1, 2)), -0.5, atol=1e-4)
    np.testing.assert_allclose(jnp.std(y, (1, 2)), 3.5, rtol=1e-3)


@pytest.mark.slow
def test_a_memory_of_nothing_is_no_memory():
    model = TransferNet(Network(width=4, blocks=1, memory=True), 2)
    variables = model.init(jax.random.key(0), X, MIX)
    nothing = jnp.zeros((*X.shape[:3], 4))
    np.testing.assert_array_equal(model.apply(variables, X, MIX), model.apply(variables, X, MIX, nothing))
    something = nothing.at[:, :, :20, 3].set(1)  # an even channel is lost in the instance norm
    assert np.abs(model.apply(variables, X, MIX, something) - model.apply(variables, X, MIX)).max() > 1e-3


def test_mixtures():
    np.testing.assert_allclose(mixture([3, 1]), [0.75, 0.25, 0])
    np.testing.assert_allclose(mixture([1, 1], 0.5), [0.25, 0.25, 0.5])
