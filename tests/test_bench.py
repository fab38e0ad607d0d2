"""The line protocol of `python -m hnn.timing`, and the benchmark without PyTorch."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from hnn import timing
from hnn.data import load_npz
from launch.bench import hnn as bench
from launch.bench.__main__ import page
from lib.child import Child
from lib.process import UserError

pytestmark = pytest.mark.slow  # long; `make test-slow`


def ask(*requests: dict) -> list[dict]:
    return [json.loads(answer) for answer in timing.serve(json.dumps(request) for request in requests)]


def torch_weights(dimension: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of both networks as PyTorch shapes them: [outputs, inputs], two outputs of the HNN."""
    rng = np.random.default_rng(seed)
    size, weights = 2 * dimension, {}
    for name, outputs in (("hnn", 2), ("baseline", size)):
        shapes = {"first.weight": (200, size), "first.bias": 200, "second.weight": (200, 200), "second.bias": 200}
        for layer, shape in {**shapes, "last.weight": (outputs, 200)}.items():
            weights[f"{name}.net.{layer}"] = np.float32(rng.normal(scale=0.1, size=shape))
    return weights


@pytest.fixture
def prepare(tmp_path):
    return {"do": "prepare", "task": "spring", "data": str(tmp_path / "spring.npz"), "n_trajectories": 4}


def test_data_and_recipe_go_to_the_other_side(prepare):
    (answer,) = ask(prepare)
    data, name = load_npz(prepare["data"])
    assert name == "spring" and data.train.y.shape == (2, 30, 2)
    assert [row.shape for row in bench.load(prepare["data"])] == [(60, 2)] * 4
    assert answer["batch_size"] is None and answer["weight_decay"] == 1e-4
    assert np.shape(answer["y0"]) == (15, 2)
    np.testing.assert_allclose(answer["span"], 20 * 1.09 ** np.arange(2, 17))


def test_training_is_timed(prepare):
    _, block, again, run = ask(
        prepare,
        {"do": "train_block", "model": "hnn", "steps": 3},
        {"do": "train_block", "model": "hnn", "steps": 3},
        {"do": "time_to_loss", "steps": 20},
    )
    assert 0 < again["seconds"] < 1 and 0 < block["seconds"] < 1  # compiled before
    assert 0 < run["seconds"] < run["compile_seconds"]
    assert 0 < run["test_loss"] < 5


def test_rollouts_follow_the_networks_of_pytorch(prepare, tmp_path):
    weights = torch_weights(1)
    files = {name: str(tmp_path / f"{name}.npz") for name in ("weights", "ours", "reference")}
    np.savez(files["weights"], **weights)
    _, timed, _ = ask(
        prepare,
        {"do": "rollouts", "weights": files["weights"], "out": files["ours"]},
        {"do": "reference", "weights": files["weights"], "out": files["reference"]},
    )
    assert timed["seconds"] > timed["seconds_compiled"] > 0
    with np.load(files["ours"]) as ours, np.load(files["reference"]) as reference:
        for name in ("hnn", "baseline"):
            assert ours[name].shape == (15, 100, 2)
            np.testing.assert_allclose(ours[name], reference[name], atol=1e-4)


def test_converted_weights_give_the_same_field():
    weights, y = torch_weights(1), np.array([0.3, -0.5])
    layers = {name: weights[f"hnn.net.{name}"].astype(float) for name in ("first.weight", "second.weight")}
    h1 = np.tanh(layers["first.weight"] @ y + weights["hnn.net.first.bias"])
    h2 = np.tanh(layers["second.weight"] @ h1 + weights["hnn.net.second.bias"])
    back = (weights["hnn.net.last.weight"][1] * (1 - h2**2)) @ layers["second.weight"]
    gradient = (back * (1 - h1**2)) @ layers["first.weight"]
    field = timing.MODELS["hnn"](1).field(timing.flax_params(weights, "hnn"), y)
    np.testing.assert_allclose(field, [gradient[1], -gradient[0]], rtol=1e-4, atol=1e-6)


def test_runge_kutta_has_order_four():
    with jax.enable_x64(True):
        rotate = lambda y: y[:, ::-1] * np.array([1.0, -1.0])  # noqa: E731
        y0, span = np.array([[1.0, 0.0]]), np.array([3.0])
        errors = []
        for substeps in (4, 8):
            ys = np.asarray(timing.follow(rotate, y0, span, 6, substeps))[0]
            t = np.linspace(0, 3, 6)
            errors.append(np.abs(ys - np.stack([np.cos(t), -np.sin(t)], axis=1)).max())
    assert errors[1] < 1e-5 and 14 < errors[0] / errors[1] < 18


def test_a_request_that_cannot_be_met(prepare):
    with pytest.raises(UserError, match="cannot do 'fly'"):
        ask({"do": "fly"})
    with pytest.raises(UserError, match="unknown task 'moon'"):
        ask({**prepare, "task": "moon"})
    with pytest.raises(UserError, match="multiple of 100"):
        ask(prepare, {"do": "time_to_loss", "steps": 150})


