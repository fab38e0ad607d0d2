"""The line protocol of `python -m gan.timing`, and the PyTorch side where PyTorch is installed."""

import importlib.util
import json

import numpy as np
import pytest

from gan import timing
from launch.bench import gan as bench
from launch.bench.rounds import check_same
from lib.child import answers
from lib.process import UserError

TINY = {"width": 2, "critic_width": 2, "latent": 3, "batch_size": 4}


def ask(*requests: dict) -> list[dict]:
    return [json.loads(answer) for answer in answers(timing.actions(), map(json.dumps, requests))]


@pytest.mark.slow
def test_cycles_are_timed_and_players_recorded(tmp_path):
    weights, record = str(tmp_path / "weights.npz"), str(tmp_path / "record.npz")
    recipe, first, again, _, memory = ask(
        {"do": "prepare", "problem": "wgan_gp", "weights": weights, **TINY, "n_critic": 2},
        {"do": "run", "cycles": 2},
        {"do": "run", "cycles": 2},
        {"do": "record", "out": record},
        {"do": "memory"},
    )
    assert first["seconds"] > again["seconds"] > 0 and memory["peak_mib"] > 50
    assert (recipe["n_critic"], recipe["batch_size"], recipe["gradient_penalty"]) == (2, 4, 10.0)
    with np.load(weights) as file, np.load(record) as found:
        assert sum(file[name].size for name in file) == recipe["parameters"]
        assert set(file) <= set(found) and found["x"].shape == (4, 28, 28, 1)
        assert all(found[name].shape == file[name].shape for name in file)


def test_the_problems_are_what_the_page_says():
    assert set(timing.PROBLEMS) == set(bench.CYCLES)
    assert timing.PROBLEMS["wgan_gp"].optim.n_critic == 5 and timing.PROBLEMS["sngan"].network.critic_norm == "spectral"


def test_requests_that_cannot_be_met(tmp_path):
    with pytest.raises(UserError, match="cannot do 'fly': choose from prepare"):
        ask({"do": "fly"})
    with pytest.raises(UserError, match="unknown problem 'chess'"):
        ask({"do": "prepare", "problem": "chess", "weights": str(tmp_path / "w.npz")})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is an extra")
@pytest.mark.parametrize("problem", bench.CYCLES)
def test_both_sides_compute_the_same(problem, tmp_path):
    found = bench.measure(problem, 1, tmp_path, 1, seeds=2, **TINY)
    check_same({problem: found}, bench.LIMITS)
    assert found["seeds_over_one"] > 0 and "2 seeds in" in bench.table(problem, found)
    assert found["ratio"] > 0 and problem in bench.table(problem, found)
