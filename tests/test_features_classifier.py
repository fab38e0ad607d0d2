"""lib/features: the small classifiers, their committed weights, and the training that made them."""

import dataclasses
import functools
import json
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.special import expit, softmax

from lib import config as configs
from lib.data import Resident, load_labelled
from lib.features import CLASSIFIERS, classifier, recipes, training
from lib.features.augment import augment
from lib.features.calibration import fit_temperature, negative_log_likelihood, score
from lib.features.classifier import FOLDER
from lib.process import UserError
from lib.shard import make_mesh
from lib.train import fit

BARS = {"digits_cnn": 0.98, "mnist_cnn": 0.993}
CIFAR10_BAR = 0.85
TINY = "--widths 4 8 --steps 60 --batch-size 32 --checkpoint-every 20"


@functools.cache
def record(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


@functools.cache
def images_of(data):
    return load_labelled(data, "test")


def tiny(**changes) -> recipes.Config:
    small = {"widths": (4, 8), "steps": 60, "batch_size": 32}
    return dataclasses.replace(recipes.PRESETS["digits"], **small, **changes)


# The committed weights


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_files_belong_together(name):
    net, found = classifier.load(name), record(name)
    (size,) = net.sizes_px or ()
    assert net.weights_sha256 == found["weights_sha256"]
    assert (FOLDER / f"{name}.safetensors").stat().st_size == found["weights_bytes"] < 3 * 2**20
    config = configs.from_json(recipes.Config, found["config"])
    assert config.name == found["name"] == name
    assert shlex.split(found["command"])[:4] == ["python", "-m", "lib.features", "train"]
    assert training.design_of(config, (size, size, net.channels)) == classifier.read_design(
        FOLDER / f"{name}.safetensors"
    )
    assert found["log"]["step"][-1] == config.steps
    assert found["test"]["accuracy"] >= BARS.get(name, CIFAR10_BAR)


# The others are slow to compile.
SOME = [pytest.param(n, marks=() if n in ("digits_cnn", "cifar10_cnn") else pytest.mark.slow) for n in CLASSIFIERS]


@pytest.mark.parametrize("name", SOME)
def test_features(name):
    net = classifier.load(name)
    (size,) = net.sizes_px or ()
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, net.channels), np.uint8)
    out = jax.jit(net.apply)(net.params, images)
    assert out.pool.shape == (3, net.dimension) and out.logits.shape == (3, net.classes) == (3, 10)
    assert out.pool.dtype == out.logits.dtype == jnp.float32
    assert 64 <= net.dimension <= 256
    single = net.apply(net.params, images[:1])  # an image's features do not depend on its neighbours
    np.testing.assert_allclose(single.pool, out.pool[:1], rtol=1e-4, atol=1e-5)
    as_floats = net.apply(net.params, images.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(as_floats.logits, out.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SOME)
def test_recorded_accuracy(name, request):
    """All 360 digits; the first 1,000 test images of the others, within four standard errors."""
    found = record(name)
    if found["config"]["data"] != "digits":
        request.getfixturevalue("data_folder")
    rows = {key: value[:1000] for key, value in images_of(found["config"]["data"]).items()}
    logits, _ = training.classifier_outputs(FOLDER / f"{name}.safetensors", rows["image"])
    got = score(logits, rows["label"], found["config"]["head"])
    expected, count = found["test"]["accuracy"], got.images
    if count == found["test"]["images"]:
        assert got.accuracy == pytest.approx(expected, abs=1 / count)
        assert got.nll_nats == pytest.approx(found["test"]["nll_nats"], rel=1e-3)
    else:
        assert abs(got.accuracy - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_predictor_gives_probabilities():
    predict, params = classifier.load_predictor("digits_cnn")
    predict = jax.jit(predict)
    rows = images_of("digits")
    found = predict(params, rows["image"][:100])
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert np.mean(found.argmax(-1) == rows["label"][:100]) > 0.9
    # A gradient with respect to the image that raises the probability it was taken of.
    x = jnp.float32(rows["image"][:1]) / 127.5 - 1
    wanted = jax.jit(lambda x: jnp.log(predict(params, x)[0, 3]))
    gradient = jax.jit(jax.grad(wanted))(x)
    assert wanted(x + 0.05 * gradient / jnp.linalg.norm(gradient)) > wanted(x)


def test_what_is_refused(tmp_path):
    net = classifier.load("digits_cnn")
    with pytest.raises(UserError, match="takes images of 8 x 8 x 1, not 28 x 28 x 1"):
        net.apply(net.params, np.zeros((2, 28, 28, 1), np.uint8))
    with pytest.raises(UserError, match="uint8"):
        net.apply(net.params, np.zeros((2, 8, 8, 1), np.int32))
    with pytest.raises(UserError, match="unknown classifier 'digit_cnn'"):
        classifier.load("digit_cnn")
    with pytest.raises(UserError, match="no such weight file"):
        classifier.read(tmp_path / "none.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not weights" * 20)
    with pytest.raises(UserError, match="is not a weight file"):
        classifier.read(garbage)
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other weights than those of a small classifier"):
        classifier.read(tmp_path / "other.safetensors")
    design = classifier.read_design(FOLDER / "digits_cnn.safetensors")
    wide = dataclasses.replace(design, widths=(*design.widths[:-1], 77))
    path = tmp_path / "wide.safetensors"
    path.write_bytes(classifier.serialize(wide, net.params))
    with pytest.raises(UserError, match="has shape"):
        classifier.read(path)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), net.params)
    path.write_bytes(classifier.serialize(design, broken))
    with pytest.raises(UserError, match="not finite"):
        classifier.read(path)


