"""hnn/loss.py and hnn/shooting.py against closed forms."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hnn_cases import KEY, RNG, TRUE, numpy_lstm, numpy_mlp, small_lstm, spring_part

from hnn import model
from hnn.config import Pixels, Rollout
from hnn.data import Trajectories
from hnn.loss import derivative_matching, latent_dynamics, next_observation, rk4_step
from hnn.model import FieldModel
from hnn.shooting import multiple_shooting, segments, third_derivative
from lib.process import UserError


@pytest.mark.parametrize("robust_scale", [None, 2.0])
def test_derivative_matching(robust_scale):
    net = model.baseline(1, 8)
    params = net.init(KEY)
    y, dy = RNG.normal(size=(2, 9, 2)).astype(np.float32)
    value, _ = derivative_matching(net.field, robust_scale)(params, {"y": y, "dy": dy}, KEY)
    error = ((numpy_mlp(params, y) - dy) ** 2).mean(-1)
    if robust_scale:
        error /= 1 + (dy**2).sum(-1) / robust_scale
    np.testing.assert_allclose(value, error.mean(), rtol=1e-5)


def test_next_observation():
    net, params = small_lstm()
    ys = RNG.normal(size=(3, 5, 2)).astype(np.float32)
    value, _ = next_observation(net)(params, {"y": ys}, KEY)
    errors = []
    for trajectory in ys:
        carry = (np.zeros(8), np.zeros(8))
        for now, following in itertools.pairwise(trajectory):
            carry, predicted = numpy_lstm(params, carry, now)
            errors.append((predicted - following) ** 2)
    np.testing.assert_allclose(value, np.mean(errors), rtol=1e-5)


def test_rk4_step_is_the_series_up_to_fourth_order():
    y = rk4_step(lambda y: y, jnp.ones(1), 0.3)
    np.testing.assert_allclose(y, 1 + 0.3 + 0.3**2 / 2 + 0.3**3 / 6 + 0.3**4 / 24, rtol=1e-6)


def test_segments_cut_a_trajectory_and_mask_what_is_missing():
    part = spring_part(points=10, trajectories=2)
    step = part.t[1]
    kept = np.array([0, 1, 2, 4, 5, 6, 7, 8, 9])  # one sample is missing
    cut, starts = segments(Trajectories(part.t[kept], *(a[:, kept] for a in part[1:])), step, 4)
    assert {name: a.shape for name, a in cut.items()} == {
        "y": (2, 3, 4, 2), "dy": (2, 3, 4, 2), "mask": (2, 3, 4, 1),
    }  # fmt: skip
    np.testing.assert_array_equal(cut["mask"].reshape(2, -1)[0], [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(cut["y"].reshape(2, 12, 2)[:, kept], part.y[:, kept], rtol=1e-6)
    np.testing.assert_allclose(starts, part.y[:, [0, 4, 8]], rtol=1e-6)

    long_gap = np.array([0, 1, 2, 9])
    cut, _ = segments(Trajectories(part.t[long_gap], *(a[:, long_gap] for a in part[1:])), step, 4)
    assert cut["mask"].sum() == 2 * 3  # rows behind the gap are left out
    with pytest.raises(UserError, match="regular grid"):
        segments(part._replace(t=part.t**2), step, 4)


@pytest.mark.parametrize("samples_per_step", [1, 3])
def test_multiple_shooting_is_zero_on_the_truth_and_counts_misfit_and_gaps(samples_per_step):
    part = spring_part()
    options = Rollout(steps=10, segment_points=15, samples_per_step=samples_per_step)
    loss = multiple_shooting(TRUE, options, part.t[1])
    batch, starts = segments(part, part.t[1], 15)
    batch = {**batch, "step": 5}
    value, parts = loss({"net": {}, "starts": starts}, batch, KEY)
    exact = 1e-3 if samples_per_step == 3 else 1e-8  # steps of 0.31 at frequency 2, and their interpolation
    assert parts["misfit"] < exact and parts["gap"] < exact

    # The flow is a rotation: a start moved by d stays |d| away, and opens one gap of |d| before it, one behind it.
    moved = starts.copy()
    moved[1, 1] += [0.3, 0.4]
    value, parts = loss({"net": {}, "starts": moved}, batch, KEY)
    np.testing.assert_allclose(parts["misfit"], 15 * 0.25 / (3 * 30 * 2), rtol=0.1)
    np.testing.assert_allclose(parts["gap"], 0.25 / (3 * 30 * 2), rtol=0.1)
    weight = (options.continuity_start * options.continuity_end) ** 0.5  # half way, geometrically
    np.testing.assert_allclose(value, parts["misfit"] + weight * parts["gap"], rtol=1e-5)


def test_third_derivative_along_a_direction():
    v = np.array([1.0, 2.0, -1.0], np.float32)
    x = np.array([0.2, -0.3, 0.5], np.float32)
    np.testing.assert_allclose(third_derivative(lambda y: jnp.sum(y**3), x, v), 6 * (v**3).sum(), rtol=1e-5)
    assert third_derivative(lambda y: jnp.sum(y**2) + y[0], x, v) == 0


@pytest.mark.slow
def test_roughness_is_the_mean_square_of_third_derivatives():
    part = spring_part()
    options = Rollout(steps=10, segment_points=15, roughness_weight=2.0, dissipation_roughness_weight=3.0)
    batch, starts = segments(part, part.t[1], 15)

    def rough(scale):
        """H and a potential with constant third derivatives: d^3/ds^3 of scale * x^3 along v is 6 scale v^3."""
        h = lambda params, q, p: jnp.sum(q**2 + p**2) + scale * jnp.sum(q**3)  # noqa: E731
        return FieldModel(TRUE.init, TRUE.field, h, lambda params, y: 0.5 * scale * y[0] ** 3)

    values = {}
    for scale in (0.0, 1.0, 2.0):
        loss = multiple_shooting(rough(scale), options, part.t[1])
        values[scale] = loss({"net": {}, "starts": starts}, {**batch, "step": 5}, KEY)
    assert values[0.0][1]["roughness"] == values[0.0][1]["dissipation_roughness"] == 0
    parts = values[1.0][1]
    # E (6 v^3)^2 = 36 * 15 for a normal v, over 18 directions here
    assert 0.02 < parts["roughness"] / 540 < 5
    np.testing.assert_allclose(parts["dissipation_roughness"], parts["roughness"] / 4, rtol=1e-5)
    np.testing.assert_allclose(values[2.0][1]["roughness"], 4 * parts["roughness"], rtol=1e-5)
    added = values[1.0][0] - values[0.0][0]
    np.testing.assert_allclose(added, 2 * parts["roughness"] + 3 * parts["dissipation_roughness"], rtol=1e-5)


def test_latent_dynamics_counts_the_reconstruction_of_uint8_frames():
    options = Pixels()
    net = model.PixelModel(4, hidden=8)
    params = net.init(KEY, jnp.zeros(8))
    frames = RNG.integers(0, 256, size=(3, options.window + 1, 2, 2), dtype=np.uint8)
    value, parts = latent_dynamics(net, options)(params, {"frames": frames}, KEY)
    flat = frames.reshape(3, -1, 4) / np.float32(255)
    pairs = np.concatenate([flat[:, :-1], flat[:, 1:]], axis=-1)
    z = net.apply(params, pairs, method="encode")
    decoded = net.apply(params, z, method="decode")
    np.testing.assert_allclose(parts["reconstruction"], np.mean((decoded - pairs) ** 2), rtol=1e-5)
    weighted = options.canonical_weight * parts["canonical"] + options.dynamics_weight * parts["dynamics"]
    np.testing.assert_allclose(value, parts["reconstruction"] + weighted, rtol=1e-5)
    leaving = (z[:, :-1, 1] - (z[:, 1:, 0] - z[:, :-1, 0])) ** 2
    np.testing.assert_allclose(parts["canonical"], np.mean(leaving) / np.var(z[..., 1]), rtol=1e-4)
