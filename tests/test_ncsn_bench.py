"""The line protocol of `python -m ncsn.timing`, and the PyTorch side where PyTorch is installed."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch.bench import ncsn as bench
from lib.process import UserError
from ncsn import timing

pytestmark = pytest.mark.slow  # long; `make test-slow`

TINY = {
    "mlp": {"count": 6, "steps": 3, "sigmas": [2.0, 1.0], "fields": {"width": 8, "layers": 2}},
    "unet": {
        "count": 4,
        "shape": [8, 8, 2],
        "sigmas": [2.0, 0.5, 0.0],
        "fields": {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
    },
    "refinenet": {"count": 4, "shape": [8, 8, 1], "steps": 1, "sigmas": [1.0, 0.1], "fields": {"ngf": 8}},
}


def ask(*requests: dict) -> list[dict]:
    return [json.loads(answer) for answer in timing.serve(json.dumps(request) for request in requests)]


def test_a_chain_is_timed_and_can_be_repeated(tmp_path):
    weights, record = str(tmp_path / "weights.npz"), str(tmp_path / "record.npz")
    recipe, first, again, _, looped, evaluations, recorded, memory = ask(
        {"do": "prepare", "problem": "mlp", "weights": weights, **TINY["mlp"]},
        {"do": "chain"},
        {"do": "chain"},
        {"do": "loop"},
        {"do": "loop"},
        {"do": "evaluations", "calls": 2},
        {"do": "record", "out": record},
        {"do": "memory"},
    )
    assert first["seconds"] > again["seconds"] > 0 and looped["seconds"] > 0
    assert evaluations["called_seconds"] > 0 and evaluations["compiled_seconds"] > 0
    assert recorded["loop_difference"] < 1e-5
    assert memory["peak_mib"] > 50 or np.isnan(memory["peak_mib"])
    assert recipe["evaluations"] == 7 and recipe["backend"] == "cpu"
    with np.load(weights) as file:
        assert file["dense1.kernel"].shape == (8, 8)
        assert sum(file[name].size for name in file) == recipe["parameters"]

    problem = timing.Problem(**{name: recipe[name] for name in ("network", *TINY["mlp"], "shape", "step_size")})
    model = problem.model()
    score = jax.jit(functools.partial(model.score, timing.random_params(model)))
    with np.load(record) as file:
        x = file["start"]
        for sigma, z in zip(np.repeat([2.0, 1.0], 3), file["noise"][:6], strict=True):
            alpha = 0.1 * sigma**2
            x = x + alpha * score(x, sigma) + np.sqrt(2 * alpha) * z
        x = x + score(x, 1.0)
        np.testing.assert_allclose(file["samples"], x, rtol=1e-4, atol=1e-5)


def test_the_problems_are_what_the_page_says():
    assert {name: p.evaluations for name, p in timing.PROBLEMS.items()} == {"mlp": 1001, "unet": 35, "refinenet": 31}
    assert set(timing.PROBLEMS) == set(bench.PROBLEMS)
    for problem in timing.PROBLEMS.values():
        json.dumps(dataclasses.asdict(problem))
        sampler = problem.sampler(lambda x, sigma: x)
        assert (np.diff(sampler.levels) <= 0).all() and sampler.levels[-1] == 0


def test_a_request_that_cannot_be_met():
    with pytest.raises(UserError, match="cannot do 'fly': choose from prepare"):
        ask({"do": "fly"})
    with pytest.raises(UserError, match="unknown problem 'moon'"):
        ask({"do": "prepare", "problem": "moon", "weights": ""})


def test_the_table_names_every_variant():
    variant = {"samples_per_s": 10.0, "median_s": 0.5, "first_s": 2.0, "peak_mib": 300.0}
    results = {
        "parameters": 5, "count": 4, "evaluations": 3, "shape": [8, 8, 1], "ratio_torch": 1.25, "ratio_loop": 2.0,
        "chain_per_evaluations": 0.9, "chain_per_compiled_evaluations": 1.05, "differences": {"loop": 1e-6},
        "variants": {"chain": variant, "torch contiguous": variant},
    }  # fmt: skip
    text = bench.table("unet", results)
    assert "4 samples of 8x8x1, 3 evaluations" in text and "1.25 times PyTorch (bar 1), 2.00 times the loop" in text
    assert "torch contiguous" in text and "loop 1.0e-06" in text


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch():
    done = subprocess.run([sys.executable, "-m", "launch.bench.ncsn"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 'error: this benchmark compares with PyTorch: pip install -e ".[bench]"\n'


@pytest.mark.parametrize("name", TINY)
def test_pytorch_ends_at_the_same_samples(name, tmp_path):
    pytest.importorskip("torch")
    from launch.bench.ncsn_torch import Bench

    weights, record = str(tmp_path / "weights.npz"), str(tmp_path / "record.npz")
    prepare = {"do": "prepare", "problem": name, "weights": weights, **TINY[name]}
    recipe, _ = ask(prepare, {"do": "record", "out": record})
    theirs = Bench()
    theirs.prepare(recipe, weights, threads=1, channels_last=name != "mlp", per_sample=name == "mlp")
    assert theirs.repeat(record)["difference"] < 1e-5
    assert theirs.chain()["seconds"] > 0
