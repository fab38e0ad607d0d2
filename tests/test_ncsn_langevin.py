"""Langevin, annealed Langevin and predictor-corrector samplers against closed forms and the published formulas."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ncsn_cases import COVARIANCE, MEAN, assert_moments, chain, gaussian_score, sample_keys, toy_score

from lib.process import UserError
from ncsn.langevin import (
    ancestral,
    annealed_langevin,
    by_level,
    by_norms,
    discretize,
    euler_maruyama,
    ladder,
    langevin,
    predictor_corrector,
    reverse_diffusion,
)
from ncsn.noise import expand, geometric
from ncsn.samplers import NOISE, fixed, normal, uniform
from ncsn.sde import VE, VP, SubVP
from ncsn.underdamped import underdamped_langevin

SCORE = gaussian_score()
COUNT = 2000
VE_LEVELS = geometric(50, 0.02, 200)


def with_zero(levels):
    return np.append(levels, 0.0)


@pytest.mark.slow
def test_plain_langevin_misses_the_weights_of_the_toy_that_annealed_langevin_finds():
    start = uniform(-8, 8)
    heavy_mode = lambda sampler: np.mean(chain(sampler, 2048)[0].sum(axis=1) > 0)  # noqa: E731
    plain = heavy_mode(langevin(toy_score, 0.0, 0.05, 250, start=start))
    annealed = heavy_mode(annealed_langevin(toy_score, geometric(20, 1, 20), 0.2, 50, start=start))
    assert abs(plain - 0.5) < 0.03
    assert abs(annealed - 0.8) < 0.02


def test_langevin_has_the_stationary_variance_of_its_step_size():
    sigma, step = 0.5, 0.2
    x, info = chain(langevin(SCORE, sigma, step, 100, start=fixed(jnp.zeros((COUNT, 2)))), COUNT)
    variances, vectors = np.linalg.eigh(COVARIANCE + sigma**2 * np.eye(2))
    assert_moments(x, covariance=(vectors * variances / (1 - step / 2 / variances)) @ vectors.T)
    assert info.nfe.sum(axis=0).tolist() == [100] * COUNT
    np.testing.assert_allclose(info.step_size, step)


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_annealed_langevin_is_the_published_loop(rule):
    sigmas, epsilon, steps = [2.0, 1.0, 0.5], 0.02, 2
    sampler = annealed_langevin(SCORE, sigmas, epsilon, steps, rule=rule, start=uniform(0, 1))
    x, info = chain(sampler, 3)
    keys = sample_keys(3)
    noise = jax.jit(lambda i: normal(keys, (2,), NOISE, i))
    expected, i = np.asarray(uniform(0, 1)(keys, (2,))), 0
    for sigma in sigmas:
        alpha = epsilon * sigma**2 / sigmas[-1] ** 2
        for _ in range(steps):
            z, score = np.asarray(noise(i)), SCORE(expected, np.full(3, sigma))
            if rule == "code":
                expected = expected + alpha * score + np.sqrt(2 * alpha) * z
            else:
                expected = expected + alpha / 2 * score + np.sqrt(alpha) * z
            i += 1
    expected = expected + sigmas[-1] ** 2 * SCORE(expected, np.full(3, sigmas[-1]))
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    assert info.nfe.sum(axis=0).tolist() == [7, 7, 7]
    assert sampler.levels.tolist() == [2, 2, 1, 1, 0.5, 0.5, 0.5, 0]


RECOVERING = {
    "annealed": (annealed_langevin(SCORE, geometric(10, 0.3, 15), 0.03, 15, denoise=False), 0.3),
    "reverse": (predictor_corrector(SCORE, reverse_diffusion(ladder(geometric(50, 0.02, 100))), by_level()), 0.02),
    "ancestral": (predictor_corrector(SCORE, ancestral(ladder(with_zero(VE_LEVELS))), corrector_steps=0), 0.0),
    "euler": (predictor_corrector(SCORE, euler_maruyama(discretize(VE(), 100)), by_level()), 0.0),
    "vp": (predictor_corrector(SCORE, reverse_diffusion(discretize(VP(), 150)), corrector_steps=0), 0.0),
    "sub_vp": (predictor_corrector(SCORE, euler_maruyama(discretize(SubVP(), 100)), by_level()), 0.0),
}


@pytest.mark.parametrize("name", RECOVERING)
def test_mean_and_covariance_of_a_gaussian(name):
    sampler, sigma = RECOVERING[name]
    x, _ = chain(sampler, COUNT)
    assert_moments(x, MEAN, COVARIANCE + sigma**2 * np.eye(2))


def test_steps_by_norms_recover_a_gaussian_of_many_dimensions():
    """In 64 dimensions the variance would be 4 % too large: the rule's own bias falls with their number."""
    grid = ladder(with_zero(geometric(20, 0.05, 100)))
    sampler = predictor_corrector(lambda x, sigma: -x / (1 + expand(sigma, x) ** 2), ancestral(grid), by_norms())
    x, info = chain(sampler, 32, (1024,))
    assert abs(np.mean(x**2) - 1) < 3 * np.sqrt(2 / x.size)
    assert info.nfe.sum(axis=0).tolist() == [200] * 32


