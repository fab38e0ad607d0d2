"""The symplectic solvers and `rollout`: order, structure, reversal, exact solutions, gradients."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnn.solvers import ImplicitMidpoint, StormerVerlet, Yoshida4, rollout, separable_terms, step_grid
from hnn.systems import SYSTEMS, field, pendulum_hamiltonian, spring_hamiltonian, total_energy

PENDULUM = separable_terms(pendulum_hamiltonian)
PENDULUM_FIELD = field(pendulum_hamiltonian)
DOUBLE_PENDULUM_FIELD = field(SYSTEMS["double_pendulum"].hamiltonian)
Y_PENDULUM = (1.1, 0.7)
Y_DOUBLE_PENDULUM = (0.7, -0.4, 0.3, 0.2)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def one_step(solver, dynamics, y, dt):
    """One step of a solver as a map [2n] -> [2n]."""
    if isinstance(dynamics, tuple):
        terms, state = dynamics, tuple(jnp.split(y, 2))
    else:
        terms, state = diffrax.ODETerm(lambda t, y, args: dynamics(y)), y
    solver_state = solver.init(terms, 0.0, dt, state, None)
    y1 = solver.step(terms, 0.0, dt, state, None, solver_state, False)[0]
    return jnp.concatenate(y1) if isinstance(y1, tuple) else y1


def many_steps(solver, dynamics, y, dt, count):
    """States after 1..count steps, [count, 2n], compiled without diffrax's loop."""

    def step(y, _):
        y = one_step(solver, dynamics, y, dt)
        return y, y

    return jax.jit(lambda y: jax.lax.scan(step, y, None, length=count)[1])(jnp.array(y))


def symplectic_defect(solver, dynamics, y, dt, jacobian=jax.jacfwd):
    """max |J' Omega J - Omega| of one step."""
    n = len(y) // 2
    omega = np.block([[np.zeros((n, n)), np.eye(n)], [-np.eye(n), np.zeros((n, n))]])
    j = jacobian(lambda y: one_step(solver, dynamics, y, dt))(jnp.array(y))
    return np.abs(j.T @ omega @ j - omega).max()


@pytest.mark.parametrize(
    ("solver", "dynamics", "order"),
    [
        (diffrax.Euler(), PENDULUM_FIELD, 1),
        (diffrax.SemiImplicitEuler(), PENDULUM, 1),
        (StormerVerlet(), PENDULUM, 2),
        (Yoshida4(), PENDULUM, 4),
        (ImplicitMidpoint(), PENDULUM_FIELD, 2),
    ],
)
def test_order_of_convergence(solver, dynamics, order):
    exact = many_steps(diffrax.Dopri8(), PENDULUM_FIELD, Y_PENDULUM, 0.01, 200)[-1]
    # Coarse enough for rounding not to matter, fine enough for the leading term of the error to rule.
    counts = np.array([500, 2000]) if order == 1 else np.array([50, 200])
    errors = [
        np.abs(many_steps(solver, dynamics, Y_PENDULUM, 2.0 / count, int(count))[-1] - exact).max() for count in counts
    ]
    slope = np.log(errors[0] / errors[1]) / np.log(counts[1] / counts[0])
    assert abs(slope - order) < 0.15
    terms = dynamics if isinstance(dynamics, tuple) else diffrax.ODETerm(lambda t, y, args: dynamics(y))
    assert solver.order(terms) == order


