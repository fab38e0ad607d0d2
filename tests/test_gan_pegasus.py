"""gan/pegasus.py and its page: routes, choice and judgement; the diagram of a model; what the command refuses."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gan_cases import DIGITS, refused

from gan import acai_experiment, diagram, experiment, pegasus
from gan.__main__ import main
from gan.acai_config import AUTOENCODERS
from gan.config import PRESETS, Config
from gan.data import Facts
from gan.pegasus import Scores, choose
from gan.sampling import Trained
from lib import config as configs
from lib import images
from lib.checkpoint import Checkpoints
from lib.run import RunFolder, write_json

BIRDS_AND_HORSES = replace(
    PRESETS["cifar10_sngan_projection"],
    data=replace(PRESETS["cifar10_sngan_projection"].data, labels=(2, 7)),
    network=replace(PRESETS["cifar10_sngan_projection"].network, width=4, critic_width=4, latent=8),
    optim=replace(PRESETS["cifar10_sngan_projection"].optim, steps=2),
)


def generator(config: Config, facts: Facts) -> Trained:
    model = experiment.build_model(config, facts)
    return Trained(model, model.init(jax.random.key(0))["generator"], facts, 0)


def scores(guided, distance):
    zeros = np.zeros(len(guided))
    return Scores(np.array(guided), zeros, zeros, zeros, np.array(distance), zeros.astype(int), zeros[:, None])


def test_only_what_is_near_real_images_is_chosen_and_by_the_guides_alone():
    found = scores([0.9, 0.2, 0.8, 0.5], [3.0, 1.0, 1.4, 0.5])
    assert choose(found, 3, 1.5).tolist() == [2, 3, 1]
    assert choose(found, 1, 9.0).tolist() == [0] and choose(found, 3, 0.4).tolist() == []


def test_a_mixture_is_between_its_classes():
    trained = generator(BIRDS_AND_HORSES, Facts((32, 32, 3), 100, 2))
    tables = trained.variables["params"]
    rng = np.random.default_rng(0)
    trained.variables["params"] = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) if x.ndim == 2 else x, tables
    )
    found = pegasus.mixed(trained, (0, 1), 10, 3)
    assert found.pixels.shape == (10, 32, 32, 3) and found.pixels.dtype == np.uint8
    np.testing.assert_allclose(found.shares, np.tile([0.3, 0.4, 0.5, 0.6, 0.7], 2), atol=1e-6)
    z = np.asarray(pegasus.latents(trained.model, 3, 10))
    y = np.stack([1 - found.shares, found.shares], 1)
    wanted, _ = trained.model.generate(trained.variables, z, y, train=False)
    difference = np.abs(images.to_uint8(np.asarray(wanted)).astype(int) - found.pixels)
    assert difference.max() <= 1


def test_the_parts_of_a_model_are_its_modules():
    model = experiment.build_model(DIGITS, Facts((8, 8, 1), 100, 10))
    z, y = jnp.zeros((2, model.latent)), jnp.zeros((2, 10))
    found = diagram.parts(model.generator, z, y, True)
    counted = sum(leaf.size for leaf in jax.tree.leaves(model.init(jax.random.key(0))["generator"]["params"]))
    assert sum(part.parameters for part in found) == counted
    assert found[-1].outputs.startswith("8×8×")


def test_arrays_of_its_own_are_parts_too():
    model = experiment.build_model(BIRDS_AND_HORSES, Facts((32, 32, 3), 100, 2))
    found = diagram.parts(model.critic, jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 2)), True)
    counted = sum(leaf.size for leaf in jax.tree.leaves(model.init(jax.random.key(0))["critic"]["params"]))
    assert sum(part.parameters for part in found) == counted
    assert found[-1] == ("embedding", "", "2×4", 8)


def test_the_diagram_is_a_picture(tmp_path):
    model = experiment.build_model(BIRDS_AND_HORSES, Facts((32, 32, 3), 100, 2))
    x, y = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 2))
    path = diagram.draw(tmp_path / "model.png", {"critic": diagram.parts(model.critic, x, y, True)})
    assert images.read(path).shape[0] > 100


@pytest.fixture
def here(tmp_path, in_process):
    return in_process(main, tmp_path)


def write_generator(path, config, facts):
    with RunFolder.start(path, "gan", configs.to_json(config), resume=False) as folder:
        write_json(path / "data.json", configs.to_json(facts))
        folder.logger("look", 0)(config.optim.steps, {"score": 2.0, "coverage": 0.5, "spread": 1.0})
    state = experiment.start_state(config, experiment.build_model(config, facts))
    state = state.replace(step=jnp.int32(config.optim.steps))
    for name in ("gan", "best"):
        with Checkpoints(path / "checkpoints" / name) as checkpoints:
            checkpoints.save(config.optim.steps, state)


def write_autoencoder(path, config, facts):
    with RunFolder.start(path, "gan", configs.to_json(config), resume=False):
        write_json(path / "data.json", configs.to_json(facts))
    state = acai_experiment.start_state(config, acai_experiment.build_model(config, facts))
    state = state.replace(step=jnp.int32(config.autoencoder.steps))
    with Checkpoints(path / "checkpoints" / "autoencoder") as checkpoints:
        checkpoints.save(config.autoencoder.steps, state)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pegasus", "needs the folders of runs"),
        ("pegasus absent", "absent is not a run folder"),
        ("pegasus digits --guides cifar10_vgg cifar10_judge_b", "cifar10_judge_b is guide and judge"),
        ("pegasus digits --steps 0", "steps at least 1"),
        ("pegasus digits --seed -1", "seed must be between 0 and"),
        ("pegasus digits --most-distant 0", "most_distant must be positive"),
        ("pegasus digits", "digits was trained on digits, not on cifar10"),
        ("pegasus lines", "lines was trained on lines, not on cifar10"),
        ("pegasus cats", "cats knows no birds and horses"),
        ("pegasus digits --out P.png", "it must be a folder"),
        ("pegasus digits --guides cifar10_cnn", "cifar10_cnn"),
    ],
)
def test_refused(here, tmp_path, line, message):
    cats = replace(BIRDS_AND_HORSES, data=replace(BIRDS_AND_HORSES.data, labels=(3, 5)))
    for name, config in {"digits": DIGITS, "lines": AUTOENCODERS["lines_acai"], "cats": cats}.items():
        with RunFolder.start(tmp_path / name, "gan", configs.to_json(config), resume=False):
            pass
    code, _, err = here(line)
    refused(code, err, message)


@pytest.mark.slow
def test_from_runs_to_the_page(here, tmp_path, data_folder):
    write_generator(tmp_path / "sngan", BIRDS_AND_HORSES, Facts((32, 32, 3), 10_000, 2))
    small = AUTOENCODERS["cifar10_acai_256"]
    small = replace(small, autoencoder=replace(small.autoencoder, depth=2, latent_width=8, steps=1))
    write_autoencoder(tmp_path / "acai", small, Facts((32, 32, 3), 50_000, 10))
    plain = replace(small, autoencoder=replace(small.autoencoder, critic=False))
    write_autoencoder(tmp_path / "plain", plain, Facts((32, 32, 3), 50_000, 10))
    for _ in range(2):
        code, out, err = here("pegasus sngan acai plain --out P --count 64 --steps 2 --guides cifar10_judge_a")
        assert code == 0, err
    record = json.loads(Path("P/pegasus.json").read_text())
    with np.load("P/scores.npz") as file:
        assert file["mixed.h"].shape == file["moved.distance"].shape == (64,)
    assert Path("P/model_acai.png").exists()
    assert set(record["routes"]) == {"mixed", "optimised", "interpolated", "moved"} and record["n"] == 64
    numbers = record["numbers"]
    for name in (*record["routes"], "real_birds", "real_horses", "pixel_blends", "autoencoder_blends"):
        assert 0 <= numbers[f"{name}.h"] <= 1 and numbers[f"{name}.kid_of_real"] < 0.1
    assert numbers["real_birds.bird"] > 0.7 > 0.1 > numbers["real_birds.horse"]
    assert numbers["real_horses.distance"] == pytest.approx(1, abs=0.2)
    assert record["best"]["distance"] == pytest.approx(
        record["best_of_each_route"][record["best"]["route"]]["distance"]
    )
    assert "best:" in out
    pictures = {path.name for path in Path("P").glob("*.png")}
    assert {"best.png", "batch64.png", "candidates.png", "controls.png", "model_sngan.png"} <= pictures
    assert len(Path("P/tried.jsonl").read_text().splitlines()) == 2
    assert Path("P/index.html").read_text().count("<img") >= 7
