"""ncsn/toys.py against SciPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from lib.process import UserError
from ncsn import toys

RNG = np.random.default_rng(0)
X = (3 * RNG.normal(size=(20, 2))).astype(np.float32)
SIGMA = np.exp(RNG.normal(size=20)).astype(np.float32)
MEAN, COVARIANCE = np.array([1.0, -2.0]), np.array([[2.0, 0.9], [0.9, 0.5]])
GAUSSIAN = toys.gaussian(MEAN, COVARIANCE)
LOPSIDED = toys.Mixture(
    np.array([0.3, 0.7], np.float32),
    *(np.concatenate([a, b]) for a, b in zip(GAUSSIAN[1:], toys.gaussian([-3, 0], np.eye(2))[1:], strict=True)),
)


def test_a_gaussian():
    noisy = COVARIANCE + SIGMA[:, None, None] ** 2 * np.eye(2)
    solved = np.linalg.solve(noisy, (X - MEAN)[..., None])[..., 0]
    np.testing.assert_allclose(jax.jit(GAUSSIAN.score)(X, SIGMA), -solved, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(GAUSSIAN.denoise)(X, SIGMA), MEAN + solved @ COVARIANCE, rtol=1e-4, atol=1e-5)
    expected = multivariate_normal(MEAN, COVARIANCE + 0.25 * np.eye(2)).logpdf(X)
    np.testing.assert_allclose(jax.jit(GAUSSIAN.log_density)(X, 0.5), expected, rtol=1e-4)


def test_a_mixture():
    parts = [
        np.log(w) + multivariate_normal(m, c + 0.09 * np.eye(2)).logpdf(X)
        for w, m, c in [(0.3, MEAN, COVARIANCE), (0.7, [-3, 0], np.eye(2))]
    ]
    np.testing.assert_allclose(jax.jit(LOPSIDED.log_density)(X, 0.3), logsumexp(parts, axis=0), rtol=1e-4)
    first = np.exp(parts[0] - logsumexp(parts, axis=0))
    np.testing.assert_allclose(jax.jit(LOPSIDED.responsibilities)(X, 0.3)[:, 0], first, rtol=1e-3, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(LOPSIDED.log_density(x, SIGMA))))(X)
    score = jax.jit(LOPSIDED.score)(X, SIGMA)
    np.testing.assert_allclose(score, gradient, rtol=1e-4, atol=1e-5)
    tweedie = X + SIGMA[:, None] ** 2 * score
    np.testing.assert_allclose(jax.jit(LOPSIDED.denoise)(X, SIGMA), tweedie, rtol=1e-4, atol=1e-4)


def test_samples_have_the_moments():
    keys = jax.random.split(jax.random.key(0), 20_000)
    x = np.asarray(jax.jit(GAUSSIAN.sample)(keys, 0.5))
    noisy = COVARIANCE + 0.25 * np.eye(2)
    assert np.all(abs(x.mean(0) - MEAN) < 4 * np.sqrt(np.diag(noisy) / 20_000))
    np.testing.assert_allclose(np.cov(x.T), noisy, atol=0.08)
    sample = jax.jit(toys.NCSN_TOY.sample)
    toy = np.asarray(sample(keys))
    heavy = toy.sum(1) > 0
    assert abs(heavy.mean() - 0.8) < 4 * np.sqrt(0.16 / 20_000)
    np.testing.assert_allclose(np.std(toy[heavy], 0), 1, atol=0.03)
    np.testing.assert_allclose(np.mean(toy[~heavy], 0), -5, atol=0.07)
    np.testing.assert_array_equal(toy[:7], sample(keys[:7]))  # the number of samples changes none


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: toys.mixture([0.5, 0.6], [[0], [1]], 1), "with the sum 1"),
        (lambda: toys.mixture([1.0], [[0], [1]], 1), "one per mean"),
        (lambda: toys.mixture([1.0], [[0]], 0), "std is 0"),
        (lambda: toys.gaussian([0, 0], [[1, 0], [1, 1]]), "symmetric and positive definite"),
        (lambda: toys.gaussian([0, 0], [[1, 2], [2, 1]]), "symmetric and positive definite"),
    ],
)
def test_what_users_get_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()