# The parts of the training

changed = jax.jit(augment, static_argnames=("shift_px", "flip", "cutout_px", "fill"))


@pytest.mark.parametrize(("patch_px", "channels", "kept"), [(2, 3, 12), (4, 3, 24), (4, 1, 16)])
def test_whitened_patches_are_white(patch_px, channels, kept):
    rng = np.random.default_rng(0)
    images = 3 * rng.normal(size=(1000, 9, 9, channels)) @ rng.normal(size=(channels, channels))
    kernel = classifier.whitening_kernel(images, patch_px)
    out = jax.lax.conv_general_dilated(
        jnp.float32(images), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert kernel.shape == (patch_px, patch_px, channels, 2 * kept)
    np.testing.assert_array_equal(kernel[..., :kept], -kernel[..., kept:])
    covariance = np.cov(np.asarray(out[..., :kept], np.float64).reshape(-1, kept), rowvar=False)
    np.testing.assert_allclose(covariance, np.eye(kept), atol=0.1)  # the floor of the variance damps the weakest


def test_shifts_flips_and_cutouts():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (64, 8, 8, 3), np.uint8)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(64))
    still = changed(images, keys, shift_px=0, flip=False, cutout_px=0, fill=0)
    np.testing.assert_array_equal(still, images)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    crops = {(y, x): padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
    shifted = np.asarray(changed(images, keys, shift_px=2, flip=False, cutout_px=0, fill=0))
    used = [next(at for at, crop in crops.items() if (crop[i] == shifted[i]).all()) for i in range(64)]
    assert {y for y, _ in used} == {x for _, x in used} == set(range(5))
    flipped = np.asarray(changed(images, keys, shift_px=0, flip=True, cutout_px=0, fill=0))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert np.all(mirrored | (flipped == images).all((1, 2, 3))) and 16 < mirrored.sum() < 48
    cut = np.asarray(changed(images, keys, shift_px=0, flip=False, cutout_px=4, fill=255))
    covered = (cut == 255).all(-1).sum((1, 2))
    assert covered.max() == 16 and covered.min() >= 4 and ((cut == 255).all(-1) | (cut == images).all(-1)).all()


def test_an_example_is_changed_by_its_own_key_alone():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    keys = jax.random.split(jax.random.key(0), 6)
    options = {"shift_px": 2, "flip": True, "cutout_px": 3, "fill": 0}
    np.testing.assert_array_equal(changed(images, keys, **options)[4:], changed(images[4:], keys[4:], **options))


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_temperature_is_found_and_calibrates(head):
    rng = np.random.default_rng(0)
    true = 2 * rng.normal(size=(20_000, 10))
    labels = (true + rng.gumbel(size=true.shape)).argmax(-1)
    if head == "sigmoid":
        posterior = softmax(true, -1)
        true = np.log(posterior) - np.log1p(-posterior)
    logits = 3 * true
    assert fit_temperature(logits, labels, head) == pytest.approx(3, rel=0.05)
    assert score(true, labels, head).calibration_error < 0.02 < 0.05 < score(logits, labels, head).calibration_error


def test_likelihoods_by_hand():
    logits, labels = np.asarray([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]]), np.asarray([0, 2])
    p, q = softmax(logits, -1), expit(logits)
    assert negative_log_likelihood(logits, labels, "softmax") == pytest.approx(-np.log([p[0, 0], p[1, 2]]).mean())
    one_vs_rest = [[q[0, 0], 1 - q[0, 1], 1 - q[0, 2]], [1 - q[1, 0], 1 - q[1, 1], q[1, 2]]]
    assert negative_log_likelihood(logits, labels, "sigmoid") == pytest.approx(-np.log(one_vs_rest).sum(-1).mean())
    assert score(logits, labels, "softmax").accuracy == 0.5


