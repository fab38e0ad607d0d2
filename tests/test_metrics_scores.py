"""Inception score, kernel distances, neighbourhoods and toys: known answers on constructed sets."""

import json
from pathlib import Path

import numpy as np
import pytest
from metrics_cases import features

from lib.metrics import frechet, inception_score, kernel, manifold, toys


def rng(seed=0):
    return np.random.default_rng(seed)


# Inception score


def test_inception_score_is_one_where_every_image_is_the_same():
    logits = np.tile(rng().standard_normal(7), (50, 1))
    np.testing.assert_allclose(inception_score.inception_score(logits), (1, 0), atol=1e-12)


def test_inception_score_is_one_where_the_net_knows_nothing():
    np.testing.assert_allclose(inception_score.inception_score(np.zeros((40, 5))), (1, 0), atol=1e-12)


def test_inception_score_is_k_for_sure_and_even_classes():
    classes = 10
    split = inception_score.split_of_image(400, 10)
    label = np.empty(400, int)
    for s in range(10):  # every split has every class equally often
        label[split == s] = np.arange(40) % classes
    assert inception_score.inception_score(1e4 * np.eye(classes)[label])[0] == pytest.approx(classes, rel=1e-12)


@pytest.mark.parametrize("count", [10, 57, 1003])
def test_splits_are_a_shuffle_into_equal_parts(count):
    split = inception_score.split_of_image(count, 10)
    sizes = np.bincount(split, minlength=10)
    assert sizes.sum() == count and sizes.max() - sizes.min() <= 1
    assert count < 20 or (np.diff(split) < 0).any()  # not contiguous in the images' own order


def test_sums_give_what_all_probabilities_give_however_they_come():
    logits = 3 * rng().standard_normal((203, 6))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.random.RandomState(2020).permutation(203)
    parts = [p[order][i * 203 // 10 : (i + 1) * 203 // 10] for i in range(10)]  # torch-fidelity's definition
    direct = [np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(0))), 1))) for q in parts]
    sums = inception_score.InceptionSums(203, 10, 6)
    for chunk in np.array_split(logits, [1, 50, 50, 170]):
        sums.add(chunk)
    np.testing.assert_allclose(sums.scores(), direct, rtol=1e-12)
    np.testing.assert_allclose(inception_score.inception_score(logits), (np.mean(direct), np.std(direct)), rtol=1e-12)


# Kernel distance


def test_kid_is_unbiased_where_distributions_are_equal():
    """The mean over many pairs of sets is zero within its error; leaving the diagonals in would shift it."""
    pairs = [(rng(2 * i).standard_normal((30, 8)), rng(2 * i + 1).standard_normal((30, 8))) for i in range(400)]
    found = np.array([kernel.mmd2(x, y, kernel.polynomial_kernel) for x, y in pairs])
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert abs(found.mean()) < 3 * error
    biased = [
        kernel.polynomial_kernel(x, x).mean()
        + kernel.polynomial_kernel(y, y).mean()
        - 2 * kernel.polynomial_kernel(x, y).mean()
        for x, y in pairs
    ]
    assert np.mean(biased) > 10 * error