@pytest.mark.parametrize("jacobian", [jax.jacfwd, pytest.param(jax.jacrev, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("solver", "dynamics", "y"),
    [
        (Yoshida4(), PENDULUM, Y_PENDULUM),
        (StormerVerlet(), separable_terms(SYSTEMS["henon_heiles"].hamiltonian), (0.2, 0.1, -0.3, 0.2)),
        (ImplicitMidpoint(), DOUBLE_PENDULUM_FIELD, Y_DOUBLE_PENDULUM),
    ],
)
def test_symplectic_solvers_preserve_the_symplectic_form(solver, dynamics, y, jacobian):
    assert symplectic_defect(solver, dynamics, y, 0.1, jacobian) < 1e-10


@pytest.mark.parametrize("solver", [pytest.param(diffrax.Euler(), marks=pytest.mark.slow), diffrax.Tsit5()])
def test_runge_kutta_does_not_preserve_the_symplectic_form(solver):
    # Tsit5's FSAL state makes its step fall outside one_step's stateless form, hence the rollout.
    ts = np.array([0.0, 0.3])
    jacobian = jax.jacfwd(
        lambda y: rollout(DOUBLE_PENDULUM_FIELD, y, ts, solver=solver, dt=0.3, adjoint=diffrax.ForwardMode())[-1]
    )(jnp.array(Y_DOUBLE_PENDULUM))
    omega = np.block([[np.zeros((2, 2)), np.eye(2)], [-np.eye(2), np.zeros((2, 2))]])
    assert np.abs(jacobian.T @ omega @ jacobian - omega).max() > 1e-7


@pytest.mark.parametrize(
    ("solver", "dynamics", "y"),
    [
        (StormerVerlet(), PENDULUM, Y_PENDULUM),
        (Yoshida4(), PENDULUM, Y_PENDULUM),
        (ImplicitMidpoint(), DOUBLE_PENDULUM_FIELD, Y_DOUBLE_PENDULUM),
    ],
)
def test_a_step_and_its_reverse_cancel(solver, dynamics, y):
    there = one_step(solver, dynamics, jnp.array(y), 0.2)
    back = one_step(solver, dynamics, there, -0.2)
    assert np.abs(there - np.array(y)).max() > 0.05
    np.testing.assert_allclose(back, y, atol=1e-10, rtol=0)


def test_euler_does_not_reverse():
    back = one_step(
        diffrax.Euler(),
        PENDULUM_FIELD,
        one_step(diffrax.Euler(), PENDULUM_FIELD, jnp.array(Y_PENDULUM), 0.2),
        -0.2,
    )
    assert np.abs(back - np.array(Y_PENDULUM)).max() > 1e-2


@pytest.mark.parametrize(
    ("solver", "dynamics"),
    [(Yoshida4(), PENDULUM), pytest.param(ImplicitMidpoint(), PENDULUM_FIELD, marks=pytest.mark.slow)],
)
def test_rollouts_backwards_in_time_return_to_the_start(solver, dynamics):
    ts = np.linspace(0.0, 10.0, 21)
    ahead = rollout(dynamics, jnp.array(Y_PENDULUM), ts, solver=solver, dt=0.1)
    back = rollout(dynamics, ahead[-1], ts[::-1], solver=solver, dt=0.1)
    np.testing.assert_allclose(back[::-1], ahead, atol=1e-10, rtol=0)


def test_symplectic_energy_stays_bounded_where_euler_drifts():
    def energy_error(dynamics, solver):
        ys = many_steps(solver, dynamics, Y_PENDULUM, 0.1, 4000)
        start = total_energy(pendulum_hamiltonian, jnp.array(Y_PENDULUM))
        return np.abs(np.asarray(total_energy(pendulum_hamiltonian, ys)) - start)

    for dynamics, solver, bound in (
        (PENDULUM, StormerVerlet(), 5e-2),
        (PENDULUM, Yoshida4(), 2e-3),
        (PENDULUM_FIELD, ImplicitMidpoint(), 5e-2),
    ):
        error = energy_error(dynamics, solver)
        assert error.max() < bound
        # No growth: the last quarter is no worse than the first.
        assert error[3000:].max() < 1.2 * error[:1000].max()
    euler = energy_error(PENDULUM_FIELD, diffrax.Euler())
    assert euler[-1] > 10


def test_implicit_midpoint_conserves_quadratic_invariants_exactly():
    ys = rollout(
        field(spring_hamiltonian),
        jnp.array([1.0, 0.0]),
        np.linspace(0, 50, 26),
        solver=ImplicitMidpoint(),
        dt=0.2,
    )
    np.testing.assert_allclose(jnp.sum(ys**2, axis=1), 1.0, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_implicit_midpoint_solves_in_float32_at_any_scale(scale):
    y0 = jnp.array([1.0, 0.5], jnp.float32) * scale
    ys = many_steps(ImplicitMidpoint(), field(spring_hamiltonian), y0, jnp.float32(0.25), 20)
    assert ys.dtype == jnp.float32
    # The map of one step is the Cayley transform: a rotation by 2 atan(dt), the frequency being 2.
    angle = 20 * 2 * np.arctan(0.25)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(ys[-1], rotation @ np.asarray(y0), atol=2e-5 * scale)


def test_implicit_midpoint_at_the_origin_of_a_field_at_rest():
    ys = rollout(field(spring_hamiltonian), jnp.zeros(2), np.array([0.0, 1.0, 2.0]), solver=ImplicitMidpoint(), dt=0.5)
    np.testing.assert_array_equal(ys, 0)


def test_adaptive_rollout_is_the_exact_oscillator():
    ts = np.linspace(0.0, 20.0, 101)
    ys = rollout(field(spring_hamiltonian), jnp.array([1.0, 0.0]), ts)
    np.testing.assert_allclose(ys, np.stack([np.cos(2 * ts), -np.sin(2 * ts)], axis=1), atol=1e-7)


def test_adaptive_rollout_in_float32_does_what_float32_can():
    ts = np.linspace(0.0, 10.0, 21)
    ys = rollout(field(spring_hamiltonian), jnp.array([1.0, 0.0], jnp.float32), ts)
    assert ys.dtype == jnp.float32
    np.testing.assert_allclose(ys[:, 0], np.cos(2 * ts), atol=1e-4)


def test_separable_terms_serve_diffrax_own_solver():
    y0 = jnp.array(Y_PENDULUM)
    ours = rollout(PENDULUM, y0, np.array([0.0, 0.1]), solver=diffrax.SemiImplicitEuler(), dt=0.1)[-1]
    q = y0[0] + 0.1 * 2 * y0[1]
    p = y0[1] - 0.1 * 3 * jnp.sin(q)
    np.testing.assert_allclose(ours, [q, p], atol=1e-14)


def test_samples_fall_on_steps_of_irregular_times():
    ts = np.array([0.0, 0.1, 0.37, 0.4, 1.4])
    together = rollout(PENDULUM, jnp.array(Y_PENDULUM), ts, solver=StormerVerlet(), dt=0.1)
    y = jnp.array(Y_PENDULUM)
    for interval, count, expected in zip(np.diff(ts), (1, 3, 1, 10), together[1:], strict=True):
        y = many_steps(StormerVerlet(), PENDULUM, y, interval / count, count)[-1]
        np.testing.assert_allclose(expected, y, atol=1e-12)
    grid = step_grid(ts, 0.1)
    assert len(grid) == 1 + 1 + 3 + 1 + 10
    assert np.diff(grid).max() < 0.1 + 1e-9
    assert set(ts) <= set(grid)


@pytest.mark.parametrize("dt", [0.0, -0.1, float("nan")])
def test_a_step_that_is_not_positive_is_refused(dt):
    with pytest.raises(ValueError, match="dt must be positive"):
        rollout(PENDULUM_FIELD, jnp.array(Y_PENDULUM), np.array([0.0, 1.0]), dt=dt)


@pytest.mark.parametrize(("solver", "dt"), [(None, None), (diffrax.Euler(), 0.05), (ImplicitMidpoint(), 0.05)])
def test_blow_up_is_marked_and_not_raised(solver, dt):
    # y' = y^3 from 1 is infinite at t = 1/2.
    ys = jax.jit(lambda y0: rollout(lambda y: y**3, y0, np.linspace(0, 2, 9), solver=solver, dt=dt))(jnp.ones(2))
    assert np.isfinite(ys[:2]).all()
    assert not np.isfinite(ys[-1]).any()


def test_running_out_of_steps_is_marked_and_not_raised():
    ys = rollout(PENDULUM_FIELD, jnp.array(Y_PENDULUM), np.linspace(0, 100, 11), max_steps=20)
    assert np.isfinite(ys[0]).all()
    assert not np.isfinite(ys[-1]).any()


def test_one_diverged_trajectory_leaves_the_batch_alone():
    y0 = jnp.array([[1.0, 1.0], [0.1, 0.1]])
    ys = jax.vmap(lambda y0: rollout(lambda y: y**3, y0, np.linspace(0, 2, 9)))(y0)
    assert not np.isfinite(ys[0, -1]).any()
    # y(t) = y0 / sqrt(1 - 2 y0^2 t)
    np.testing.assert_allclose(ys[1, -1], 0.1 / np.sqrt(1 - 0.04), atol=1e-8)


@pytest.mark.parametrize(
    ("solver", "dt"),
    [
        (None, None),
        pytest.param(Yoshida4(), 0.1, marks=pytest.mark.slow),
        pytest.param(ImplicitMidpoint(), 0.1, marks=pytest.mark.slow),
    ],
)
def test_gradients_through_rollouts_agree_with_finite_differences(solver, dt):
    ts = np.linspace(0.0, 1.5, 6)
    splitting = isinstance(solver, StormerVerlet | Yoshida4)

    def loss(parameters):
        stiffness, q0 = parameters

        def hamiltonian(q, p):
            return jnp.sum(stiffness * (1 - jnp.cos(q)) + p**2)

        dynamics = separable_terms(hamiltonian) if splitting else field(hamiltonian)
        ys = rollout(dynamics, jnp.stack([q0, 0.3]), ts, solver=solver, dt=dt)
        return jnp.sum(ys**2)

    parameters = jnp.array([3.0, 0.8])
    loss = jax.jit(loss)
    gradient = jax.grad(loss)(parameters)
    step = 1e-5 * np.eye(2)
    numeric = [(loss(parameters + h) - loss(parameters - h)) / 2e-5 for h in step]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6)
