"""Hamiltonian networks: models, losses and metrics against closed forms, and what the commands write."""

import contextlib
import io
import itertools
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnn import evaluate, experiment, model
from hnn.__main__ import main
from hnn.config import PRESETS, Config, Data, Pixels, Rollout
from hnn.data import Dataset, Trajectories, load_npz
from hnn.evaluate import Scenes, Trained
from hnn.loss import derivative_matching, latent_dynamics, next_observation, rk4_step
from hnn.model import FieldModel
from hnn.pixel_evaluation import physical_map
from hnn.pixels import SIZE_PX
from hnn.shooting import multiple_shooting, segments, third_derivative
from hnn.solvers import rollout
from hnn.systems import SYSTEMS, system_field, total_energy
from lib import config as configs
from lib import shard
from lib.run import UserError

KEY = jax.random.key(5)
SPRING = SYSTEMS["spring"]
RNG = np.random.default_rng(0)
PNG = b"\x89PNG\r\n\x1a\n"


def tree_size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ---- networks


def numpy_mlp(params, x):
    layers = params["params"]
    for name in ("Dense_0", "Dense_1"):
        x = np.tanh(x @ np.asarray(layers[name]["kernel"]) + np.asarray(layers[name]["bias"]))
    return x @ np.asarray(layers["Dense_2"]["kernel"])


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


def numpy_lstm(params, carry, y):
    cell, out = params["params"]["OptimizedLSTMCell_0"], params["params"]["Dense_0"]
    c, h = carry
    gate = lambda k: y @ cell[f"i{k}"]["kernel"] + h @ cell[f"h{k}"]["kernel"] + cell[f"h{k}"]["bias"]  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    c = sigmoid(gate("f")) * c + sigmoid(gate("i")) * np.tanh(gate("g"))
    h = sigmoid(gate("o")) * np.tanh(c)
    return (c, h), y + h @ out["kernel"] + out["bias"]


@pytest.fixture(scope="module")
def lstm():
    net = model.SequenceModel(1, 8)
    return net, jax.tree.map(np.asarray, net.init(KEY, net.start(), jnp.zeros(2)))


def test_lstm_follows_its_own_predictions(lstm):
    net, params = lstm
    assert params["params"]["OptimizedLSTMCell_0"]["ii"]["kernel"].shape == (2, 8)
    ys = model.lstm_follow(net, params, jnp.array([0.5, 0.1]), 6)
    carry, expected = (np.zeros(8), np.zeros(8)), [np.array([0.5, 0.1])]
    for _ in range(5):
        carry, y = numpy_lstm(params, carry, expected[-1])
        expected.append(y)
    assert ys.shape == (6, 2)
    np.testing.assert_allclose(ys, expected, atol=1e-5)


# ---- losses


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


def test_next_observation(lstm):
    net, params = lstm
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


def spring_part(points=30, trajectories=3, seeds=0):
    """Exact trajectories of the spring: energies 1, 4, 9, ..."""
    t = np.linspace(0, 3, points)
    radius = 1 + np.arange(trajectories)[:, None]
    angle = radius - 2 * t
    y = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    dy = 2 * np.stack([y[..., 1], -y[..., 0]], axis=-1)
    if seeds:
        y, dy = (np.broadcast_to(a, (seeds, *a.shape)) for a in (y, dy))
    return Trajectories(t, y, y, dy)


TRUE = FieldModel(lambda key: {}, lambda params, y: system_field(SPRING)(y), lambda params, q, p: jnp.sum(q**2 + p**2))


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


# ---- metrics


def test_trajectory_errors_in_closed_form():
    truth = spring_part().y
    assert [e.tolist() for e in evaluate.trajectory_errors(SPRING, truth, truth)] == [[0, 0, 0]] * 2
    energy, coordinates = evaluate.trajectory_errors(SPRING, 1.1 * truth, truth)
    h = np.array([1.0, 4.0, 9.0])  # q^2 + p^2
    np.testing.assert_allclose(energy, (0.21 * h) ** 2, rtol=1e-9)
    np.testing.assert_allclose(coordinates, 0.01 * h / 2, rtol=1e-9)


