"""python -m launch reproduce ncsn: the page of finished runs."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import gan.__main__
import gan.config
import ncsn.__main__
from gan.acai_config import AUTOENCODERS
from launch import studies
from lib import config as configs
from lib import images
from lib.process import UserError
from lib.run import RunFolder, write_json, write_text
from ncsn.config import PRESETS


@pytest.fixture
def finished(tmp_path):
    """A run with few numbers, as training and evaluation leave it."""
    path = tmp_path / "runs" / "ncsn" / "toy_mixture"
    with RunFolder.start(path, "ncsn", configs.to_json(PRESETS["toy_mixture"]), resume=False) as folder:
        log = folder.logger("score", 0)
        log(10, {"loss": 1.0})
        images.write(folder.figures / "samples.png", np.zeros((4, 4, 1)))
        images.write(folder.figures / "training.png", np.zeros((4, 4, 1)))
    numbers = {"heun_35.fid": 0.25, "heun_35.fid.sd": 0.01, "heun_35.nfe": 35, "protocol": "As it should be."}
    write_json(path / "evaluation.json", numbers)
    write_text(path / "report.html", "")
    return tmp_path


def test_a_finished_run_is_not_repeated_and_becomes_a_page(finished):
    places = ["--runs", str(finished / "runs"), "--out", str(finished / "results")]
    studies.main("ncsn", ["--only", "toy_mixture", *places])
    page = (finished / "results" / "ncsn.md").read_text()
    assert "    python -m launch reproduce ncsn --only toy_mixture\n" in page
    assert "| heun_35 | 0.25 ± 0.01 | 35 |" in page and "As it should be." in page
    assert "](ncsn/toy_mixture_samples.png)" in page and "training.png" not in page
    assert (finished / "results" / "ncsn" / "toy_mixture_samples.png").exists()
    record = json.loads((finished / "results" / "ncsn.json").read_text())
    assert record["toy_mixture"]["numbers"]["heun_35.nfe"] == 35
    assert str(finished) not in page + json.dumps(record)


def test_runs_of_another_machine_stay_on_the_page(finished):
    places = ["--runs", str(finished / "runs"), "--out", str(finished / "results")]
    studies.main("ncsn", ["--only", "toy_mixture", *places])
    before = (finished / "results" / "ncsn.md").read_text()
    (finished / "runs" / "ncsn" / "toy_mixture").rename(finished / "runs" / "ncsn" / "digits_v1")
    studies.main("ncsn", ["--only", "digits_v1", *places])
    page = (finished / "results" / "ncsn.md").read_text()
    assert "    python -m launch reproduce ncsn --only toy_mixture digits_v1\n" in page
    assert before[before.index("## toy_mixture") :] in page and "](ncsn/digits_v1_samples.png)" in page


def test_seeds_are_compared(finished, monkeypatch):
    runs = finished / "runs" / "ncsn"
    monkeypatch.setitem(studies.STUDIES, "ncsn", dataclasses.replace(studies.STUDIES["ncsn"], seeds={"toy_mixture": 3}))
    for seed, value in ((1, 0.5), (2, 0.75)):
        shutil.copytree(runs / "toy_mixture", runs / f"toy_mixture_seed{seed}")
        numbers = json.loads((runs / "toy_mixture" / "evaluation.json").read_text())
        write_json(runs / f"toy_mixture_seed{seed}" / "evaluation.json", numbers | {"heun_35.fid": value})
    out = finished / "results"
    studies.main("ncsn", ["--only", "toy_mixture", "--runs", str(finished / "runs"), "--out", str(out)])
    page = (out / "ncsn.md").read_text()
    assert "seeds 0 to 2" in page and "| heun_35.fid | 0.5 ± 0.25 | 0.25 | 0.75 |" in page
    assert "| heun_35.nfe | 35" not in page  # the same in all
    assert len(json.loads((out / "ncsn.json").read_text())["toy_mixture"]["other_seeds"]) == 2


def test_runs_are_compared(finished, monkeypatch):
    compared = ("heun_35.fid", "heun_35.nfe", "real.fid", "heun_35.f")
    study = dataclasses.replace(studies.STUDIES["ncsn"], compared=compared)
    monkeypatch.setitem(studies.STUDIES, "ncsn", study)
    out = finished / "results"
    studies.main("ncsn", ["--only", "toy_mixture", "--runs", str(finished / "runs"), "--out", str(out)])
    lines = (out / "ncsn.md").read_text().splitlines()
    row = lines.index("| toy_mixture | 0.25 ± 0.01 | 35 |  |  |")
    assert lines[row - 2] == "| | heun_35.fid | heun_35.nfe | real.fid | heun_35.f |"
    assert row < lines.index("## toy_mixture")


def test_options_of_runs_are_known():
    def options(package, preset):
        if package == "ncsn":
            return ncsn.__main__.Train(config=PRESETS[preset])
        if preset in AUTOENCODERS:
            return gan.__main__.TrainAutoencoder(config=AUTOENCODERS[preset])
        return gan.__main__.Train(config=gan.config.PRESETS[preset])

    for package in ("ncsn", "gan"):
        for first, *_ in studies.STUDIES[package].runs.values():
            command, preset, *rest = first.format(run="R").split()
            assert command == "train"
            assert configs.parse(options(package, preset), rest, "python -m PACKAGE train PRESET").out == Path("R")


def test_an_unknown_run():
    with pytest.raises(UserError, match="unknown run 'moon': choose from toy_mixture, digits_v1"):
        studies.main("ncsn", ["--only", "moon"])
