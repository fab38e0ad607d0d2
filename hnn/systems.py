"""Mechanical systems with a known Hamiltonian: what the networks learn from and are measured against.

Phase space is y = [all q, all p], shape [2n]. For bodies in the plane q = [x of every body, y of every body].
Constants, samplers, spans and noise of `spring`, `pendulum`, `two_body` and `three_body` are those of the
code published with the paper (Greydanus et al. 2019, arXiv:1906.01563), which differ in places from its text.
Samplers draw trajectory i from `fold_in(key, i)`: asking for more never changes the first ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from lib.process import UserError

Hamiltonian = Callable[[Array, Array], Array]
Field = Callable[[Array], Array]
Sampler = Callable[[Array, int], Array]

PENDULUM_STIFFNESS = 3.0
PENDULUM_FRICTION = 0.2
REAL_PENDULUM_STIFFNESS = 2.4
DOUBLE_PENDULUM_GRAVITY = 3.0
HENON_HEILES_LAMBDA = 1.0
# Between this energy and 1/6, where orbits begin to escape, lies the extrapolation shell.
HENON_HEILES_TRAINING_ENERGY = 0.125

# Gym's Pendulum-v0 is phi'' = -(3 g / 2 l) sin(phi) with g = 10, l = 1. In the paper's coordinates q = phi,
# p = phi'/4 it conserves p^2 + 1.875 (1 - cos q). The paper fitted 1.9 because gym takes semi-implicit Euler
# steps, which make the energy ripple by several per cent; here the frames sample the exact flow.
PIXEL_PENDULUM_STIFFNESS = 15.0 / 8.0
PIXEL_PENDULUM_STIFFNESS_PAPER = 1.9
PIXEL_PENDULUM_VELOCITY_SCALE = 0.25
PIXEL_PENDULUM_FRAME_S = 0.05
# In this unit of time, and no other, that conserved quantity also generates the motion (q' = 2p).
PIXEL_PENDULUM_TIME_UNIT_S = 0.5


@dataclass(frozen=True)
class System:
    """A mechanical system, how its data are drawn, and how its test set is split off.

    `hamiltonian(q [n], p [n])` is a pure scalar function; `dissipation(q [n], p [n])`, where there is one, is
    the non-conservative force [n] added to p'. `original_energy` is what the paper's notebooks call energy
    where that is not H. `inside(y0 [2n])` says whether a start lies in the training range. A system without
    `sample_initial` is a recording: its H serves evaluation only and does not generate its motion.
    """

    name: str
    dimension: int
    hamiltonian: Hamiltonian
    t_span: tuple[float, float]
    n_points: int
    n_trajectories: int
    inside: Callable[[Array], Array]
    sample_initial: Sampler | None
    noise_std: float = 0.0
    test_fraction: float = 0.2
    test_position: Literal["first", "last"] = "first"
    sample_original_test: Sampler | None = None
    sample_extrapolation: Sampler | None = None
    dissipation: Callable[[Array, Array], Array] | None = None
    original_energy: Hamiltonian | None = None


# ---- fields and energy


def field(hamiltonian: Hamiltonian) -> Field:
    """The symplectic gradient y -> M grad H, [2n] -> [2n]: q' = dH/dp, p' = -dH/dq (paper eq. 1)."""

    def symplectic_gradient(y: Array) -> Array:
        q, p = jnp.split(y, 2)
        dh_dq, dh_dp = jax.grad(hamiltonian, argnums=(0, 1))(q, p)
        return jnp.concatenate([dh_dp, -dh_dq])

    return symplectic_gradient


def system_field(system: System) -> Field:
    """The true y -> y' of a system, [2n] -> [2n], with its dissipation.

    Raises UserError for a recording, which has no equations of motion.
    """
    if system.sample_initial is None:
        raise UserError(f"{system.name} is a recording: it has no true field; choose a simulated system")
    conservative = field(system.hamiltonian)
    dissipation = system.dissipation
    if dissipation is None:
        return conservative

    def dissipative(y: Array) -> Array:
        q, p = jnp.split(y, 2)
        return conservative(y) + jnp.concatenate([jnp.zeros_like(q), dissipation(q, p)])

    return dissipative


def total_energy(hamiltonian: Hamiltonian, y: Array) -> Array:
    """H along trajectories: y [..., 2n] -> [...]."""
    return jnp.vectorize(lambda state: hamiltonian(*jnp.split(state, 2)), signature="(m)->()")(y)


# ---- Hamiltonians


def spring_hamiltonian(q: Array, p: Array) -> Array:
    """q^2 + p^2, so that the frequency is 2."""
    return jnp.sum(q**2 + p**2)


def pendulum_hamiltonian(q: Array, p: Array) -> Array:
    """3 (1 - cos q) + p^2."""
    return jnp.sum(PENDULUM_STIFFNESS * (1 - jnp.cos(q)) + p**2)


def real_pendulum_hamiltonian(q: Array, p: Array) -> Array:
    """2.4 (1 - cos q) + p^2, p the measured angular velocity: the paper's fit, for evaluation only."""
    return jnp.sum(REAL_PENDULUM_STIFFNESS * (1 - jnp.cos(q)) + p**2)