def test_bodies_are_compared_by_positions():
    system = SYSTEMS["two_body"]
    truth = RNG.normal(size=(2, 5, 8))
    faster = truth + np.repeat([0.0, 1.0], 4)
    _, coordinates = evaluate.trajectory_errors(system, faster, truth)
    np.testing.assert_array_equal(coordinates, [0, 0])


def test_rollout_numbers_average_over_initial_conditions_then_seeds():
    truth = np.concatenate([spring_part().y] * 2 + [spring_part().y])
    scenes = Scenes(truth[:, 0], np.full(9, 3.0), truth, slice(0, 3), slice(3, 6), slice(6, 9))
    factors = np.array([1.0, 1.1])[:, None, None, None]
    ys = factors * truth[None]
    e, h = np.array([0, 0.1]), np.array([1.0, 4.0, 9.0])
    for average, middle in (("mean", 14 / 3), ("median", 4.0)):
        got = evaluate.rollout_numbers("x", SPRING, scenes, ys, average)
        per_seed = e**2 * middle / 2
        np.testing.assert_allclose(got["x.coordinate_mse"], per_seed.mean())
        np.testing.assert_allclose(got["x.coordinate_mse.sd"], per_seed.std(ddof=1))
        assert got["x.coordinate_mse_extrapolation"] == got["x.coordinate_mse"]
    np.testing.assert_allclose(got["x.energy_mse_mean"], np.mean([0, np.mean((0.21 * h) ** 2)]))
    np.testing.assert_allclose(got["x.energy_mse_original_recipe"], np.mean([0, np.mean((0.21 * h) ** 2)]))


@pytest.fixture(scope="module")
def spring_scenes():
    return evaluate.make_scenes(SPRING, 5.0, 3, 11)


def test_the_true_field_makes_no_errors(spring_scenes):
    numbers, ys = evaluate.field_numbers("x", Trained(TRUE, {"none": np.zeros(1)}), SPRING, spring_scenes, "mean", 1e-9)
    assert ys.shape == (1, 21, 11, 2)
    assert set(numbers) == {
        "x.energy_mse", "x.coordinate_mse", "x.energy_mse_extrapolation", "x.coordinate_mse_extrapolation",
        "x.energy_mse_original_recipe", "x.reversal_error",
    }  # fmt: skip
    assert max(numbers.values()) < 1e-10


def test_scenes_are_the_exact_flow_of_the_spring(spring_scenes):
    q, p = spring_scenes.y0.T[:, :, None]
    t = spring_scenes.span[:, None] * np.linspace(0, 1, 11)
    exact = np.stack([q * np.cos(2 * t) + p * np.sin(2 * t), p * np.cos(2 * t) - q * np.sin(2 * t)], axis=-1)
    np.testing.assert_allclose(spring_scenes.truth, exact, atol=1e-8)
    inside = np.asarray(jax.vmap(SPRING.inside)(jnp.asarray(spring_scenes.y0)))
    assert inside[spring_scenes.inside].all() and not inside[spring_scenes.extrapolation].any()


def test_a_field_with_friction_is_not_reversible(spring_scenes):
    rubbing = FieldModel(TRUE.init, lambda params, y: system_field(SPRING)(y) - 0.05 * y)
    numbers, _ = evaluate.field_numbers("x", Trained(rubbing, {"n": np.zeros(1)}), SPRING, spring_scenes, "mean", 1e-9)
    y0 = spring_scenes.y0[spring_scenes.inside]
    expected = (np.exp(-0.05 * 2 * 5.0) - 1) ** 2 * np.mean(y0**2)  # y shrinks by exp(-0.05 t), there and back
    np.testing.assert_allclose(numbers["x.reversal_error"], expected, rtol=1e-6)


