"""gan/loss.py and gan/spectral.py against closed forms, exact distances and singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from gan import loss, spectral
from gan.dcgan import MLP
from lib.initial import initialised

RNG = np.random.default_rng(0)
P, Q = np.array([1, 2, 5]), np.array([4, 2, 2])  # eight real and eight generated examples at three points
GAMES = ("non_saturating", "hinge", "least_squares", "wasserstein")


@jax.jit
def _of_points(scores):
    """Each game's loss of the critic, and its gradient, for scores at the three points."""
    both = lambda game: lambda s: loss.critic_loss(game, jnp.repeat(s, P), jnp.repeat(s, Q))  # noqa: E731
    return {game: jax.value_and_grad(both(game))(scores) for game in GAMES}


def test_the_best_critic_of_each_game():
    value, gradient = _of_points(np.log(P / Q))["non_saturating"]
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    mean = (P + Q) / 16
    jensen_shannon = (scipy.stats.entropy(P / 8, mean) + scipy.stats.entropy(Q / 8, mean)) / 2
    np.testing.assert_allclose(value, 2 * np.log(2) - 2 * jensen_shannon, rtol=1e-5)
    np.testing.assert_allclose(_of_points(P / (P + Q))["least_squares"][1], 0, atol=1e-6)
    np.testing.assert_allclose(_of_points(np.sign(P - Q) + 0.0)["hinge"][0], 2 * np.minimum(P, Q).sum() / 8, rtol=1e-6)
    np.testing.assert_allclose(_of_points(np.float32([1, 2, 4]))["wasserstein"][1], (Q - P) / 8, atol=1e-6)


def test_at_the_equilibrium_the_critic_says_one_half():
    same = jnp.zeros(4)
    value, gradient = jax.value_and_grad(lambda s: loss.critic_loss("non_saturating", s, s))(same)
    assert float(value) == pytest.approx(2 * np.log(2)) and jax.nn.sigmoid(same)[0] == 0.5
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


@pytest.mark.parametrize(
    ("game", "expected"),
    [
        ("non_saturating", np.mean(np.log1p(np.exp([-1.0, 2.0])))),
        ("least_squares", np.mean([0.0, 4.5])),
        ("hinge", 0.5),
        ("wasserstein", 0.5),
    ],
)
def test_what_the_generator_wants(game, expected):
    fake = jnp.asarray([1.0, -2.0])
    value, gradient = jax.value_and_grad(lambda s: loss.generator_loss(game, s))(fake)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert gradient[1] < 0 and abs(gradient[1]) >= abs(gradient[0])  # higher scores, the more so the lower they are


def test_a_trained_logit_is_the_log_ratio_of_densities():
    """Of N(0, 1) and N(1, 1), by their quantiles: log p/q = 1/2 - x."""
    quantiles = np.float32(scipy.stats.norm.ppf((np.arange(2000) + 0.5) / 2000))
    tx = optax.adam(0.1)

    @jax.jit
    def train():
        def objective(w):
            score = lambda x: w[0] + w[1] * x  # noqa: E731
            return loss.critic_loss("non_saturating", score(quantiles), score(quantiles + 1))

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(objective)(w), state)
            return (optax.apply_updates(w, updates), state), None

        start = jnp.zeros(2)
        return jax.lax.scan(step, (start, tx.init(start)), None, 400)[0][0]

    np.testing.assert_allclose(train(), [0.5, -1.0], atol=0.01)


def test_a_clipped_critics_gap_is_the_wasserstein_distance_times_its_slope():
    # Where leaky ReLUs have their kinks, near zero, so small a network cannot be steepest on both sides.
    real = np.float32(RNG.normal(3, 0.5, size=(512, 1)))
    fake = np.float32(RNG.normal(5, 0.7, size=(512, 1)))
    exact = scipy.stats.wasserstein_distance(real[:, 0], fake[:, 0])
    net, tx = MLP(16, 2, 1, 0.2), optax.rmsprop(1e-3)
    params = initialised(net, real, None, True)(jax.random.key(0))["params"]
    score = lambda params, x: net.apply({"params": params}, x, None, True)[:, 0]  # noqa: E731

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            objective = lambda p: loss.critic_loss("wasserstein", score(p, real), score(p, fake))  # noqa: E731
            updates, state = tx.update(jax.grad(objective)(params), state)
            params = jax.tree.map(lambda w: jnp.clip(w, -0.1, 0.1), optax.apply_updates(params, updates))
            return (params, state), -objective(params)

        (params, _), gaps = jax.lax.scan(step, (params, tx.init(params)), None, 400)
        slopes = loss.gradient_norms(lambda x: score(params, x), jnp.linspace(0, 8, 2000)[:, None])
        return gaps[-1], slopes.max()

    gap, slope = train(params)
    assert 0.9 * exact < gap / slope <= exact * (1 + 1e-4)


