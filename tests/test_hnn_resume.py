"""A study that is killed, preempted, interrupted or diverges: what `--resume` makes of it is what would have been."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hnn import experiment
from hnn.config import Config
from hnn.data import save_npz, simulate
from hnn.systems import SYSTEMS
from lib import config as configs
from lib.checkpoint import Checkpoints
from lib.run import RunFolder

pytestmark = pytest.mark.slow  # long; `make test-slow`

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 240
SHORT = "--hidden 16 --derivative.steps 1500 --checkpoint-every 100"
LONG = "--hidden 64 --derivative.steps 12000 --checkpoint-every 500"


class Study:
    """`python -m hnn train` of one configuration, in processes of its own with a compile cache of their own."""

    def __init__(self, folder, options):
        self.folder = folder
        self.options = (
            f"--data.path {folder}/spring.npz --seeds 2 --models baseline hnn --evaluation.no-sweep "
            f"--evaluation.n-initial 2 --evaluation.n-points 10 --evaluation.t-end 1 {options}"
        ).split()

    def start(self, run, *more):
        """The process; its output goes to files, so that it never waits for a reader."""
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "EQX_ON_ERROR": "nan",  # without callbacks to Python the rollouts are cached too, for speed alone
        }
        command = [sys.executable, "-m", "hnn", "train", "spring", *self.options, "--out", str(run), *more]
        with (self.folder / "out").open("w") as out, (self.folder / "err").open("w") as err:
            return subprocess.Popen(command, env=os.environ | variables, cwd=self.folder, stdout=out, stderr=err)

    def wait(self, process):
        """Exit code and stderr."""
        try:
            code = process.wait(timeout=LIMIT_S)
        finally:
            process.kill()
        return code, (self.folder / "err").read_text()

    def finish(self, run, *more):
        assert self.wait(self.start(run, *more)) == (0, "")


def log_of(run):
    """(step, name, loss) of every complete line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows += [(row["step"], name, value) for name, value in row.items() if name.endswith(".loss")]
    return rows


def wait_for(process, condition):
    """Until `condition()`, or until the process has ended: whether it runs."""
    end = time.monotonic() + LIMIT_S
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
    return process.poll() is None


def trained_params(run):
    config = configs.from_json(Config, RunFolder.open(run, "hnn")[1])
    data = experiment.load_data(config)
    return experiment.load_trained(config, data, RunFolder(run), config.models)


def assert_same(run, reference):
    assert (run / "evaluation.json").read_bytes() == (reference / "evaluation.json").read_bytes()
    ours, theirs = trained_params(run), trained_params(reference)
    for name, one in theirs.items():
        jax.tree.map(np.testing.assert_array_equal, ours[name].params, one.params)
    assert log_of(run) == log_of(reference)
    assert (run / "report.html").exists()


