"""A real Slurm on this machine (tests/slurm/cluster.sh): preemption, requeueing, arrays."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = str(ROOT / "tests" / "slurm" / "cluster.sh")
MISSING = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,  # trainings in a queue; `make test-slow`
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: apt install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs as root only"),
]
TRAIN = "-m hnn train spring --models hnn --seeds 2 --hidden 16 --checkpoint-every 200 --evaluation.n-initial 2"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """`slurm(words)`: a command on a machine with a cluster of its own, which ends with the tests."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }

    def call(*words):
        done = subprocess.run(
            list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    subprocess.run([CLUSTER, "start", str(folder)], check=True, timeout=60)
    try:
        deadline = time.monotonic() + 60
        while "idle" not in call("sinfo", "--noheader"):
            assert time.monotonic() < deadline, "the node does not come up"
            time.sleep(0.5)
        call.folder = folder
        yield call
    finally:
        subprocess.run([CLUSTER, "stop", str(folder)], check=True, timeout=60)


def until(condition, timeout_s=400):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def steps(run):
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_preempted_job_is_requeued_and_ends_like_one_that_was_not(slurm):
    training = [sys.executable, *TRAIN.split(), "--derivative.steps", "4000"]
    submit = [sys.executable, "-m", "launch", "slurm", "--tasks-per-node", 2, "--time", "0:30:00", "--folder", "logs"]
    out = slurm(*submit, "--", *training, "--out", "preempted")
    job = out.split("job ")[1].split(";")[0]
    run = slurm.folder / "preempted"
    until(lambda: max(steps(run), default=0) >= 500)
    slurm("scancel", "--signal=TERM", job)
    until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job))
    until(lambda: not slurm("squeue", "--noheader"))
    told = next((slurm.folder / "logs").glob(f"*-{job}*.out")).read_text()
    assert told.count("stopped: at step") == 2 and "4000 steps, from step" in told, told

    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(slurm.folder / "cache")}
    straight = [sys.executable, "-m", "launch", "local", "--processes", "2", "--", *training, "--out", "straight"]
    subprocess.run(straight, cwd=slurm.folder, env=environment, check=True, timeout=400, capture_output=True)
    assert numbers(run) == numbers(slurm.folder / "straight")


def numbers(run):
    return json.loads((run / "evaluation.json").read_text())


def test_a_sweep_as_an_array(slurm):
    grid = ["--grid", "derivative.lr=1e-2,1e-3,1e-4", "seed=0,1", "--out", "S"]
    sweep = [sys.executable, "-m", "launch", "sweep"]
    batch = ["--engine", "slurm", "--batch.time", "0:30:00", "--batch.cpus-per-task", 2, "--batch.folder", "logs"]
    out = slurm(*sweep, *grid, *batch, "--", sys.executable, *TRAIN.split(), "--derivative.steps", "100")
    assert "job " in out
    until(lambda: not slurm("squeue", "--noheader"))
    table = slurm(*sweep, "--summary", "--out", "S")
    assert table.count("finished") == 6 and "lr=1e-2_seed=0" in table, table
    record = json.loads((slurm.folder / "S" / "summary.json").read_text())
    assert len(record) == 6
