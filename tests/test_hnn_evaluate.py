"""hnn/evaluate.py: metrics in closed form, and the true field as the model that makes no errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hnn_cases import RNG, SPRING, TRUE, spring_part

from hnn import evaluate
from hnn.data import Dataset
from hnn.evaluate import Scenes, Trained
from hnn.model import FieldModel
from hnn.pixel_evaluation import physical_map
from hnn.systems import SYSTEMS, system_field


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


@pytest.mark.slow
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


@pytest.mark.slow
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
