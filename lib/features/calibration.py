"""Whether a classifier's probabilities mean what they say: temperature scaling (Guo et al., arXiv 1706.04599)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax

Head = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Scores:
    """What a classifier reaches on labelled images."""

    images: int
    accuracy: float
    """fraction whose largest logit is that of the label"""
    nll_nats: float
    """mean negative log-likelihood; of one-vs-rest heads summed over the classes"""
    calibration_error: float
    """mean |confidence - accuracy| over 15 bins of confidence in the chosen class, weighted by their images"""


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, head: Head) -> float:
    """In nats per image; logits [n, classes], labels [n]."""
    logits = np.asarray(logits, np.float64)
    if head == "softmax":
        return float(-np.mean(np.take_along_axis(log_softmax(logits, -1), labels[:, None], -1)))
    sign = np.where(np.arange(logits.shape[-1]) == labels[:, None], 1.0, -1.0)
    return float(-np.mean(np.sum(log_expit(sign * logits), -1)))


def fit_temperature(logits: np.ndarray, labels: np.ndarray, head: Head) -> float:
    """The T for which logits / T are most likely."""
    logits = np.asarray(logits, np.float64)
    found = minimize_scalar(
        lambda log_t: negative_log_likelihood(logits / np.exp(log_t), labels, head), bounds=(-3, 3), method="bounded"
    )
    return float(np.exp(found.x))


def score(logits: np.ndarray, labels: np.ndarray, head: Head) -> Scores:
    """Accuracy, likelihood and calibration of logits [n, classes]."""
    logits = np.asarray(logits, np.float64)
    right = logits.argmax(-1) == labels
    confidence = (softmax(logits, -1) if head == "softmax" else expit(logits)).max(-1)
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(np.sum(confidence[bins == i] - right[bins == i])) for i in range(15)]
    return Scores(
        images=len(labels),
        accuracy=float(np.mean(right)),
        nll_nats=negative_log_likelihood(logits, labels, head),
        calibration_error=float(np.sum(gaps) / len(labels)),
    )
