"""The systems: equations of motion, known solutions, conserved energy, samplers and training ranges."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnn.solvers import rollout
from hnn.systems import (
    DOUBLE_PENDULUM_GRAVITY,
    PENDULUM_FRICTION,
    PIXEL_PENDULUM_TIME_UNIT_S,
    PIXEL_PENDULUM_VELOCITY_SCALE,
    SYSTEMS,
    field,
    system_field,
    total_energy,
)
from lib.process import UserError

SIMULATED = [name for name, system in SYSTEMS.items() if system.sample_initial is not None]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sample(name, count=200, kind="sample_initial"):
    return np.asarray(jax.jit(getattr(SYSTEMS[name], kind), static_argnums=1)(jax.random.key(0), count))


def inside(name, y):
    return np.asarray(jax.jit(jax.vmap(SYSTEMS[name].inside))(y))


def derivative(name, y):
    return jax.jit(system_field(SYSTEMS[name]))(y)


def radii(y):
    return np.linalg.norm(y, axis=1)


def test_the_paper_s_numbers():
    def numbers(name):
        s = SYSTEMS[name]
        return (*s.t_span, s.n_points, s.n_trajectories, s.noise_std, s.test_fraction, s.test_position)

    assert numbers("spring") == (0, 3, 30, 50, 0.1, 0.5, "last")
    assert numbers("pendulum") == (0, 3, 45, 50, 0.1, 0.5, "last")
    assert numbers("two_body") == (0, 20, 50, 1000, 0, 0.2, "first")
    assert numbers("three_body") == (0, 5, 20, 5000, 0, 0.2, "first")
    assert numbers("pixel_pendulum")[2:] == (103, 200, 0, 0.2, "first")


@pytest.mark.parametrize("name", SIMULATED)
def test_energy_is_conserved_and_dissipation_takes_exactly_its_power(name):
    system = SYSTEMS[name]
    y = sample(name, 20)
    assert y.shape == (20, 2 * system.dimension)
    dy = jax.jit(jax.vmap(system_field(system)))(y)
    gradient = jax.jit(jax.vmap(jax.grad(lambda y: total_energy(system.hamiltonian, y))))(y)
    power = np.sum(gradient * dy, axis=1)
    p = y[:, system.dimension :]
    expected = -2 * PENDULUM_FRICTION * np.sum(p**2, axis=1) if system.dissipation else 0.0
    np.testing.assert_allclose(power, expected, atol=1e-12)


def test_spring_and_pendulum_equations():
    y = np.array([0.7, -0.4])
    np.testing.assert_allclose(derivative("spring", y), [2 * -0.4, -2 * 0.7])
    np.testing.assert_allclose(derivative("pendulum", y), [2 * -0.4, -3 * np.sin(0.7)])
    np.testing.assert_allclose(derivative("damped_pendulum", y), [2 * -0.4, -3 * np.sin(0.7) + 0.4 * PENDULUM_FRICTION])


def test_pixel_pendulum_is_gym_s_pendulum():
    angle, velocity = 0.4, -0.9
    y = np.array([angle, PIXEL_PENDULUM_VELOCITY_SCALE * velocity])
    per_second = derivative("pixel_pendulum", y) / PIXEL_PENDULUM_TIME_UNIT_S
    # phi'' = -(3 g / 2 l) sin(phi), g = 10, l = 1
    np.testing.assert_allclose(per_second, [velocity, PIXEL_PENDULUM_VELOCITY_SCALE * -15 * np.sin(angle)])
    steps_s = np.diff(np.linspace(*SYSTEMS["pixel_pendulum"].t_span, 103)) * PIXEL_PENDULUM_TIME_UNIT_S
    np.testing.assert_allclose(steps_s, 0.05)


def test_bodies_follow_newton():
    y = sample("three_body", 1)[0]
    positions, momenta = y.reshape(2, 2, 3)
    forces = np.zeros((2, 3))
    for i in range(3):
        for j in range(3):
            if i != j:
                separation = positions[:, j] - positions[:, i]
                forces[:, i] += separation / np.linalg.norm(separation) ** 3
    expected = np.concatenate([momenta.ravel(), forces.ravel()])
    np.testing.assert_allclose(derivative("three_body", y), expected, rtol=1e-12)


@pytest.mark.slow
def test_a_circular_two_body_orbit_returns_after_its_period():
    radius = 0.8
    speed = 1 / (2 * np.sqrt(radius))
    y0 = jnp.array([radius, -radius, 0, 0, 0, 0, speed, -speed])
    period = 2 * np.pi * radius / speed
    ys = rollout(system_field(SYSTEMS["two_body"]), y0, np.linspace(0, period, 5))
    np.testing.assert_allclose(ys[-1], y0, atol=1e-7)
    np.testing.assert_allclose(ys[1], [0, 0, radius, -radius, -speed, speed, 0, 0], atol=1e-7)


def test_double_pendulum_follows_the_lagrangian_equations():
    a1, a2, w1, w2 = 0.7, -0.5, 0.9, -1.3
    g, delta = DOUBLE_PENDULUM_GRAVITY, a1 - a2
    # The textbook angular accelerations for unit masses and rods.
    denominator = 3 - np.cos(2 * delta)
    acceleration1 = (
        -3 * g * np.sin(a1) - g * np.sin(a1 - 2 * a2) - 2 * np.sin(delta) * (w2**2 + w1**2 * np.cos(delta))
    ) / denominator
    acceleration2 = (2 * np.sin(delta) * (2 * w1**2 + 2 * g * np.cos(a1) + w2**2 * np.cos(delta))) / denominator

    def to_momenta(angles, velocities):
        c = jnp.cos(angles[0] - angles[1])
        return jnp.array([[2.0, 0.0], [0.0, 1.0]]) @ velocities + c * velocities[::-1]

    angles, velocities = jnp.array([a1, a2]), jnp.array([w1, w2])
    y = jnp.concatenate([angles, to_momenta(angles, velocities)])
    _, dp = jax.jvp(to_momenta, (angles, velocities), (velocities, jnp.array([acceleration1, acceleration2])))
    dy = derivative("double_pendulum", y)
    np.testing.assert_allclose(dy, [w1, w2, *dp], rtol=1e-12)


def test_henon_heiles_equations():
    x, y, px, py = 0.2, -0.3, 0.1, 0.25
    dy = derivative("henon_heiles", jnp.array([x, y, px, py]))
    np.testing.assert_allclose(dy, [px, py, -x - 2 * x * y, -y - x**2 + y**2], rtol=1e-12)


def test_pendulum_energy_along_a_trajectory():
    system = SYSTEMS["pendulum"]
    ys = rollout(field(system.hamiltonian), jnp.array([2.0, 0.5]), np.linspace(0, 20, 50), solver=diffrax.Dopri8())
    energy = total_energy(system.hamiltonian, ys)
    assert energy.shape == (50,)
    np.testing.assert_allclose(energy, 3 * (1 - np.cos(2.0)) + 0.25, atol=1e-6)


def test_a_recording_has_no_field():
    with pytest.raises(UserError, match="real_pendulum"):
        system_field(SYSTEMS["real_pendulum"])


@pytest.mark.parametrize(("name", "low", "high"), [("spring", 0.1, 1), ("pendulum", 1.3, 2.3)])
def test_shell_samplers_fill_their_range(name, low, high):
    training = radii(sample(name, 1000))
    assert low <= training.min() < low + 0.02
    assert high - 0.02 < training.max() <= high


@pytest.mark.parametrize("name", ["spring", "pendulum"])
def test_original_test_set_is_the_notebooks(name):
    y = np.abs(sample(name, 1000, "sample_original_test"))
    assert 0.2 <= y.min() < 0.21
    assert 0.99 < y.max() <= 1
    assert len({tuple(signs) for signs in np.sign(sample(name, 100, "sample_original_test"))}) == 4


@pytest.mark.parametrize("name", SIMULATED)
def test_training_starts_are_inside_and_extrapolation_is_not(name):
    system = SYSTEMS[name]
    assert inside(name, sample(name)).all()
    if system.sample_extrapolation is not None:
        assert not inside(name, sample(name, 200, "sample_extrapolation")).any()


def test_inside_splits_the_original_test_set():
    y = sample("spring", 200, "sample_original_test")
    np.testing.assert_array_equal(inside("spring", y), radii(y) <= 1)
    assert 0 < inside("spring", y).sum() < 200


def test_two_body_starts_nearly_circular():
    q, p = sample("two_body", 2000).reshape(-1, 2, 2, 2).swapaxes(0, 1)
    np.testing.assert_array_equal(q[..., 0], -q[..., 1])
    np.testing.assert_array_equal(p[..., 0], -p[..., 1])
    first = q[..., 0]
    assert first.min() >= 0.5
    assert first.max() <= 1.5
    np.testing.assert_allclose(np.sum(first * p[..., 0], axis=1), 0, atol=1e-12)
    factor = np.linalg.norm(p[..., 0], axis=1) * 2 * np.sqrt(np.linalg.norm(first, axis=1))
    assert abs(factor.mean() - 1) < 0.005
    assert abs(factor.std() - 0.05) < 0.004


def test_three_body_starts_as_a_triangle():
    q, p = sample("three_body", 500).reshape(-1, 2, 2, 3).swapaxes(0, 1)
    radius = np.linalg.norm(q, axis=1)
    assert 0.9 <= radius.min() < 0.91
    assert 1.19 < radius.max() <= 1.2
    np.testing.assert_allclose(q.sum(axis=2), 0, atol=1e-12)
    # The unperturbed speed is the circular one: v^2 = 1 / (sqrt(3) r). Its direction is perpendicular.
    circular = np.stack([-q[:, 1], q[:, 0]], axis=1) / radius[:, None] ** 1.5 / 3**0.25
    factor = p / circular
    assert 0.8 <= factor.min() < 0.81
    assert 1.19 < factor.max() <= 1.2


@pytest.mark.slow
def test_henon_heiles_starts_below_the_escape_energy():
    system = SYSTEMS["henon_heiles"]
    energy = np.asarray(total_energy(system.hamiltonian, sample("henon_heiles", 500)))
    assert 0.02 - 1e-9 <= energy.min() < 0.022
    assert 0.12 < energy.max() <= 0.125 + 1e-9
    times = np.linspace(0, 50, 6)
    follow = jax.jit(jax.vmap(lambda y: rollout(system_field(system), y, times, rtol=1e-6, atol=1e-6)))
    ys = follow(sample("henon_heiles", 20, "sample_extrapolation"))
    assert np.abs(ys).max() < 1.1


def test_pixel_pendulum_starts():
    y = np.abs(sample("pixel_pendulum", 1000))
    assert 0.5 < y[:, 0].max() <= np.pi / 6
    assert 0.24 < y[:, 1].max() <= 0.25


@pytest.mark.parametrize("name", SIMULATED)
def test_samples_depend_on_key_and_index_only(name):
    system = SYSTEMS[name]
    draw = jax.jit(system.sample_initial, static_argnums=1)
    few = draw(jax.random.key(1), 3)
    np.testing.assert_allclose(few, draw(jax.random.key(1), 8)[:3], rtol=1e-12)
    assert not np.allclose(few, draw(jax.random.key(2), 3))


def test_original_energies():
    q, p = jnp.array([0.5]), jnp.array([0.3])
    assert float(SYSTEMS["pendulum"].original_energy(q, p)) == pytest.approx(0.34)
    assert float(SYSTEMS["pixel_pendulum"].original_energy(q, p)) == pytest.approx(1.9 * (1 - np.cos(0.5)) + 0.09)
    assert float(SYSTEMS["real_pendulum"].hamiltonian(q, p)) == pytest.approx(2.4 * (1 - np.cos(0.5)) + 0.09)