def pixel_pendulum_hamiltonian(q: Array, p: Array) -> Array:
    """1.875 (1 - cos q) + p^2: exact, q the angle from hanging down [rad], p a quarter of q' [rad/s]."""
    return jnp.sum(PIXEL_PENDULUM_STIFFNESS * (1 - jnp.cos(q)) + p**2)


def pixel_pendulum_paper_energy(q: Array, p: Array) -> Array:
    """1.9 (1 - cos q) + p^2, the energy of the paper's pixel analysis."""
    return jnp.sum(PIXEL_PENDULUM_STIFFNESS_PAPER * (1 - jnp.cos(q)) + p**2)


def bodies_hamiltonian(q: Array, p: Array) -> Array:
    """Planar gravity between unit masses, G = 1: sum of p^2 / 2 minus the sum over pairs of 1 / r."""
    positions = q.reshape(2, -1)
    first, second = jnp.triu_indices(positions.shape[1], k=1)
    separations = positions[:, first] - positions[:, second]
    return 0.5 * jnp.sum(p**2) - jnp.sum(1 / jnp.sqrt(jnp.sum(separations**2, axis=0)))


def double_pendulum_hamiltonian(q: Array, p: Array) -> Array:
    """Two unit masses on unit rods, q the angles from hanging down; H = 0 hanging at rest. Not separable."""
    cos_delta = jnp.cos(q[0] - q[1])
    # p^T M(q)^-1 p / 2 with the mass matrix M = [[2, cos], [cos, 1]].
    kinetic = (p[0] ** 2 + 2 * p[1] ** 2 - 2 * p[0] * p[1] * cos_delta) / (2 * (2 - cos_delta**2))
    potential = DOUBLE_PENDULUM_GRAVITY * (2 * (1 - jnp.cos(q[0])) + (1 - jnp.cos(q[1])))
    return kinetic + potential


def henon_heiles_hamiltonian(q: Array, p: Array) -> Array:
    """(|p|^2 + |q|^2) / 2 + lambda (x^2 y - y^3 / 3), lambda = 1; bounded below energy 1/6."""
    return 0.5 * jnp.sum(p**2 + q**2) + HENON_HEILES_LAMBDA * (q[0] ** 2 * q[1] - q[1] ** 3 / 3)


def viscous_friction(q: Array, p: Array) -> Array:
    """The force -0.2 p of the damped pendulum."""
    del q
    return -PENDULUM_FRICTION * p


# ---- samplers of initial conditions


def _per_trajectory(sample_one: Callable[[Array], Array]) -> Sampler:
    def sample(key: Array, count: int) -> Array:
        return jax.vmap(lambda index: sample_one(jax.random.fold_in(key, index)))(jnp.arange(count))

    return sample


def _shell(radius_min: float, radius_max: float) -> Sampler:
    """One degree of freedom; directions of points of a square, as in the paper: not uniform in angle."""

    def sample_one(key: Array) -> Array:
        direction_key, radius_key = jax.random.split(key)
        direction = jax.random.uniform(direction_key, (2,), minval=-1.0, maxval=1.0)
        radius = jax.random.uniform(radius_key, minval=radius_min, maxval=radius_max)
        return radius * direction / jnp.linalg.norm(direction)

    return _per_trajectory(sample_one)


def _notebook_corners(key: Array) -> Array:
    """The evaluation notebooks' starts: each |coordinate| in [0.2, 1], random signs, so radius up to 1.41."""
    coordinates = jax.random.uniform(key, (2,), minval=-0.8, maxval=0.8)
    return coordinates + 0.2 * jnp.sign(coordinates)


