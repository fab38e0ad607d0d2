"""python -m lib.metrics: tables, JSON, and one line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from metrics_cases import pixels, toy_net

from lib import features, shard
from lib.metrics import __main__ as cli
from lib.process import command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The command in this process, with nets that need no weights: `run(*args) -> (exit code, stdout, stderr)`."""
    monkeypatch.setattr(shard, "start", lambda: None)
    monkeypatch.setattr(features, "load", lambda name, path: toy_net(name=name))
    monkeypatch.setattr(features, "default_for", lambda *shape: "by_size_" + "x".join(map(str, shape)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", pixels(60))
    np.savez(tmp_path / "b.npz", pixels(50, 1))

    def call(*args):
        code = command(cli.main, args)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_json_is_one_object(run):
    code, out, err = run("a.npz", "b.npz", "--json", "--features", "toy")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found) == [f"{m}.toy" for m in cli.LEAST]
    assert {"value", "uncertainty", "uncertainty_kind", "protocol"} == set(found["fid.toy"])
    assert (
        found["fid.toy"]["protocol"] | {"real": "a.npz", "generated": "b.npz", "n_generated": 50}
        == found["fid.toy"]["protocol"]
    )


def test_the_table_and_the_net_by_size(run):
    code, out, err = run("a.npz", "b.npz", "--metrics", "fid", "kid")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[2].startswith("fid.by_size_4x4x1 ") and lines[3].startswith("kid.by_size_4x4x1 ")
    assert any(line.startswith("real ") and "a.npz (60 images)" in line for line in lines)


def test_devices_batch_and_cache_change_nothing(run):
    whole = json.loads(run("a.npz", "b.npz", "--json")[1])
    for args in (("--devices", "1"), ("--batch-size", "7"), ("--no-cache",)):
        other = json.loads(run("a.npz", "b.npz", "--json", *args)[1])
        for name in whole:
            assert other[name]["value"] == pytest.approx(whole[name]["value"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "required"),
        (("a.npz",), "required"),
        (("a.npz", "b.npz", "--metrics", "fud"), "fud"),
        (("a.npz", "b.npz", "--max-features", "0"), "max_features must be at least 1"),
        (("a.npz", "b.npz", "--devices", "9"), "devices is 9, but there are 4"),
        (("a.npz", "nowhere"), "nowhere: no such folder or file"),
        (("a.npz", "empty"), "empty holds no images"),
        (("a.npz", "one.npz"), "one.npz has 1 image: at least 2 are needed"),
        (("a.npz", "few.npz"), "is needs at least 10 images, few.npz gives 5"),
        (("a.npz", "rgb.npz"), "images of 1 channel(s), those of rgb.npz have 3"),
        (("a.npz", "large.npz"), "toy takes 4 x 4 pixels, the images of large.npz have 5 x 5"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "one.npz", pixels(1))
    np.savez(tmp_path / "few.npz", pixels(5))
    np.savez(tmp_path / "rgb.npz", pixels(20, shape=(4, 4, 3)))
    np.savez(tmp_path / "large.npz", pixels(20, shape=(5, 5, 1)))
    code, out, err = run(*args, *(("--features", "toy") if "large.npz" in args else ()))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


# The whole command, in a process of its own


def whole(*args, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lib.metrics", *map(str, args)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def digits(path):
    from sklearn.datasets import load_digits

    images = np.uint8(load_digits().images[..., None] * (255 / 16))
    np.savez(path / "a.npz", images[:900])
    np.savez(path / "b.npz", images[900:])


@pytest.mark.slow
def test_digits_in_a_process_of_its_own(tmp_path):
    digits(tmp_path)
    done = whole(tmp_path / "a.npz", tmp_path / "b.npz", "--json", XDG_CACHE_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["fid.digits_cnn"]["protocol"]["preprocessing"]
    assert found["is.digits_cnn"]["value"] > 7  # nearly one of ten classes each
    assert found["precision.digits_cnn"]["value"] > 0.5


@pytest.mark.parametrize(
    "content", ["missing", *[pytest.param(how, marks=pytest.mark.slow) for how in ("garbage", "of another net", "nan")]]
)
def test_wrong_weights_are_one_line(tmp_path, content):
    from safetensors.numpy import load_file, save_file

    digits(tmp_path)
    weights = tmp_path / "weights.safetensors"
    pretrained = ROOT / "lib" / "features" / "pretrained"
    if content == "garbage":
        weights.write_bytes(b"not weights")
    elif content == "of another net":
        save_file({"something": np.zeros(3, np.float32)}, weights)
    elif content == "nan":
        from safetensors import safe_open

        with safe_open(pretrained / "digits_cnn.safetensors", "numpy") as file:
            metadata = file.metadata()
        broken = {k: np.full_like(v, np.nan) for k, v in load_file(pretrained / "digits_cnn.safetensors").items()}
        save_file(broken, weights, metadata)
    done = whole(tmp_path / "a.npz", tmp_path / "b.npz", "--features", "digits_cnn", "--weights", weights)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
