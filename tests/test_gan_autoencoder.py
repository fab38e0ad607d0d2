"""python -m gan train, interpolate and evaluate of autoencoders, whole, on small data; what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gan_cases import by_step, numbers_of, refused, rows_of
from PIL import Image

from gan import lines
from gan.__main__ import main
from gan.acai_evaluate import references

DIGITS = (
    "train digits_acai --out R --autoencoder.depth 2 --autoencoder.latent-width 4 --autoencoder.batch-size 8 "
    "--autoencoder.steps 48 --measurement.every 16 --measurement.kmeans-starts 2 --checkpoint-every 16"
)


@pytest.fixture
def here(tmp_path, in_process):
    return in_process(main, tmp_path)


@pytest.fixture
def call(here):
    """Runs a command in an empty folder; it must end well. Returns what it says."""

    def call(line):
        code, out, err = here(line)
        assert code == 0, err
        return out

    return call


@pytest.mark.slow
def test_from_training_to_report_and_resumed_to_the_bit(call, here):
    out = call(DIGITS)
    numbers = numbers_of("R")
    assert "training ACAI" in out and "accuracy" in out and "R/report.html" in out
    assert 0 < numbers["test.mse"] < 2 and 0 <= numbers["test.accuracy"] <= 1 and 0 < numbers["test.clustering"] <= 1
    assert numbers["test.fitted_accuracy"] > 0.3  # ten classes, latents of a network that has hardly begun
    looks = [row for row in rows_of("R") if "look.mse" in row]
    assert [row["step"] for row in looks] == [16, 32, 48]
    assert looks[-1]["look.mse"] == numbers["test.mse"] and looks[-1]["look.accuracy"] == numbers["test.accuracy"]
    assert Path("R/report.html").read_text().count("<img") == 3

    shutil.copytree("R", "stopped")
    shutil.rmtree("stopped/checkpoints/autoencoder/48")
    code, _, err = here("interpolate stopped")
    assert code == 2 and "the training of autoencoder is not finished" in err
    call("train stopped --resume")
    assert numbers_of("stopped") == numbers
    assert by_step(rows_of("stopped")) == by_step(rows_of("R"))

    call("interpolate R --rows 3 --columns 5 --labels 1 7 --out strips.png")
    with Image.open("strips.png") as sheet:
        assert sheet.size == (5 * 50 + 2, 3 * 50 + 2)
    call("evaluate R --kmeans-starts 1")
    assert {k: v for k, v in numbers_of("R").items() if "test.m" in k} == {"test.mse": numbers["test.mse"]}
    for line, message in {
        "interpolate R --labels 1": "--labels needs two classes",
        "interpolate R --labels 1 12": "no test image of class 12",
        "sample R": "is an autoencoder, which has no samples",
        "train --config R/config.json --out R": "already holds a run",
        "pegasus R --out P --count 3": "count must be at least 64",
    }.items():
        code, _, err = here(line)
        assert code == 2 and message in err, err


@pytest.mark.slow
def test_two_classes_without_a_critic(call):
    out = call(f"{DIGITS} --data.labels 3 8 --autoencoder.no-critic")
    numbers = numbers_of("R")
    assert "training an autoencoder" in out and numbers["test.clustering"] >= 0.5  # of two clusters, matched
    assert not any("critic" in name for name in rows_of("R")[0])
    assert json.loads(Path("R/data.json").read_text())["count"] < 400


@pytest.mark.slow
def test_lines(call):
    call(
        "train lines_acai --out R --autoencoder.depth 2 --autoencoder.latent-width 16 --autoencoder.latent-channels 1 "
        "--autoencoder.batch-size 8 --autoencoder.steps 64 --measurement.every 32"
    )
    numbers = numbers_of("R")
    assert numbers["perfect.distance"] < 1e-5 < 1e-3 < numbers["autoencoder.distance"]
    assert numbers["blend.smoothness"] > 0.5 and np.isfinite(numbers["autoencoder.smoothness"])
    assert "last 2 looks" in numbers["protocol"]


def test_references_score_as_published():
    """The published scorer gives perfect (1.8e-7, .0005), pixel blend (6.4e-3, .90), abrupt (1.7e-7, .93)."""
    found = {name: lines.score(frames) for name, frames in references(0, 64).items()}
    assert found["perfect"].distance < 3e-7 and found["perfect"].smoothness < 2e-3
    assert found["blend"].distance == pytest.approx(6.4e-3, rel=0.15) and found["blend"].smoothness > 0.8
    assert found["abrupt"].distance < 3e-7 and found["abrupt"].smoothness == pytest.approx(0.933, abs=0.01)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train digits_acai --autoencoder.latent-width 3", "is not size_px 8 halved"),
        ("train digits_acai --autoencoder.batch-size 9", "must be even"),
        ("train digits_acai --measurement.every 0", "must be at least 1"),
        ("train lines_acai --autoencoder.size-px 16 --autoencoder.latent-width 4", "lines have 32 pixels"),
        ("train digits_acai --data.labels 1 10 --out R", "there is no class 10"),
        ("train digits_acai --autoencoder.size-px 4 --autoencoder.latent-width 2 --out R", "larger than autoencoder"),
        ("train digits_acai --autoencoder.batch-size 2000 --out R", "there are only 1437 images"),
        ("train digits_acai --autoencoder.batch-size 6 --devices 2 --out R", "no pairs for each of 2 devices"),
        ("train digits_acai --data.source nowhere --out R", "no such folder or file; data.source is lines"),
        ("train digits_acai --config absent.json", "Unrecognized options: --config"),
    ],
)
def test_refused(here, line, message):
    code, _, err = here(line)
    refused(code, err, message)
    assert not Path("R").exists()