def prepared(folder, options):
    save_npz(folder / "spring.npz", simulate(SYSTEMS["spring"], jax.random.key(0)), "spring")
    study = Study(folder, options)
    study.finish(folder / "straight")
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small study and its uninterrupted run, `straight`."""
    return prepared(tmp_path_factory.mktemp("short"), SHORT)


def test_kills_do_not_change_a_bit(study):
    run, chance = study.folder / "killed", random.Random(1)
    lines = len(log_of(study.folder / "straight"))
    assert lines == 30
    # Anywhere in the training, and while the run is evaluated.
    for low, high in ((2, 27), (lines, lines)):
        process, count, delay_s = study.start(run, "--resume"), chance.randint(low, high), chance.uniform(0, 0.1)
        running = wait_for(process, lambda count=count: len(log_of(run)) >= count)
        assert running, (study.folder / "err").read_text()
        time.sleep(delay_s)
        process.kill()
        assert study.wait(process)[0] == -signal.SIGKILL
        assert not (run / "evaluation.json").exists()
    study.finish(run, "--resume")
    assert_same(run, study.folder / "straight")
    assert len(json.loads((run / "environment.json").read_text())) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_save_and_the_run_goes_on(study, number, code):
    run = study.folder / number.name
    process = study.start(run)
    assert wait_for(process, lambda: len(log_of(run)) >= 18), (study.folder / "err").read_text()
    process.send_signal(number)
    got, err = study.wait(process)
    assert got == code
    stopped = re.fullmatch(r"stopped: at step (\d+) of 1500; --resume goes on from there\n", err)
    assert stopped, err
    step = int(stopped[1])
    assert step % 100 == 0 and (run / "checkpoints" / "hnn" / str(step)).is_dir()
    assert log_of(run)[-1][:2] == (step, "hnn.loss")
    if number == signal.SIGINT:
        return  # saved in the same way; test_signals_at_random_instants goes on from there
    study.finish(run, "--resume")
    assert f"training hnn: 2 seeds, 1500 steps, from step {step}" in (study.folder / "out").read_text()
    assert "training baseline" not in (study.folder / "out").read_text()
    assert_same(run, study.folder / "straight")


def test_a_loss_that_is_not_finite_stops_with_one_line(study):
    run = study.folder / "diverged"
    wild = ("--models", "baseline", "--derivative.lr", "3e18", "--derivative.warmup", "0.9")
    code, err = study.wait(study.start(run, *wild))
    assert code == 2
    pattern = r"error: the loss is not finite at step (\d+): the last good checkpoint is step (\d+); a lower .*\n"
    match = re.fullmatch(pattern, err)
    assert match, err
    step, saved = map(int, match.groups())
    assert 100 < step <= 1500 and saved == (step - 1) // 100 * 100
    assert not (run / "evaluation.json").exists()
    config = configs.from_json(Config, RunFolder.open(run, "hnn")[1])
    like = experiment.start_state(config, experiment.recipe("baseline", config, experiment.load_data(config)))
    with Checkpoints(run / "checkpoints" / "baseline") as checkpoints:
        state = checkpoints.restore(like)
    np.testing.assert_array_equal(state.step, [saved, saved])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    # The same again, and nothing gets worse by trying.
    assert study.wait(study.start(run, *wild, "--resume")) == (2, err)


def test_twenty_kills_at_random_instants(tmp_path):
    """By the clock: in imports, compilation, training of either model, checkpoints, evaluation, report."""
    begun = time.monotonic()
    study, run, chance = prepared(tmp_path, LONG), tmp_path / "killed", random.Random(7)
    whole_s, kills = time.monotonic() - begun, 0
    while kills < 20:
        process, end = study.start(run, "--resume"), time.monotonic() + chance.uniform(0, 0.5 * whole_s)
        if wait_for(process, lambda end=end: time.monotonic() > end):
            process.kill()
            kills += 1
        code, err = study.wait(process)
        assert code in (0, -signal.SIGKILL), err
        assert not [line for line in err.splitlines() if "damaged" not in line and "restore" not in line], err
    for _ in range(2):  # the second time only to be evaluated again
        study.finish(run, "--resume")
        assert_same(run, tmp_path / "straight")
    assert "training" not in (tmp_path / "out").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_at_random_instants(tmp_path, number, code):
    """From the first line of output to the end: always the exit code and one line, and nothing lost."""
    begun = time.monotonic()
    study, run, chance = prepared(tmp_path, LONG), tmp_path / "stopped", random.Random(int(number))
    whole_s = time.monotonic() - begun
    for _ in range(8):
        process = study.start(run, "--resume")
        assert wait_for(process, lambda: (run / "environment.json").exists())
        end = time.monotonic() + chance.uniform(0, 0.4 * whole_s)
        wait_for(process, lambda: (tmp_path / "out").read_text() != "")
        running = wait_for(process, lambda end=end: time.monotonic() > end)
        if running:
            process.send_signal(number)
        got, err = study.wait(process)
        assert got in (0, code), err
        assert got == 0 or (err.startswith("stopped: ") and len(err.splitlines()) == 1), err
    study.finish(run, "--resume")
    assert_same(run, tmp_path / "straight")