def test_losses_of_the_true_field_are_the_noise_floor():
    part = spring_part(seeds=2)
    noise = RNG.normal(size=part.y.shape)
    data = Dataset(part._replace(y=part.y + noise), part)
    numbers = evaluate.true_field_losses(SPRING, data)
    # The field is linear: y' of the noise is 2 (p, -q).
    per_seed = 4 * (noise**2).mean((1, 2, 3))
    np.testing.assert_allclose(numbers["true_field.train_loss"], per_seed.mean(), rtol=1e-4)
    np.testing.assert_allclose(numbers["true_field.train_loss.sd"], per_seed.std(ddof=1), rtol=1e-3)
    assert numbers["true_field.test_loss"] < 1e-10


def test_euler_is_of_first_order_and_the_sweep_finds_where_it_wins():
    sweep = evaluate.euler_sweep(SPRING, 0.1, 3.0, np.array([[1.0, 0.0], [0.3, -0.6]]), {})
    dt, energy, coordinates = sweep.lines["Euler, true field"]
    np.testing.assert_allclose(dt, 0.2 / 2.0 ** np.arange(9))
    slopes = np.diff(np.log([energy, coordinates])) / np.diff(np.log(dt))
    np.testing.assert_allclose(slopes[:, -3:], 2, atol=0.05)  # of squared errors
    # |1 + 2 i dt|^2 per step: what Euler does to the energy exactly.
    steps = np.rint(np.arange(16) * 0.2 / dt[-1])
    growth = (1 + 4 * dt[-1] ** 2) ** steps - 1
    np.testing.assert_allclose(energy[-1], np.mean([np.mean((growth * h) ** 2) for h in (1.0, 0.45)]), rtol=1e-5)

    numbers = evaluate.euler_numbers(sweep, 0.1)
    assert numbers["euler.coordinate_mse"] == coordinates[1]
    assert numbers["euler_dt_0.05.energy_mse"] == energy[2]
    assert len(numbers) == 18
    assert evaluate.step_size_to_match(sweep, 1.0001 * coordinates[4]) == dt[4]
    assert evaluate.step_size_to_match(sweep, 0.5 * coordinates[-1]) is None


def test_latent_coordinates_are_mapped_to_physical_ones():
    z = RNG.normal(size=(4, 20, 2))
    affine = z @ np.array([[2.0, 1.0], [0.5, -1.0]]) + 3
    np.testing.assert_allclose(physical_map(z, affine, 1)(z), affine, atol=1e-5)
    cubic = np.stack([z[..., 0] ** 3 + z[..., 1], z[..., 0] * z[..., 1] ** 2], axis=-1)
    np.testing.assert_allclose(physical_map(z, cubic, 3)(z), cubic, atol=1e-4)


# ---- commands, in this process

TINY = (
    "--seeds 3 --hidden 8 --derivative.steps 120 --checkpoint-every 100 "
    "--evaluation.n-initial 2 --evaluation.n-points 20 --evaluation.t-end 2"
)


@pytest.fixture(scope="module")
def call():
    """Runs a command: what it prints."""

    def call(line):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(line.split())
        return out.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "start", lambda devices=None: None)  # JAX has started long ago
        yield call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def spring_run(call, folder):
    """A small study of two models: its folder and what was printed."""
    out = call(f"train spring {TINY} --models baseline hnn --out {folder}/spring")
    return folder / "spring", out


@pytest.fixture(scope="module")
def small_run(call, folder):
    """The smallest study."""
    call(f"train spring {TINY} --models hnn --evaluation.no-sweep --out {folder}/small --devices 2")
    return folder / "small"


