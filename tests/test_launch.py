"""The local launcher: exit codes, signals, no orphans; and two processes compute what one does."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Lines are written in one piece: the launcher's processes share a stream, and a print is two writes.
WHICH = (
    "import os, sys, time, signal; i = os.environ['GRADIENT_FIELDS_PROCESS']; "
    "say = lambda *words: sys.stdout.write(' '.join(map(str, words)) + '\\n'); "
)

# Training that depends on everything a second process could spoil: the order of the batches, the split of a
# batch, the random numbers of its examples, the mean of the gradients.
FIT = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lib import shard
from lib.checkpoint import Checkpoints
from lib.data import Resident
from lib.process import command
from lib.train import fit, init_state, make_step


def loss(params, batch, key):
    noise = jax.vmap(jax.random.normal)(shard.example_keys(key, batch["x"].shape[0]))
    error = jnp.tanh(batch["x"] @ params["inner"]) @ params["outer"] + 0.1 * noise - batch["y"]
    return jnp.mean(error**2), {}


def main(args):
    out, steps = Path(args[0]), int(args[1])
    shard.start(cpu_devices=1)
    x = np.random.default_rng(0).standard_normal((96, 5)).astype(np.float32)
    params = {"inner": jnp.full((5, 8), 0.1) + jnp.eye(5, 8), "outer": jnp.ones(8) / 8}
    tx = optax.sgd(0.1)
    with Checkpoints(out / "checkpoints") as checkpoints:
        state = fit(
            init_state(params, tx, jax.random.key(1)),
            make_step(loss, tx),
            Resident({"x": x, "y": np.sin(x.sum(1))}, batch_size=32),
            steps=steps,
            mesh=shard.make_mesh(),
            steps_per_call=8,
            checkpoints=checkpoints,
            log=lambda step, metrics: print("step", step, flush=True),
        )
        restored = shard.fetch(checkpoints.restore(state).params)
    params = shard.fetch(state.params)
    assert all(np.array_equal(restored[name], params[name]) for name in params)
    np.savez(out / f"process_{jax.process_index()}.npz", devices=jax.device_count(), **params)


sys.exit(command(main))
"""


def launch(*command: object, processes: int = 2, grace_s: float = 20) -> subprocess.Popen[str]:
    options = ["--processes", str(processes), "--grace-s", str(grace_s)]
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "local", *options, "--", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch_python(source: str, **options: float) -> subprocess.Popen[str]:
    return launch(sys.executable, "-uc", WHICH + source, **options)  # type: ignore[arg-type]


def finish(launcher: subprocess.Popen[str], timeout_s: float = 30) -> tuple[int, str, str]:
    try:
        out, err = launcher.communicate(timeout=timeout_s)
    finally:
        launcher.kill()  # its children die with it
        launcher.wait()
    return launcher.returncode, out, err


def lines_until(launcher: subprocess.Popen[str], text: str, count: int) -> list[str]:
    """Reads stdout until `count` lines hold `text`."""
    assert launcher.stdout is not None
    lines = []
    for line in launcher.stdout:
        lines.append(line.rstrip("\n"))
        if sum(text in seen for seen in lines) == count:
            return lines
    raise AssertionError(f"ended without {count} times {text!r}: {lines}")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], timeout_s: float = 5) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def test_environment_and_output():
    source = (
        # One write a line: what process 0 writes in pieces may have other lines between them.
        "e = os.environ; "
        "sys.stdout.write(f\"{e['GRADIENT_FIELDS_COORDINATOR']} {i} {e['GRADIENT_FIELDS_PROCESSES']}\\n\"); "
        "sys.stderr.write('err ' + i)"
    )
    code, out, err = finish(launch_python(source, processes=3))
    assert code == 0
    found = [re.fullmatch(r"(?:\[(\d)\] )?127\.0\.0\.1:(\d+) (\d) 3", line) for line in out.splitlines()]
    assert sorted((m[1], m[3]) for m in found if m and m[1]) == [("1", "1"), ("2", "2")]
    assert [m[3] for m in found if m and not m[1]] == ["0"]
    assert len({m[2] for m in found if m}) == 1
    assert "[1] err 1\n" in err
    assert "[2] err 2\n" in err


@pytest.mark.parametrize("expected", [2, 75, 130])
def test_exit_code_is_that_of_the_failing_process(expected):
    code, _, _ = finish(launch_python(f"sys.exit({expected} if i == '1' else 0)"))
    assert code == expected


