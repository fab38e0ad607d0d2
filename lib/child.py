"""A process that works on request, in lines of JSON: for benchmarks, whose sides must not share one.

    with Child("hnn.timing") as child:                   # the side that asks
        seconds = child.ask("train_block", model="hnn", steps=100)["seconds"]

    work("hnn.timing", argv, actions)                    # the side that works

Between requests it sleeps, so that whoever asks can measure something else meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.process import UserError


class Child:
    """`python -m MODULE ARGUMENTS`, started at once."""

    def __init__(self, module: str, *arguments: str):
        self.module = module
        command_line = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()  # closes its stdin, upon which it ends

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request. Raises UserError where the child has ended; its own message is on stderr."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise UserError(f"python -m {self.module} ended before it was asked") from None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"python -m {self.module} ended without an answer to {do!r}")
        return json.loads(line)


def answers(actions: Iterable[Callable[..., dict[str, Any]]], requests: Iterable[str]) -> Iterator[str]:
    """Answers to request lines, one each, by the action named in "do". Raises UserError where there is none."""
    by_name = {action.__name__: action for action in actions}
    for line in requests:
        request = json.loads(line)
        name = request.pop("do", None)
        if name not in by_name:
            raise UserError(f"cannot do {name!r}: choose from {', '.join(by_name)}")
        yield json.dumps(by_name[name](**request))


def work(module: str, argv: Sequence[str], actions: Iterable[Callable[..., dict[str, Any]]]) -> None:
    """The main function of the side that works, `python -m module`. Raises UserError for arguments: it takes none."""
    if argv:
        raise UserError(f"python -m {module} takes no arguments: it reads requests from stdin")
    for answer in answers(actions, sys.stdin):
        print(answer, flush=True)


def peak_memory_mib() -> float:
    """The most memory that this process has had in RAM so far; NaN where the system does not tell (not Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