@pytest.fixture(scope="module")
def other_run(call, folder):
    """The other models, without the sweep."""
    models = "--models separable hnn_rollout dissipative lstm"
    short = "--rollout.steps 100 --sequence.steps 100 --rollout.roughness-weight 0"
    call(f"train spring {TINY} {models} {short} --seeds 1 --evaluation.no-sweep --out {folder}/other")
    return folder / "other"


def numbers_of(run):
    return json.loads((run / "evaluation.json").read_text())


def params_of(run):
    """Every array of the last checkpoints."""
    _, values = experiment.RunFolder.open(run, "hnn")
    config = configs.from_json(Config, values)
    data = experiment.load_data(config)
    trained = experiment.load_trained(config, data, experiment.RunFolder(run), config.models)
    return {name: one.params for name, one in trained.items()}


def test_run_folder(spring_run):
    run, out = spring_run
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        "config.json", "environment.json", "metrics.jsonl", "checkpoints", "figures", "evaluation.json", "report.html",
    }  # fmt: skip
    record = json.loads((run / "config.json").read_text())
    config = configs.from_json(Config, record["config"])
    assert record["package"] == "hnn"
    assert (config.seeds, config.hidden, config.derivative.steps) == (3, 8, 120)
    (environment,) = json.loads((run / "environment.json").read_text())
    assert {"utc_start", "argv", "git_commit", "git_dirty", "versions", "devices"} <= set(environment)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [100, 120, 100, 120]
    assert ["baseline.loss" in row for row in rows] == [True, True, False, False]
    assert ["hnn.loss" in row for row in rows] == [False, False, True, True]
    assert all(row["wall_s"] > 0 for row in rows)
    for name in ("baseline", "hnn"):
        steps = {int(p.name) for p in (run / "checkpoints" / name).iterdir() if p.name.isdigit()}
        assert steps == {100, 120}
    figures = {p.name for p in (run / "figures").iterdir()}
    assert figures == {
        "phase_portraits.png", "energy.png", "learned_hamiltonian.png", "vector_fields.png", "training.png",
        "error_against_step.png",
    }  # fmt: skip
    assert all((run / "figures" / name).read_bytes().startswith(PNG) for name in figures)
    assert out.rstrip().endswith(str(run / "report.html"))
    for name in ("true_field", "baseline", "hnn", "euler"):
        assert re.search(rf"^{name} ", out, re.MULTILINE)


METRICS = {
    "energy_mse", "coordinate_mse", "energy_mse_extrapolation", "coordinate_mse_extrapolation",
}  # fmt: skip
LOSSES = {"train_loss", "test_loss"}
FIELD_METRICS = LOSSES | METRICS | {"reversal_error", "energy_mse_original_recipe"}


def test_names_of_the_numbers(spring_run, other_run):
    numbers = numbers_of(spring_run[0])
    assert isinstance(numbers.pop("protocol"), str)
    expected = {f"{name}.{metric}" for name in ("baseline", "hnn") for metric in FIELD_METRICS}
    expected |= {f"true_field.{metric}" for metric in LOSSES}
    expected |= {f"{name}.sd" for name in expected}
    euler = {name for name in numbers if name.startswith("euler")}
    assert set(numbers) - euler == expected
    assert {"euler.energy_mse", "euler.coordinate_mse"} <= euler
    extras = euler - {"euler.energy_mse", "euler.coordinate_mse"}
    assert all(re.fullmatch(r"euler_dt_[\d.e-]+\.(energy|coordinate)_mse|euler\.step_size_\w+", n) for n in extras)
    finite = {name: value for name, value in numbers.items() if not name.startswith("euler_dt")}
    assert all(isinstance(value, float) and np.isfinite(value) and value >= 0 for value in finite.values()), finite

    numbers = numbers_of(other_run)
    del numbers["protocol"]
    expected = {f"{n}.{m}" for n in ("separable", "hnn_rollout", "dissipative") for m in FIELD_METRICS}
    assert set(numbers) == expected | {f"lstm.{m}" for m in METRICS} | {f"true_field.{m}" for m in LOSSES}
    assert all(np.isfinite(value) for value in numbers.values())