def _rotation(angle: float) -> Array:
    return jnp.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _two_body_orbit(key: Array) -> Array:
    """Mirror-image bodies on nearly circular orbits; one scalar of noise scales both velocities."""
    position_key, velocity_key = jax.random.split(key)
    position = jax.random.uniform(position_key, (2,), minval=0.5, maxval=1.5)
    circular = jnp.array([-position[1], position[0]]) / (2 * jnp.linalg.norm(position) ** 1.5)
    velocity = circular * (1 + 0.05 * jax.random.normal(velocity_key))
    q = jnp.stack([position, -position], axis=1)
    p = jnp.stack([velocity, -velocity], axis=1)
    return jnp.concatenate([q.ravel(), p.ravel()])


def _three_body_orbit(key: Array) -> Array:
    """An equilateral triangle in nearly circular rotation; noise of 20 % on every velocity component."""
    direction_key, radius_key, velocity_key = jax.random.split(key, 3)
    direction = jax.random.uniform(direction_key, (2,), minval=-1.0, maxval=1.0)
    radius = jax.random.uniform(radius_key, minval=0.9, maxval=1.2)
    position = radius * direction / jnp.linalg.norm(direction)
    speed_factor = math.sqrt(math.sin(math.pi / 3) / (2 * math.cos(math.pi / 6) ** 2))
    velocity = speed_factor * (_rotation(math.pi / 2) @ position) / radius**1.5
    turns = jnp.stack([_rotation(2 * math.pi / 3 * body) for body in range(3)])
    q = (turns @ position).T
    perturbation = jax.random.uniform(velocity_key, (2, 3), minval=-0.2, maxval=0.2)
    p = (turns @ velocity).T * (1 + perturbation)
    return jnp.concatenate([q.ravel(), p.ravel()])


def _double_pendulum_start(angle_min: float, angle_max: float) -> Sampler:
    """Both |angles| in the given range, random signs, momenta up to 0.5."""

    def sample_one(key: Array) -> Array:
        angle_key, sign_key, momentum_key = jax.random.split(key, 3)
        angles = jax.random.uniform(angle_key, (2,), minval=angle_min, maxval=angle_max)
        signs = jax.random.rademacher(sign_key, (2,), dtype=angles.dtype)
        momenta = jax.random.uniform(momentum_key, (2,), minval=-0.5, maxval=0.5)
        return jnp.concatenate([signs * angles, momenta])

    return _per_trajectory(sample_one)


def _henon_heiles_shell(energy_min: float, energy_max: float) -> Sampler:
    """A random direction in phase space, scaled to a uniform energy inside the bounded well."""

    def sample_one(key: Array) -> Array:
        direction_key, energy_key = jax.random.split(key)
        direction = jax.random.normal(direction_key, (4,))
        direction = direction / jnp.linalg.norm(direction)
        energy = jax.random.uniform(energy_key, minval=energy_min, maxval=energy_max)
        cubic = henon_heiles_hamiltonian(*jnp.split(direction, 2)) - 0.5
        # H(s direction) = s^2 / 2 + cubic s^3 rises up to s = 1 / (3 |cubic|), where it is at least 1/6, and
        # is at least s^2 / 6 before: so bisection below both bounds finds the point in the well.
        upper = jnp.minimum(jnp.sqrt(6 * energy), 1 / (3 * jnp.abs(cubic)))

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) / 2
            below = middle**2 / 2 + cubic * middle**3 < energy
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, _ = jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(upper), upper))
        return low * direction

    return _per_trajectory(sample_one)


def _pixel_pendulum_start(key: Array) -> Array:
    """Gym's reset, kept where |angle from hanging down| < pi/6: uniform angle and velocity U(-1, 1) rad/s."""
    angle_key, velocity_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, minval=-math.pi / 6, maxval=math.pi / 6)
    velocity = jax.random.uniform(velocity_key, minval=-1.0, maxval=1.0)
    return jnp.stack([angle, PIXEL_PENDULUM_VELOCITY_SCALE * velocity])


# ---- training ranges


def _first_body_radius(y0: Array) -> Array:
    return jnp.linalg.norm(y0.reshape(4, -1)[:2, 0])


def _between(low: float, high: float, size: Callable[[Array], Array] = jnp.linalg.norm) -> Callable[[Array], Array]:
    return lambda y0: (size(y0) >= low - 1e-6) & (size(y0) <= high + 1e-6)


