"""gan/latents.py on constructed latents, of which the answer is known."""

import numpy as np
import pytest

from gan.latents import (
    classifier_accuracy,
    clustering_accuracy,
    fitted_accuracy,
    matched_accuracy,
    of_images,
    whitened,
)
from lib.process import UserError

CENTRES = np.array([[0, 0, 0], [8, 0, 0], [0, 8, 0], [0, 0, 8]], np.float32)


def groups(seed, n, scale):
    """Four groups of unit width, seen through a matrix that makes one direction `scale` times as long."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    x = CENTRES[labels] + rng.normal(size=(n, 3))
    noise = rng.normal(size=(n, 1)) * scale  # larger than the groups are apart, and tells nothing of them
    return np.concatenate([x, noise], axis=1).astype(np.float32).reshape(n, 2, 2, 1), labels


def test_groups_are_found_whatever_the_scale_of_directions():
    train, _ = groups(0, 600, 100.0)
    test, labels = groups(1, 200, 100.0)
    assert clustering_accuracy(train, test, labels, 4, n_init=10) == 1.0
    again = clustering_accuracy(train, test, labels, 4, n_init=10)
    assert again == 1.0
    shuffled = np.random.default_rng(2).permutation(labels)
    assert clustering_accuracy(train, test, shuffled, 4, n_init=10) < 0.45  # a quarter, and what the best match adds


def test_a_fitted_classifier_is_as_good_as_any_can_be():
    def drawn(seed):  # two groups a standard deviation from their border, whose direction has any scale
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, 10_000)
        apart = (2 * labels - 1 + rng.normal(size=10_000)) * 1e-3
        return np.stack([apart, rng.normal(size=10_000) * 100], axis=1).astype(np.float32), labels

    accuracy = fitted_accuracy(*drawn(0), *drawn(1))
    assert accuracy == pytest.approx(0.8413, abs=4 * np.sqrt(0.8413 * 0.1587 / 10_000))  # Phi(1)
    x = np.zeros((5, 2), np.float32)
    assert fitted_accuracy(x, np.ones(5, int), x, np.array([1, 1, 1, 1, 0])) == 0.8


def test_without_whitening_the_long_direction_would_decide():
    from sklearn.cluster import KMeans

    train, labels = groups(0, 600, 100.0)
    clusters = KMeans(4, n_init=10, random_state=0).fit_predict(train.reshape(600, -1))
    assert matched_accuracy(clusters, labels, 4) < 0.5


def test_whitening_gives_the_training_latents_equal_directions():
    train, _ = groups(0, 600, 100.0)
    test, _ = groups(1, 50, 100.0)
    a, b = whitened(train, test)
    np.testing.assert_allclose(a.T @ a, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(a.mean(0), 0, atol=1e-12)
    both = np.concatenate([train, test]).reshape(650, 4).astype(np.float64)
    again, _ = whitened(train, both)
    assert again.shape == a.shape
    transform = np.linalg.lstsq(both[:600] - both[:600].mean(0), a, rcond=None)[0]
    np.testing.assert_allclose(b, (both[600:] - both[:600].mean(0)) @ transform, atol=1e-9)  # the same map for both


def test_the_best_match_is_one_to_one():
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    renamed = np.array([2, 0, 1])[labels]
    assert matched_accuracy(renamed, labels, 3) == 1.0
    # Cluster 0 holds most of two classes: it may stand for one of them only.
    clusters = np.array([0, 0, 0, 0, 0, 1, 2, 2, 2, 2])
    assert matched_accuracy(clusters, labels, 3) == 0.8
    assert matched_accuracy(np.zeros(10, int), labels, 3) == 0.4


def test_the_accuracy_of_logits():
    logits = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert classifier_accuracy(logits, np.array([0, 1, 1])) == pytest.approx(2 / 3)


def test_latents_of_images_in_batches_of_one_shape():
    shapes = []

    def encode(x):
        shapes.append(x.shape)
        return 2.0 * x

    images = np.arange(7 * 4, dtype=np.float32).reshape(7, 2, 2, 1)
    assert np.array_equal(of_images(encode, images, batch_size=3), 2 * images.reshape(7, 4))
    assert shapes == [(3, 2, 2, 1)] * 3


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="10 clusters"):
        clustering_accuracy(np.zeros((5, 2)), np.zeros((5, 2)), np.zeros(5, int), 10)
