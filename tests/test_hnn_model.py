"""hnn/model.py: the networks against NumPy, sizes, initial weights, and what each kind of field conserves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hnn_cases import KEY, RNG, numpy_lstm, numpy_mlp, small_lstm

from hnn import model
from hnn.solvers import rollout
from hnn.systems import total_energy


def tree_size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_baseline_is_the_papers_mlp():
    net = model.baseline(2, 16)
    params = net.init(KEY)
    y = RNG.normal(size=(7, 4)).astype(np.float32)
    np.testing.assert_allclose(net.field(params, y), numpy_mlp(params, y), atol=1e-6)


def test_hnn_field_is_the_symplectic_gradient_of_its_h_by_finite_differences():
    net = model.hnn(2, 16)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), net.init(KEY))
        y = RNG.normal(size=4)
        field = np.asarray(net.field(params, jnp.asarray(y)))
        np.testing.assert_allclose(net.hamiltonian(params, y[:2], y[2:]), numpy_mlp(params, y)[0], rtol=1e-12)
    h = lambda y: numpy_mlp(params, y)[0]  # noqa: E731
    gradient = np.array([(h(y + 1e-6 * e) - h(y - 1e-6 * e)) / 2e-6 for e in np.eye(4)])
    np.testing.assert_allclose(field, [gradient[2], gradient[3], -gradient[0], -gradient[1]], atol=1e-8)


# The paper's models: 200 hidden units, so 200 d + 200, 200 * 200 + 200, and outputs without bias.
@pytest.mark.parametrize(
    ("build", "dimension", "count"),
    [
        (model.baseline, 1, 600 + 40_200 + 400),
        (model.hnn, 1, 600 + 40_200 + 200),
        (model.hnn, 4, 1_800 + 40_200 + 200),
        (model.separable, 1, 2 * (400 + 40_200 + 200)),
        (model.dissipative, 1, 2 * (600 + 40_200 + 200)),
    ],
)
def test_sizes(build, dimension, count):
    assert tree_size(jax.eval_shape(build(dimension).init, KEY)) == count


def test_initial_weights_are_orthogonal_and_biases_as_in_pytorch():
    layers = model.baseline(2).init(KEY)["params"]
    for layer in layers.values():
        kernel = np.asarray(layer["kernel"], np.float64)
        small = kernel @ kernel.T if kernel.shape[0] < kernel.shape[1] else kernel.T @ kernel
        np.testing.assert_allclose(small, np.eye(len(small)), atol=1e-5)
    for name, fan_in in (("Dense_0", 4), ("Dense_1", 200)):
        bias = np.asarray(layers[name]["bias"])
        bound = fan_in**-0.5
        assert np.abs(bias).max() <= bound
        assert abs(bias.std() - bound / 3**0.5) < 0.15 * bound
        assert abs(bias.mean()) < 0.15 * bound
    assert "bias" not in layers["Dense_2"]


@pytest.mark.parametrize("build", [model.hnn, model.separable])
def test_hamiltonian_fields_are_divergence_free(build):
    net = build(2, 16)
    params = net.init(KEY)
    for y in RNG.normal(size=(5, 4)).astype(np.float32):
        jacobian = np.asarray(jax.jacobian(partial(net.field, params))(y))
        assert abs(np.trace(jacobian)) < 1e-5
        omega = np.block([[np.zeros((2, 2)), np.eye(2)], [-np.eye(2), np.zeros((2, 2))]])
        np.testing.assert_allclose(omega @ jacobian, (omega @ jacobian).T, atol=1e-5)  # Hamiltonian matrix
    baseline = model.baseline(2, 16)
    assert abs(np.trace(jax.jacobian(partial(baseline.field, baseline.init(KEY)))(jnp.ones(4)))) > 1e-3


def test_an_untrained_hnn_conserves_its_own_h():
    net = model.hnn(1, 16)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), net.init(KEY))
        y0 = jnp.array([0.4, -0.7])
        ys = jax.jit(lambda y: rollout(partial(net.field, params), y, np.linspace(0, 20, 50)))(y0)
        energy = np.asarray(total_energy(partial(net.hamiltonian, params), ys))
        assert np.ptp(ys, axis=0).max() > 0.1  # it does move
        assert np.ptp(energy) < 1e-7


def test_separable_has_no_cross_derivatives():
    net = model.separable(2, 16)
    params = net.init(KEY)
    q, p = jnp.array([0.3, -0.4]), jnp.array([1.0, 0.2])
    cross = jax.jacobian(jax.grad(partial(net.hamiltonian, params), argnums=0), argnums=1)(q, p)
    np.testing.assert_array_equal(cross, np.zeros((2, 2)))
    own = jax.jacobian(jax.grad(partial(net.hamiltonian, params), argnums=0), argnums=0)(q, p)
    assert np.abs(own).max() > 1e-3


def test_dissipative_is_a_conservative_plus_a_gradient_field():
    net = model.dissipative(1, 16)
    params = net.init(KEY)
    y = jnp.array([0.3, -0.4])
    dh_dq, dh_dp = jax.grad(partial(net.hamiltonian, params), argnums=(0, 1))(y[:1], y[1:])
    rest = net.field(params, y) - jnp.concatenate([dh_dp, -dh_dq])
    np.testing.assert_allclose(rest, jax.grad(net.potential, argnums=1)(params, y), atol=1e-6)


def test_lstm_follows_its_own_predictions():
    net, params = small_lstm()
    assert params["params"]["OptimizedLSTMCell_0"]["ii"]["kernel"].shape == (2, 8)
    ys = model.lstm_follow(net, params, jnp.array([0.5, 0.1]), 6)
    carry, expected = (np.zeros(8), np.zeros(8)), [np.array([0.5, 0.1])]
    for _ in range(5):
        carry, y = numpy_lstm(params, carry, expected[-1])
        expected.append(y)
    assert ys.shape == (6, 2)
    np.testing.assert_allclose(ys, expected, atol=1e-5)
