"""Inpainting, colourisation and guidance: what is known is kept, what is not has the conditional distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ncsn_cases import COVARIANCE, MEAN, chain, gaussian_score, sample_keys

from ncsn.constraints import GREY, GREY_MASK, inpaint, known_grey
from ncsn.guidance import classifier_free, classifier_guided, labelled, reconstruction
from ncsn.langevin import annealed_langevin, ladder, langevin, predictor_corrector, reverse_diffusion
from ncsn.noise import geometric, karras
from ncsn.ode import dpm_solver, heun
from ncsn.samplers import fixed

SCORE = gaussian_score()
MASK = np.asarray([True, False])


@pytest.mark.parametrize("redraw", [True, False])
def test_the_unknown_coordinate_has_the_conditional_mean_and_variance(redraw):
    """At one noise level sigma, long after the start: x_2 given x_1 + sigma z, with the bias of the step size."""
    count, known, sigma, alpha = 2000, 1.5, 0.02, 0.03
    base = langevin(SCORE, sigma, alpha, 200, start=fixed(jnp.zeros((count, 2))))
    x, _ = chain(inpaint(base, jnp.asarray([known, 0.0]), MASK, redraw=redraw), count)
    (a, b), (_, c) = COVARIANCE + sigma**2 * np.eye(2)
    variance = (c - b**2 / a) / (1 - alpha / 2 / (c - b**2 / a))
    assert (x[:, 0] == np.float32(known)).all()
    mean = MEAN[1] + b / a * (known - MEAN[0])
    assert abs(x[:, 1].mean() - mean) < 3 * np.sqrt(variance / count)
    assert abs(x[:, 1].var() / variance - 1) < 3 * np.sqrt(2 / count)


def samplers():
    levels = np.append(geometric(10, 0.1, 4), 0)
    return {
        "annealed": annealed_langevin(SCORE, levels[:-1], 0.001, 2),
        "predictor_corrector": predictor_corrector(SCORE, reverse_diffusion(ladder(levels))),
        "heun": heun(SCORE, levels),
        "dpm_solver": dpm_solver(SCORE, levels[:-1]),
    }


@pytest.mark.parametrize("name", samplers())
def test_known_coordinates_are_kept_to_the_bit(name):
    known = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    mask = np.asarray([[True, False], [False, True], [True, True], [False, False], [True, False]])
    x, _ = chain(inpaint(samplers()[name], jnp.asarray(known), mask), 5)
    np.testing.assert_array_equal(x[mask], known[mask])
    assert (x[~mask] != known[~mask]).all() and np.isfinite(x).all()


@pytest.mark.parametrize("redraw", [True, False])
def test_what_is_inserted_has_the_noise_of_its_level(redraw):
    """Redrawn at every step (NCSNv2), or once per level (NCSN)."""
    sampler = inpaint(annealed_langevin(SCORE, [3.0, 0.5], 0.01, 2), jnp.zeros(2), MASK, redraw=redraw)
    keys, step = sample_keys(2000), jax.jit(sampler.step)
    state, seen = sampler.init(keys, (2,)), []
    for i, level in enumerate(sampler.levels):
        seen.append(np.asarray(state.x[:, 0]))
        assert seen[-1].std() == pytest.approx(level, rel=0.06)
        if i < len(sampler.levels) - 1:
            state, _ = step(keys, i, state)
    same = [np.allclose(a, b, rtol=1e-5) for a, b in itertools.pairwise(seen)]
    assert same == [not redraw, False, not redraw, not redraw, False]


@pytest.mark.parametrize("guided", [True, False])
def test_colours_keep_the_given_grey(guided):
    np.testing.assert_allclose(GREY.T @ GREY, np.eye(3), atol=1e-6)
    grey = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 1)), jnp.float32)
    score = gaussian_score(np.zeros(12), 0.25 * np.eye(12))
    levels = np.append(geometric(10, 0.1, 6), 0)
    known = known_grey(grey)
    if guided:
        score = reconstruction(score, known, GREY_MASK, 0.5, basis=GREY)
        sampler = heun(score, levels)
    else:
        sampler = predictor_corrector(score, reverse_diffusion(ladder(levels)))
    x, _ = chain(inpaint(sampler, known, GREY_MASK, every_step=not guided, basis=GREY), 3, (2, 2, 3))
    np.testing.assert_allclose(x.mean(axis=-1, keepdims=True), grey, atol=1e-6)
    assert x.std(axis=-1).min() > 0


def test_reconstruction_is_exact_for_independent_data():
    """There the known coordinate is known + sigma z, and the others do not care."""
    std, known, mask = 0.5, np.float32([0.7, -0.3]), np.asarray([True, False])
    score = gaussian_score(np.asarray([0.2, 0.1]), std**2 * np.eye(2))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    for sigma in (jnp.asarray([0.3]), jnp.linspace(0.1, 5, 5)):
        found = np.asarray(reconstruction(score, jnp.asarray(known), mask, std)(x, sigma))
        wanted = (known - np.asarray(x)) / np.asarray(sigma)[:, None] ** 2
        np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=2e-4)
        np.testing.assert_allclose(found[:, 1], score(x, sigma)[:, 1], rtol=1e-5)


@pytest.mark.slow
def test_few_steps_of_an_ode_find_the_conditional_mean_by_reconstruction_and_not_by_replacement():
    count, known = 500, jnp.asarray([3.0, 0.0])
    levels = np.append(karras(20, 0.01, 18), 0)
    std = float(np.sqrt(COVARIANCE[0, 0]))
    samplers = {
        "guided": inpaint(heun(reconstruction(SCORE, known, MASK, std), levels), known, MASK, every_step=False),
        "replaced": inpaint(heun(SCORE, levels), known, MASK),
    }
    found = {name: chain(sampler, count)[0] for name, sampler in samplers.items()}
    slope = COVARIANCE[0, 1] / COVARIANCE[0, 0]
    wanted = MEAN[1] + slope * (3.0 - MEAN[0])
    error = {name: abs(x[:, 1].mean() - wanted) for name, x in found.items()}
    assert (found["guided"][:, 0] == 3.0).all()
    assert error["guided"] < 0.1 * abs(wanted - MEAN[1]) < error["replaced"]


CENTRES = np.asarray([[-2.0, 0.0], [2.0, 1.0], [0.0, 0.0]], np.float32)


def by_class(x, sigma, label):
    """Class k is N(CENTRES[k], I)."""
    return (jnp.asarray(CENTRES)[label] - x) / (1 + sigma[:, None] ** 2)


@pytest.mark.slow
def test_guidance_without_a_classifier():
    x, sigma, labels = jnp.asarray(CENTRES + 0.3), jnp.asarray([0.5, 1.0, 2.0]), jnp.asarray([0, 1, 1])
    guided = lambda weight: classifier_free(by_class, labels, 2, weight)(x, sigma)  # noqa: E731
    given, without = labelled(by_class, labels)(x, sigma), by_class(x, sigma, jnp.full(3, 2))
    np.testing.assert_allclose(guided(1.0), given, rtol=1e-6)
    np.testing.assert_allclose(guided(0.0), without, rtol=1e-6)
    np.testing.assert_allclose(guided(3.0), without + 3 * (given - without), rtol=1e-6)


def test_guidance_by_the_true_classifier_is_the_score_of_the_class():
    labels = jnp.asarray([0, 1, 0, 1])

    def log_joint(x, sigma):
        logs = [-jnp.sum((x - c) ** 2, axis=1) / 2 / (1 + sigma**2) for c in CENTRES[:2]]
        return jnp.stack(logs, axis=1)

    mixture = jax.grad(lambda x, sigma: jnp.sum(jax.nn.logsumexp(log_joint(x, sigma), axis=1)))

    def log_probability(x, sigma):
        return jnp.take_along_axis(jax.nn.log_softmax(log_joint(x, sigma), axis=1), labels[:, None], axis=1)[:, 0]

    x, sigma = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32), jnp.full(4, 0.7)
    found = classifier_guided(mixture, log_probability)(x, sigma)
    np.testing.assert_allclose(found, by_class(x, sigma, labels), atol=1e-5)
