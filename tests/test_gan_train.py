"""python -m gan train and evaluate, whole, on small data; early ends; the watcher in a run folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gan_cases import by_step, numbers_of, rows_of

from gan.__main__ import main
from gan.data import MODE_STD, MODES, gaussians
from gan.looks import misplaced

POINTS = (
    "train mixture_wgan_gp --out R --optim.steps 200 --optim.n-critic 2 --optim.batch-size 16 --network.width 8 "
    "--network.critic-width 8 --network.levels 1 --watch.every 100 --watch.samples 40 --evaluation.samples 200 "
    "--checkpoint-every 100"
)
DIGITS = (
    "train digits_dcgan --out R --network.width 2 --network.critic-width 2 --optim.batch-size 8 --watch.samples 24 "
    "--evaluation.samples 24"
)


@pytest.fixture
def call(tmp_path, in_process):
    """Runs a command in an empty folder; it must end well. Returns what it says."""
    here = in_process(main, tmp_path)

    def call(line):
        code, out, err = here(line)
        assert code == 0, err
        return out

    return call


def test_points_from_training_to_report_and_resumed_to_the_bit(call):
    out = call(POINTS)
    numbers = numbers_of("R")
    assert numbers["real.modes"] == 25 and numbers["real.good"] > 0.97 and numbers["real.misplaced"] < 0.2
    assert numbers["last.cycle"] == 200 and numbers["best.cycle"] in (100, 200)
    assert 0 <= numbers["best.modes"] <= 25 and "best: cycle" in out
    assert "<img" in Path("R/report.html").read_text()

    shutil.copytree("R", "stopped")
    shutil.rmtree("stopped/checkpoints/gan/200")
    call("train stopped --resume")
    assert numbers_of("stopped") == numbers
    assert by_step(rows_of("stopped")) == by_step(rows_of("R"))

    call("evaluate R --samples 60")
    assert numbers_of("R")["last.good"] * 60 % 1 == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_a_training_that_gets_no_better_ends(call):
    out = call(POINTS.replace("steps 200", "steps 5000") + " --optim.lr 1e-9 --watch.patience 2")
    looks = [row for row in rows_of("R") if "look.score" in row]
    assert 3 <= len(looks) < 50 and "2 looks brought nothing better" in out
    end, best = looks[-1]["step"], min(looks, key=lambda row: row["look.score"])
    assert f"ended at cycle {end}" in out and f"best: cycle {best['step']}" in out and end == best["step"] + 200
    numbers = numbers_of("R")
    assert (numbers["best.cycle"], numbers["last.cycle"]) == (best["step"], end)
    assert "training" not in call("train R --resume")  # nothing is left to do
    assert f"of cycle {end}" in call("sample R --checkpoint last --count 4")


@pytest.mark.slow
def test_alarms_of_a_training_that_is_made_to_collapse_and_of_three_that_are_not(call):
    line = "train digits_dcgan --optim.steps 800 --optim.decay constant --optim.ema-decay 0.9 --watch.every 100"
    alarms = lambda run: {name for name in numbers_of(run) if name.startswith("alarms.")}  # noqa: E731
    for seed in range(3):
        call(f"{line} --checkpoint-every 400 --seed {seed} --out healthy{seed}")
        assert not alarms(f"healthy{seed}")
    # The first one again, from its middle on with a learning rate that is a hundred times as high.
    shutil.copytree("healthy0", "collapsed")
    shutil.rmtree("collapsed/checkpoints/gan/800")
    config = json.loads(Path("collapsed/config.json").read_text())
    config["config"]["optim"]["lr"] = 0.2
    Path("collapsed/config.json").write_text(json.dumps(config))
    out = call("train collapsed --resume")
    assert {"alarms.collapse_at_cycle", "alarms.divergence_at_cycle"} <= alarms("collapsed")
    before = [row for row in rows_of("healthy0") if "look.score" in row and row["step"] <= 400]
    best = min(before, key=lambda row: row["look.score"])["step"]
    assert "collapse at cycle" in out and numbers_of("collapsed")["best.cycle"] == best


def test_misplaced_samples():
    assert misplaced(np.repeat(MODES, 4, axis=0)) == pytest.approx(0, abs=1e-9)
    assert misplaced(np.repeat(MODES[:5], 4, axis=0)) == pytest.approx(0.8)
    assert misplaced(MODES + 3.1 * MODE_STD) == 1
    assert misplaced(gaussians(20_000, 0)) < 0.03


@pytest.mark.slow
def test_images_from_training_to_report(call):
    call(f"{DIGITS} --optim.steps 100 --watch.every 50 --checkpoint-every 50 --network.conditioning concatenation")
    numbers = numbers_of("R")
    assert json.loads(Path("R/speed.json").read_text())["best.images_per_s"] > 0
    for name in ("real", "best", "last"):
        assert numbers[f"{name}.fid.digits_cnn"] > 0
        assert 0 <= numbers[f"{name}.coverage.digits_cnn"] <= 1
    assert numbers["last.fid.digits_cnn"] > 3 * numbers["real.fid.digits_cnn"]  # so little teaches little
    pictures = {path.name for path in Path("R/figures").iterdir()}
    assert {"samples_best.png", "samples_last.png", "neighbours.png", "interpolation.png", "class_walk.png"} <= pictures
    seen = {path.name for path in Path("R/samples").iterdir()}
    assert seen == {f"{kind}_{step:07}.png" for kind in ("fixed", "fresh") for step in (50, 100)}

    shutil.copytree("R", "stopped")
    shutil.rmtree("stopped/checkpoints/gan/100")
    call("train stopped --resume")  # batch norm, its running statistics and their average among the state
    assert numbers_of("stopped") == numbers and by_step(rows_of("stopped")) == by_step(rows_of("R"))


@pytest.mark.slow
def test_an_autoencoder_as_the_baseline(call):
    call(f"{DIGITS} --optim.loss elbo --optim.steps 300 --watch.every 300 --optim.lr 3e-3")
    rows = [row for row in rows_of("R") if "gan.reconstruction" in row]
    assert rows[-1]["gan.reconstruction"] < 0.7 * rows[0]["gan.reconstruction"] and rows[-1]["gan.divergence"] > 0
    assert numbers_of("R")["best.fid.digits_cnn"] > 0