def test_a_sample_does_not_depend_on_its_company():
    sampler = predictor_corrector(SCORE, reverse_diffusion(ladder([2.0, 1.0, 0.5])))
    step = jax.jit(sampler.step)
    keys, x = sample_keys(4), jnp.asarray([[1.0, 2.0], [-3.0, 0.5], [0.1, 0.2], [9.0, 9.0]])
    state, _ = step(keys, 0, sampler.init(keys, (2,))._replace(x=x))
    other, _ = step(keys, 0, state._replace(x=x.at[1:].multiply(-7)))
    np.testing.assert_array_equal(state.x[0], other.x[0])


def test_a_score_of_zero_makes_no_nan():
    sampler = predictor_corrector(lambda x, sigma: jnp.zeros_like(x), reverse_diffusion(ladder([2.0, 1.0])))
    assert np.isfinite(chain(sampler, 2)[0]).all()


@pytest.mark.parametrize("process", [VP(), SubVP()])
def test_predictors_are_the_published_formulas_in_the_coordinates_of_the_process(process):
    """SDE eq. 46 (reverse diffusion) and Euler-Maruyama of eq. 6, one step each, in numpy."""
    steps = 50
    grid = discretize(process, steps)
    t = np.linspace(1, process.t_min, steps)
    rng = np.random.default_rng(0)
    x, score, z = rng.normal(size=(3, 4, 2))  # in the coordinates of the process
    for i in (0, 20, 40):
        before, after = grid.scales[i], grid.scales[i + 1]
        dt = t[i] - t[i + 1]
        f, g = (
            float(process.drift(jnp.ones((1, 1)), jnp.full(1, t[i]))[0, 0]),
            float(process.diffusion(jnp.float32(t[i]))),
        )
        by_euler = x - (f * x - g**2 * score) * dt + g * np.sqrt(dt) * z
        ratio = before / after  # sqrt(1 - beta_i) for VP
        variance = (
            float(process.std(jnp.float32(t[i]))) ** 2 - ratio**2 * float(process.std(jnp.float32(t[i + 1]))) ** 2
        )
        by_reverse = (2 - ratio) * x + variance * score + np.sqrt(variance) * z
        for expected, predictor in ((by_euler, euler_maruyama(grid)), (by_reverse, reverse_diffusion(grid))):
            keep, drift, noise = (a[i] for a in predictor.rule[1:])
            found = after * (keep * x / before + drift * before * score + noise * z)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    if isinstance(process, VP):  # and the noise of the reverse step is that beta
        np.testing.assert_allclose(variance, 1 - ratio**2, rtol=1e-3)


def test_ancestral_steps_are_draws_from_the_posterior_of_ddpm():
    """DDPM (arXiv 2006.11239) eq. 6 and 7 for x_0 denoised, written with its alpha and beta."""
    grid = discretize(VP(), 50)
    rule, i = ancestral(grid).rule, 30
    bar, bar_next = grid.scales[i] ** 2, grid.scales[i + 1] ** 2
    alpha = bar / bar_next
    x, score, z = np.random.default_rng(1).normal(size=(3, 4, 2))
    x0 = (x + (1 - bar) * score) / np.sqrt(bar)
    mean = np.sqrt(bar_next) * (1 - alpha) / (1 - bar) * x0 + np.sqrt(alpha) * (1 - bar_next) / (1 - bar) * x
    expected = mean + np.sqrt((1 - bar_next) / (1 - bar) * (1 - alpha)) * z
    before, after = grid.scales[i], grid.scales[i + 1]
    found = after * (rule.keep[i] * x / before + rule.drift[i] * before * score + rule.noise[i] * z)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [pytest.param(diffrax.ALIGN(), marks=pytest.mark.slow), diffrax.QUICSORT()])
def test_underdamped_langevin_recovers_a_gaussian_and_counts_its_evaluations(solver):
    calls = []

    def counted(x, sigma):
        jax.debug.callback(lambda: calls.append(1))
        return SCORE(x, sigma)

    sampler = underdamped_langevin(counted, geometric(20, 0.1, 15), 0.5, 14, solver=solver, denoise=False)
    x, info = chain(sampler, COUNT)
    jax.effects_barrier()
    assert info.nfe.sum(axis=0).tolist() == [len(calls)] * COUNT
    assert_moments(x, MEAN, COVARIANCE + 0.1**2 * np.eye(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: annealed_langevin(SCORE, [1.0, 2.0], 0.1, 1), "falling"),
        (lambda: annealed_langevin(SCORE, [1.0, 0.0], 0.1, 1), "positive"),
        (lambda: annealed_langevin(SCORE, [2.0, 1.0], -0.1, 1), "step_size"),
        (lambda: annealed_langevin(SCORE, [2.0, 1.0], 0.1, 0), "steps"),
        (lambda: underdamped_langevin(SCORE, [2.0, 1.0], 0.1, 1, friction=0.0), "friction"),
        (lambda: ladder([1.0, np.nan]), "falling"),
        (lambda: ladder([1.0, -1.0]), "0 or more"),
        (lambda: discretize(VP(), 1), "at least 2"),
        (lambda: predictor_corrector(SCORE, ancestral(ladder([2.0, 1.0])), corrector_steps=-1), "corrector_steps"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
