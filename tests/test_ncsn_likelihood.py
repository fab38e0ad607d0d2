"""Likelihoods by the probability-flow ODE of a Gaussian, whose density is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ncsn_cases import COVARIANCE, MEAN, flow, gaussian_score, log_density, sample_keys

from lib.process import UserError
from ncsn.likelihood import bits_per_dim, log_likelihood
from ncsn.samplers import PROBE

SCORE = gaussian_score()
SIGMA_MIN, SIGMA_MAX = 0.01, 80.0
X = np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, 256).astype(np.float32)


def of_the_model(x, weights=1.0):
    """The log-density of what the ODE makes of N(0, SIGMA_MAX^2 I): the Gaussian's, but for the prior's mean of 0.

    `weights` [n, 2] count the flow's spreading along each eigenvector.
    """
    variances = np.linalg.eigvalsh(COVARIANCE)
    spreading = np.log((variances + SIGMA_MAX**2) / (variances + SIGMA_MIN**2)) / 2
    latent = flow(x, SIGMA_MIN, SIGMA_MAX)
    return log_density(latent, SIGMA_MAX**2 * np.eye(2), np.zeros(2)) + np.sum(weights * spreading, axis=-1)


def test_exact_trace():
    evaluate = jax.jit(lambda x, keys: log_likelihood(SCORE, x, keys, SIGMA_MIN, SIGMA_MAX, probes=None))
    found = evaluate(X, sample_keys(256))
    bits = np.asarray(bits_per_dim(found.log_density, 2, 2.0))
    np.testing.assert_allclose(bits, 7 - of_the_model(X) / (2 * np.log(2)), atol=1e-3)
    exact = log_density(X, COVARIANCE + SIGMA_MIN**2 * np.eye(2)).mean()
    assert bits.mean() == pytest.approx(7 - exact / (2 * np.log(2)), abs=1e-3)
    np.testing.assert_allclose(found.latent, flow(X, SIGMA_MIN, SIGMA_MAX), rtol=1e-3, atol=0.01)


def test_hutchinson_trace():
    """To 1e-3 bits/dim what the drawn signs v make of it, the mean of v'Jv; and unbiased over samples."""
    evaluate = jax.jit(lambda x, keys: log_likelihood(SCORE, x, keys, SIGMA_MIN, SIGMA_MAX, probes=3).log_density)
    draw = lambda key: jax.random.rademacher(jax.random.fold_in(key, PROBE), (3, 2), jnp.float32)  # noqa: E731
    signs = np.asarray(jax.jit(jax.vmap(draw))(sample_keys(256)))
    weights = np.mean((signs @ np.linalg.eigh(COVARIANCE)[1]) ** 2, axis=1)
    found = np.asarray(evaluate(X, sample_keys(256)))
    np.testing.assert_allclose(found / (2 * np.log(2)), of_the_model(X, weights) / (2 * np.log(2)), atol=1e-3)
    error = found - of_the_model(X)
    assert error.std() > 0.1
    assert abs(error.mean()) < 3 * error.std() / 16


def test_offsets_of_scaled_pixels():
    """Uniform data on all 256 levels cost 8 bits, in whatever range they are scaled to."""
    for width in (1.0, 2.0):
        density = -10 * np.log(width)  # of a uniform density on 10 dimensions, in nats
        assert bits_per_dim(jnp.float32(density), 10, width) == pytest.approx(8.0, abs=1e-6)


def test_no_probes_are_an_error():
    with pytest.raises(UserError, match="probes is 0"):
        log_likelihood(SCORE, jnp.asarray(X), sample_keys(256), SIGMA_MIN, SIGMA_MAX, probes=0)
