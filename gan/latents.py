"""What the latents of an autoencoder know of classes that it was never told: clustering and linear classification.

Protocol of ACAI (Berthelot et al. 2018, arXiv 1807.07543, section 4), on latents [n, ...] of training and test images.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from lib.process import UserError

N_INIT = 1000
"""random starts of k-means, of which the one with the smallest sum of squares counts"""
_EPSILON = 1e-5  # added to singular values


def of_images(encode: Callable[[jax.Array], jax.Array], images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Latents float32 [n, d] of images [n, h, w, c], encoded `batch_size` at a time by a jitted function."""
    return in_batches(encode, images, batch_size).reshape(len(images), -1)


def in_batches(call: Callable[[jax.Array], jax.Array], x: np.ndarray, batch_size: int) -> np.ndarray:
    """`call` of x [n, ...], `batch_size` rows at a time: [n, ...]."""
    out = []
    for start in range(0, len(x), batch_size):
        rows = x[start : start + batch_size]
        short = batch_size - len(rows)
        padded = np.concatenate([rows, np.repeat(rows[:1], short, axis=0)]) if short else rows
        out.append(np.asarray(call(padded))[: len(rows)])  # one shape, one program
    return np.concatenate(out)


def whitened(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, less the mean of `train` [n, d], in the principal directions of `train`, each divided by its size there."""
    train = train.reshape(len(train), -1).astype(np.float64)
    test = test.reshape(len(test), -1).astype(np.float64)
    mean = train.mean(axis=0)
    _, size, directions = np.linalg.svd(train - mean, full_matrices=False)
    transform = directions.T / (size + _EPSILON)
    return (train - mean) @ transform, (test - mean) @ transform


def matched_accuracy(clusters: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """The part of rows whose cluster [n] stands for their label [n], under the best one-to-one assignment (Munkres)."""
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (clusters, labels), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum()) / len(labels)


def clustering_accuracy(
    train: np.ndarray, test: np.ndarray, test_labels: np.ndarray, classes: int, *, n_init: int = N_INIT, seed: int = 0
) -> float:
    """k-means of the whitened training latents, with as many clusters as classes, judged on the test latents.

    The assignment of clusters to classes is the best one for the test labels, as published.
    Raises UserError where there are fewer training latents than classes.
    """
    from sklearn.cluster import KMeans

    if len(train) < classes:
        raise UserError(f"{classes} clusters need as many training images, not {len(train)}")
    train, test = whitened(train, test)
    kmeans = KMeans(classes, init="random", n_init=n_init, max_iter=1000, random_state=seed).fit(train)
    return matched_accuracy(kmeans.predict(test), np.asarray(test_labels), classes)


def fitted_accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Of multinomial logistic regression, fitted to the latents [n, d] and labels [n] of training images.

    The published classifier is one that has been trained to its end; after a short training of the autoencoder the one
    beside it has not. Where the training images have one class alone, that is what is answered.
    """
    if len(np.unique(labels)) == 1:
        return float(np.mean(test_labels == labels[0]))
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train, labels)
    return float(fitted.score(test, test_labels))


def classifier_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Of the layer that was trained beside the autoencoder: logits [n, classes], labels int [n]."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))
