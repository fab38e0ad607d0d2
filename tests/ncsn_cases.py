"""What several tests of samplers share: distributions with exact scores, and chains without the driver."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

MEAN = np.asarray([0.3, -0.2])
COVARIANCE = np.asarray([[1.0, 0.6], [0.6, 0.8]])


def gaussian_score(mean=MEAN, covariance=COVARIANCE):
    """The score of N(mean, covariance + sigma^2 I), x [b, d] or [b, ...] with d numbers, of JAX or NumPy."""
    variances, vectors = np.linalg.eigh(covariance)
    centre, variances, vectors = (np.asarray(a, np.float32) for a in (mean, variances, vectors))

    def score(x, sigma):
        flat = x.reshape(len(x), -1)
        along = (flat - centre) @ vectors / (variances + sigma[:, None] ** 2)
        return -(along @ vectors.T).reshape(x.shape)

    return score


def log_density(x, covariance, mean=MEAN):
    """log N(x; mean, covariance) for x [b, d], in float64."""
    e = np.asarray(x, np.float64) - mean
    quadratic = np.sum(e * np.linalg.solve(covariance, e.T).T, axis=1)
    return -quadratic / 2 - np.linalg.slogdet(2 * np.pi * covariance)[1] / 2


def flow(x, sigma0, sigma1, mean=MEAN, covariance=COVARIANCE):
    """Where the probability-flow ODE of the Gaussian takes x [b, d] from noise sigma0 to sigma1."""
    variances, vectors = np.linalg.eigh(covariance)
    factors = np.sqrt((variances + sigma1**2) / (variances + sigma0**2))
    return mean + (np.asarray(x, np.float64) - mean) @ (vectors * factors) @ vectors.T


def toy_score(x, sigma):
    """0.8 N((5, 5), I) + 0.2 N((-5, -5), I), with noise sigma."""
    variance = 1 + sigma**2
    heavy = jax.nn.sigmoid(np.log(4) + 10 * jnp.sum(x, axis=1) / variance)
    return (5 * (2 * heavy - 1)[:, None] - x) / variance[:, None]


@functools.cache
def sample_keys(count, seed=0):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(count))


def chain(sampler, count, shape=(2,), seed=0, given=None):
    """`count` samples of the sampler, side by side in one program: (x, Info of [steps, count]) as NumPy arrays.

    `given`: arrays, then traced, of which `sampler(given)` is the sampler.
    """
    build = sampler if given is not None else lambda given: sampler

    @jax.jit
    def run(keys, given):
        sampler = build(given)
        numbers = jnp.arange(len(sampler.levels) - 1)
        state = sampler.init(keys, shape)
        state, info = jax.lax.scan(lambda state, i: sampler.step(keys, i, state), state, numbers)
        return state.x, info

    return jax.tree.map(np.asarray, run(sample_keys(count, seed), given))


def assert_moments(x, mean=MEAN, covariance=COVARIANCE, errors=3.0):
    """Mean and covariance of x [n, d] agree with those given, within so many standard errors."""
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), (np.asarray(x, np.float64) - mean).T)
    d, n = whitened.shape
    second = whitened @ whitened.T / n - np.eye(d)
    z = np.concatenate([whitened.mean(axis=1), (second / np.sqrt(1 + np.eye(d)))[np.triu_indices(d)]]) * np.sqrt(n)
    assert np.abs(z).max() < errors, z.round(1)
