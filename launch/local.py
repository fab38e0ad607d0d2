"""A small cluster on one machine: N processes of one command that find each other through `lib.shard.start`.

Process 0 writes to the terminal as usual; every line of process i > 0 begins with `[i] `. The processes live
and die together: a signal to the launcher goes to all of them, a failure of one ends the others, and none
outlives the launcher.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from launch import jobs
from lib.config import parse
from lib.process import UserError, tell

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_FORWARDED = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Local:
    """Starts copies of the command after `--` as processes of one distributed JAX program."""

    processes: int = 2
    """how many copies"""
    grace_s: float = 30.0
    """seconds that the others have between SIGTERM and SIGKILL once one has failed"""


def main(args: Sequence[str]) -> int:
    """Parses `[--processes N] [--grace-s S] -- COMMAND...` and runs it; returns the exit code.

    Raises UserError for wrong options and for a command that cannot be started.
    """
    words, command = jobs.split(args, "python -m launch local --processes N -- COMMAND...")
    options = parse(Local(), words, "python -m launch local")
    if options.processes < 1:
        raise UserError(f"--processes is {options.processes}, it must be at least 1")
    if not (math.isfinite(options.grace_s) and options.grace_s >= 0):
        raise UserError(f"--grace-s is {options.grace_s}, it must be finite and not negative")
    return run(command, options.processes, options.grace_s)


def run(command: Sequence[str], processes: int, grace_s: float) -> int:
    """Runs `processes` copies of `command` to their end.

    Returns 0 if all succeed, else the exit code of the first that failed (128 + n where signal n ended it).
    Raises UserError where the command cannot be started.
    """
    children: list[subprocess.Popen[bytes]] = []
    output = _Output()
    with _received_signals() as received:
        try:
            coordinator = f"127.0.0.1:{_free_port()}"
            for i in range(processes):
                children.append(_start(command, i, processes, coordinator))
                if i > 0:
                    output.follow(children[i], f"[{i}] ".encode())
            return _supervise(children, received, output, grace_s)
        finally:
            for child in children:
                _signal_group(child, signal.SIGKILL)
            for child in children:
                child.wait()
            output.drain()


def _supervise(
    children: Sequence[subprocess.Popen[bytes]], received: list[int], output: _Output, grace_s: float
) -> int:
    """Waits for all children, forwarding output and signals; returns the exit code of the first failure."""
    code, deadline, told = 0, math.inf, False
    running = list(children)
    while running and time.monotonic() < deadline:
        output.forward(_POLL_S)
        while received:
            told = True
            number = received.pop(0)
            for child in running:
                _signal_group(child, number)
        ended = {child: status for child in running if (status := _exit_code(child)) is not None}
        running = [child for child in running if child not in ended]
        # Of several that end at once, one that a signal has ended is why the others did.
        failed = sorted((child for child in ended if ended[child]), key=lambda child: ended[child] <= 128)
        if failed and code == 0:
            code, deadline = ended[failed[0]], time.monotonic() + grace_s
            if not told and len(children) > 1:
                _tell(children.index(failed[0]), len(children), code)
            # Children that the user's signal has reached are saving: a second one might cut that short.
            for other in () if told else running:
                _signal_group(other, signal.SIGTERM)
    return code


def _tell(number: int, count: int, status: int) -> None:
    name = signal.Signals(status - 128).name if status - 128 in signal.valid_signals() else None
    how = f"was ended by {name}" if name else f"ended with exit code {status}"
    tell(f"launch: process {number} of {count} {how}; the others are asked to end")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(command: Sequence[str], i: int, processes: int, coordinator: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "GRADIENT_FIELDS_COORDINATOR": coordinator,
        "GRADIENT_FIELDS_PROCESSES": str(processes),
        "GRADIENT_FIELDS_PROCESS": str(i),
        "GRADIENT_FIELDS_LOCAL": str(i),
    }
    launcher = os.getpid()
    cores = _share(sorted(os.sched_getaffinity(0)), i, processes)
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        # `kill -9` leaves the launcher no time to end its children: the kernel does it.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)
        os.sched_setaffinity(0, cores)

    pipe = subprocess.PIPE if i > 0 else None
    try:
        # A group of its own, so that Ctrl-C on the terminal reaches it once, through the launcher.
        # `preexec_fn` is safe because the launcher has no other threads.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            process_group=0,
            preexec_fn=prepare,
        )
    except OSError as error:
        raise UserError(f"cannot start {command[0]}: {error.strerror}") from None


def _share(cores: Sequence[int], i: int, processes: int) -> Sequence[int]:
    """The cores of process i: equal shares, or all where there are fewer cores than processes."""
    if processes > len(cores):
        return cores
    return cores[i * len(cores) // processes : (i + 1) * len(cores) // processes]


def _exit_code(child: subprocess.Popen[bytes]) -> int | None:
    """None while the child runs. It is not reaped here: its group keeps its number until that is killed."""
    status = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else 128 + status.si_status


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    os.killpg(child.pid, number)


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """The signals to be forwarded, in order of arrival, instead of what they usually do."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Output:
    """Passes lines of several children on, each line whole and with its child's prefix."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def follow(self, child: subprocess.Popen[bytes], prefix: bytes) -> None:
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            assert source is not None
            os.set_blocking(source.fileno(), False)
            self._selector.register(source, selectors.EVENT_READ, _Lines(prefix, target.buffer))

    def forward(self, timeout_s: float) -> bool:
        """Waits up to `timeout_s` for output and passes it on; False where there was none."""
        ready = self._selector.select(timeout_s)
        for key, _ in ready:
            data = os.read(key.fd, 1 << 16)
            key.data.write(data)
            if not data:
                self._selector.unregister(key.fileobj)
        return bool(ready)

    def drain(self) -> None:
        """What is left in the pipes of children that have ended."""
        while self.forward(0):
            pass
        for key in list(self._selector.get_map().values()):
            key.data.write(b"")
        self._selector.close()


class _Lines:
    def __init__(self, prefix: bytes, target: BinaryIO):
        self._prefix, self._target, self._rest = prefix, target, b""

    def write(self, data: bytes) -> None:
        """Writes the lines that `data` completes; an empty `data` completes the last."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data and self._rest:
            lines, self._rest = [self._rest], b""
        if lines:
            self._target.write(b"".join(self._prefix + line + b"\n" for line in lines))
            self._target.flush()
