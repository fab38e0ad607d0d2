"""gan/watch.py: every alarm is provoked by a series that deserves it, and silent on healthy ones. (Of real trainings:
tests/test_gan_train.py.)"""

import math

import numpy as np
import pytest

from gan import watch

RNG = np.random.default_rng(0)


def looks(score, coverage=None, spread=None):
    n = len(score)
    coverage = np.linspace(0.3, 0.8, n) if coverage is None else coverage
    spread = np.full(n, 0.95) if spread is None else spread
    rows = zip(score, coverage, spread, strict=True)
    return [
        {"step": 100 * (i + 1), "score": float(s), "coverage": float(c), "spread": float(d)}
        for i, (s, c, d) in enumerate(rows)
    ]


def logged(ranked, loss=1.0):
    return [{"step": 10 * (i + 1), "gan.ranked": float(r), "gan.loss": loss} for i, r in enumerate(ranked)]


def healthy(seed):
    """Falls and then stays, with a tenth of noise; the critic is right more often than not."""
    rng = np.random.default_rng(seed)
    noise = np.exp(0.1 * rng.normal(size=(3, 30)))
    fall = 5 + 200 * np.exp(-np.arange(30) / 4)
    coverage = 0.8 * (1 - np.exp(-np.arange(1, 31) / 4)) * noise[1]
    return looks(fall * noise[0], coverage, 0.9 * noise[2]), logged(0.75 + 0.1 * rng.normal(size=300))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("objective", ["non_saturating", "wasserstein"])
def test_healthy_trainings_are_left_alone(seed, objective):
    assert watch.alarms(*healthy(seed), objective) == []


def test_collapse():
    seen, rows = healthy(0)
    after = lambda **change: [{**look, "step": look["step"] + 3000, **change} for look in seen[-3:]]  # noqa: E731
    collapsed = seen + after(coverage=0.1, spread=0.3)
    (alarm,) = watch.alarms(collapsed, rows, "hinge")
    assert alarm.kind == "collapse" and alarm.step == collapsed[-2]["step"]
    assert "cover 10% of the data" in alarm.message
    # Bad samples that differ, good ones that lie closer together, and a single look are no collapse.
    for later in (after(coverage=0.1), after(spread=0.3), after(coverage=0.1, spread=0.3)[:1]):
        assert watch.alarms(seen + later, rows, "hinge") == []


def test_divergence_of_the_score():
    """As in published logs of a DCGAN (from 49.0 to 137) and of a projection discriminator (from 33.8 to 152)."""
    for lowest, end in ((49.0, 137.0), (33.8, 152.0)):
        scores = [200, 120, 80, lowest, lowest * 1.1, lowest * 1.5, end * 0.9, end]
        (alarm,) = watch.alarms(looks(scores), [], "non_saturating")
        assert alarm.kind == "divergence" and alarm.step == 800 and f"{lowest:.3g}" in alarm.message
    assert watch.alarms(looks([200, 100, 50, 120, 49, 48]), [], "hinge") == []  # one bad look is none


def test_oscillation():
    scores = [60, 30, 55, 28, 50, 27, 52, 30]
    assert "oscillation" in [alarm.kind for alarm in watch.alarms(looks(scores), [], "wasserstein")]
    assert watch.swings(scores) == 6
    assert watch.swings([60, 40, 45, 30, 33, 25]) == 0 and watch.swings([10, 30, 10]) == 1


def test_an_overpowering_critic():
    rows = logged([0.7] * 20 + [0.999] * 20)
    stuck = looks([50, 40, 40, 41])
    (alarm,) = watch.alarms(stuck, rows, "non_saturating")
    assert alarm.kind == "overpowering" and alarm.step == 400
    assert watch.alarms(stuck, rows, "wasserstein") == [] and watch.alarms(stuck[:3], rows, "hinge") == []
    assert watch.alarms(looks([50, 40, 41, 39]), rows, "hinge") == []  # samples become better
    assert watch.alarms(stuck, logged([0.7] * 20 + [0.999] * 10 + [0.9] * 10), "hinge") == []


def test_best_checkpoints_that_nobody_needs():
    assert watch.superseded([700, 900], [800, 1000]) == []  # whoever goes on from 800 had its best at 700
    assert watch.superseded([500, 700, 900, 950], [800, 1000]) == [500, 900]
    assert watch.superseded([100, 200], []) == [100, 200] and watch.superseded([], [800]) == []


def test_the_best_look_and_the_end():
    seen = looks([50, 20, 30, math.nan, 20, 40])
    assert watch.best(seen)["step"] == 200 and watch.best([]) is None and watch.best(looks([math.nan])) is None
    ended = [watch.exhausted(seen[: i + 1], 3) for i in range(len(seen))]
    assert ended == [False, False, False, False, True, True]
    assert not watch.exhausted(seen, None) and not watch.exhausted(looks([3, 2, 1, 0.5]), 1)
