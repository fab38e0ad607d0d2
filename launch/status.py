"""`python -m launch status RUN...`: how far run folders are, from their files alone; also while they are written."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.process import UserError
from lib.report import number, text_table
from lib.run import RunFolder, read_json

COLUMNS = ["run", "package", "state", "step", "loss", "minutes", "processes"]


def main(args: Sequence[str]) -> None:
    if not args or args[0].startswith("-"):
        raise UserError("usage: python -m launch status RUN... (run folders, or folders of them)")
    runs = [run for arg in args for run in found(Path(arg))]
    print(text_table(COLUMNS, [row(run) for run in runs]))


def found(path: Path) -> list[Path]:
    """The run folders at or below a path. Raises UserError where there is none."""
    if (path / "config.json").is_file():
        return [path]
    runs = sorted(p.parent for p in path.rglob("config.json") if (p.parent / "environment.json").exists())
    if not runs:
        raise UserError(f"{path} holds no run folder")
    return runs


def row(run: Path) -> list[str]:
    """The cells of a run: COLUMNS."""
    record = read_json(run / "config.json")
    package = record.get("package", "?") if isinstance(record, dict) else "?"
    rows = RunFolder(run).metrics()
    last = max(rows, key=lambda r: r["step"], default={})
    losses = [r for r in rows if any(key.endswith(".loss") for key in r)]
    loss = next((v for k, v in losses[-1].items() if k.endswith(".loss")), None) if losses else None
    environment = _last_environment(run)
    return [
        str(run), package, state(run), str(last.get("step", 0)), "" if loss is None else number(loss),
        f"{max((r['wall_s'] for r in rows), default=0) / 60:.1f}", str(environment.get("processes", 1)),
    ]  # fmt: skip


def state(run: Path) -> str:
    """finished (it has a report), running (a process of this machine holds it), or stopped."""
    if (run / "report.html").exists():
        return "finished"
    lock = run / ".lock"
    if not lock.exists():
        return "stopped"
    handle = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running"
    finally:
        os.close(handle)
    return "stopped"


def _last_environment(run: Path) -> dict[str, Any]:
    try:
        found = read_json(run / "environment.json")
    except UserError:
        return {}
    return found[-1] if isinstance(found, list) and found else {}
