"""python -m ncsn train and evaluate, whole, on small data; and what a configuration becomes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance

from lib.process import UserError
from ncsn import data, experiment
from ncsn.__main__ import main
from ncsn.config import PRESETS, SAMPLERS, Config, Data, Noise, Sampling, parse_sampler
from ncsn.data import Facts
from ncsn.noise import OVERLAP, overlap
from ncsn.sampling import make_sampler

TOY = (
    "train toy_mixture --out R --optim.steps 20 --optim.batch-size 16 --network.width 8 --checkpoint-every 10 "
    "--sampling.nfe 40 --evaluation.samples 64 --evaluation.samplers annealed_langevin:40"
)
DIGITS = (
    "train digits_edm --out R --optim.steps 2 --optim.batch-size 8 --network.width 4 --network.multipliers 1 "
    "--network.blocks 1 --evaluation.samples 20 --evaluation.samplers heun:3 ancestral:4:12 "
    "--evaluation.inpainting ancestral:4 --evaluation.likelihood-images 0"
)


@pytest.fixture
def call(tmp_path, in_process):
    """Runs a command in an empty folder; it must end well. Returns what it says."""
    here = in_process(main, tmp_path)

    def call(line):
        code, out, _ = here(line)
        assert code == 0
        return out

    return call


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_points_from_training_to_report(call):
    out = call(TOY)
    numbers = json.loads(Path("R/evaluation.json").read_text())
    for name in ("annealed_langevin", "langevin"):
        for variant in (name, f"{name}.analytic"):
            assert 0 <= numbers[f"{variant}.heavy_mode_weight"] <= 1
        assert name in out
    assert numbers["annealed_langevin.nfe"] == 40 and numbers["score.relative_error"] > 0
    assert "<img" in Path("R/report.html").read_text()


@pytest.mark.slow
def test_points_resumed_to_the_bit(call):
    call(TOY)
    numbers = json.loads(Path("R/evaluation.json").read_text())
    shutil.copytree("R", "stopped")
    shutil.rmtree("stopped/checkpoints/score/20")
    call("train stopped --resume")
    assert json.loads(Path("stopped/evaluation.json").read_text()) == numbers
    folders = [f"{name}/checkpoints/score/20/state" for name in ("R", "stopped")]
    first, second = ({k: v for k, v in contents(f).items() if "ocdbt" not in k and "d/" in k} for f in folders)
    assert first.keys() and len(first) == len(second)


@pytest.mark.slow
def test_points_measured_again_with_other_options(call):
    call(TOY)
    before = contents("R/checkpoints")
    call("evaluate R --samples 32 --sampling.denoise")
    again = json.loads(Path("R/evaluation.json").read_text())
    assert again["langevin.heavy_mode_weight"] * 32 % 1 == 0 and again["annealed_langevin.nfe"] == 41
    assert contents("R/checkpoints") == before


@pytest.mark.slow
def test_images_from_training_to_report(call):
    out = call(DIGITS)
    numbers = json.loads(Path("R/evaluation.json").read_text())
    for name in ("real", "heun_3", "heun_3.noisy", "ancestral_4", "ancestral_4.noisy"):
        assert numbers[f"{name}.fid.digits_cnn"] > 0
        assert 0 <= numbers[f"{name}.confident"] <= 1
    assert numbers["heun_3.nfe"] == 6 and numbers["heun_3.noisy.nfe"] == 4  # guidance takes two each
    assert numbers["heun_3.samples"] == 20 and numbers["ancestral_4.samples"] == 12
    assert numbers["heun_3.fid.digits_cnn"] > 10 * numbers["real.fid.digits_cnn"]  # two steps teach nothing
    assert numbers["inpainting.known_pixels_exact"] == 1
    assert numbers["real_whole.accuracy"] > 0.95 > numbers["mean_fill.accuracy"]
    assert "heun_3" in out and "R/report.html" in out
    pictures = {path.name for path in Path("R/figures").iterdir()}
    assert {"samples_heun_3.png", "chain.png", "neighbours.png", "quality.png", "inpainting.png"} <= pictures


@pytest.fixture(scope="module")
def digits():
    return data.load(PRESETS["digits_v2"])


def test_facts_are_those_of_the_data(digits):
    known = data.facts(digits)
    unit = digits.train["image"].reshape(-1, 64) / 255.0
    assert (known.shape, known.count, known.classes, known.dimension) == ((8, 8, 1), 1437, 10, 64)
    assert known.mean == pytest.approx(unit.mean(), rel=1e-6)
    assert known.std == pytest.approx(unit.std(), rel=1e-6)
    assert known.largest_distance == pytest.approx(scipy.spatial.distance.pdist(unit).max(), rel=1e-5)
    wide = known.in_range(-1, 1)
    assert wide.size == pytest.approx(np.sqrt(np.mean((2 * unit - 1) ** 2)), rel=1e-6)
    assert wide.largest_distance == pytest.approx(2 * known.largest_distance)


def test_the_ladder_of_v2_comes_from_the_data(digits):
    known = data.facts(digits)
    sigmas = experiment.ladder(PRESETS["digits_v2"], known)
    ends = known.largest_distance, PRESETS["digits_v2"].noise.sigma_min
    assert (sigmas[0], sigmas[-1]) == pytest.approx(ends, rel=1e-5)
    # The number of levels is the whole number that is nearest to what the overlap asks for.
    wider, closer = ((ends[0] / ends[1]) ** (1 / (len(sigmas) - 1 + change)) for change in (-0.5, 0.5))
    assert overlap(wider, 64) < OVERLAP < overlap(closer, 64)


def test_a_folder_of_images_is_cropped_and_split(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (9 + i % 3, 12, 3), np.uint8)).save(tmp_path / f"{i}.png")
    config = replace(
        PRESETS["digits_v2"],
        data=Data(str(tmp_path), size_px=8),
        optim=replace(PRESETS["digits_v2"].optim, batch_size=8),
    )
    found = data.load(config)
    assert found.train["image"].shape == (36, 8, 8, 3) and found.test["image"].shape == (4, 8, 8, 3)
    assert data.facts(found).classes == 0
    with pytest.raises(UserError, match="were 12 x 9|pixels"):
        data.load(replace(config, data=Data(str(tmp_path))))


FACTS = Facts((64,), 1000, 0, 0.1, 1.0, 12.0)


def gaussian_score(x, sigma):
    return (0.1 - x) / (1 + sigma.reshape(-1, 1) ** 2)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("denoise", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_sampler_keeps_to_its_budget(name, denoise):
    """And ends near the data, N(0.1, I) in 64 dimensions."""
    config = replace(PRESETS["toy_mixture"], noise=Noise("ladder", sigma_min=0.05, sigma_max=12.0, levels=10))
    # Chains that move by small random steps need more of them to arrive; at one level alone they would need far more.
    budget = 600 if name in ("annealed_langevin", "underdamped_langevin") else 60
    options = Sampling(name, nfe=budget, denoise=denoise)
    sampler = make_sampler(config, FACTS, options, gaussian_score)
    steps = len(sampler.levels) - 1
    keys = jax.random.split(jax.random.key(0), 64)

    @jax.jit
    def chain():
        state = sampler.init(keys, (64,))
        return jax.lax.scan(lambda s, i: sampler.step(keys, i, s), state, jnp.arange(steps))

    state, info = chain()
    nfe = np.asarray(info.nfe).sum(axis=0)
    if name != "probability_flow":  # which takes what it needs
        langevin = name in ("annealed_langevin", "langevin")
        assert (nfe <= budget + (langevin or name == "underdamped_langevin") * 10).all() and (
            nfe >= 5 / 6 * budget
        ).all()
    assert (sampler.levels[-1] == 0) == denoise
    if name != "langevin":  # too few steps at one level to get anywhere
        assert abs(np.mean(state.x) - 0.1) < 0.1 and 0.6 < np.var(state.x) < 1.6


def test_a_sampler_in_one_word():
    base = Sampling("annealed_langevin", 1000, step_size=2e-5)
    assert parse_sampler("annealed_langevin:200", base).step_size == 2e-5
    assert parse_sampler("heun:35", base) == replace(base, sampler="heun", nfe=35, step_size=None)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith("digits") else pytest.mark.slow) for name in PRESETS]
)
def test_every_preset_fits_its_data(name):
    config = PRESETS[name]
    shape = {"toy_mixture": (2,), "digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[config.data.source]
    experiment.check_fits(config, Facts(shape, 1000, 10, 0.3, 0.4, 10.0))


def test_what_does_not_fit_together():
    with pytest.raises(UserError, match="set noise.training to ladder"):
        replace(PRESETS["digits_v1"], noise=Noise())
    with pytest.raises(UserError, match="points, for which network.kind is mlp"):
        Config(network=replace(Config().network, kind="mlp"))
    with pytest.raises(UserError, match="guidance needs a network that knows classes"):
        replace(Config(), sampling=Sampling(guidance=2.0))