def test_mmd_by_its_definition():
    x, y = rng().standard_normal((4, 3)), rng(1).standard_normal((5, 3))
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    within_x = np.mean([k(x[i], x[j]) for i in range(4) for j in range(4) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    exact = within_x + within_y - 2 * np.mean([k(a, b) for a in x for b in y])
    assert kernel.mmd2(x, y, kernel.polynomial_kernel) == pytest.approx(exact, rel=1e-12)
    assert kernel.kid(x, y[:4], subsets=3)[0] == pytest.approx(kernel.mmd2(x, y[:4], kernel.polynomial_kernel))


def test_kid_sees_a_shift_and_float32_features_do_not_matter():
    x, y = rng().standard_normal((2, 1500, 16))
    near, far = kernel.kid(x, y, 10), kernel.kid(x, y + 0.5, 10)
    assert abs(near[0]) < 3 * near[1] and far[0] > 20 * far[1]
    half = kernel.kid(x.astype(np.float32), (y + 0.5).astype(np.float32), 10)
    np.testing.assert_allclose(half, far, rtol=1e-6)


# Neighbourhoods


def test_separated_sets():
    x, y = rng().standard_normal((2, 100, 5))
    found = manifold.compare(x, y + 100)
    assert all(values.sum() == 0 for values in found)


def test_a_set_with_itself():
    x = rng().standard_normal((100, 5)).astype(np.float32)
    found = manifold.compare(x, x)
    assert all(found.precision) and all(found.recall) and all(found.coverage) and all(found.copying)


def test_a_collapsed_generator_has_precision_but_no_recall():
    x = rng().standard_normal((500, 2))
    y = x[7] + 1e-3 * rng(1).standard_normal((500, 2))
    found = manifold.compare(x, y)
    assert found.precision.mean() == 1
    assert found.recall.mean() < 0.02
    assert found.coverage.mean() < 0.05


def test_half_of_two_clusters():
    """Real images in two clusters, generated ones in one of them and in a third."""
    centres = np.array([[0.0, 0], [50, 0], [0, 50]])
    draw = lambda seed, *which: np.concatenate(  # noqa: E731
        [centres[i] + rng(seed + i).uniform(-1, 1, (300, 2)) for i in which]
    )
    found = manifold.compare(draw(0, 0, 1), draw(10, 0, 2))
    assert found.precision.mean() == pytest.approx(0.5, abs=0.03)
    assert found.recall.mean() == pytest.approx(0.5, abs=0.03)
    assert found.coverage.mean() == pytest.approx(0.5, abs=0.03)
    assert found.density.mean() == pytest.approx(0.5, abs=0.06)


def test_density_and_copying_of_fresh_samples():
    x, y = rng().standard_normal((2, 3000, 4))
    found = manifold.compare(x, y)
    assert found.density.mean() == pytest.approx(1, abs=0.05)
    assert found.copying.mean() == pytest.approx(0.5, abs=0.05)


def test_by_all_pairs_across_blocks(monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", 17)
    x, y = rng().standard_normal((60, 3)), rng(1).standard_normal((45, 3)) * 1.3
    found = manifold.compare(x, y, k=3, k_density=5)
    far = lambda a, b: np.linalg.norm(a[:, None] - b, axis=-1)  # noqa: E731
    xx, yy, yx = np.sort(far(x, x), 1), np.sort(far(y, y), 1), far(y, x)  # column 0: itself
    np.testing.assert_array_equal(found.precision, (yx <= xx[:, 3]).any(1))
    np.testing.assert_array_equal(found.recall, (yx <= yy[:, [3]]).any(0))
    np.testing.assert_allclose(found.density, (yx < xx[:, 5]).sum(1) / 5)
    np.testing.assert_array_equal(found.coverage, (yx < xx[:, 5]).any(0))
    closest = yx.argmin(1)
    np.testing.assert_array_equal(found.copying, yx.min(1) < xx[closest, 1])


def test_nearest_finds_copies_exactly():
    x = 1000 + rng().standard_normal((700, 30)).astype(np.float32)
    copies = rng(1).integers(0, 700, 50)
    indices, distances = manifold.nearest(x, x[copies], k=3)
    np.testing.assert_array_equal(indices[:, 0], copies)
    assert (distances[:, 0] == 0).all() and (np.diff(distances, axis=1) > 0).all()
    np.testing.assert_allclose(distances[:, 1], np.linalg.norm(x[copies] - x[indices[:, 1]], axis=1), rtol=1e-5)


# Toys


def ring(seed, n, modes=8, radius=2.0, sigma=0.02):
    angles = 2 * np.pi * np.arange(modes) / modes
    centres = radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    return centres, centres[np.arange(n) % modes] + sigma * rng(seed).standard_normal((n, 2))


def test_all_modes():
    centres, points = ring(0, 4000)
    found = toys.mode_coverage(points, centres, 0.02)
    assert found["modes"].value == 8 and found["modes"].uncertainty == 0
    # the share of a two-dimensional Gaussian within 3 sigma is 1 - exp(-9/2)
    assert abs(found["good"].value - (1 - np.exp(-4.5))) < 4 * found["good"].uncertainty
    assert 0 <= found["kl_from_uniform"].value < 0.01


def test_some_modes_and_none():
    centres, points = ring(0, 4000)
    two = points[np.arange(4000) % 8 < 2]
    found = toys.mode_coverage(two, centres, 0.02)
    assert found["modes"].value == 2
    assert found["kl_from_uniform"].value == pytest.approx(np.log(4), abs=0.01)
    nowhere = toys.mode_coverage(two + 10, centres, 0.02)
    assert nowhere["modes"].value == nowhere["good"].value == 0 and np.isnan(nowhere["kl_from_uniform"].value)


def test_mmd_of_points():
    _, x = ring(0, 1000)
    _, y = ring(1, 1000)
    same, other = toys.mmd(x, y), toys.mmd(x, y[np.arange(1000) % 8 < 4])
    assert abs(same.value) < 4 * same.uncertainty
    assert other.value > 10 * other.uncertainty
    with pytest.raises(ValueError, match="at least"):
        toys.mmd(x[:5], y)


# Against torch-fidelity


def test_torch_fidelitys_numbers():
    """On the same features, committed with the script that made them: reference/make_metrics.py."""
    published = json.loads((Path(__file__).parent / "reference" / "metrics.json").read_text())
    real, generated = features()
    logits = 3 * features(seed=5, dimension=10)[0]
    moments = [f(x.astype(np.float64)) for x in (real, generated) for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))]
    verdicts = manifold.compare(real, generated)
    ours = {
        "frechet_inception_distance": frechet.frechet_distance(*moments),
        "precision": verdicts.precision.mean(),
        "recall": verdicts.recall.mean(),
    }
    kid, isc = kernel.kid(real, generated, subset_size=300), inception_score.inception_score(logits)
    ours |= dict(zip(("kernel_inception_distance_mean", "kernel_inception_distance_std"), kid, strict=True))
    ours |= dict(zip(("inception_score_mean", "inception_score_std"), isc, strict=True))
    assert {name: value for name, value in published.items() if name != "f_score"} == pytest.approx(ours, rel=1e-6)
