"""python -m ncsn: what is refused, in one line and soon, and what the commands write."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from lib import config as configs
from lib import images
from lib.checkpoint import Checkpoints
from lib.run import RunFolder, write_json
from ncsn import experiment
from ncsn.__main__ import main
from ncsn.config import Config, Data, Evaluation, Network, Optim
from ncsn.data import Facts

ROOT = Path(__file__).resolve().parents[1]
TINY = Config(
    network=Network(width=4, multipliers=(1,), blocks=1, class_conditional=True),
    optim=Optim(steps=2, batch_size=8, label_dropout=0.1),
    evaluation=Evaluation(samples=16, samplers=("heun:3",), likelihood_images=0),
)
COLOUR = replace(
    TINY,
    data=Data("photos"),
    network=replace(TINY.network, class_conditional=False),
    optim=Optim(steps=2, batch_size=8),
)
GREY_FACTS = Facts((8, 8, 1), 1437, 10, 0.3, 0.4, 6.0)
COLOUR_FACTS = Facts((8, 8, 3), 40, 0, 0.3, 0.4, 6.0)


def write_run(path, config, facts, *, steps=None):
    """A run as training leaves it, with its initial weights."""
    with RunFolder.start(path, "ncsn", configs.to_json(config), resume=False):
        write_json(path / "data.json", configs.to_json(facts))
    state = experiment.start_state(config, experiment.build_model(config, facts))
    with Checkpoints(path / "checkpoints" / experiment.NAME) as checkpoints:
        steps = config.optim.steps if steps is None else steps
        checkpoints.save(steps, state.replace(step=jax.numpy.int32(steps)))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    desk = tmp_path_factory.mktemp("desk")
    rng = np.random.default_rng(0)
    (desk / "photos").mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(desk / "photos" / f"{i}.png")
    (desk / "few").mkdir()
    shutil.copy(desk / "photos" / "0.png", desk / "few" / "0.png")
    (desk / "empty").mkdir()
    np.savez(desk / "odd.npz", images=rng.integers(0, 256, (40, 7, 7, 1), np.uint8))
    (desk / "text.png").write_text("no image")
    Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).save(desk / "small.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(desk / "white.png")
    (desk / "strange").mkdir()
    (desk / "strange" / "holiday.txt").write_text("mine")
    write_run(desk / "grey", TINY, GREY_FACTS)
    write_run(desk / "colour", COLOUR, COLOUR_FACTS)
    write_run(desk / "stopped", TINY, GREY_FACTS, steps=1)
    with RunFolder.start(desk / "unfinished", "ncsn", configs.to_json(TINY), resume=False):
        pass
    shutil.copytree(desk / "grey", desk / "damaged")
    (desk / "damaged" / "data.json").write_text('{"shape": [8, 8, 1]}')
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
    ("train digits", "unknown preset 'digits'"),
    ("train digits_edm --optim.lrr 1", "perhaps you meant --optim.lr"),
    ("train digits_edm --optim.lr 0", "optim.lr must be positive"),
    ("train digits_edm --evaluation.samplers heun", "a sampler is written NAME:NFE"),
    ("train digits_edm --evaluation.samplers hoin:3", "unknown sampler 'hoin'"),
    ("train digits_edm --noise.sigma-min 100", "noise.sigma_max must be above noise.sigma_min"),
    ("train digits_v1 --noise.training log_normal", "set noise.training to ladder"),
    ("train digits_v2 --network.class-conditional", "has neither classes nor an energy"),
    ("train digits_edm --network.kind mlp", "images need one of v1, v2, unet"),
    ("train digits_edm --network.multipliers 1 1 1 1 1 --out R", "need a height and width that 16 divides"),
    ("train digits_edm --optim.batch-size 5000 --out R", "there are only 1437 examples"),
    ("train digits_edm --devices 99 --out R", "devices is 99"),
    # Data
    ("train mnist_edm --out R", "GRADIENT_FIELDS_DATA"),
    ("train digits_v1 --data.source nowhere --out R", "nowhere: no such folder or file"),
    ("train digits_v1 --data.source empty --out R", "empty holds no images"),
    ("train digits_v1 --data.source few --out R", "few holds 1 images: at least 20"),
    ("train digits_v1 --data.source odd.npz --optim.batch-size 8 --out R", "even height and width"),
    ("train digits_edm --data.source photos --optim.batch-size 8 --out R", "photos has no labels"),
    ("train digits_v1 --data.size-px 16 --out R", "digits has its own size"),
    # Run folders
    ("train digits_edm --out strange", "it holds holiday.txt"),
    ("train digits_edm --out grey", "grey already holds a run"),
    ("train grey --optim.steps 3 --resume", "optim.steps was 2, now 3"),
    ("evaluate strange", "strange is not a run folder"),
    ("evaluate unfinished", "unfinished holds no trained score"),
    ("sample stopped", "the training of score is not finished"),
    ("sample damaged", "damaged/data.json.classes: missing"),
    # Samples
    ("sample grey --count 0", "count must be at least 1"),
    ("sample grey --out samples.jpg", "must end in .png or .npz, or be a folder"),
    ("sample grey --out nowhere/samples.png", "there is no folder nowhere"),
    ("sample grey --movie chain.mp4", "must end in .gif"),
    ("sample grey --label 10", "the classes are 0 to 9"),
    ("sample colour --label 1", "this network knows no classes"),
    ("sample grey --sampler annealed_langevin --nfe 3", "noise levels here and needs"),
    ("sample grey --sigma-min 90", "sigma_max must be above sigma_min"),
    # Conditions
    ("inpaint grey absent.png", "absent.png: no such image"),
    ("inpaint grey text.png", "text.png cannot be read as an image"),
    ("inpaint grey small.png", "small.png is 4 x 4, smaller than the network's 8 x 8"),
    ("inpaint grey photos/0.png --mask nowhere", "choose from left, right, top, bottom, middle"),
    ("inpaint grey photos/0.png --mask photos/0.png", "is 10 x 12, the network's images are 8 x 8"),
    ("inpaint grey photos/0.png --mask white.png", "is all white"),
    ("colorize grey photos/0.png", "it knows no colours"),
    ("likelihood grey --count 999", "there are 360 test images"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_refused(here, line, message):
    code, out, err = here(line)
    assert code == 2, (out, err)
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and message in err, err
    assert not Path("R").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [("train mnist_edm --out R", "GRADIENT_FIELDS_DATA"), ("sample stopped", "is not finished")],
)
def test_refused_by_a_process(desk, line, message, monkeypatch):
    monkeypatch.delenv("GRADIENT_FIELDS_DATA", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "ncsn", *line.split()]
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_help_fits_a_screen(here):
    code, out, err = here("")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 110
    for command in ("train", "sample", "inpaint", "colorize", "likelihood", "evaluate"):
        assert command in out


@pytest.mark.slow
def test_samples_to_every_kind_of_file(here):
    line = "sample grey --sampler heun --nfe 5 --count 3 --seed 1"
    code, out, err = here(f"{line} --out grid.png --movie chain.gif")
    assert code == 0 and "3 samples, 5 evaluations each: grid.png, chain.gif" in out, err
    with Image.open("grid.png") as grid, Image.open("chain.gif") as movie:
        assert grid.size == movie.size == (102, 102) and movie.n_frames > 1
    assert here(f"{line} --out folder")[0] == 0
    assert here(f"{line} --out samples.npz")[0] == 0
    with np.load("samples.npz") as file:
        pixels = file["images"]
    assert pixels.shape == (3, 8, 8, 1) and pixels.dtype == np.uint8
    singly = [images.to_uint8(images.read(path))[..., :1] for path in sorted(Path("folder").iterdir())]
    np.testing.assert_array_equal(np.stack(singly), pixels)


def cell(sheet, i):
    """The i-th 8x8 image of the first row of a grid, in which each of its pixels is 6x6."""
    return sheet[2:50:6, 2 + 50 * i : 50 + 50 * i : 6]


def test_inpainting_keeps_what_is_known(here):
    code, _, err = here("inpaint grey photos/0.png --mask left --count 2 --sampler ancestral --nfe 4")
    assert code == 0, err
    sheet = images.to_uint8(images.read(Path("inpainted.png"))).mean(-1)
    whole, _, first, second = (cell(sheet, i) for i in range(4))
    np.testing.assert_array_equal(first[:, 4:], whole[:, 4:])
    np.testing.assert_array_equal(second[:, 4:], whole[:, 4:])
    assert (first[:, :4] != second[:, :4]).any()


@pytest.mark.slow
def test_colours_of_a_grey_image(here):
    code, _, err = here("colorize colour photos/0.png --count 2 --sampler ancestral --nfe 4 --out c.png")
    assert code == 0, err
    sheet = images.read(Path("c.png"))
    grey, first = cell(sheet, 0), cell(sheet, 1)
    assert np.ptp(grey, axis=-1).max() == 0 and np.ptp(first, axis=-1).max() > 0


@pytest.mark.slow
def test_bits_per_dimension(here):
    code, out, err = here("likelihood grey --count 2 --rtol 1e-2")
    assert code == 0 and "bits per dimension, 2 test images" in out, err
