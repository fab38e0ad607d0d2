"""`python -m launch demo`: a small run of every package, one after the other, and one page of all their reports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.config import parse
from lib.report import join
from lib.run import UserError

RUNS = {"hnn": "demo", "ncsn": "digits_edm"}
"""package: preset; on data inside the installed packages"""


@dataclass(frozen=True)
class Demo:
    """Train, evaluate and show a small run of every package."""

    out: Path = Path("runs/demo")
    """folder for the run folders and report.html"""


def main(args: Sequence[str]) -> None:
    options = parse(Demo(), args, "python -m launch demo")
    for package, preset in RUNS.items():
        print(f"\n== python -m {package} train {preset}", flush=True)
        command = [sys.executable, "-m", package, "train", preset, "--out", str(options.out / package)]
        status = subprocess.run(command, check=False).returncode
        if status:
            raise UserError(f"python -m {package} train {preset} failed with exit code {status}")
    pages = [options.out / package / "report.html" for package in RUNS]
    print(f"\n{join(pages, options.out / 'report.html', title='Gradient Fields')}")
