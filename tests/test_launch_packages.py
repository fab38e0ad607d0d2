"""Every package trains on two and on four local processes what it trains on one; any number of them reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib import images
from tests.stylize_cases import smooth, write_photos, write_vgg

pytestmark = pytest.mark.slow  # processes that compile whole trainings; `make test-slow`

ROOT = Path(__file__).resolve().parents[1]
TRAININGS = {
    "hnn": "train spring --models hnn --seeds 4 --hidden 16 --derivative.steps 60 --evaluation.n-initial 2 "
    "--evaluation.n-points 20 --evaluation.t-end 2",
    "ncsn": "train digits_edm --optim.steps 20 --optim.batch-size 8 --network.width 4 --network.multipliers 1 "
    "--network.blocks 1 --evaluation.samples 20 --evaluation.samplers heun:3 --evaluation.inpainting ancestral:4 "
    "--evaluation.likelihood-images 0",
    "ncsn in parts": "train toy_mixture --shard-state --optim.steps 40 --optim.batch-size 16 --network.width 64 "
    "--sampling.nfe 40 --evaluation.samples 64 --evaluation.samplers annealed_langevin:40",
    "gan": "train mixture_wgan_gp --optim.steps 40 --optim.n-critic 2 --optim.batch-size 16 --network.width 8 "
    "--network.critic-width 8 --network.levels 1 --watch.every 20 --watch.samples 40 --evaluation.samples 200",
    "gan of images": "train digits_dcgan --network.width 2 --network.critic-width 2 --optim.batch-size 8 "
    "--optim.steps 6 --watch.every 6 --watch.samples 24 --evaluation.samples 24",
    "gan acai": "train digits_acai --autoencoder.depth 2 --autoencoder.latent-width 4 --autoencoder.batch-size 8 "
    "--autoencoder.steps 8 --measurement.every 8 --measurement.kmeans-starts 2",
    "stylize": "train style.png --photos photos --style-px 24 --network.width 2 --network.blocks 1 --optim.steps 6 "
    "--optim.batch-size 4 --optim.crop-px 32 --photo-px 40 --perception.weights vgg.safetensors "
    "--perception.style-layers relu1_1 relu2_1 --perception.content-layers relu2_1",
}
AGAIN = {"hnn": "evaluate", "ncsn": "evaluate", "gan": "evaluate", "stylize": "apply"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    desk = tmp_path_factory.mktemp("desk")
    write_photos(desk / "photos", (40, 50), (64, 40), (48, 96))
    images.write(desk / "style.png", smooth(3, 24, 32))
    write_vgg(desk)
    return desk


def call(desk, words, processes=1):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIENT_FIELDS_PROCESS")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(desk / "cache")}
    command = [sys.executable, "-m", *words]
    if processes > 1:
        command = [sys.executable, "-m", "launch", "local", "--processes", str(processes), "--", *command]
    done = subprocess.run(
        command, cwd=desk, env=environment, capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {(name, row["step"]): row[name] for row in rows for name in row if name.endswith(".loss")}
    assert found
    return found


@pytest.mark.parametrize("name", TRAININGS)
def test_processes_train_what_one_does(desk, name):
    package, slug = name.split()[0], name.replace(" ", "_")
    runs = {n: desk / f"{slug}{n}" for n in (1, 2, 4)}
    for processes, run in runs.items():
        call(desk, [package, *TRAININGS[name].split(), "--out", str(run)], processes)
    wanted = losses(runs[1])
    for processes in (2, 4):
        found = losses(runs[processes])
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), (processes, key)
    more = [str(desk / "photos" / "0.png"), "--out", str(desk / "made.png")] if package == "stylize" else []
    call(desk, [package, AGAIN[package], str(runs[4]), *more])
    if package == "stylize":
        assert np.abs(images.read(desk / "made.png")).max() > 0
    else:
        call(desk, [package, "train", str(runs[1]), "--resume"], 2)