@pytest.mark.slow
def test_devices_do_not_change_a_step():
    """Gradients and the statistics of batch norm are those of the whole batch on any number of devices."""
    config = tiny(head="sigmoid", cutout_px=3, flip=True)
    rows = load_labelled("digits", "train")
    design, tx = training.design_of(config, (8, 8, 1)), training.optimizer(config)
    state = training.start_state(config, design, rows, tx)
    step, source = training.make_step(config, design, tx), Resident(rows, config.batch_size)
    one, four = (fit(state, step, source, steps=4, mesh=make_mesh(n), steps_per_call=4) for n in (1, 4))
    for got, expected in ((four.params, one.params), (four.extra, one.extra)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), got, expected)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), four.params, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.slow
def test_statistics_are_those_of_the_data():
    """After many steps at rate zero, evaluation with the running statistics equals evaluation with the batch's own."""
    config = tiny()
    design, rows = training.design_of(config, (8, 8, 1)), images_of("digits")
    state = training.start_state(config, design, rows, training.optimizer(config))
    model, x = classifier.build(design), classifier.scaled(design, rows["image"])
    variables, statistics = {"params": state.params}, state.extra

    @jax.jit
    def update(statistics):
        return model.apply({**variables, "statistics": statistics}, x, True, mutable=["statistics"])

    for _ in range(300):
        expected, changed = update(statistics)
        statistics = changed["statistics"]
    got = jax.jit(lambda: model.apply({**variables, "statistics": statistics}, x, False))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, expected)


@pytest.mark.parametrize("changes", [{"kind": "residual", "head": "sigmoid"}, {"kind": "vgg", "patch_px": 0}])
def test_a_network_comes_back_from_its_file(changes, tmp_path):
    config, rows = tiny(**changes), images_of("digits")
    design = training.design_of(config, (8, 8, 1))
    state = training.start_state(config, design, rows, training.optimizer(config))
    variables = {"params": state.params, "statistics": state.extra}
    path = tmp_path / "new.safetensors"
    path.write_bytes(classifier.serialize(design, variables))
    net = classifier.read(path)
    assert (net.name, net.dimension, classifier.read_design(path)) == ("new", 8, design)
    run = jax.jit(lambda variables: classifier.build(design).apply(variables, x, False))
    x = classifier.scaled(design, rows["image"][:8])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2), run(variables), run(net.params))


@pytest.mark.slow
def test_a_vgg_learns():
    """Every parameter moves, the statistics too, and the loss falls."""
    config, rows = tiny(kind="vgg", patch_px=0), load_labelled("digits", "train")
    design, tx = training.design_of(config, (8, 8, 1)), training.optimizer(config)
    state = training.start_state(config, design, rows, tx)
    losses = []
    source, step = Resident(rows, config.batch_size), training.make_step(config, design, tx)
    new = fit(
        state, step, source, steps=60, mesh=make_mesh(2), steps_per_call=20, log=lambda _, m: losses.append(m["loss"])
    )
    assert losses[-1] < 0.9 * losses[0]
    assert set(state.extra) == {"norm1_1", "norm1_2", "norm2_1", "norm2_2"}
    assert set(state.params) == {"conv1_1", "conv1_2", "conv2_1", "conv2_2", *state.extra, "Dense_0"}
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), (new.params, new.extra), (state.params, state.extra))
    assert min(jax.tree.leaves(moved)) > 1e-4


# The command


