"""The Inception score (Salimans et al. 2016): exp of the mean KL of p(y | x) from p(y), over splits.

It needs of every split only sums over its images, so that no image's probabilities are kept.
"""

from __future__ import annotations

import numpy as np
import scipy.special

SEED = 2020  # torch-fidelity's, so that its splits are ours


def split_of_image(count: int, splits: int, seed: int = SEED) -> np.ndarray:
    """The split [count] of every image: a permutation, then contiguous parts, as torch-fidelity has it."""
    order = np.random.RandomState(seed).permutation(count)
    bounds = np.arange(1, splits) * count // splits
    split = np.empty(count, np.int64)
    split[order] = np.searchsorted(bounds, np.arange(count), side="right")
    return split


class InceptionSums:
    """Running sums of one set of `count` images over `splits` splits."""

    def __init__(self, count: int, splits: int, classes: int):
        self._split = split_of_image(count, splits)
        self._seen = 0
        self.counts = np.zeros(splits)
        self.probabilities = np.zeros((splits, classes))
        self.negative_entropies = np.zeros(splits)

    def add(self, logits: np.ndarray) -> None:
        """The next images' logits [b, classes]."""
        log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
        p = np.exp(log_p)
        split = self._split[self._seen : self._seen + len(p)]
        self._seen += len(p)
        np.add.at(self.counts, split, 1)
        np.add.at(self.probabilities, split, p)
        np.add.at(self.negative_entropies, split, (p * log_p).sum(1))

    def scores(self) -> np.ndarray:
        """The score of every split [splits]."""
        marginal = self.probabilities / self.counts[:, None]
        return np.exp(self.negative_entropies / self.counts - scipy.special.xlogy(marginal, marginal).sum(1))


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits, of logits [n, classes]."""
    sums = InceptionSums(len(logits), splits, logits.shape[1])
    sums.add(logits)
    scores = sums.scores()
    return float(scores.mean()), float(scores.std())
