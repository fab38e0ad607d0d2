"""What all engines share: the command after `--`, and how it is made one that can be sent again."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence

from lib.process import UserError

PACKAGES = ("hnn", "ncsn", "gan", "stylize")


def split(args: Sequence[str], usage: str) -> tuple[list[str], list[str]]:
    """(options before `--`, command after it). Raises UserError without a command."""
    at = list(args).index("--") if "--" in args else len(args)
    options, command = list(args[:at]), list(args[at + 1 :])
    if not command and not {"-h", "--help"} & set(options):
        raise UserError(f"no command given: {usage}")
    return options, command


def resumable(command: Sequence[str]) -> list[str]:
    """A training that engines start again after a preemption goes on where it was: `--resume` is added.

    Raises UserError for a training without a run folder, which could not be found again.
    """
    words = list(command)
    if not is_training(words):
        return words
    if "--out" not in words and not any(word.startswith("--out=") for word in words):
        raise UserError("a training that may be preempted needs --out RUN, to be found again")
    return words if "--resume" in words else [*words, "--resume"]


def is_training(words: Sequence[str]) -> bool:
    """Whether it is `python -m PACKAGE train ...`."""
    return any(
        words[i] == "-m" and words[i + 1] in PACKAGES and words[i + 2 : i + 3] == ["train"]
        for i in range(len(words) - 1)
    )


def check_name(name: str) -> str:
    """What Slurm, Kubernetes and Google Cloud all take for a name. Raises UserError for anything else."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(f"{name!r} is no name: up to 40 of a-z, 0-9 and -, from a letter to a letter or digit")
    return name


def execute(words: Sequence[str], *, dry_run: bool, given: str | None = None) -> str:
    """Runs a command of an engine and returns what it says; with `dry_run` it is only printed.

    `given` goes to its standard input. Raises UserError where it is missing or fails.
    """
    print(shlex.join(words), flush=True)
    if dry_run:
        return ""
    try:
        done = subprocess.run(words, input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not installed here: --dry-run prints what would be executed") from None
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{words[0]} failed: {told[-1]}")
    return done.stdout
