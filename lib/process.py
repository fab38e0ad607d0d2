"""How a command ends: mistakes of the user's, signals, other processes, exit codes.

Exit codes: 0 done, 2 the user's mistake, 75 preempted after saving, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130

_STOPPED = "--resume goes on from the newest checkpoint"


class UserError(Exception):
    """A mistake that the user can mend. The message is one line that says what to change; commands exit with 2."""


class Stopped(Exception):
    """A signal asked the run to end; whatever there was to save has been saved. `code` is the exit code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


SAVE_VARIABLE = "GRADIENT_FIELDS_SAVE_S"
"""how long a training may take to save after SIGTERM, seconds; then it ends without: a scheduler would kill it"""
_SAVE_S = 100.0


def seconds_of(variable: str, default: float) -> float:
    """A time that the environment may set. Raises UserError where it is not positive and finite."""
    text = os.environ.get(variable)
    try:
        found = default if text is None else float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < math.inf:
        raise UserError(f"{variable} must be a positive number of seconds, not {text!r}")
    return found


class Signals:
    """SIGTERM and SIGINT as a flag while training (so that the state is saved), as an exception elsewhere."""

    def __init__(self) -> None:
        self._deferred = False
        self._save_s = _SAVE_S
        self._timer: threading.Timer | None = None
        self.code: int | None = None

    def install(self) -> None:
        """Raises UserError where the environment's time to save is none."""
        self._save_s = seconds_of(SAVE_VARIABLE, _SAVE_S)
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        del frame
        code = EXIT_PREEMPTED if number == signal.SIGTERM else EXIT_INTERRUPTED
        impatient = self.code is not None
        self.code = code
        if not self._deferred or (impatient and code == EXIT_INTERRUPTED):
            raise Stopped(code, _STOPPED)
        if code == EXIT_PREEMPTED and not impatient:
            self._timer = threading.Timer(self._save_s, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def _give_up(self) -> None:
        """Long steps, slow disks, or another process that is gone: what is on disk is good, and time is up."""
        message = f"stopped: nothing was saved within {self._save_s:g} s ({SAVE_VARIABLE}); {_STOPPED}\n"
        os.write(sys.stderr.fileno(), message.encode())
        os._exit(EXIT_PREEMPTED)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, signals only set `code`; a second Ctrl-C still ends at once.

        A signal that nobody inside looked at any more raises Stopped at the end.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
            if self._timer is not None:
                self._timer.cancel()
        if self.code is not None:
            raise Stopped(self.code, _STOPPED)


SIGNALS = Signals()


class Others:
    """The other processes of a run, as far as leaving them is concerned."""

    wait_s: float | None = None
    """None: there are none. Else whoever fails leaves at once, after so many seconds: the way out would wait for the
    others, who may be waiting for it in a collective. `lib.shard.start` sets it."""

    def leave(self, code: int) -> None:
        """Ends this process where there are others."""
        if self.wait_s is not None:
            end(code, self.wait_s)


OTHERS = Others()


def end(code: int, after_s: float = 0.0) -> NoReturn:
    """Ends this process, signals or not, without waiting for its threads or for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    time.sleep(after_s)
    os._exit(code)


def command(entry: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs `entry(argv)` and turns its outcome into an exit code and at most one line on stderr."""
    try:
        code = _outcome(entry, argv)
    except Exception:
        if OTHERS.wait_s is not None:
            traceback.print_exc()
            OTHERS.leave(1)
        raise
    if code == EXIT_USER_ERROR:
        OTHERS.leave(code)
        # After a save that failed, threads of Orbax's go on waiting for it, ten minutes each: Python would join them.
        others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        if argv is None and not all(thread.daemon for thread in others):
            end(code)
    return code


def _outcome(entry: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    try:
        SIGNALS.install()
        entry(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _fail(str(error), EXIT_USER_ERROR)
    except Stopped as stop:
        return _fail(str(stop), stop.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}", EXIT_USER_ERROR)
    return 0


def dispatch(commands: Mapping[str, Callable[[Sequence[str]], None]], usage: str, args: Sequence[str]) -> None:
    """Calls the command that `args` begin with, with the rest of them; prints `usage` without any and for --help.

    Raises UserError for an unknown one.
    """
    if not args or args[0] in ("-h", "--help"):
        print(usage, flush=True)
    elif args[0] in commands:
        commands[args[0]](args[1:])
    else:
        raise UserError(f"unknown command {args[0]!r}: choose from {', '.join(commands)}")


def tell(line: str) -> None:
    """A line on stderr, in one write: what other processes say cannot fall into it. (An unbuffered `print` writes the
    end of the line by itself.) What was printed before comes first.
    """
    sys.stdout.flush()
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _fail(message: str, code: int) -> int:
    tell(f"{'error' if code == EXIT_USER_ERROR else 'stopped'}: {' '.join(message.split())}")
    return code
