"""lib/metrics/frechet.py against closed forms, both routes, singular covariances too."""

import numpy as np
import pytest
import scipy.linalg

from lib.metrics import frechet
from lib.metrics.statistics import Statistics


def rng(seed=0):
    return np.random.default_rng(seed)


def spd(d, seed=0):
    a = rng(seed).standard_normal((d, d))
    return a @ a.T / d + 0.1 * np.eye(d)


def statistics(rows, stored=None):
    stored = len(rows) if stored is None else stored
    return Statistics(
        len(rows), rows.mean(0), np.cov(rows.T), np.arange(stored), rows[:stored].astype(np.float32), np.zeros(10)
    )


def both_routes(m1, s1, m2, s2):
    # Cholesky factors are not those of the eigenvalue route: the two share nothing but the inputs.
    factors = [np.linalg.cholesky(s).T for s in (s1, s2)]
    return frechet.frechet_distance(m1, s1, m2, s2), frechet.frechet_distance_of_factors(m1, factors[0], m2, factors[1])


def test_commuting_gaussians():
    d = 40
    rotation = np.linalg.qr(rng().standard_normal((d, d)))[0]
    a, b = rng(1).uniform(0.1, 30, (2, d))
    m1, m2 = rng(2).standard_normal((2, d))
    exact = np.sum((m1 - m2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    s1, s2 = ((rotation * values) @ rotation.T for values in (a, b))
    np.testing.assert_allclose(both_routes(m1, s1, m2, s2), exact, rtol=1e-10)


def test_two_dimensions_that_do_not_commute():
    s1, s2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.4], [-0.4, 3.0]])
    m1, m2 = np.array([1.0, -2.0]), np.array([0.0, 0.5])
    # the root of a 2 x 2 matrix A has trace √(Tr A + 2 √det A)
    root = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1 @ s2)))
    exact = 1 + 6.25 + np.trace(s1 + s2) - 2 * root
    np.testing.assert_allclose(both_routes(m1, s1, m2, s2), exact, rtol=1e-12)


def test_against_scipys_matrix_root():
    d = 60
    s1, s2, m = spd(d, 1), spd(d, 2), np.zeros(d)
    exact = np.trace(s1 + s2) - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    np.testing.assert_allclose(both_routes(m, s1, m, s2), exact, rtol=1e-9)


def test_samples_of_two_gaussians():
    """White samples turned into ones whose own moments are those wanted: the closed form then holds exactly."""
    d, n = 12, 300

    def with_moments(mean, cov, seed):
        x = rng(seed).standard_normal((n, d))
        x -= x.mean(0)
        x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
        return x @ np.linalg.cholesky(cov).T + mean

    shift = np.arange(d) / 10
    real = statistics(with_moments(np.zeros(d), 4 * np.eye(d), 3))
    generated = statistics(with_moments(shift, 9 * np.eye(d), 4))
    exact = np.sum(shift**2) + d * (3 - 2) ** 2
    assert frechet.fid(real, generated) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("n", [20, 500])
def test_a_set_with_itself(n):
    same = statistics(10 * np.maximum(rng().standard_normal((n, 64)), 0))
    assert abs(frechet.fid(same, same)) < 1e-8


def test_rank_one_is_exact():
    """Two images a side: S = a aᵀ and b bᵀ, and the trace of the root of their product is |a·b|."""
    d = 300
    x, y = 50 * rng().standard_normal((2, 2, d))
    x, y = x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)
    a, b = (x[0] - x[1]) / np.sqrt(2), (y[0] - y[1]) / np.sqrt(2)
    exact = np.sum((x.mean(0) - y.mean(0)) ** 2) + a @ a + b @ b - 2 * abs(a @ b)
    assert frechet.fid(statistics(x), statistics(y)) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("others", [30, 4000])
def test_fewer_images_than_dimensions(others):
    """Features that live in a known subspace: there the covariances are regular and scipy's root is exact."""
    d, inner, n = 200, 15, 40
    basis = np.linalg.qr(rng().standard_normal((d, inner)))[0]
    small, large = rng(1).standard_normal((n, inner)) * 3, rng(2).standard_normal((others, inner)) + 0.3
    s1, s2 = np.cov(small.T), np.cov(large.T)
    exact = np.sum((small.mean(0) - large.mean(0)) ** 2) + np.trace(s1 + s2)
    exact -= 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    a, b = small @ basis.T, large @ basis.T
    few, many = (Statistics(len(x), x.mean(0), np.cov(x.T), np.arange(len(x)), x, np.zeros(10)) for x in (a, b))
    assert frechet.fid(many, few) == pytest.approx(exact, rel=1e-10)
    assert frechet.fid(few, many) == pytest.approx(exact, rel=1e-10)
    by_eigenvalues = frechet.frechet_distance(few.mean, few.covariance, many.mean, many.covariance)
    assert by_eigenvalues == pytest.approx(exact, rel=1e-5)
    # without the stored features of the large set its covariance has to do, and does
    without = Statistics(len(b), many.mean, many.covariance, many.rows[:5], many.features[:5], many.scores)
    assert frechet.fid(without, few) == pytest.approx(exact, rel=1e-7)


def test_a_constant_feature_and_a_constant_set():
    x, y = rng().standard_normal((2, 400, 8))
    x[:, 3] = y[:, 3] = 7.0
    assert np.isfinite(frechet.fid(statistics(x), statistics(y)))
    constant = statistics(np.tile(y[:1], (400, 1)))
    exact = np.sum((x.mean(0) - y[0]) ** 2) + np.trace(np.cov(x.T))
    assert frechet.fid(statistics(x), constant) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(400, 5), (30, 50)])
def test_bootstrap_is_near_the_spread_over_fresh_sets(n, d):
    def fresh(seed):
        return statistics(rng(seed).standard_normal((n, d))), statistics(rng(seed + 1).standard_normal((n, d)) + 0.5)

    spread = np.std([frechet.fid(*fresh(2 * i)) for i in range(60)], ddof=1)
    found = np.mean([frechet.bootstrap_fid(*fresh(1000 + 2 * i), 20, i) for i in range(5)])
    assert 0.6 * spread < found < 1.7 * spread


def test_bootstrap_counts_all_images_not_only_the_stored_ones():
    x, y = rng().standard_normal((2, 4000, 4))
    y += 1
    stored = [frechet.bootstrap_fid(statistics(x, k), statistics(y, k), 60, 0) for k in (500, 4000)]
    assert 0.6 < stored[0] / stored[1] < 1.6  # √8 = 2.8 if it were for the stored ones