def test_penalties_of_a_linear_critic():
    w = np.float32([3.0, 4.0])
    real, fake = np.float32(RNG.normal(size=(2, 6, 2)))
    keys = jax.random.split(jax.random.key(0), 6)
    both = jax.jit(jax.value_and_grad(lambda w: loss.gradient_penalty(lambda x: x @ w, real, fake, keys)))
    value, gradient = both(w)
    np.testing.assert_allclose(value, (5 - 1) ** 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * (5 - 1) * w / 5, rtol=1e-6)
    value, gradient = both(0 * w)  # the norm has no gradient there
    assert value == 1 and np.all(np.asarray(gradient) == 0)


def test_penalties_of_a_curved_critic_against_finite_differences():
    real, fake = np.float32(RNG.normal(size=(2, 5, 3)))
    keys = jax.random.split(jax.random.key(1), 5)
    matrix = np.float32(RNG.normal(size=(3, 3)))

    def penalties(a):
        score = lambda x: jnp.sum(jnp.tanh(x @ (a * matrix)) * x, axis=1)  # noqa: E731
        return jnp.stack([loss.gradient_penalty(score, real, fake, keys), loss.r1(score, real)])

    forward, backward = jax.jit(penalties), jax.jit(jax.jacrev(penalties))
    step = 1e-2
    numeric = (np.asarray(forward(0.8 + step)) - np.asarray(forward(0.8 - step))) / (2 * step)
    np.testing.assert_allclose(backward(0.8), numeric, rtol=2e-3)
    round_one = loss.r1(lambda x: 3 * jnp.sum(x**2, axis=1) / 2, real)
    np.testing.assert_allclose(round_one, 9 * np.mean(np.sum(real**2, axis=1)) / 2, rtol=1e-5)


def test_the_evidence_bound():
    x, decoded = np.float32(RNG.normal(size=(2, 4, 2, 2, 1)))
    mean, log_variance = np.float32(RNG.normal(size=(2, 4, 3)))
    reconstruction, divergence = loss.evidence_bound(x, decoded, mean, log_variance, 0.5)
    np.testing.assert_allclose(reconstruction, np.mean(np.sum((x - decoded) ** 2, (1, 2, 3))) / 0.5, rtol=1e-5)
    s = np.exp(log_variance / 2)
    draws = mean + s * RNG.normal(size=(200_000, 1, 1))
    normal = scipy.stats.norm.logpdf
    monte_carlo = (normal(draws, mean, s) - normal(draws)).sum(-1).mean()
    assert float(divergence) == pytest.approx(monte_carlo, rel=0.02)


@pytest.fixture(scope="module")
def critic():
    return {
        "conv": {"kernel": np.float32(RNG.normal(size=(3, 3, 4, 6))), "bias": np.float32(RNG.normal(size=6))},
        "dense": {"kernel": np.float32(RNG.normal(size=(7, 5)))},
        "embedding": np.float32(RNG.normal(size=(4, 8))),
    }


def flat(kernel):
    """[C_out, rest]."""
    return kernel.reshape(-1, kernel.shape[-1]).T


def test_sigma_is_the_largest_singular_value(critic):
    @jax.jit
    def converge(params, key):
        vectors = jax.lax.fori_loop(0, 200, lambda _, v: spectral.iterate(params, v), spectral.start(params, key))
        return spectral.norms(params, vectors), spectral.normalised(params, vectors)

    sigma, normalised = converge(critic, jax.random.key(0))
    for name, kernel in (("conv", critic["conv"]["kernel"]), ("dense", critic["dense"]["kernel"])):
        exact = np.linalg.svd(flat(kernel), compute_uv=False)[0]
        np.testing.assert_allclose(sigma[name]["kernel"], exact, rtol=1e-4)
        np.testing.assert_allclose(normalised[name]["kernel"], kernel / exact, rtol=1e-4)
    exact = np.linalg.svd(critic["embedding"], compute_uv=False)[0]
    np.testing.assert_allclose(sigma["embedding"], exact, rtol=1e-4)
    np.testing.assert_array_equal(normalised["conv"]["bias"], critic["conv"]["bias"])
    assert jax.tree.structure(normalised) == jax.tree.structure(critic)


def test_one_iteration_and_its_gradient(critic):
    vectors = jax.jit(spectral.start)(critic, jax.random.key(1))
    once = jax.jit(spectral.iterate)(critic, vectors)
    w, u = flat(critic["conv"]["kernel"]), np.asarray(vectors["conv"]["kernel"]["u"])
    v = w.T @ u / np.linalg.norm(w.T @ u)
    u = w @ v / np.linalg.norm(w @ v)
    np.testing.assert_allclose(once["conv"]["kernel"]["u"], u, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(once["conv"]["kernel"]["v"], v, rtol=1e-4, atol=1e-6)

    total = lambda params: spectral.norms(params, spectral.iterate(params, vectors))["conv"]["kernel"]  # noqa: E731
    gradient = jax.jit(jax.grad(total))(critic)
    np.testing.assert_allclose(flat(np.asarray(gradient["conv"]["kernel"])), np.outer(u, v), rtol=1e-3, atol=1e-6)
    assert not np.any(gradient["dense"]["kernel"])