@pytest.fixture
def train_here(monkeypatch):
    """The command inside this process, whose devices are already there."""
    monkeypatch.setattr(training.shard, "start", lambda: None)
    return lambda *args: training.main([word for arg in args for word in shlex.split(str(arg))])


@pytest.mark.slow
def test_resumed_is_bit_identical(train_here, tmp_path, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_here("digits", TINY, "--out", straight)
    table = capsys.readouterr().out
    shutil.copytree(straight, resumed)
    for lost in ("digits_cnn.safetensors", "digits_cnn.json", "evaluation.json", "report.html"):
        (resumed / lost).unlink()
    shutil.rmtree(resumed / "checkpoints" / "digits_cnn" / "60")
    train_here("digits", TINY, "--out", resumed, "--resume")
    for same in ("digits_cnn.safetensors", "evaluation.json", "config.json"):
        assert (resumed / same).read_bytes() == (straight / same).read_bytes()
    ours, theirs = (json.loads((run / "digits_cnn.json").read_text()) for run in (resumed, straight))
    assert ours["log"]["digits_cnn.loss"] == theirs["log"]["digits_cnn.loss"]
    assert (resumed / "report.html").exists() and "accuracy" in table
    numbers = json.loads((straight / "evaluation.json").read_text())
    net = classifier.read(straight / "digits_cnn.safetensors")
    right = net.apply(net.params, images_of("digits")["image"]).logits.argmax(-1) == images_of("digits")["label"]
    assert numbers["test.accuracy"] == pytest.approx(float(np.mean(right)), abs=1e-6)
    assert numbers["test.accuracy"] > 0.2
    with pytest.raises(UserError, match="already holds a run"):
        train_here("digits", TINY, "--out", straight)
    with pytest.raises(UserError, match="steps"):
        train_here("digits", TINY, "--steps 80 --resume --out", straight)


@pytest.mark.parametrize("preset", recipes.PRESETS)
def test_the_recorded_command_repeats_the_configuration(preset):
    for config in (recipes.PRESETS[preset], dataclasses.replace(recipes.PRESETS[preset], lr=0.07, widths=(8, 16))):
        words = shlex.split(training.command_line(config))[4:]
        base, _, rest = configs.starting_point(recipes.PRESETS, training.PACKAGE, words)
        assert configs.parse(training.Train(config=base), rest, "train").config == config


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("cifar100", "unknown preset 'cifar100'"),
        ("--config", "--config needs a file"),
        ("digits --steps 0", "steps must be at least 1"),
        ("digits --lr -1", "lr must be positive"),
        ("digits --lrr 1", "Unrecognized"),
        ("digits --patch-px 0", "patch_px must be even"),
        ("digits --kind vgg", "patch_px must be 0 where kind is vgg"),
        ("digits --holdout 1437", "only 1437 training images"),
        ("digits --batch-size 5000", "only 1300 images"),
    ],
)
def test_mistakes_are_one_line(train_here, tmp_path, args, message):
    with pytest.raises(UserError, match=message) as error:
        train_here(args, "--out" if args != "--config" else "", tmp_path / "run" if args != "--config" else "")
    assert "\n" not in str(error.value)


def test_missing_data_are_named(train_here, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIENT_FIELDS_DATA", str(tmp_path))
    with pytest.raises(UserError, match="tfds: not found"):
        train_here("mnist", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_digits_are_split_once():
    train, test = (load_labelled("digits", split) for split in ("train", "test"))
    assert train["image"].shape == (1437, 8, 8, 1) and test["image"].shape == (360, 8, 8, 1)
    assert train["image"].dtype == np.uint8 and train["image"].max() == 255
    rows = {tuple(image.ravel()) for image in train["image"]}
    assert not any(tuple(image.ravel()) in rows for image in test["image"])
    kept, heldout = training.split_holdout(train, 137)
    assert len(kept["label"]) == 1300 and len(heldout["label"]) == 137
    assert not {tuple(i.ravel()) for i in kept["image"]} & {tuple(i.ravel()) for i in heldout["image"]}


def test_judges_are_independent():
    a, b = recipes.PRESETS["cifar10_judge_a"], recipes.PRESETS["cifar10_judge_b"]
    assert a.head == b.head == "sigmoid" and a.kind != b.kind and a.seed != b.seed
