"""python -m hnn with bad input: exit code 2, one line that says what to change, soon, and nothing on disk touched."""

import fcntl
import json
import os
import pickle
import pty
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hnn import experiment
from hnn.__main__ import main
from hnn.config import Config, Data, Derivative
from hnn.data import load_npz
from lib import config as configs
from lib.checkpoint import Checkpoints
from lib.run import RunFolder

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = "import diffrax, flax, jax, optax, orbax.checkpoint, tyro"
STEPS = 3


def contents(folder):
    """Everything below, byte for byte; folders as None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def hnn_process(*argv, cwd, **environment):
    """Exit code, stdout, stderr and processor seconds of `python -m hnn ...`."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "80"} | environment
    kept = {name: value for name, value in os.environ.items() if name != "GRADIENT_FIELDS_DATA"}
    return process("-m", "hnn", *map(str, argv), cwd=cwd, env=kept | variables)


def process(*argv, **options):
    """Exit code, stdout, stderr and processor seconds of `python ...`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=120, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, spent_s


@pytest.fixture(scope="module")
def soon_s():
    """How long a mistake may take: twice what the libraries take to load, in seconds of the processor, which do not
    depend on what else the machine does, and depend on how fast it is as the command does."""
    code, _, err, spent_s = process("-c", LIBRARIES)
    assert code == 0, err
    return 2 * spent_s


def refused(code, out, err, message):
    """One line on stderr, with the message in it, and the exit code of a user's mistake."""
    assert "Traceback" not in out + err, err
    assert code == 2, (code, err)
    assert len(err.splitlines()) == 1 and err.endswith("\n"), err
    assert err.startswith("error: ")
    assert message in err


# ---- a desk full of broken things


def spring_arrays(points=30, trajectories=4):
    """What `simulate spring` writes, in closed form."""
    t = np.linspace(0, 3, points)
    angle = np.arange(trajectories)[:, None] - 2 * t
    y = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    dy = 2 * np.stack([y[..., 1], -y[..., 0]], axis=-1)
    part = {"t": t, "y": y, "y_true": y, "dy": dy}
    return {"system": np.array("spring")} | {f"{name}_{k}": v for name in ("train", "test") for k, v in part.items()}


def with_nan(array):
    array = array.copy()
    array[0, 1, 0] = np.nan
    return array


def recording(rows, velocity="0.5"):
    header = "% trial t angle velocity\n"
    return header + "".join(f"1 {i / 6:.4f} {np.sin(i):.4f} {velocity}\n" for i in range(rows))


CONFIG = Config(
    "spring", ("baseline", "hnn"), seeds=2, hidden=4, data=Data(path="spring.npz"), derivative=Derivative(steps=STEPS)
)


def write_run(path, config=CONFIG, package="hnn"):
    with RunFolder.start(path, package, configs.to_json(config), resume=False):
        pass


