"""lib/run.py: run folders, and that nothing of the user's is ever touched by a mistake."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib import run
from lib.process import UserError
from lib.run import RunFolder

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"system": "spring", "optim": {"lr": 1e-3, "steps": 100}}


@dataclasses.dataclass(frozen=True)
class Usage:
    total: int
    used: int
    free: int


def contents(folder):
    """Every file below, byte for byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_write_text_replaces_in_one_step(tmp_path):
    path = tmp_path / "x.json"
    run.write_text(path, "old")
    before = path.stat().st_ino
    run.write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert path.stat().st_ino != before  # another file under the same name: never a half-written one
    assert os.listdir(tmp_path) == ["x.json"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    run.write_text(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_finite_or_none():
    value = {"a": math.nan, "b": [1.0, math.inf, (-math.inf, 2)], "c": {"d": 0.5, "e": "nan", "f": None, "g": True}}
    assert run.finite_or_none(value) == {
        "a": None,
        "b": [1.0, None, [None, 2]],
        "c": {"d": 0.5, "e": "nan", "f": None, "g": True},
    }


def test_json_is_strict(tmp_path):
    run.write_json(tmp_path / "x.json", {"loss": math.nan})
    assert run.read_json(tmp_path / "x.json") == {"loss": None}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"{'a': 1}"])
def test_garbled_json(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="not valid JSON") as error:
        run.read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in one_line(error)


def test_missing_json(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "x.json", tmp_path / "file" / "x.json"):
        with pytest.raises(UserError, match="no such file"):
            run.read_json(path)


# Starting and opening runs


def start(path, *, package="hnn", config=CONFIG, resume=False):
    return RunFolder.start(path, package, config, resume=resume)


def test_fresh_run(tmp_path):
    folder = start(tmp_path / "deep" / "R")
    assert folder.figures.is_dir()
    assert run.read_json(folder.path / "config.json") == {"package": "hnn", "config": CONFIG}
    (record,) = run.read_json(folder.path / "environment.json")
    assert record["backend"] == "cpu" and record["versions"]["jax"] and record["devices"]
    opened, config = RunFolder.open(folder.path, "hnn")
    assert (opened.path, config) == (folder.path, CONFIG)


def test_empty_folder_is_taken(tmp_path):
    start(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_folder_of_a_run_killed_before_its_first_write_is_taken(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.partial").write_text("{")
    start(tmp_path)
    assert run.read_json(tmp_path / "config.json")["package"] == "hnn"


def test_resume_keeps_everything_and_records_the_new_environment(tmp_path):
    folder = start(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    config = (tmp_path / "config.json").read_bytes()
    del folder  # gives the lock back
    start(tmp_path, resume=True)
    assert (tmp_path / "config.json").read_bytes() == config
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    assert len(run.read_json(tmp_path / "environment.json")) == 2


def test_resume_of_nothing_starts(tmp_path):
    start(tmp_path / "R", resume=True)
    assert (tmp_path / "R" / "config.json").exists()


OTHER_LR = {"system": "spring", "optim": {"lr": 2e-3, "steps": 100}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "already holds a run: --resume continues it"),
        ({"resume": True, "package": "gan"}, "is a run of hnn, not of gan"),
        ({"resume": True, "config": OTHER_LR}, "another configuration: optim.lr was 0.001, now 0.002"),
        ({"resume": True, "config": {"system": "spring"}}, "another configuration: optim was"),
    ],
)
def test_an_existing_run_is_refused_and_untouched(tmp_path, arguments, message):
    start(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        start(tmp_path, **arguments)
    assert str(tmp_path) in one_line(error)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("holiday.txt", "mine", "is not empty and not a run folder .it holds holiday.txt."),
        ("config.json", "{", "is not valid JSON"),
        ("config.json", '{"lr": 1}', "is not the configuration of a run"),
        ("config.json", "[]", "is not the configuration of a run"),
    ],
)
def test_a_strangers_folder_is_refused_and_untouched(tmp_path, resume, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        start(tmp_path, resume=resume)
    one_line(error)
    assert contents(tmp_path) == {name: content.encode()}
    assert os.listdir(tmp_path) == [name]


def test_a_file_instead_of_a_folder(tmp_path):
    path = tmp_path / "R"
    path.write_text("mine")
    with pytest.raises(UserError, match="is a file, not a folder"):
        start(path)
    with pytest.raises(UserError, match="is not a folder"):
        start(path / "below")
    assert path.read_text() == "mine"


def test_where_nothing_can_be_written():
    with pytest.raises(UserError, match="/proc/gradient-fields"):
        start(Path("/proc/gradient-fields/R"))


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path, "hnn")
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path / "absent", "hnn")
    start(tmp_path)
    with pytest.raises(UserError, match="is a run of hnn, not of gan"):
        RunFolder.open(tmp_path, "gan")