def test_true_field_has_the_noise_floor_of_the_spring(spring_run):
    # y' is linear with factor 2, the noise 0.1: 4 * 0.01.
    assert abs(numbers_of(spring_run[0])["true_field.test_loss"] - 0.04) < 0.004


def test_report_is_self_contained(spring_run):
    run, _ = spring_run
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(list((run / "figures").iterdir()))
    assert not re.search(r"""\b(src|href)\s*=(?!"data:image/png;base64,)""", page)
    for forbidden in ("<script", "<link", "@import", "url("):
        assert forbidden not in page
    for present in ("Euler", "baseline", "train --config", "derivative", "git_commit"):
        assert present in page


def assert_same_run(a, b):
    assert (a / "evaluation.json").read_bytes() == (b / "evaluation.json").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, params_of(a), params_of(b))


def test_the_configuration_repeats_the_run(call, folder, small_run):
    call(f"train --config {small_run}/config.json --out {folder}/again --devices 2")
    assert (folder / "again" / "config.json").read_bytes() == (small_run / "config.json").read_bytes()
    assert_same_run(folder / "again", small_run)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_number_of_devices_changes_no_bit(call, folder, small_run, devices):
    call(f"train --config {small_run}/config.json --out {folder}/on-{devices} --devices {devices}")
    assert_same_run(folder / f"on-{devices}", small_run)


def test_models_do_not_depend_on_each_other(spring_run, small_run):
    """Beside the baseline and a sweep, hnn is what it is alone."""
    together, alone = numbers_of(spring_run[0]), numbers_of(small_run)
    assert together.items() >= {(k, v) for k, v in alone.items() if k != "protocol"}
    jax.tree.map(np.testing.assert_array_equal, params_of(spring_run[0])["hnn"], params_of(small_run)["hnn"])


def test_another_seed_gives_another_run(call, folder, small_run):
    call(f"train --config {small_run}/config.json --seed 1 --out {folder}/seed-1")
    ours, theirs = numbers_of(folder / "seed-1"), numbers_of(small_run)
    for name in ("hnn.train_loss", "hnn.energy_mse", "true_field.train_loss"):
        assert ours[name] != theirs[name]


def test_evaluate_again_with_other_options(call, small_run):
    before = (small_run / "evaluation.json").read_bytes()
    config = (small_run / "config.json").read_bytes()
    try:
        call(f"evaluate {small_run} --t-end 1")
        first, then = json.loads(before), numbers_of(small_run)
        assert then["hnn.train_loss"] == first["hnn.train_loss"]
        assert then["hnn.coordinate_mse"] < first["hnn.coordinate_mse"]
        assert "T = 1," in then["protocol"]
        assert (small_run / "config.json").read_bytes() == config
    finally:
        call(f"evaluate {small_run}")
    assert (small_run / "evaluation.json").read_bytes() == before


# ---- rollout


