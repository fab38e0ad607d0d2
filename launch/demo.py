"""`python -m launch demo`: a small run of every package, one after the other, and one page of all their reports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.config import parse
from lib.process import UserError
from lib.report import join

RUNS = {
    "hnn": "train demo --out {out}",
    "ncsn": "train digits_edm --evaluation.samplers dpm_solver:20 --out {out}",
    "gan": "train digits_dcgan --optim.steps 3000 --out {out}",
    "stylize": "image astronaut hubble_deep_field --longest-px 192 --optim.iterations 60 --run {out} --out {out}.png",
}
"""package: command; on data inside the installed packages"""


@dataclass(frozen=True)
class Demo:
    """Train, evaluate and show a small run of every package."""

    out: Path = Path("runs/demo")
    """folder for the run folders and report.html"""


def main(args: Sequence[str]) -> None:
    options = parse(Demo(), args, "python -m launch demo")
    options.out.mkdir(parents=True, exist_ok=True)
    for package, command in RUNS.items():
        words = [word.format(out=options.out / package) for word in command.split()]
        print(f"\n== python -m {package} {' '.join(words)}", flush=True)
        status = subprocess.run([sys.executable, "-m", package, *words], check=False).returncode
        if status:
            raise UserError(f"python -m {package} {' '.join(words)} failed with exit code {status}")
    pages = [options.out / package / "report.html" for package in RUNS]
    print(f"\n{join(pages, options.out / 'report.html', title='Gradient Fields')}")