def test_the_child_answers_and_ends_with_its_input(prepare):
    with Child("hnn.timing") as child:
        assert child.ask("prepare", **{k: v for k, v in prepare.items() if k != "do"})["points"] == 100
        with pytest.raises(UserError, match="ended without an answer"):
            child.ask("fly")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch():
    done = subprocess.run([sys.executable, "-m", "launch.bench.hnn"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 'error: this benchmark compares with PyTorch: pip install -e ".[bench]"\n'


def test_the_page_of_ratios():
    rates = {"ours": {"median_steps_per_s": 400.0}, "ratio_as_shipped": 4.0, "ratio_lean": 2.5}
    seconds = {"ours": 0.5, "ours_compiled": 0.1, "torch_1": 9.0, "torch_2": 10.0}
    rollouts = {name: {"median_s": value} for name, value in seconds.items()} | {"ratio": 18.0}
    environment = {"utc_start": "2020-01-02T", "cores": 2, "versions": {"jax": "0"}, "python": "3"}
    variants = {"ours": {"median_ms": 500.0}, "torch contiguous": {"median_ms": 600.0}}
    features = {"ours": {"median_per_s": 9.0}, "torch channels_last": {"median_per_s": 6.0}}
    chain = {"samples_per_s": 30.0, "first_s": 6.0, "peak_mib": 512.0}
    problem = {
        "variants": {"chain": chain, "torch contiguous": chain | {"samples_per_s": 20.0}},
        "parameters": 12345, "count": 64, "evaluations": 35, "chain_per_evaluations": 0.97,
        "chain_per_compiled_evaluations": 1.01, "torch": "3",
    }  # fmt: skip
    seconds = {"per_s": 2.0, "median_s": 0.5, "first_s": 4.0, "peak_mib": 256.0}
    network = {
        "problem": {"kind": "network", "width": 16, "size_px": 256},
        "variants": {"ours": seconds, "torch contiguous": seconds | {"per_s": 1.6}},
        "ratio": 1.25,
        "torch": "3",
    }
    cycles = {"per_s": 9.0, "median_s": 0.5, "first_s": 4.0, "peak_mib": 256.0}
    dcgan = {
        "problem": {"parameters": 1234, "batch_size": 64, "n_critic": 1},
        "variants": {"ours": cycles, "torch contiguous": cycles | {"per_s": 6.0}},
        "ratio": 1.5,
        "torch": "3",
    }
    scaling = {
        "step_s": {"half": 0.1, "one": 0.2, "two": 0.21},
        "predicted_s": {"one": 0.22, "two": 0.23},
        "prediction_error": {"one": 0.1, "two": 0.11},
        "images": 16, "weak_scaling": 0.95, "flops_per_s": 2e10, "all_reduce_bytes": 2**20, "all_reduce_s": 0.004,
    }  # fmt: skip
    results = {
        "scaling": scaling,
        "gan": {"cores": 2, "problems": {"dcgan": dcgan}},
        "stylize": {"cores": 2, "problems": {"network": network}, "large": {}},
        "ncsn": {"cores": 2, "problems": {"unet": problem}},
        "convolution": {"variants": variants, "steps_per_round": 8, "cores": 2},
        "inception": {"variants": features, "batch": 32, "cores": 2},
        "hnn": {"torch": "2", "tasks": {"spring": {"training": {"hnn": rates}, "rollouts": rollouts}}},
    }
    results = {name: r | {"environment": environment} for name, r in results.items()}
    text = page(results)
    assert "## Training of GANs\n\n2020-01-02, 2 CPU cores, jax 0, torch 3, Python 3.\n" in text
    assert "## Hamiltonian networks\n\n2020-01-02, 2 CPU cores, jax 0, torch 2, Python 3.\n" in text
    assert "## Convolutions" not in page({"gan": results["gan"]})
    assert "| torch contiguous | 600 | 1.20 |" in text
    assert "| torch channels_last | 6.00 | 1.50 |" in text
    assert "| 16 | 256 | 2.00 | 1.60 | 1.25 | 4.0 | 256 | 256 |" in text
    assert "| DCGAN | 1,234 | 64 | 1 | 9.00 | 6.00 | 1.50 | 4.0 | 256 | 256 |" in text
    assert "| 1 | 200 | 220 | +10% |" in text and "| 2 | 210 | 230 | +11% |" in text
    assert "a step of two: 0.95" in text and "1.0 MiB reduced in 4.0 ms" in text
    assert "| spring | hnn | 400 | 100 | 4.00 | 160 | 2.50 |" in text
    assert "| spring | 0.500 | 0.100 | 9.00 | 18.0 |" in text
    assert "| EDM's U-Net, Heun's method | torch contiguous | 20.0 | 1.50 | 6.0 | 512 |" in text
    assert "| EDM's U-Net, Heun's method | 12,345 | 64 | 35 | 0.97 | 1.01 |" in text
