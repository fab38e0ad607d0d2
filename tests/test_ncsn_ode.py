"""Solvers of the probability-flow ODE: orders, the published loops, adaptive steps, latents."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ncsn_cases import COVARIANCE, MEAN, assert_moments, chain, flow, gaussian_score, sample_keys

from lib.latents import slerp
from lib.process import UserError
from ncsn.noise import karras
from ncsn.ode import Churn, dpm_solver, euler, heun, probability_flow, transport
from ncsn.samplers import NOISE, fixed, gaussian, normal

SCORE = gaussian_score()
Z = 10 * np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)


@pytest.mark.parametrize(("solver", "order", "steps"), [(euler, 1, 32), (heun, 2, 16), (dpm_solver, 2, 16)])
def test_order_of_convergence(solver, order, steps):
    exact = flow(Z, 10.0, 0.1)

    def error(n):
        x, info = chain(solver(SCORE, np.geomspace(10, 0.1, n + 1), start=fixed(jnp.asarray(Z))), len(Z))
        assert info.nfe.sum() == len(Z) * n * (2 if solver is heun else 1)
        return np.abs(x - exact).mean()

    assert np.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver"])
def test_mean_and_covariance_of_a_gaussian(name):
    levels = np.append(karras(80, 0.01, 400 if name == "euler" else 40), 0)
    sampler = {
        "euler": lambda: euler(SCORE, levels),
        "heun": lambda: heun(SCORE, levels, Churn(10.0, 0.05, 50.0)),
        "dpm_solver": lambda: dpm_solver(SCORE, levels),
    }[name]()
    x, info = chain(sampler, 2000)
    assert_moments(x, MEAN, COVARIANCE)
    assert (info.nfe.sum(axis=0) == {"euler": 400, "heun": 79, "dpm_solver": 40}[name]).all()


def test_heun_is_the_loop_of_edm():
    """EDM algorithm 2, as its authors write it, with D = x + sigma^2 score."""
    levels = np.append(karras(10, 0.1, 5), 0).astype(np.float64)
    churn = Churn(S_churn=1.0, S_tmin=0.2, S_tmax=5.0, S_noise=1.01)
    keys = sample_keys(3)
    denoise = lambda x, t: x + t**2 * SCORE(x, np.full(3, t))  # noqa: E731
    noise = jax.jit(lambda i: normal(keys, (2,), NOISE, i))
    x_next = np.asarray(gaussian(levels[0])(keys, (2,)), np.float64)
    for i, (t_cur, t_next) in enumerate(itertools.pairwise(levels)):
        x_cur = x_next
        gamma = min(churn.S_churn / 5, np.sqrt(2) - 1) if churn.S_tmin <= t_cur <= churn.S_tmax else 0
        t_hat = t_cur + gamma * t_cur
        x_hat = x_cur + np.sqrt(t_hat**2 - t_cur**2) * churn.S_noise * np.asarray(noise(i))
        d_cur = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x_next = x_hat + (t_next - t_hat) * d_cur
        if i < 4:
            d_prime = (x_next - denoise(x_next, t_next)) / t_next
            x_next = x_hat + (t_next - t_hat) * (0.5 * d_cur + 0.5 * d_prime)
    x, info = chain(heun(SCORE, levels, churn), 3)
    np.testing.assert_allclose(x, x_next, rtol=1e-4, atol=1e-5)
    assert info.nfe.sum(axis=0).tolist() == [9, 9, 9]


def test_dpm_solver_is_the_published_multistep_formula():
    """arXiv 2211.01095, algorithm 2, in its lambda, h and r, for alpha = 1."""
    levels = np.asarray([5.0, 3.0, 1.0, 0.2])
    denoise = lambda x, t: x + t**2 * SCORE(x, np.full(len(x), t))  # noqa: E731
    x, old, lambdas = Z[:3].astype(np.float64), None, -np.log(levels)
    for i in range(3):
        h = lambdas[i + 1] - lambdas[i]
        now = denoise(x, levels[i])
        if old is None:
            D = now
        else:
            r = (lambdas[i] - lambdas[i - 1]) / h
            D = (1 + 1 / (2 * r)) * now - old / (2 * r)
        x, old = levels[i + 1] / levels[i] * x - np.expm1(-h) * D, now
    found, _ = chain(dpm_solver(SCORE, levels, start=fixed(jnp.asarray(Z[:3]))), 3)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def carry():
    """(x, sigma0, sigma1) -> Solved by one compiled program, and the evaluations that it has made."""
    calls = []

    def counted(x, sigma):
        jax.debug.callback(lambda: calls.append(1))
        return SCORE(x, sigma)

    solve = jax.jit(lambda x, sigma0, sigma1: transport(counted, x, sigma0, sigma1))

    def run(x, sigma0, sigma1):
        calls.clear()
        solved = jax.block_until_ready(solve(x, sigma0, sigma1))
        jax.effects_barrier()
        return jax.tree.map(np.asarray, solved), len(calls)

    return run


def test_adaptive_steps_follow_the_exact_flow_there_and_back(carry):
    z = 8 * Z[:4]
    decoded, calls = carry(z, 80.0, 0.01)
    np.testing.assert_allclose(decoded.y, flow(z, 80.0, 0.01), atol=2e-4)
    assert decoded.nfe.max() == calls
    encoded, _ = carry(decoded.y, 0.01, 80.0)
    np.testing.assert_allclose(encoded.y, z, rtol=1e-3, atol=0.01)
    again, _ = carry(encoded.y, 80.0, 0.01)
    np.testing.assert_allclose(again.y, decoded.y, atol=2e-4)


def test_each_sample_has_steps_of_its_own(carry):
    z = 8 * Z[:4]
    together, _ = carry(z, 80.0, 0.01)
    disturbed, _ = carry(np.concatenate([z[:1], 1e3 * z[1:]]), 80.0, 0.01)
    assert len(set(disturbed.nfe.tolist())) > 1
    np.testing.assert_array_equal(disturbed.y[0], together.y[0])
    assert disturbed.nfe[0] == together.nfe[0]


def test_probability_flow_recovers_a_gaussian_given_conditions_of_the_batch():
    """A score that knows its batch (labels, and here one shift per sample) is called for all of it."""
    shift = np.random.default_rng(1).normal(size=(2000, 2)).astype(np.float32)

    def build(shift):
        return probability_flow(lambda x, sigma: SCORE(x - shift, sigma), [80.0, 0.01, 0.0])

    x, info = chain(build, 2000, given=shift)
    sampler = build(shift)
    assert_moments(x - shift, MEAN, COVARIANCE)
    assert sampler.levels.tolist() == [80, 0]
    assert (info.step_size > 0).all() and (info.nfe > 30).all()


def test_slerp_keeps_to_the_arc():
    arc = jax.jit(lambda a, b: slerp(a, b, np.asarray([0.0, 0.5, 1.0])))
    a, b = np.asarray([[3.0, 0.0]]), np.asarray([[0.0, 3.0]])
    np.testing.assert_allclose(arc(a, b)[:, 0], 3 * np.asarray([[1, 0], [np.sqrt(0.5)] * 2, [0, 1]]), atol=1e-6)
    np.testing.assert_allclose(arc(a, a), [a, a, a], atol=1e-6)
    np.testing.assert_allclose(arc(a, 2 * a), [a, 1.5 * a, 2 * a], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: euler(SCORE, [1.0]), "two or more"),
        (lambda: heun(SCORE, [1.0, 0.5], Churn(S_churn=-1.0)), "negative"),
        (lambda: dpm_solver(SCORE, [0.5, 1.0]), "falling"),
        (lambda: probability_flow(SCORE, [1.0, 0.0]), "another one"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
