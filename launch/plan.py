"""`python -m launch plan PRESET --devices 256 --hosts 32`: the command `plan` of the package that has the preset."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from lib.process import UserError

_PACKAGES = ("ncsn", "gan", "stylize")


def main(args: Sequence[str]) -> None:
    if not args or args[0].startswith("-"):
        raise UserError("usage: python -m launch plan PRESET --devices N [--hosts H] [-- OPTIONS of the training]")
    known = {}
    for package in _PACKAGES:
        told = subprocess.run([*_command(package), "--presets"], capture_output=True, text=True, check=True).stdout
        known |= dict.fromkeys(told.split(), package)
    if args[0] not in known:
        raise UserError(f"unknown preset {args[0]!r}: choose from {', '.join(known)}")
    sys.exit(subprocess.run([*_command(known[args[0]]), *args], check=False).returncode)


def _command(package: str) -> list[str]:
    return [sys.executable, "-m", package, "plan"]
