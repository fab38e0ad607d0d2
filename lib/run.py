"""Run folders and their files: what every command of every package writes in the same way.

A run folder holds ``config.json``, ``environment.json``, ``metrics.jsonl``, ``checkpoints/``, ``figures/``,
``evaluation.json`` and ``report.html``; files are replaced atomically, so that a kill at any instant leaves either
the old or the new one.
"""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.process import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")
_MIN_FREE_BYTES = 32 * 2**20


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN or infinity: they are written as null, in nested structures too."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    return value


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` in one step; where that fails, the old file is left and nothing else."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(finite_or_none(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError where the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def write_evaluation(folder: Path, numbers: dict[str, Any], protocol: str) -> None:
    """Writes evaluation.json, the same to the bit for a run that was interrupted, and evaluated.json: when, with what
    code and on what machine it was measured."""
    write_json(folder / "evaluation.json", {**numbers, "protocol": protocol})
    write_json(folder / "evaluated.json", environment())


def check_out(out: Path, *suffixes: str) -> None:
    """Raises UserError where the file `out` cannot be written, before anything is computed.

    `suffixes`: how its name may end; "" stands for a folder, which need not exist.
    """
    if out.suffix not in suffixes:
        ends = [f"end in {' or '.join(filter(None, suffixes))}"] if any(suffixes) else []
        raise UserError(f"{out}: it must {', or '.join(ends + ['be a folder'] * ('' in suffixes))}")
    if out.is_dir() and out.suffix:
        raise UserError(f"{out} is a folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}")
    try:
        with tempfile.TemporaryFile(dir=out.parent) as file:
            file.write(bytes(2**16))  # a full disk lets files be made, but not be filled
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def environment() -> dict[str, Any]:
    """What is needed to know where a number comes from: code, versions, devices, command, time."""
    import jax

    def git(*args: str) -> str:
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "utc_start": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git("rev-parse", "HEAD") or None,
        "git_dirty": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "cores": len(os.sched_getaffinity(0)),
    }


class RunFolder:
    """One run on disk. Only the process with `primary=True` writes; the others read and wait."""

    def __init__(self, path: Path, *, primary: bool = True):
        self.path = path
        self.primary = primary
        self._release: Callable[[], object] = lambda: None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        """Lets other processes use the folder."""
        self._release()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @classmethod
    def start(
        cls, path: Path, package: str, config: dict[str, Any], *, resume: bool, primary: bool = True
    ) -> RunFolder:
        """Creates the folder of a new run, or opens that of a run to be continued.

        Raises UserError for a folder in use, of another package or configuration, with other contents, not
        writable, or on a full disk; nothing that was there is touched.
        """
        folder = cls(path, primary=primary)
        if not primary:
            return folder
        cls.check(path, package, config, resume=resume)
        try:
            folder.figures.mkdir(parents=True, exist_ok=True)
            folder._take_lock()
            if not (path / "config.json").exists():
                write_json(path / "config.json", {"package": package, "config": config})
            previous = read_json(path / "environment.json") if (path / "environment.json").exists() else []
            write_json(path / "environment.json", [*previous, environment()])
        except OSError as error:
            raise UserError(f"cannot write the run folder {path}: {error.strerror}") from None
        return folder

    @staticmethod
    def check(path: Path, package: str, config: dict[str, Any], *, resume: bool) -> None:
        """Raises what `start` would raise, and writes nothing: for before the seconds that imports and data take."""
        found = _existing(path)
        if found is not None and not resume:
            raise UserError(f"{path} already holds a run: --resume continues it, another --out starts a new one")
        if found is not None:
            _check_same(path, found, {"package": package, "config": config})
        _check_space(path)

    @classmethod
    def open(cls, path: Path, package: str) -> tuple[RunFolder, dict[str, Any]]:
        """An existing run and its configuration. Raises UserError where `path` is no run of `package`."""
        found = _existing(path) if path.is_file() or (path / "config.json").exists() else None
        if found is None:
            raise UserError(f"{path} is not a run folder (no config.json in it)")
        if found["package"] != package:
            raise UserError(f"{path} is a run of {found['package']}, not of {package}")
        return cls(path), found["config"]

    def _take_lock(self) -> None:
        """Held until the end of the context, or until this object is collected."""
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._release = weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is in use by another process") from None

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; a line torn by a kill is left out."""
        path = self.path / "metrics.jsonl"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def logger(self, name: str, resumed_step: int) -> Callable[[int, dict[str, float]], None]:
        """A function `log(step, metrics)` that appends lines `{"step", "NAME.metric", ..., "wall_s"}`.

        Lines of `name` beyond `resumed_step` belong to steps that are about to be repeated and are dropped.
        `wall_s` is the training time of `name`, summed over interruptions.
        """
        if not self.primary:
            return lambda step, metrics: None
        rows = self.metrics()
        ours = lambda row: any(key.startswith(f"{name}.") for key in row)  # noqa: E731
        kept = [row for row in rows if not ours(row) or row["step"] <= resumed_step]
        path = self.path / "metrics.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        spent_s = max((row["wall_s"] for row in kept if ours(row)), default=0.0)
        start = time.perf_counter() - spent_s

        def log(step: int, metrics: dict[str, float]) -> None:
            row = {"step": step} | {f"{name}.{k}": v for k, v in metrics.items()}
            row["wall_s"] = round(time.perf_counter() - start, 4)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite_or_none(row)) + "\n")

        return log


def _existing(path: Path) -> dict[str, Any] | None:
    """The record in an existing run folder; None where a new run may be put there."""
    if not path.exists():
        return None
    if not path.is_dir():
        raise UserError(f"{path} is a file, not a folder")
    if (path / "config.json").exists():
        record = read_json(path / "config.json")
        if not isinstance(record, dict) or set(record) != {"package", "config"}:
            raise UserError(f"{path}/config.json is not the configuration of a run")
        return record
    leftovers = {".lock", "figures", "config.json.partial"}  # of a run killed before its first write
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in leftovers)
    if strangers:
        raise UserError(f"{path} is not empty and not a run folder (it holds {strangers[0]}): choose another --out")
    return None


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found["package"] != wanted["package"]:
        raise UserError(f"{path} is a run of {found['package']}, not of {wanted['package']}")
    difference = first_difference(found["config"], wanted["config"])
    if difference:
        raise UserError(f"{path} was started with another configuration: {difference}")


def first_difference(old: Any, new: Any, name: str = "") -> str | None:
    """The first place where two JSON values differ, as `field: old, now new`; None where they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if old == new else f"{name} was {json.dumps(old)}, now {json.dumps(new)}"


def _check_space(path: Path) -> None:
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"cannot write the run folder {path}: {parent} is not a folder")
    free = shutil.disk_usage(parent).free
    if free < _MIN_FREE_BYTES:
        raise UserError(f"the disk that holds {path} is full ({free // 2**20} MiB free): choose another --out")