def save_untrained(path, config, steps):
    """Checkpoints as a training of `steps` steps leaves them."""
    data = experiment.load_data(config)
    for name in config.models:
        state = experiment.start_state(config, experiment.recipe(name, config, data))
        with Checkpoints(path / "checkpoints" / name) as checkpoints:
            checkpoints.save(steps, state.replace(step=jnp.full(config.seeds, steps, jnp.int32)))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    desk = tmp_path_factory.mktemp("desk")
    good = spring_arrays()
    np.savez(desk / "spring.npz", **good)
    np.savez(desk / "pendulum.npz", **good | {"system": np.array("pendulum")})
    np.savez(desk / "nan.npz", **good | {"train_y": with_nan(good["train_y"])})
    np.savez(desk / "short.npz", **spring_arrays(points=2))
    np.savez(desk / "shapes.npz", **good | {"train_y": good["train_y"][:, :-1]})
    np.savez(desk / "lacking.npz", **{k: v for k, v in good.items() if k != "test_dy"})
    np.savez(desk / "objects.npz", **good | {"train_y": np.array([{}], dtype=object)}, allow_pickle=True)
    whole = (desk / "spring.npz").read_bytes()
    (desk / "garbled.npz").write_bytes(whole[:200] + bytes(200) + whole[400:])
    (desk / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (desk / "text.npz").write_text("1 2 3\n")
    (desk / "pickle.npz").write_bytes(pickle.dumps({"y": [1]}))
    (desk / "garbled.txt").write_text(recording(60).replace("0.5", "fast", 1))
    (desk / "nan.txt").write_text(recording(60, velocity="nan"))
    (desk / "short.txt").write_text(recording(20))
    (desk / "file").write_text("mine")
    (desk / "broken.json").write_text("{")
    (desk / "list.json").write_text("[1]")
    (desk / "strange").mkdir()
    (desk / "strange" / "holiday.txt").write_text("mine")

    write_run(desk / "foreign", package="gan")
    write_run(desk / "unfinished")
    write_run(desk / "pixels", replace(CONFIG, system="pixel_pendulum", data=Data()))
    write_run(desk / "recording", replace(CONFIG, system="real_pendulum", data=Data(path="good.txt")))
    write_run(desk / "separable", replace(CONFIG, models=("baseline", "separable")))
    write_run(desk / "broken")
    (desk / "broken" / "config.json").write_text("{")
    write_run(desk / "newer")
    record = json.loads((desk / "newer" / "config.json").read_text())
    record["config"]["dropout"] = 0.5
    (desk / "newer" / "config.json").write_text(json.dumps(record))

    config = replace(CONFIG, models=("hnn",))
    write_run(desk / "torn", config)
    save_untrained(desk / "torn", replace(config, data=Data(path=str(desk / "spring.npz"))), STEPS)
    write_run(desk / "stopped", replace(config, derivative=replace(config.derivative, steps=STEPS + 1)))
    shutil.copytree(desk / "torn" / "checkpoints", desk / "stopped" / "checkpoints")
    arrays = [path for path in (desk / "torn" / "checkpoints").rglob("*") if path.is_file() and "state" in path.parts]
    assert arrays
    for path in arrays:
        os.truncate(path, path.stat().st_size // 2)
    return desk


@pytest.fixture
def desk(template, tmp_path):
    shutil.copytree(template, tmp_path / "desk")
    return tmp_path / "desk"


# ---- as processes


PROCESSES = [
    # What is asked for
    ("no_such_command", "unknown command 'no_such_command'"),
    ("train", "which preset?"),
    ("train sprong", "unknown preset 'sprong'"),
    ("train spring --derivative.lrr 1e-3", "perhaps you meant --derivative.lr"),
    ("train spring --models transformer", "unknown model 'transformer'"),
    ("train spring --derivative.lr -1e-3", "lr must be positive"),
    ("train spring --devices 99 --out R", "devices is 99"),
    ("train spring --derivative.batch-size 100000 --out R", "there are only 750 rows"),
    # Data
    ("train spring --data.path absent.npz --out R", "absent.npz: no such file"),
    ("train spring --data.path garbled.npz --out R", "garbled.npz: not a readable npz file"),
    ("train spring --data.path pendulum.npz --out R", "holds data of 'pendulum', not of 'spring'"),
    ("train spring --data.path nan.npz --out R", "train_y holds NaN"),
    ("train real_pendulum --out R", "GRADIENT_FIELDS_DATA"),
    ("train real_pendulum --data.path short.txt --out R", "has 20 rows of data; at least 50"),
    # Run folders
    ("train spring --out unfinished", "unfinished already holds a run"),
    ("train spring --out strange", "it holds holiday.txt"),
    ("train spring --out file", "file is a file, not a folder"),
    ("train spring --out /proc/gradient-fields", "/proc/gradient-fields"),
    ("train unfinished --derivative.steps 7 --resume", "derivative.steps was 3, now 7"),
    # Trained runs
    ("evaluate strange", "strange is not a run folder"),
    ("evaluate broken", "broken/config.json is not valid JSON"),
    ("evaluate stopped", "the training of hnn is not finished"),
    ("evaluate torn", "torn/checkpoints/hnn: the last checkpoint is damaged"),
    ("rollout unfinished --dt -0.1 --solver euler", "needs a positive --dt"),
    # Simulation
    ("simulate spring --out /proc/s.npz", "/proc/s.npz: cannot be written"),
]


# Every fifth is fast.
_PARAMS = [pytest.param(*case, id=case[0], marks=pytest.mark.slow if k % 5 else ()) for k, case in enumerate(PROCESSES)]


@pytest.mark.parametrize(("line", "message"), _PARAMS)
def test_refused_by_a_process(desk, line, message, soon_s):
    before = contents(desk)
    code, out, err, spent_s = hnn_process(*line.split(), cwd=desk)
    refused(code, out, err, message)
    assert spent_s < soon_s, (spent_s, soon_s)
    assert contents(desk) == before


def test_a_run_in_use_by_another_process(desk, soon_s):
    lock = os.open(desk / "unfinished" / ".lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = contents(desk)
        code, out, err, spent_s = hnn_process("train", "unfinished", "--resume", cwd=desk)
        refused(code, out, err, "unfinished is in use by another process")
        assert contents(desk) == before
        assert spent_s < soon_s, (spent_s, soon_s)
    finally:
        os.close(lock)


def test_training_onto_a_full_disk(tiny_disk, soon_s):
    (tiny_disk / "mine").write_text("kept")
    code, out, err, spent_s = hnn_process("train", "spring", "--out", tiny_disk / "R", cwd=tiny_disk)
    refused(code, out, err, "is full (0 MiB free)" if "(0 MiB" in err else "is full (1 MiB free)")
    assert contents(tiny_disk) == {"mine": b"kept"}
    assert spent_s < soon_s, (spent_s, soon_s)


def test_simulating_onto_a_full_disk(tiny_disk, soon_s):
    out_file = tiny_disk / "s.npz"
    out_file.write_bytes(b"old")
    (tiny_disk / "mine").write_bytes(bytes(2**20 - 3 * 4096))
    before = contents(tiny_disk)
    code, out, err, spent_s = hnn_process("simulate", "spring", "--out", out_file, cwd=tiny_disk)
    refused(code, out, err, "s.npz: cannot be written (No space left on device)")
    assert contents(tiny_disk) == before
    assert spent_s < soon_s, (spent_s, soon_s)


def test_a_terminal_gets_the_same_line(tmp_path):
    """Where stdout is a terminal, tyro draws its errors in colour; with ASCII output, in another form."""
    leader, follower = pty.openpty()
    try:
        for stdout, variables in ((follower, {"TERM": "xterm"}), (subprocess.PIPE, {"PYTHONIOENCODING": "ascii"})):
            command = [sys.executable, "-m", "hnn", "simulate", "spring", "--n-point", "3"]
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120
            )
            refused(done.returncode, "", done.stderr, "Unrecognized options: --n-point")
            assert done.stderr.isascii() and "\x1b" not in done.stderr
    finally:
        os.close(leader)
        os.close(follower)


def test_without_arguments_the_help_fits_a_screen(tmp_path):
    code, out, err, _ = hnn_process(cwd=tmp_path)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 110
    for command in ("train", "evaluate", "rollout", "simulate"):
        assert command in out


# ---- the rest, in this process


@pytest.fixture
def here(desk, monkeypatch, in_process):
    """Runs a command in the desk: exit code, stdout, stderr."""
    monkeypatch.delenv("GRADIENT_FIELDS_DATA", raising=False)
    return in_process(main, desk)


CALLS = [
    *PROCESSES,
    # As above
    ("train spring --derivative.steps many", "--derivative.steps"),
    ("train --system moon", "unknown system 'moon'"),
    ("train spring --data.path text.npz --out R", "text.npz: not a readable npz file"),
    ("train spring --data.path objects.npz --out R", "objects.npz: not a readable npz file"),
    ("train spring --data.path short.npz --out R", "at least 3 times"),
    ("train spring --data.path shapes.npz --out R", "train_y must have shape"),
    ("train real_pendulum --data.path garbled.txt --out R", "line 2 is not four numbers"),
    ("train real_pendulum --data.path nan.txt --out R", "line 2 holds NaN"),
    ("train spring --out file/R", "file is not a folder"),
    ("evaluate newer", "config.dropout: unknown field"),
    ("evaluate unfinished", "unfinished holds no trained baseline"),
    ("rollout torn --out r.npz", "torn/checkpoints/hnn: the last checkpoint is damaged"),
    ("rollout unfinished --out /proc/r.npz", "/proc/r.npz: cannot be written"),
    ("simulate moon", "unknown system 'moon'"),
    ("simulate spring --t-end -1", "t_span must increase"),
    ("train spring --resume", "--resume needs --out"),
    ("train spring --out foreign --resume", "foreign is a run of gan, not of hnn"),
    # Fields
    ("train --seeds 2 --help-me", "--help-me"),
    ("train spring --models", "models"),
    ("train spring --models hnn hnn", "names a model twice"),
    ("train pixel_pendulum --models lstm", "lstm cannot learn from films"),
    ("train pixel_pendulum --data.path spring.npz", "leave data.path out"),
    ("train real_pendulum --models lstm", "lstm needs times on a regular grid"),
    ("train spring --derivative.steps 0", "steps must be at least 1"),
    ("train spring --derivative.lr nan", "lr must be positive"),
    ("train spring --derivative.b2 1", "b2 must be between 0 and 1"),
    ("train spring --derivative.warmup 1", "warmup must be"),
    ("train spring --derivative.final-lr 2", "final_lr must be"),
    ("train spring --derivative.weight-decay -1", "weight_decay must not be negative"),
    ("train spring --derivative.batch-size 0", "batch_size must be at least 1"),
    ("train spring --derivative.robust-scale 0", "robust_scale must be positive"),
    ("train spring --rollout.batch-size 5", "leave batch_size out"),
    ("train spring --rollout.segment-points 10", "multiple of rollout.samples_per_step"),
    ("train pixel_pendulum --pixels.window 4", "pixels.window"),
    ("train spring --evaluation.t-end -1", "t_end must be positive"),
    ("train spring --evaluation.rtol 1", "rtol must be between"),
    ("train spring --evaluation.rtol 0", "rtol must be between"),
    ("train spring --evaluation.n-initial 0", "n_initial must be at least 1"),
    ("train spring --evaluation.average mode", "average"),
    ("train spring --seeds 0", "seeds must be between 1 and 1000"),
    ("train spring --seed -1", "seed must be between 0 and"),
    ("train spring --hidden 0", "hidden must be between"),
    ("train spring --checkpoint-every 0", "checkpoint_every must be at least 1"),
    ("train spring --data.noise-std -0.1", "noise_std must be zero or positive"),
    ("train spring --data.noise-std inf", "noise_std must be zero or positive"),
    ("train spring --data.n-trajectories 1", "n_trajectories must be at least 2"),
    ("train spring --devices 0 --out R", "devices is 0"),
    ("train spring --devices -1 --out R", "devices is -1"),
    ("train spring --models lstm --sequence.batch-size 26 --out R", "there are only 25 rows to train lstm"),
    ("train spring --data.path spring.npz --derivative.batch-size 121 --out R", "there are only 120 rows"),
    # --config
    ("train --config", "--config needs a file"),
    ("train --config absent.json", "absent.json: no such file"),
    ("train --config broken.json", "broken.json is not valid JSON"),
    ("train --config list.json", "list.json is not the configuration of a run of hnn"),
    ("train --config foreign/config.json", "is not the configuration of a run of hnn"),
    ("train --config newer/config.json", "config.dropout: unknown field"),
    # Data
    ("train spring --data.path lacking.npz --out R", "lacks the array 'test_dy'"),
    ("train spring --data.path torn.npz --out R", "torn.npz: not a readable npz file"),
    ("train spring --data.path pickle.npz --out R", "pickle.npz: not a readable npz file"),
    ("train spring --data.path strange --out R", "strange: not a readable npz file"),
    ("train real_pendulum --data.path absent.txt --out R", "absent.txt: no such file"),
    ("train real_pendulum --data.path spring.npz --out R", "spring.npz"),
    # Runs
    ("train strange", "unknown preset 'strange'"),
    ("train broken --resume", "broken/config.json is not valid JSON"),
    ("train spring --out unfinished --resume", "started with another configuration"),
    ("evaluate", "needs the folder of a run"),
    ("evaluate --rtol 1e-6", "needs the folder of a run"),
    ("evaluate absent", "absent is not a run folder"),
    ("evaluate foreign", "foreign is a run of gan"),
    ("evaluate unfinished --t-end 0", "t_end must be positive"),
    ("evaluate unfinished --rtoll 1e-6", "--rtoll"),
    # Rollouts
    ("rollout", "needs the folder of a run"),
    ("rollout file", "file is a file, not a folder"),
    ("rollout unfinished --model lstm", "this run has no model 'lstm'"),
    ("rollout unfinished --seed 2", "seed must be between 0 and 1"),
    ("rollout unfinished --seed -1", "seed must be between 0 and 1"),
    ("rollout unfinished --y0 1 2 3", "y0 needs 2 numbers"),
    ("rollout unfinished --y0 1 nan", "y0 must be finite"),
    ("rollout unfinished --t-end 0", "t_end must be positive"),
    ("rollout unfinished --t-end inf", "t_end must be positive"),
    ("rollout unfinished --points 1", "points must be at least 2"),
    ("rollout unfinished --dt 0.1", "dt is for solvers with fixed steps"),
    ("rollout unfinished --solver midpoint", "needs a positive --dt"),
    ("rollout unfinished --solver midpoint --dt nan", "needs a positive --dt"),
    ("rollout unfinished --solver midpoint --dt 1e-9", "more than ten million steps"),
    ("rollout unfinished --solver rk45 --dt 0.1", "solver"),
    ("rollout unfinished --solver verlet --dt 0.1", "needs H = T(p) + V(q)"),
    ("rollout separable --model baseline --solver yoshida --dt 0.1", "needs H = T(p) + V(q)"),
    ("rollout unfinished --out r.csv", "must end in .npz or .png"),
    ("rollout unfinished --out absent/r.npz", "there is no folder absent"),
    ("rollout unfinished --out r.npz", "holds no trained hnn"),
    ("rollout stopped --out r.npz", "the training of hnn is not finished"),
    ("rollout pixels --out r.npz", "follows coordinates"),
    ("rollout recording --out r.npz", "give the initial state with --y0"),
    # Simulations
    ("simulate", "which system?"),
    ("simulate --out s.npz", "which system?"),
    ("simulate real_pendulum", "is a recording and cannot be simulated"),
    ("simulate spring --out s.txt", "must end in .npz"),
    ("simulate spring --out absent/s.npz", "there is no folder absent"),
    ("simulate spring --n-points 1", "n_points must be at least 3"),
    ("simulate spring --n-trajectories 1", "n_trajectories must be at least 2"),
    ("simulate spring --noise-std -1", "noise_std must be zero or positive"),
    ("simulate spring --seed -1", "seed must be between 0 and"),
    ("simulate pixel_pendulum --t-end 3", "leave these options out"),
    ("simulate pixel_pendulum --n-trajectories 1", "n_trajectories must be at least 2"),
]


@pytest.mark.parametrize(("line", "message"), CALLS, ids=[line for line, _ in CALLS])
def test_refused(desk, here, line, message):
    before = contents(desk)
    refused(*here(line), message)
    assert contents(desk) == before


def test_the_desk_has_good_things_too(desk):
    """What the bad inputs above were made from is accepted."""
    data, name = load_npz(desk / "spring.npz")
    assert name == "spring" and data.train.y.shape == (4, 30, 2)
    assert configs.from_json(Config, RunFolder.open(desk / "unfinished", "hnn")[1]) == CONFIG
