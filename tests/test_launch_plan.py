"""The commands `plan`: presets in shapes, what is read from their compiled steps, and what is refused."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gan import acai_experiment as autoencoders
from gan import experiment as gans
from gan.acai_config import AUTOENCODERS
from gan.config import PRESETS as GANS
from gan.data import facts as facts_of_gan
from gan.data import used
from launch import plan as launch_plan
from lib import planning as plan
from lib.plan import Machine, Outline
from lib.process import UserError
from lib.sources import LABELLED, load_images, shape_of
from ncsn import experiment as scores
from ncsn.config import PRESETS as SCORES
from ncsn.data import facts as facts_of_scores
from stylize import training as stylings
from stylize import vgg
from stylize.config import PRESETS as STYLES


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def test_an_outline_has_the_shapes_of_the_training():
    config = SCORES["digits_edm"]
    rows = load_images("digits", None)
    found = scores.outline(config)
    model = scores.build_model(config, facts_of_scores(rows))
    assert shapes(found.state) == shapes(jax.eval_shape(lambda: scores.start_state(config, model)))
    batch = {name: part[: config.optim.batch_size] for name, part in scores._used(config, rows).items()}
    assert shapes(found.batch) == shapes(batch)

    config = GANS["digits_dcgan"]
    found = gans.outline(config)
    model = gans.build_model(config, facts_of_gan(rows))
    assert shapes(found.state) == shapes(jax.eval_shape(lambda: gans.start_state(config, model)))
    batch = {name: part[: found.rows] for name, part in used(config, rows).items()}
    assert shapes(found.batch) == shapes(batch)


@pytest.mark.parametrize(
    ("lab", "config"),
    [(scores, SCORES["toy_mixture"]), (gans, GANS["mixture_wgan_gp"]), (autoencoders, AUTOENCODERS["lines_acai"]),
     (autoencoders, AUTOENCODERS["mnist_acai_32"]), (stylings, STYLES["small"])],
)  # fmt: skip
def test_an_outline_is_a_step_that_can_be_taken(lab, config):
    outline = lab.outline(config, vgg.load(config.perception)) if lab is stylings else lab.outline(config)
    _, metrics = jax.eval_shape(outline.step, outline.state, outline.batch)
    assert metrics["loss"].shape == ()


def test_presets_of_all_packages_have_names_of_their_own():
    names = [*SCORES, *GANS, *AUTOENCODERS, *STYLES]
    assert len(set(names)) == len(names)


def test_the_shapes_of_known_data():
    assert shape_of("digits", None) == (load_images("digits", None).train["image"].shape[1:], 10)
    assert shape_of("cifar10", None, (2, 7)) == ((32, 32, 3), 2) and set(LABELLED) >= {"cifar10", "mnist"}
    assert shape_of("a/folder", 64) == ((64, 64, 3), 0)
    with pytest.raises(UserError, match="how large are the images of a/folder"):
        shape_of("a/folder", None)


def test_batches_grow_to_what_the_devices_need():
    rows = {"image": jax.ShapeDtypeStruct((12, 2, 2, 1), jnp.uint8)}
    outline = Outline(lambda state, batch: (state, {}), (), rows, unit=5)
    assert outline.rows == 12
    assert (outline.over(1).rows, outline.over(2).rows, outline.over(8).rows) == (15, 20, 40)


def test_accelerators_are_what_the_user_says():
    options = plan.Plan("p", devices=64, hosts=8)
    assert plan.accelerator("a:1e14:2e11:3e10", options) == ("a", Machine(1e14, 2e11, 3e10, 8, 0.0))
    assert plan.accelerator("a:1e14:2e11:3e10:1e-5", options)[1].latency_s == 1e-5
    for text in ("a", "a:1:2", "a:1:2:x", ":1:2:3", "a:1:2:3:4:5", "a:inf:1:1"):
        with pytest.raises(UserError, match="is not NAME:FLOPS:LINK:NETWORK"):
            plan.accelerator(text, options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "unknown preset 'nothing': choose from toy_mixture"),
        (["digits_edm", "--devices", "6", "--hosts", "4"], "6 devices do not divide over 4 hosts"),
        (["digits_edm", "--", "--optim.batch-size", "none"], "batch-size"),
    ],
)
def test_what_is_refused(args, message):
    with pytest.raises(UserError, match=message):
        plan.main(args, "ncsn", SCORES, scores.outline)


WIDE = ["--", "--network.width", "512"]


def test_the_launcher_knows_the_presets_of_all_packages():
    with pytest.raises(UserError, match="unknown preset 'nothing': choose from toy_mixture.*lines_acai.*movie"):
        launch_plan.main(["nothing"])
    with pytest.raises(UserError, match="usage: python -m launch plan PRESET"):
        launch_plan.main(["--devices", "8"])


def planned(folder, *words):
    at = words.index("--") if "--" in words else len(words)
    command = [sys.executable, "-m", "launch", "plan", *words[:at], "--out", str(folder), *words[at:]]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.slow  # programs for large meshes
@pytest.mark.parametrize("devices", [8, 64, 256])
def test_the_only_collective_is_one_all_reduce_of_the_gradient(tmp_path, devices):
    machine = "a:1e13:1e11:1e10"
    found = planned(tmp_path, "toy_mixture", "--devices", str(devices), "--hosts", "4", "--accelerators", machine)
    outline = scores.outline(SCORES["toy_mixture"])
    numbers = sum(x.size for x in jax.tree.leaves(outline.state.params))
    _, metrics = jax.eval_shape(outline.step, outline.state, outline.batch)
    assert found["collectives"] == [["all-reduce", 4 * (numbers + len(metrics))]]
    seconds = found["predicted_s"]["a"]
    assert list(seconds) == [str(2**k) for k in range(devices.bit_length())]
    assert seconds["1"] == pytest.approx(found["flops"] / 1e13) and seconds[str(devices)] > seconds["1"]
    assert (tmp_path / "scaling.png").exists() and (tmp_path / "report.html").exists()


@pytest.mark.slow  # as above
def test_sharded_states_are_parts(tmp_path):
    whole, parts = (
        planned(tmp_path / name, "toy_mixture", "--devices", "8", *words)
        for name, words in (("whole", WIDE), ("parts", ["--sharded", *WIDE]))
    )
    assert parts["state_bytes"] == pytest.approx(whole["state_bytes"] / 8, rel=0.1)
    assert parts["config"]["network"]["width"] == 512