def _box(*limits: float) -> Callable[[Array], Array]:
    return lambda y0: jnp.all(jnp.abs(y0) <= jnp.array(limits) + 1e-6)


_SYSTEMS = (
    System(
        name="spring",
        dimension=1,
        hamiltonian=spring_hamiltonian,
        t_span=(0.0, 3.0),
        n_points=30,
        n_trajectories=50,
        noise_std=0.1,
        test_fraction=0.5,
        test_position="last",
        inside=_between(0.0, 1.0),
        sample_initial=_shell(0.1, 1.0),
        sample_original_test=_per_trajectory(_notebook_corners),
        sample_extrapolation=_shell(1.0, 1.41),
    ),
    System(
        name="pendulum",
        dimension=1,
        hamiltonian=pendulum_hamiltonian,
        t_span=(0.0, 3.0),
        n_points=45,
        n_trajectories=50,
        noise_std=0.1,
        test_fraction=0.5,
        test_position="last",
        inside=_between(1.3, 2.3),
        sample_initial=_shell(1.3, 2.3),
        sample_original_test=_per_trajectory(_notebook_corners),
        sample_extrapolation=_shell(0.28, 1.3),
        # The pendulum notebook compares q^2 + p^2, which the pendulum does not conserve.
        original_energy=spring_hamiltonian,
    ),
    System(
        name="damped_pendulum",
        dimension=1,
        hamiltonian=pendulum_hamiltonian,
        dissipation=viscous_friction,
        t_span=(0.0, 3.0),
        n_points=45,
        n_trajectories=50,
        noise_std=0.1,
        test_fraction=0.5,
        test_position="last",
        # From small radii too, because that is where long rollouts end.
        inside=_between(0.0, 2.3),
        sample_initial=_shell(0.1, 2.3),
    ),
    System(
        name="two_body",
        dimension=4,
        hamiltonian=bodies_hamiltonian,
        t_span=(0.0, 20.0),
        n_points=50,
        n_trajectories=1000,
        inside=_between(0.5 * math.sqrt(2), 1.5 * math.sqrt(2), _first_body_radius),
        sample_initial=_per_trajectory(_two_body_orbit),
    ),
    System(
        name="three_body",
        dimension=6,
        hamiltonian=bodies_hamiltonian,
        t_span=(0.0, 5.0),
        n_points=20,
        n_trajectories=5000,
        inside=_between(0.9, 1.2, _first_body_radius),
        sample_initial=_per_trajectory(_three_body_orbit),
    ),
    System(
        name="double_pendulum",
        dimension=2,
        hamiltonian=double_pendulum_hamiltonian,
        t_span=(0.0, 5.0),
        n_points=50,
        n_trajectories=500,
        inside=_box(0.8, 0.8, 0.5, 0.5),
        sample_initial=_double_pendulum_start(0.0, 0.8),
        sample_extrapolation=_double_pendulum_start(0.8, 1.1),
    ),
    System(
        name="henon_heiles",
        dimension=2,
        hamiltonian=henon_heiles_hamiltonian,
        t_span=(0.0, 10.0),
        n_points=50,
        n_trajectories=500,
        inside=_between(0.0, HENON_HEILES_TRAINING_ENERGY, partial(total_energy, henon_heiles_hamiltonian)),
        sample_initial=_henon_heiles_shell(0.02, HENON_HEILES_TRAINING_ENERGY),
        sample_extrapolation=_henon_heiles_shell(HENON_HEILES_TRAINING_ENERGY, 0.16),
    ),
    System(
        name="real_pendulum",
        dimension=1,
        hamiltonian=real_pendulum_hamiltonian,
        t_span=(5.0, 99.5),
        n_points=556,
        n_trajectories=1,
        test_position="last",
        inside=_between(0.0, math.inf),
        sample_initial=None,
    ),
    System(
        name="pixel_pendulum",
        dimension=1,
        hamiltonian=pixel_pendulum_hamiltonian,
        t_span=(0.0, 102 * PIXEL_PENDULUM_FRAME_S / PIXEL_PENDULUM_TIME_UNIT_S),
        n_points=103,
        n_trajectories=200,
        inside=_box(math.pi / 6, PIXEL_PENDULUM_VELOCITY_SCALE),
        sample_initial=_per_trajectory(_pixel_pendulum_start),
        original_energy=pixel_pendulum_paper_energy,
    ),
)

SYSTEMS: dict[str, System] = {system.name: system for system in _SYSTEMS}
