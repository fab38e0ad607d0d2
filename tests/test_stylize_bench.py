"""The line protocol of `python -m stylize.timing`, and the PyTorch side where PyTorch is installed."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from launch.bench import stylize as bench
from launch.bench.__main__ import _stylize
from launch.bench.rounds import check_same
from lib.child import answers
from lib.features import weights
from lib.process import UserError
from stylize import timing

pytestmark = pytest.mark.slow  # long; `make test-slow`

TINY = {
    "network": {"kind": "network", "size_px": 32, "width": 4, "blocks": 1},
    "lbfgs": {"kind": "lbfgs", "size_px": 16, "iterations": 3},
    "adam": {"kind": "adam", "size_px": 16, "iterations": 3},
}


def ask(*requests: dict) -> list[dict]:
    return [json.loads(answer) for answer in answers(timing.actions(), map(json.dumps, requests))]


@pytest.fixture(scope="module")
def small_vgg(tmp_path_factory):
    """The first three convolutions of a random VGG-19: little to compile."""
    rng, c = np.random.default_rng(0), 3
    arrays = {"mean": rng.normal(size=3).astype(np.float32) / 10}
    for layer, width in {"conv1_1": 64, "conv1_2": 64, "conv2_1": 128}.items():
        arrays[f"{layer}/kernel"] = rng.normal(size=(3, 3, c, width)).astype(np.float32) * np.float32(
            (9 * c / 2) ** -0.5
        )
        arrays[f"{layer}/bias"] = rng.normal(size=width).astype(np.float32) / 10
        c = width
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    weights.write(path, arrays)
    return str(path)


@pytest.fixture(scope="module", params=TINY)
def recorded(request, tmp_path_factory, small_vgg):
    """(the files that our side wrote, its answers)."""
    folder = tmp_path_factory.mktemp(request.param)
    files = {name: str(folder / f"{name}.npz") for name in ("problem", "record")}
    return files, ask(
        {"do": "prepare", "file": files["problem"], "vgg": small_vgg, **TINY[request.param]},
        {"do": "run", "calls": 1},
        {"do": "run", "calls": 2},
        {"do": "record", "out": files["record"]},
        {"do": "memory"},
    )


def test_runs_are_timed_and_told(recorded):
    files, (recipe, first, again, _, memory) = recorded
    assert first["seconds"] > again["seconds"] / 2 > 0  # compiled the first time
    assert first["value"] == again["value"] and again["evaluations"] == 2 * first["evaluations"]
    assert memory["peak_mib"] > 50 or np.isnan(memory["peak_mib"])
    with np.load(files["problem"]) as file, np.load(files["record"]) as record:
        if recipe["kind"] == "network":
            assert first["evaluations"] == 1
            assert sum(file[name].size for name in file) - file["image"].size == recipe["parameters"]
            assert record["output"].shape == file["image"].shape == (32, 32, 3)
            return
        # One at the start of L-BFGS, and at least one in every search along a line.
        assert first["evaluations"] >= 4 if recipe["kind"] == "lbfgs" else first["evaluations"] == 3
        assert 0 < first["value"] < record["value"] and record["gradient"].shape == file["start"].shape == (16, 16, 3)
        assert {*recipe["layers"], "pixels"} >= {*recipe["style_layers"], *recipe["content_layers"]}


@pytest.mark.parametrize("channels_last", [False, True])
def test_pytorch_computes_the_same(recorded, channels_last):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from launch.bench.stylize_torch import Bench

    files, (recipe, first, *_) = recorded
    theirs = Bench()
    theirs.prepare(recipe, files["problem"], threads=1, device="cpu", channels_last=channels_last)
    differences = theirs.compare(files["record"])
    assert set(differences) == ({"output"} if recipe["kind"] == "network" else {"value", "gradient"})
    for what, value in differences.items():
        assert value < bench.LIMITS[what]
    run = theirs.run(calls=2)
    assert run["seconds"] > 0 and run["evaluations"] == (2 if recipe["kind"] == "network" else 6)
    if recipe["kind"] == "adam":
        assert run["value"] == pytest.approx(first["value"], rel=bench.LIMITS["value after Adam"])


def test_a_step_in_tiles_lowers_the_objective(small_vgg):
    fields = {"kind": "tiles", "size_px": 48, "tile_px": 32, "vgg": small_vgg}
    _, first, again, memory = ask(
        {"do": "prepare", **fields}, {"do": "run", "calls": 1}, {"do": "run", "calls": 1}, {"do": "memory"}
    )
    assert 0 < again["value"] < first["value"] and again["evaluations"] == 1
    assert memory["peak_mib"] > 50 or np.isnan(memory["peak_mib"])


def test_pictures_are_in_range_and_differ():
    images = [timing.picture(seed, 37) for seed in (0, 0, 1)]
    assert all(x.shape == (37, 37, 3) and x.dtype == np.float32 and np.abs(x).max() <= 1 for x in images)
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).mean() > 0.1


def test_a_request_that_cannot_be_met(tmp_path, small_vgg):
    with pytest.raises(UserError, match="cannot do 'fly': choose from prepare"):
        ask({"do": "fly"})
    with pytest.raises(UserError, match="unknown kind 'moon': choose from network"):
        ask({"do": "prepare", "kind": "moon", "size_px": 32})
    with pytest.raises(UserError, match="no other side"):
        ask({"do": "prepare", "file": str(tmp_path / "x.npz"), "kind": "tiles", "size_px": 32, "vgg": small_vgg})


def test_the_problems_are_what_the_timing_takes():
    chosen = bench.problems(bench.PARTS, (16, 32), (256, 512, 1024), 512, 5)
    assert len(chosen) == 8 and chosen["network 16, 512 px"][1] == 4
    for problem, calls in chosen.values():
        assert timing.Problem(**problem).size_px >= 256 and calls >= 1
    assert list(bench.problems(["gatys"], (16,), (256,), 64, 2)) == ["lbfgs, 64 px", "adam, 64 px"]


def results(kind: str, **fields: object) -> dict:
    variant = {"per_s": 2.0, "median_s": 0.5, "first_s": 4.0, "peak_mib": 300.0}
    slower = {"per_s": 1.0, "median_s": 1.0, "first_s": 1.5, "peak_mib": 400.0}
    return {
        "problem": {"kind": kind, "size_px": 64, **fields},
        "variants": {"ours": variant, "torch contiguous": slower, "torch channels_last": slower | {"median_s": 1.2}},
        "ratio": 2.0,
        "differences": {"torch contiguous": {"output": 1e-6}, "torch channels_last": {"output": 3e-6}},
    }


def test_the_table_and_the_page():
    network, lbfgs = results("network", width=16), results("lbfgs", layers=["conv1_1", "relu1_1"])
    text = bench.table("network", network)
    assert "2.00 times PyTorch; largest differences: output 3.0e-06" in text and "torch channels_last" in text
    large = {
        "tiles": {"problem": {"size_px": 4096, "tile_px": 512}, "peak_gib": 3.21},
        "network": {"problem": {"size_px": 4096, "width": 16}, "peak_gib": 4.56},
    }
    lines = _stylize({"cores": 2, "problems": {"a": network, "b": lbfgs}, "large": large})
    assert "| 16 | 64 | 2.00 | 1.00 | 2.00 | 4.0 | 300 | 400 |" in lines
    assert "| L-BFGS | 64 | relu1_1 | 2.00 | 1.00 | 2.00 | 4.0 | 300 | 400 |" in lines
    assert "3.2 GiB for a step of Adam in tiles of 512, 4.6 GiB for the network" in lines[-2]


def test_sides_that_differ_are_an_error():
    good, bad = results("network"), results("network")
    bad["differences"]["torch contiguous"]["output"] = float("nan")
    check_same({"good": good}, bench.LIMITS)
    with pytest.raises(UserError, match="bad: output of torch contiguous differs by nan, more than 0.0001"):
        check_same({"good": good, "bad": bad}, bench.LIMITS)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch():
    done = subprocess.run([sys.executable, "-m", "launch.bench.stylize"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 'error: this benchmark compares with PyTorch: pip install -e ".[bench]"\n'
