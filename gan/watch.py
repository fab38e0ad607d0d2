"""Watching a training: what looks at the samples show over time, what is alarming in it, and when to end.

A look is {"step", "score", "coverage", "spread", ...} of fresh samples (`gan.looks`): score is the lower the better;
coverage the share of the data that samples come near; spread the mean distance between two samples over that between
two real ones. All functions here are pure functions of the series of looks and of the logged losses, so a training that
goes on after an interruption comes to the same conclusions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gan.config import Objective

Look = Mapping[str, float]
_CONFIRMED = 2
"""looks in a row that have to say the same"""
_COLLAPSED_COVERAGE, _COLLAPSED_SPREAD = 0.5, 0.7
_DIVERGED = 2.0
_RANKED = 0.99
_SWING, _SWINGS, _WINDOW = 1.5, 4, 8
_SATURATING = ("non_saturating", "least_squares", "hinge")


class Alarm(NamedTuple):
    kind: str
    """collapse, divergence, oscillation or overpowering"""
    step: int
    """where it was noticed"""
    message: str


def best(looks: Sequence[Look]) -> Look | None:
    """The look with the lowest score, of equal ones the first; scores that are not finite count for nothing."""
    finite = [look for look in looks if math.isfinite(look["score"])]
    return min(finite, key=lambda look: look["score"], default=None)


def exhausted(looks: Sequence[Look], patience: int | None) -> bool:
    """Whether the last `patience` looks brought nothing better than those before them."""
    if patience is None or len(looks) <= patience:
        return False
    found = best(looks)
    return found is None or found["step"] < looks[-patience]["step"]


def superseded(kept: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Of the steps of best checkpoints those that are not the best one of a training that ends at any of `ends`."""
    needed = {max((step for step in kept if step <= end), default=None) for end in ends}
    return [step for step in kept if step not in needed]


def alarms(looks: Sequence[Look], logged: Sequence[Mapping[str, float]], objective: Objective) -> list[Alarm]:
    """Everything alarming, at most one alarm of each kind, at the step where it was first noticed.

    `logged`: rows of metrics.jsonl with the critic's "gan.ranked".
    """
    found = [_collapse(looks), _divergence(looks), _oscillation(looks), _overpowering(looks, logged, objective)]
    return sorted((alarm for alarm in found if alarm), key=lambda alarm: alarm.step)


def _collapse(looks: Sequence[Look]) -> Alarm | None:
    """Coverage and spread are both far below what they have been.

    Coverage alone also falls where samples become bad, and spread alone where they become good.
    """
    run, coverage, spread = 0, 0.0, 0.0
    for look in looks:
        low = look["coverage"] < _COLLAPSED_COVERAGE * coverage and look["spread"] < _COLLAPSED_SPREAD * spread
        run = run + 1 if low else 0
        if run == _CONFIRMED:
            message = (
                f"samples have become alike: they cover {look['coverage']:.0%} of the data, after {coverage:.0%}, and "
                f"are {look['spread']:.2f} as far apart as real ones, after {spread:.2f}"
            )
            return Alarm("collapse", int(look["step"]), message)
        coverage, spread = max(coverage, look["coverage"]), max(spread, look["spread"])
    return None


def _divergence(looks: Sequence[Look]) -> Alarm | None:
    """The score is twice its best, and stays there. (A loss that is not finite ends a training at once.)"""
    run, lowest = 0, math.inf
    for look in looks:
        run = run + 1 if not look["score"] <= _DIVERGED * lowest else 0
        if run == _CONFIRMED:
            message = f"the score is {look['score']:.3g}, its best was {lowest:.3g}, and that checkpoint is kept: stop"
            return Alarm("divergence", int(look["step"]), message)
        if math.isfinite(look["score"]):
            lowest = min(lowest, look["score"])
    return None


def _oscillation(looks: Sequence[Look]) -> Alarm | None:
    """The score goes up and down by half of itself, time and again, within a few looks."""
    for end in range(_WINDOW, len(looks) + 1):
        window = looks[end - _WINDOW : end]
        if swings([look["score"] for look in window]) >= _SWINGS:
            message = f"the score swings by more than {_SWING:g} times within {_WINDOW} looks: a lower lr may help"
            return Alarm("oscillation", int(window[-1]["step"]), message)
    return None


def swings(scores: Sequence[float]) -> int:
    """How often a series turns between a low and a high that are a factor of 1.5 apart."""
    logs = np.log(np.maximum(np.nan_to_num(np.asarray(scores, np.float64), nan=np.inf), 1e-300))
    least, count, direction, extreme = math.log(_SWING), 0, 0, float(logs[0])
    for value in map(float, logs[1:]):
        if direction == 0:
            if abs(value - extreme) >= least:
                direction, extreme = (1 if value > extreme else -1), value
        elif (value - extreme) * direction >= 0:
            extreme = value
        elif abs(value - extreme) >= least:
            direction, extreme, count = -direction, value, count + 1
    return count


def _overpowering(looks: Sequence[Look], logged: Sequence[Mapping[str, float]], objective: Objective) -> Alarm | None:
    """The critic is always right and the samples become no better: the generator's gradient then comes from the flat
    end of its loss.

    A Wasserstein critic is meant to be always right, and no alarm; nor is any while samples become better.
    """
    if objective not in _SATURATING:
        return None
    run, before, lowest = 0, 0.0, math.inf
    for look in looks:
        ranked = [row["gan.ranked"] for row in logged if "gan.ranked" in row and before < row["step"] <= look["step"]]
        stuck = bool(ranked) and float(np.mean(ranked)) > _RANKED and not look["score"] < lowest
        run = run + 1 if stuck else 0
        if run == _CONFIRMED:
            message = "the critic ranks more than 99 % of all pairs rightly, and samples become no better: a slower or "
            return Alarm("overpowering", int(look["step"]), f"{message}smaller one may help")
        before, lowest = look["step"], min(lowest, look["score"]) if math.isfinite(look["score"]) else lowest
    return None
