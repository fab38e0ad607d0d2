"""ncsn/sde.py against the moment equations, and against closed forms for a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import norm

from lib.process import UserError
from ncsn import sde, toys

PROCESSES = [sde.VE(), sde.VE(0.02, 3.0), sde.VP(), sde.SubVP(), sde.VP(0.5, 0.5)]
T = np.linspace(0.01, 1, 23, dtype=np.float32)
MEAN, COVARIANCE = np.array([1.0, -2.0]), np.array([[2.0, 0.9], [0.9, 0.5]])
GAUSSIAN = toys.gaussian(MEAN, COVARIANCE)
SCORE = jax.jit(GAUSSIAN.score)
X = np.random.default_rng(0).normal(size=(len(T), 2)).astype(np.float32)

over_processes = pytest.mark.parametrize("process", PROCESSES, ids=str)


@over_processes
def test_marginals_solve_the_moment_equations(process):
    """m' = f m and V' = 2 f V + g^2 for a point x(0) = 1 with what noise the process starts with."""

    def moments(t, y):
        f = float(process.drift(jnp.ones((1, 1)), jnp.full(1, t))[0, 0])
        return [f * y[0], 2 * f * y[1] + float(process.diffusion(t)) ** 2]

    start = [1.0, float(process.std(0.0)) ** 2]
    m, v = solve_ivp(moments, (0, 1), start, t_eval=T, rtol=1e-5, atol=1e-11, method="LSODA").y
    np.testing.assert_allclose(process.scale(T), m, rtol=1e-4)
    np.testing.assert_allclose(process.std(T), np.sqrt(v), rtol=1e-4)


@over_processes
def test_sigma_and_time_are_inverse(process):
    t = np.geomspace(process.t_min, 1, 30, dtype=np.float32)
    np.testing.assert_allclose(process.sigma(t), process.std(t) / process.scale(t), rtol=1e-5)
    np.testing.assert_allclose(process.time(process.sigma(t)), t, rtol=1e-4, atol=1e-7)
    assert np.all(np.diff(process.sigma(t)) > 0)


def test_known_ends():
    np.testing.assert_allclose(sde.VP().sigma(1.0), np.sqrt(np.expm1(10.05)), rtol=1e-5)
    np.testing.assert_allclose(sde.SubVP().std(1.0), 1 - np.exp(-10.05), rtol=1e-6)
    np.testing.assert_allclose([sde.VE().std(0.0), sde.VE().std(1.0)], [0.01, 50], rtol=1e-5)


@over_processes
def test_score_of_a_gaussian_in_the_coordinates_of_the_process(process):
    scale, std = np.asarray(process.scale(T), np.float64), np.asarray(process.std(T), np.float64)
    covariance = scale[:, None, None] ** 2 * COVARIANCE + std[:, None, None] ** 2 * np.eye(2)
    expected = -np.linalg.solve(covariance, (X - scale[:, None] * MEAN)[..., None])[..., 0]
    score = jax.jit(sde.score_in_time(process, GAUSSIAN.score))
    np.testing.assert_allclose(score(X, T), expected, rtol=2e-3, atol=2e-4)
    sigma = process.sigma(T)
    back = sde.score_in_sigma(process, score)
    np.testing.assert_allclose(back(X, sigma), SCORE(X, sigma), rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(score(X, 0.5), score(X, np.full_like(T, 0.5)), rtol=1e-6)  # a time for all


@over_processes
def test_reverse_drift_keeps_the_marginals(process):
    """Backwards, a drift a (x - m) + m' and the diffusion noise g have m' = drift(m), V' = 2 a V - (noise g)^2."""
    one = toys.gaussian([0.7], [[0.4]])
    mean = lambda t: 0.7 * process.scale(t)  # noqa: E731
    variance = lambda t: 0.4 * process.scale(t) ** 2 + process.std(t) ** 2  # noqa: E731
    (m, dm), (v, dv) = (jax.jvp(f, (T,), (np.ones_like(T),)) for f in (mean, variance))
    g2 = process.diffusion(T) ** 2
    score = jax.jit(sde.score_in_time(process, one.score))
    for noise in (0.0, 0.6, 1.0):
        drift = sde.reverse_drift(process, score, noise)
        at_mean = drift(m[:, None], T)[:, 0]
        slope = drift(m[:, None] + 1, T)[:, 0] - at_mean
        np.testing.assert_allclose(at_mean, dm, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(2 * slope * v - noise**2 * g2, dv, rtol=2e-3, atol=2e-4 * float(g2.max()))


@over_processes
def test_prior(process):
    std = process.sigma_max if isinstance(process, sde.VE) else 1.0
    x = std * np.random.default_rng(1).normal(size=(5, 3, 2)).astype(np.float32)
    np.testing.assert_allclose(process.prior_log_density(x), norm(0, std).logpdf(x).sum((1, 2)), rtol=1e-5)
    drawn = process.prior_sample(jax.random.key(0), (4000,))
    assert abs(drawn.std() / std - 1) < 4 / np.sqrt(8000)
    # What the process makes of data with variance near 1 is close to it.
    if process != PROCESSES[-1]:
        np.testing.assert_allclose(process.std(1.0), std, rtol=1e-4)


def test_training_draws_times_evenly_and_weighs_by_the_likelihood():
    process = sde.VP()
    sigma = jax.vmap(sde.uniform_time(process))(jax.random.split(jax.random.key(0), 4000))
    t = process.time(sigma)
    assert t.min() > 0.9e-3 and t.max() <= 1
    assert abs(t.mean() - 0.5005) < 4 / np.sqrt(12 * 4000)
    b = 0.1 * T + 9.95 * T**2
    expected = (0.1 + 19.9 * T) / (1 - np.exp(-b))
    np.testing.assert_allclose(sde.likelihood_weight(process)(process.sigma(T)), expected, rtol=1e-4)
    flat = sde.likelihood_weight(sde.VE())(sde.VE().sigma(T))
    np.testing.assert_allclose(flat, 2 * np.log(5000), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sde.VE(2.0, 1.0), "sigma_max 1 and sigma_min 2"),
        (lambda: sde.VP(0.0), "beta_max 20 and beta_min 0"),
        (lambda: sde.SubVP(3.0, 2.0), "beta_max 2 and beta_min 3"),
        (lambda: sde.VP(t_min=0.0), "t_min is 0"),
        (lambda: sde.VE(t_min=1.0), "t_min is 1"),
    ],
)
def test_what_users_get_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()