HOLD = """
import sys
from pathlib import Path
from lib.run import RunFolder
folder = RunFolder.start(Path(sys.argv[1]), "hnn", {}, resume=False)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_in_use_by_another_process(tmp_path):
    path = tmp_path / "R"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        before = contents(path)
        with pytest.raises(UserError, match="is in use by another process"):
            start(path, config={}, resume=True)
        assert contents(path) == before
    finally:
        holder.kill()
        holder.communicate(timeout=30)
    start(path, config={}, resume=True)  # a kill leaves no stale lock


def test_full_disk_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(UserError, match=r"is full \(1 MiB free\)") as error:
        start(tmp_path / "R")
    assert str(tmp_path / "R") in one_line(error)
    assert os.listdir(tmp_path) == []


def test_disk_that_fills_up_at_once(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write the run folder .* No space left on device"):
        start(tmp_path / "R")


def test_real_full_disk(tiny_disk, monkeypatch):
    with pytest.raises(UserError, match="is full"):
        start(tiny_disk / "R")
    assert os.listdir(tiny_disk) == []
    run.write_text(tiny_disk / "kept.json", "old")
    with pytest.raises(OSError, match="No space left"):
        run.write_text(tiny_disk / "kept.json", "x" * 2**21)
    assert contents(tiny_disk) == {"kept.json": b"old"}


# Metrics


def test_logger_drops_lines_that_will_be_repeated_and_keeps_the_other_models(tmp_path):
    folder = RunFolder(tmp_path)
    for name in ("hnn", "baseline"):
        log = folder.logger(name, 0)
        for step in (10, 20, 30):
            log(step, {"loss": 1.0 / step, "accuracy": math.inf})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "baseline.lo')  # a kill in the middle of a line
    assert len(folder.metrics()) == 6

    log = folder.logger("baseline", 20)
    log(30, {"loss": 0.5})
    rows = folder.metrics()
    steps = {name: [r["step"] for r in rows if f"{name}.loss" in r] for name in ("hnn", "baseline")}
    assert steps == {"hnn": [10, 20, 30], "baseline": [10, 20, 30]}
    assert rows[-1]["baseline.loss"] == 0.5
    assert rows[0]["hnn.accuracy"] is None
    text = (tmp_path / "metrics.jsonl").read_text()
    assert len(text.splitlines()) == 6 and text.endswith("\n")


def test_wall_time_goes_on_after_an_interruption(tmp_path):
    rows = [{"step": 10, "hnn.loss": 1.0, "wall_s": 50.0}, {"step": 20, "hnn.loss": 1.0, "wall_s": 90.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = RunFolder(tmp_path)
    folder.logger("hnn", 10)(20, {"loss": 1.0})
    assert 50 <= folder.metrics()[-1]["wall_s"] < 60


def test_only_the_primary_process_writes(tmp_path):
    folder = RunFolder.start(tmp_path / "R", "hnn", CONFIG, resume=False, primary=False)
    folder.logger("hnn", 0)(1, {"loss": 1.0})
    assert not (tmp_path / "R").exists()
