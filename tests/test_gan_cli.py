"""python -m gan: what is refused, in one line and soon, and what the commands write."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from gan_cases import DIGIT_FACTS, DIGITS, POINT_FACTS, POINTS, refused
from PIL import Image

from gan import experiment
from gan.__main__ import main
from lib import config as configs
from lib import images
from lib.checkpoint import Checkpoints
from lib.run import RunFolder, write_json

ROOT = Path(__file__).resolve().parents[1]


def write_run(path, config, facts, *, steps=None, seed=0):
    """A run as training leaves it, with its initial weights."""
    config = replace(config, seed=seed)
    with RunFolder.start(path, "gan", configs.to_json(config), resume=False) as folder:
        write_json(path / "data.json", configs.to_json(facts))
        steps = config.optim.steps if steps is None else steps
        for name, numbers in (("gan", {"loss": 1.0}), ("look", {"score": 2.0, "coverage": 0.5, "spread": 1.0})):
            folder.logger(name, 0)(steps, numbers)
    state = experiment.start_state(config, experiment.build_model(config, facts)).replace(step=jax.numpy.int32(steps))
    for name in ("gan", "best"):
        with Checkpoints(path / "checkpoints" / name) as checkpoints:
            checkpoints.save(steps, state)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    desk = tmp_path_factory.mktemp("desk")
    rng = np.random.default_rng(0)
    (desk / "photos").mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(desk / "photos" / f"{i}.png")
    (desk / "empty").mkdir()
    np.savez(desk / "odd.npz", images=rng.integers(0, 256, (80, 9, 9, 1), np.uint8))
    (desk / "strange").mkdir()
    (desk / "strange" / "holiday.txt").write_text("mine")
    write_run(desk / "digits", DIGITS, DIGIT_FACTS)
    write_run(desk / "points", POINTS, POINT_FACTS)
    shutil.copytree(desk / "digits", desk / "stopped")
    shutil.rmtree(desk / "stopped" / "checkpoints" / "gan" / str(DIGITS.optim.steps))
    with RunFolder.start(desk / "unfinished", "gan", configs.to_json(DIGITS), resume=False):
        pass
    shutil.copytree(desk / "digits", desk / "blind")
    (desk / "blind" / "metrics.jsonl").unlink()
    for i, value in enumerate((1.0, 2.0, 4.0, 8.0)):
        with RunFolder.start(desk / f"seed{i}", "gan", configs.to_json(replace(DIGITS, seed=i)), resume=False):
            numbers = {"best.fid.digits_cnn": value, "best.fid.digits_cnn.sd": 9.0, "protocol": "as it is"}
            numbers["best.samples"] = 48 if i == 3 else 24
            write_json(desk / f"seed{i}" / "evaluation.json", numbers)
    return desk


@pytest.fixture
def desk(template, tmp_path):
    shutil.copytree(template, tmp_path / "desk")
    return tmp_path / "desk"


@pytest.fixture
def here(desk, monkeypatch, in_process):
    """Runs a command in the desk: exit code, stdout, stderr."""
    monkeypatch.delenv("GRADIENT_FIELDS_DATA", raising=False)
    return in_process(main, desk)


REFUSED = [
    # What is asked for
    ("paint", "unknown command 'paint'"),
    ("train", "which preset?"),
    ("train numbers", "unknown preset 'numbers'"),
    ("train digits_dcgan --optim.lrr 1", "perhaps you meant --optim.lr"),
    ("train digits_dcgan --optim.lr 0", "optim.lr must be positive"),
    ("train digits_dcgan --optim.n-critic 0", "must be at least 1"),
    ("train digits_dcgan --network.critic-levels 0", "must be at least 1"),
    ("train digits_dcgan --optim.gradient-penalty 10", "needs a critic without batch norm"),
    ("train digits_dcgan --network.kind mlp", "mlp has neither classes nor batch norm"),
    ("train mixture_ns --data.source digits", "points, for which network.kind is mlp"),
    ("train digits_dcgan --network.conditioning projection", "is for network.kind resnet"),
    ("train cifar10_vae --optim.clip 0.1", "elbo has no critic"),
    ("train digits_dcgan --watch.patience 0", "watch.patience must be at least 1"),
    ("train digits_dcgan --network.levels 4 --out R", "need a height and width that 16 divides"),
    ("train digits_dcgan --optim.batch-size 5000 --out R", "there are only 1437 examples"),
    ("train digits_dcgan --devices 99 --out R", "devices is 99"),
    ("train digits_dcgan --optim.batch-size 63 --devices 2 --out R", "optim.batch_size is 63, which 2 devices do not"),
    ("train digits_dcgan --resume", "--resume needs --out RUN"),
    # Data
    ("train mnist_dcgan --out R", "GRADIENT_FIELDS_DATA"),
    ("train digits_dcgan --data.source nowhere --out R", "nowhere: no such folder or file"),
    ("train digits_dcgan --data.source empty --out R", "empty holds no images"),
    ("train digits_dcgan --data.source photos --optim.batch-size 8 --out R", "photos gives 3 images for tests"),
    ("train digits_dcgan --data.source odd.npz --out R", "9 x 9, need a height and width that 4 divides"),
    ("train mnist_cgan --data.source odd.npz --out R", "odd.npz has no labels"),
    ("train digits_dcgan --data.size-px 16 --out R", "digits has its own size"),
    # Run folders
    ("train digits_dcgan --out strange", "it holds holiday.txt"),
    ("train digits_dcgan --out digits", "digits already holds a run"),
    ("train digits --optim.steps 9 --resume", "optim.steps was 4, now 9"),
    ("evaluate strange", "strange is not a run folder"),
    ("evaluate unfinished", "unfinished holds no trained gan"),
    ("evaluate digits points", "differ in more than the seed"),
    ("evaluate digits seed1", "digits is not evaluated yet"),
    ("evaluate seed0 seed1 seed1", "runs of the seeds 0, 1, 1: each has to have its own"),
    ("evaluate seed0 seed3", "measured with 24, 48 samples: evaluate them alike"),
    ("evaluate seed0 seed1 --out numbers.txt", "must end in .json"),
    ("sample", "needs the folder of a run"),
    ("sample absent", "absent is not a run folder"),
    ("sample stopped --checkpoint last", "the training of gan is not finished"),
    ("evaluate stopped", "the training of gan is not finished"),
    ("sample blind", "has no look at the samples"),
    # Samples
    ("sample digits --count 0", "count must be at least 1"),
    ("sample digits --out samples.jpg", "must end in .png or .npz, or be a folder"),
    ("sample digits --label 10", "the classes are 0 to 9"),
    ("sample digits --seed -1", "seed must be between 0 and"),
    ("sample points --label 1", "this network knows no classes"),
    ("sample points --out folder", "points are written to .png or .npz"),
    ("interpolate digits --columns 1", "columns at least 2"),
    ("interpolate digits --seed -1", "seed must be between 0 and"),
    ("interpolate points", "between them there is nothing to see"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_refused(here, line, message):
    code, _, err = here(line)
    refused(code, err, message)
    assert not Path("R").exists()


def test_refused_by_a_process(desk, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "gan", "train", "digits_dcgan", "--out", "strange"]
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2 and "it holds holiday.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_help_fits_a_screen(here):
    code, out, err = here("")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 110
    for command in ("train", "sample", "interpolate", "evaluate"):
        assert command in out


def test_samples_to_every_kind_of_file(here):
    line = "sample digits --count 3 --seed 1"
    code, out, err = here(f"{line} --out grid.png")
    assert code == 0 and "3 samples of cycle 4: grid.png" in out, err
    with Image.open("grid.png") as grid:
        assert grid.size == (102, 102)
    assert here(f"{line} --out folder")[0] == 0
    assert here("sample digits --count 5 --seed 1 --out samples.npz")[0] == 0
    with np.load("samples.npz") as file:
        pixels = file["images"]
    assert pixels.shape == (5, 8, 8, 1) and pixels.dtype == np.uint8
    singly = [images.to_uint8(images.read(path))[..., :1] for path in sorted(Path("folder").iterdir())]
    np.testing.assert_array_equal(np.stack(singly), pixels[:3])  # a sample does not depend on their number
    assert here("sample stopped --count 1 --out best.npz")[0] == 0  # what is best so far
    assert here("sample points --count 5 --out points.npz")[0] == 0
    with np.load("points.npz") as file:
        assert file["x"].shape == (5, 2)


def test_strips(here):
    assert here("interpolate digits --rows 2 --columns 4 --label 3 --out a.png")[0] == 0
    with Image.open("a.png") as grid:
        assert grid.size == (4 * 50 + 2, 2 * 50 + 2)
    code, out, err = here("interpolate digits --classes --rows 1 --out b.png")
    assert code == 0 and "from class to class" in out, err
    with Image.open("b.png") as grid:
        assert grid.size == (28 * 50 + 2, 52)


def test_over_several_trainings(here):
    code, out, err = here("evaluate seed0 seed1 seed2 --out numbers.json")
    assert code == 0 and "over 3 trainings" in out, err
    numbers = json.loads(Path("numbers.json").read_text())
    assert numbers["best.fid.digits_cnn"] == pytest.approx(7 / 3)
    assert numbers["best.fid.digits_cnn.sd"] == pytest.approx(np.std([1, 2, 4], ddof=1)) and numbers["trainings"] == 3