def test_failure_takes_the_others_down():
    source = (
        "stop = lambda *_: (say('asked'), sys.exit(0)); signal.signal(signal.SIGTERM, stop); "
        "say('ready', os.getpid()); (time.sleep(1), sys.exit(7)) if i == '1' else time.sleep(60)"
    )
    launcher = launch_python(source)
    pids = [int(line.split()[-1]) for line in lines_until(launcher, "ready", 2)]
    code, out, _ = finish(launcher)
    assert code == 7
    assert "asked" in out
    assert wait_until_gone(pids)


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period():
    source = "signal.signal(signal.SIGTERM, signal.SIG_IGN); i == '0' or (time.sleep(2), exit(7)); time.sleep(60)"
    start = time.monotonic()
    code, _, _ = finish(launch_python(source, grace_s=0.5))
    assert code == 7
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_reach_every_process_once(number, expected):
    source = (
        f"save = lambda *_: (say('saved'), sys.exit({expected})); "
        f"signal.signal({number:d}, save); say('ready'); time.sleep(60)"
    )
    launcher = launch_python(source, processes=3)
    lines_until(launcher, "ready", 3)
    launcher.send_signal(number)
    code, out, _ = finish(launcher)
    assert code == expected
    assert sorted(out.splitlines()) == ["[1] saved", "[2] saved", "saved"]


def test_death_by_signal_is_128_plus_its_number():
    code, _, _ = finish(launch_python("os.kill(os.getpid(), signal.SIGKILL) if i == '1' else None"))
    assert code == 128 + signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_kill_9_of_the_launcher_leaves_no_orphans():
    launcher = launch_python("say('ready', os.getpid()); time.sleep(60)")
    pids = [int(line.split()[-1]) for line in lines_until(launcher, "ready", 2)]
    launcher.kill()
    finish(launcher)
    assert wait_until_gone(pids)


def test_grandchildren_end_with_their_process(tmp_path):
    both_said = (
        f"touch {tmp_path}/$GRADIENT_FIELDS_PROCESS; until [ -e {tmp_path}/0 -a -e {tmp_path}/1 ]; do sleep .1; done"
    )
    launcher = launch("sh", "-c", f"sleep 60 & echo pid $!; {both_said}; exit 3")
    pids = [int(line.split()[-1]) for line in lines_until(launcher, "pid", 2)]
    code, _, _ = finish(launcher)
    assert code == 3
    assert wait_until_gone(pids)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cluster"], "unknown command 'cluster'"),
        (["local", "--processes", "2"], "no command given"),
        (["local", "--processes", "0", "--", "true"], "--processes is 0"),
        (["local", "--processes", "two", "--", "true"], "--processes"),
        (["local", "--grace-s", "nan", "--", "true"], "--grace-s is nan"),
        (["local", "--", "no-such-command-here"], "cannot start no-such-command-here"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(args, message):
    done = subprocess.run(
        [sys.executable, "-m", "launch", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def fit_script(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("GRADIENT_FIELDS_PROCESS")]:
        monkeypatch.delenv(name)
    script = tmp_path / "fit.py"
    script.write_text(FIT)
    return script


def test_two_processes_train_the_same_parameters_as_one(fit_script, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    launcher = launch(sys.executable, fit_script, two, 20)
    code, _, err = finish(launcher, timeout_s=120)
    assert code == 0, err
    subprocess.run([sys.executable, fit_script, one, "20"], check=True, timeout=120, capture_output=True)

    alone = np.load(one / "process_0.npz")
    first, second = (np.load(two / f"process_{i}.npz") for i in range(2))
    assert (alone["devices"], first["devices"], second["devices"]) == (1, 2, 2)
    for name in ("inner", "outer"):
        scale = np.abs(alone[name]).max()
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], alone[name], rtol=0, atol=1e-6 * scale)


@pytest.mark.slow
def test_sigterm_saves_in_two_processes(fit_script, tmp_path):
    launcher = launch(sys.executable, fit_script, tmp_path, 10**8)
    watchdog = time.monotonic() + 120
    assert launcher.stdout is not None
    while "step" not in launcher.stdout.readline():
        assert launcher.poll() is None
        assert time.monotonic() < watchdog
    launcher.send_signal(signal.SIGTERM)
    code, _, err = finish(launcher, timeout_s=60)
    assert code == 75, err
    saved = re.search(r"^stopped: at step (\d+) of", err, re.MULTILINE)
    assert saved, err
    assert (tmp_path / "checkpoints" / saved[1]).is_dir()