def arrays_of(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_rollout_of_every_model_starts_where_it_is_told(call, folder, other_run):
    for name in ("separable", "hnn_rollout", "dissipative", "lstm"):
        out = call(f"rollout {other_run} --model {name} --y0 0.6 -0.2 --t-end 1.5 --points 7 --out {folder}/{name}.npz")
        assert name in out and "largest change of the true energy" in out
        got = arrays_of(folder / f"{name}.npz")
        assert set(got) == {"t", "y", "truth"}
        assert got["y"].shape == got["truth"].shape == (len(got["t"]), 2)
        np.testing.assert_allclose(got["y"][0], [0.6, -0.2], atol=1e-7)
        angle = 2 * got["t"]
        exact = [0.6 * np.cos(angle) - 0.2 * np.sin(angle), -0.2 * np.cos(angle) - 0.6 * np.sin(angle)]
        np.testing.assert_allclose(got["truth"].T, exact, atol=1e-8)
        if name != "lstm":  # which has the time grid of its data
            np.testing.assert_allclose(got["t"], np.linspace(0, 1.5, 7))
    assert not list(folder.glob("*partial*"))


def test_rollout_with_fixed_steps(call, folder, other_run):
    line = f"rollout {other_run} --model separable --y0 0.6 -0.2 --t-end 1.5 --points 7 --out {folder}/r.npz"
    call(line)
    adaptive = arrays_of(folder / "r.npz")["y"]
    for solver, largest in (("euler", 0.2), ("midpoint", 1e-3), ("verlet", 1e-3), ("yoshida", 1e-6)):
        call(f"{line} --solver {solver} --dt 0.01")
        assert 0 < np.abs(arrays_of(folder / "r.npz")["y"] - adaptive).max() < largest, solver


def test_rollout_from_a_fresh_state_and_as_a_picture(call, folder, spring_run):
    run, _ = spring_run
    for seed in (0, 1):
        call(f"rollout {run} --seed {seed} --points 7 --out {folder}/fresh-{seed}.npz")
    first, second = (arrays_of(folder / f"fresh-{seed}.npz") for seed in (0, 1))
    np.testing.assert_array_equal(first["truth"], second["truth"])
    assert not np.allclose(first["y"], second["y"])
    assert SPRING.inside(first["y"][0])
    assert first["t"][-1] == 2.0  # that of the run's evaluation
    call(f"rollout {run} --model baseline --points 7 --out {folder}/r.png")
    assert (folder / "r.png").read_bytes().startswith(PNG)


# ---- simulate


def test_simulate_writes_what_training_reads(call, folder):
    path = folder / "pendulum.npz"
    out = call(f"simulate pendulum --out {path} --n-trajectories 6 --n-points 8 --t-end 2 --noise-std 0 --seed 3")
    data, name = load_npz(path, SYSTEMS["pendulum"])
    assert name == "pendulum"
    assert data.train.y.shape[0] + data.test.y.shape[0] == 6
    np.testing.assert_allclose(data.train.t, np.linspace(0, 2, 8))
    np.testing.assert_array_equal(data.train.y, data.train.y_true)
    assert out == f"{path}: {len(data.train.y)} + {len(data.test.y)} trajectories of 8 points\n"
    assert list(folder.glob("pendulum*")) == [path]


def test_training_from_a_file_is_training_from_the_simulation(call, folder):
    path = folder / "spring.npz"
    call(f"simulate spring --out {path} --seed 4")
    config = Config("spring", seeds=2, seed=4)
    simulated = experiment.load_data(config)
    read = experiment.load_data(Config("spring", seeds=2, data=Data(path=str(path))))
    jax.tree.map(np.testing.assert_array_equal, simulated, read)
    own = experiment.load_data(Config("spring", seeds=2, seed=4, data=Data(per_seed=True)))
    assert own.train.y.shape == read.train.y.shape
    assert not np.allclose(own.train.y[0], own.train.y[1])


def test_simulate_films(call, folder):
    path = folder / "films.npz"
    out = call(f"simulate pixel_pendulum --out {path} --n-trajectories 3")
    films = arrays_of(path)
    assert set(films) == {f"{part}_{name}" for part in ("train", "test") for name in ("t", "frames", "y")}
    assert out == f"{path}: {len(films['train_y'])} + {len(films['test_y'])} films\n"
    count = len(films["train_t"])
    assert films["train_frames"].dtype == np.uint8
    assert films["train_frames"].shape == (len(films["train_y"]), count, SIZE_PX, SIZE_PX)
    assert films["train_frames"].max() > 200 and films["train_frames"].min() == 0
    assert films["train_y"].shape == (len(films["train_y"]), count, 2)


# ---- presets


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    config = PRESETS[name]
    assert configs.from_json(Config, json.loads(json.dumps(configs.to_json(config)))) == config
