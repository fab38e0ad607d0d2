"""lib/process.py: exit codes and signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lib import process
from lib.process import Stopped

ROOT = Path(__file__).resolve().parents[1]

COMMAND = """
import os, signal, sys, time
from lib import process
from lib.process import command, UserError, Stopped
def entry(argv):
    print("out")
    match argv[0]:
        case "done": pass
        case "user": raise UserError("negative dt:\\n  use dt > 0")
        case "os": open("/absent/file")
        case "full": raise OSError(28, "No space left on device")
        case "stopped": raise Stopped(75, "at step 3 of 9")
        case "TERM": os.kill(os.getpid(), signal.SIGTERM)
        case "INT": os.kill(os.getpid(), signal.SIGINT)
        case "slow":
            with process.SIGNALS.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
        case "bug": raise ZeroDivisionError("a bug")
sys.exit(command(entry))
"""


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("done", 0, ""),
        ("user", 2, "error: negative dt: use dt > 0\n"),
        ("os", 2, "error: /absent/file: No such file or directory\n"),
        ("full", 2, "error: No space left on device\n"),
        ("stopped", 75, "stopped: at step 3 of 9\n"),
        ("TERM", 75, "stopped: --resume goes on from the newest checkpoint\n"),
        ("INT", 130, "stopped: --resume goes on from the newest checkpoint\n"),
    ],
)
def test_exit_codes(what, code, line):
    arguments = [sys.executable, "-c", COMMAND, what]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (code, line, "out\n")


def test_what_cannot_be_saved_in_time_is_left():
    variables = os.environ | {process.SAVE_VARIABLE: "0.2"}
    arguments = [sys.executable, "-c", COMMAND, "slow"]
    done = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=30, check=False)
    line = (
        "stopped: nothing was saved within 0.2 s (GRADIENT_FIELDS_SAVE_S); --resume goes on from the newest checkpoint"
    )
    assert (done.returncode, done.stderr) == (75, line + "\n")


def test_a_time_to_save_that_is_none():
    variables = os.environ | {process.SAVE_VARIABLE: "soon"}
    arguments = [sys.executable, "-c", COMMAND, "done"]
    done = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and "GRADIENT_FIELDS_SAVE_S must be a positive number of seconds" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_of_an_error_is_one_write(unbuffered):
    """What several processes say to one stderr stays apart. In its packet mode a pipe keeps writes apart."""
    source, target = os.pipe2(os.O_DIRECT)
    variables = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    subprocess.run([sys.executable, "-c", COMMAND, "user"], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL,
                   stderr=target, timeout=30, check=False)  # fmt: skip
    os.close(target)
    with os.fdopen(source, "rb", buffering=0) as pipe:
        assert pipe.read(1000) == b"error: negative dt: use dt > 0\n"


def test_a_bug_is_not_hidden():
    arguments = [sys.executable, "-c", COMMAND, "bug"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_reader_that_closes_the_pipe_gets_no_traceback():
    script = "import sys; from lib.process import command\nsys.exit(command(lambda argv: print('x' * 10**6)))"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$1" | head -c 1', "_", script],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("x", "")


@pytest.fixture
def signals():
    """Handlers of its own, put back afterwards."""
    kept = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    made = process.Signals()
    made.install()
    yield made
    for number, handler in kept:
        signal.signal(number, handler)


def test_signals_wait_while_deferred_and_are_never_lost(signals):
    seen = []

    def train():
        with signals.deferred():
            signal.raise_signal(signal.SIGTERM)
            seen.append(signals.code)

    with pytest.raises(Stopped) as stop:
        train()
    assert seen == [75]
    assert stop.value.code == 75  # though nobody inside looked


def test_a_second_interrupt_is_not_deferred(signals):
    def train():
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("should have ended")

    with pytest.raises(Stopped) as stop:
        train()
    assert stop.value.code == 130
