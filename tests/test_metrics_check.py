"""launch/metrics_check.py: images that do get worse, and a verdict on order that can be wrong."""

import numpy as np
import pytest
from metrics_cases import pixels

from launch import metrics_check
from lib.metrics.result import Protocol, Result

PROTOCOL = Protocol("cifar10_cnn", "0" * 64, "none", "train", "test", 9, 9, "uint8 as given", "")


def results(metric, values):
    """{set: {metric: Result}} with the values of the blurred and then of the noisy sets."""
    labels = list(dict.fromkeys(label for chain in metrics_check.CHAINS["cifar10"] for label in chain))
    return {
        label: {f"{metric}.cifar10_cnn": Result(value, 0.1, "made up", PROTOCOL)}
        for label, value in zip(labels, values, strict=True)
    }


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_every_step_is_further_from_the_test_images(name):
    shape = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[name]
    test = pixels(20, shape=shape, low=60, high=200)
    found = metrics_check.sets(name, test)
    assert set(found) == {label for chain in metrics_check.CHAINS[name] for label in chain}
    away = {
        label: np.mean((np.concatenate(list(images.batches(7))).astype(float) - test) ** 2)
        for label, images in found.items()
    }
    for chain in metrics_check.CHAINS[name]:
        assert away[chain[0]] == 0
        assert (np.diff([away[label] for label in chain]) > 0).all()


@pytest.mark.parametrize(
    ("metric", "values", "wrong"),
    [
        ("fid", (0, 1, 2, 3, 4, 1, 2, 3, 4), ("", "")),
        ("fid", (0, 1, 2, 3, 2.5, 1, 2, 3, 4), ("blurred 2 px, blurred 4 px", "")),
        ("fid", (0, -1, 2, 3, 4, -1, 2, 3, 4), ("", "")),  # barely changed images do not count
        ("precision", (0.9, 0.91, 0.5, 0, 0, 0.9, 0.9, 0.9, 0.1), ("", "test, noisy 24/255")),
        ("copying", (0.4, 0.4, 0.3, 0.2, 0, 0.4, 0.6, 0.7, 0.8), ("", "")),
        ("copying", (0.4, 0.4, 0.6, 0.3, 0, 0.4, 0.6, 0.7, 0.8), ("blurred 1 px, blurred 2 px", "")),
    ],
)
def test_the_verdict_on_order(metric, values, wrong):
    found = results(metric, values)
    assert tuple(metrics_check.disorder(metric, chain, found) for chain in metrics_check.CHAINS["cifar10"]) == wrong


def test_page_and_plot(tmp_path):
    found = results("precision", (0.9, 0.91, 0.5, 0, 0, 0.9, 0.9, 0.9, 0.1))
    env = {
        "utc_start": "2026-01-01",
        "cores": 2,
        "devices": ["cpu"],
        "versions": {"jax": "0"},
        "python": "3",
        "git_commit": None,
    }
    page = metrics_check.page({"command": "the command", "environment": env}, {"cifar10": found})
    assert "    the command\n" in page and "CIFAR-10 (JPEG)" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| precision.cifar10_cnn |")]
    assert row.endswith("| wrong: test, noisy 24/255 |")
    assert metrics_check.plot(found, tmp_path / "x.png").stat().st_size > 1000
