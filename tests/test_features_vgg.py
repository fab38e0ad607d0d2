"""VGG against PyTorch's, at random weights and the real partial ones (see reference/); VGG-9 against its classifier."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_cases import VGG_SIZE_PX, images, positions, vgg_state

from lib.features import classifier, convert, vgg, weights
from lib.process import UserError

REFERENCE = np.load(Path(__file__).parent / "reference" / "features.npz")
TOLERANCE = 1e-5


@functools.cache
def random_vgg(depth: int) -> dict[str, np.ndarray]:
    name, arrays = convert.convert(vgg_state(depth), "random")
    assert name == f"vgg{depth}"
    return arrays


def truncated(depth: int, last: str) -> dict:
    names = vgg.layer_names(depth)
    kept = {name for name in names[: names.index(last) + 1] if name.startswith("conv")}
    arrays = random_vgg(depth)
    return weights.nested({k: v for k, v in arrays.items() if k == "mean" or k.split("/")[0] in kept})


def pixels(height: int, width: int) -> jax.Array:
    return jnp.asarray(images(height, width), jnp.float32) / 127.5 - 1


def error(name: str, activation: jax.Array) -> float:
    sampled = np.asarray(activation).ravel()[positions(name, activation.size)]
    return float(np.abs(sampled - REFERENCE[name]).max() / np.abs(REFERENCE[name]).max())


@pytest.fixture
def partial(data_folder) -> vgg.VGG:
    path = data_folder / "weights" / vgg.PARTIAL_FILE
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return vgg.load(path)


@pytest.mark.parametrize(("depth", "pooling"), [(16, "average"), (19, "max")])
def test_every_layer_equals_pytorch(depth, pooling):
    layers = [name for name in vgg.layer_names(depth) if not name.startswith("conv")]
    params = weights.nested(random_vgg(depth))
    found = vgg.apply(params, pixels(VGG_SIZE_PX, VGG_SIZE_PX), layers, pooling=pooling)
    assert {name: error(f"vgg{depth}.{name}", found[name]) for name in layers} == pytest.approx(
        dict.fromkeys(layers, 0), abs=TOLERANCE
    )
    assert found["pool5"].shape == (2, 1, 1, 512)


def test_the_other_pooling_is_visible():
    params = weights.nested(random_vgg(19))
    found = vgg.apply(params, pixels(VGG_SIZE_PX, VGG_SIZE_PX), ["pool1"], pooling="average")
    assert error("vgg19.pool1", found["pool1"]) > 1e-2


@pytest.mark.parametrize("prepare", [dict, vgg.prepared])
def test_real_weights_equal_pytorch(partial, prepare):
    layers = ["relu1_1", "relu1_2", "relu2_1", "relu2_2", "relu3_1", "relu3_4", "pool3"]
    found = vgg.apply(prepare(partial.params), pixels(40, 48), layers)
    for name in layers:
        assert error(f"partial.{name}", found[name]) < TOLERANCE
    assert partial.layers[-2:] == ["relu3_4", "pool3"]
    assert len(partial.weights_sha256) == 64


@pytest.mark.parametrize("prepare", [pytest.param(dict, marks=pytest.mark.slow), vgg.prepared])
def test_gradient_to_the_pixels_equals_pytorch_also_in_a_scan(partial, prepare):
    params = prepare(partial.params)

    def loss(x):
        return jnp.mean(vgg.apply(params, x, ["relu3_3"])["relu3_3"] ** 2)

    @jax.jit
    def scanned(x):
        return jax.lax.scan(lambda x, _: (x, jax.grad(loss)(x)), x, length=2)[1]

    # The reference is PyTorch's in float64; its own in float32 is 5e-4 off, where rounding turned a ReLU.
    for gradient in scanned(pixels(40, 48)):
        assert error("partial.gradient", gradient) < 1e-3


def test_wide_kernels_are_prepared_and_small_maps_are_computed_directly():
    params = weights.nested(random_vgg(19))
    ready = vgg.prepared(params)
    assert {name for name in params if ready[name] is not params[name]} == {
        name for name in params if name.startswith("conv") and name not in ("conv1_1", "conv1_2")
    }

    def products(size):
        text = str(jax.make_jaxpr(lambda x: vgg.apply(ready, x, ["relu2_1"]))(pixels(size, size)))
        return text.count("dot_general["), text.count("conv_general_dilated[")

    assert products(32) == (1, 2)  # Winograd's, of the tiles
    assert products(16) == (0, 3)


@pytest.mark.slow
def test_colours_and_means_of_pytorch_and_keras_are_folded_in():
    """The same kernel through both routes differs only in what is done to the pixels."""
    state = vgg_state(19)
    caffe = {f"block{n[4]}_conv{n[6]}/{kind}": a for n, kind, a in torch_to_keras(state)}
    name, keras = convert.convert(caffe, "keras")
    assert name == "vgg19"
    x = pixels(8, 8)
    bgr = (np.asarray(x) + 1)[..., ::-1] * 127.5 - np.array([103.939, 116.779, 123.68])
    plain = vgg.apply({**weights.nested(random_vgg(19)), **torchvision_first(state)}, jnp.float32(bgr), ["conv1_1"])
    ours = vgg.apply(weights.nested(keras), x, ["conv1_1"])
    np.testing.assert_allclose(ours["conv1_1"], plain["conv1_1"], rtol=0, atol=TOLERANCE * 500)


def test_the_partial_file_is_converted_too(partial, data_folder, tmp_path):
    path = data_folder / "weights" / vgg.PARTIAL_FILE
    name, arrays = convert.convert(convert.read_state(path), path)
    assert name == "vgg19"
    weights.write(tmp_path / "vgg19.safetensors", arrays)
    for ours, theirs in zip(
        jax.tree.leaves(vgg.load(tmp_path / "vgg19.safetensors").params), jax.tree.leaves(partial.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def torch_to_keras(state):
    for i, name in enumerate(vgg.layer_names(19)):
        if name.startswith("conv"):
            yield name, "kernel:0", state[f"features.{i}.weight"].transpose(2, 3, 1, 0)
            yield name, "bias:0", state[f"features.{i}.bias"]


def torchvision_first(state):
    """The first convolution as it is in the file, nothing folded in, no mean."""
    kernel = state["features.0.weight"].transpose(2, 3, 1, 0)
    return {"mean": np.zeros(3, np.float32), "conv1_1": {"kernel": kernel, "bias": state["features.0.bias"]}}


@pytest.mark.parametrize(
    ("kernel", "bias"),
    [
        ("block{}_conv{}/kernel:0", "block{}_conv{}/bias:0"),
        ("block{0}_conv{1}/block{0}_conv{1}_W_1:0", "block{0}_conv{1}/block{0}_conv{1}_b_1:0"),
        ("block{0}_conv{1}/block{0}_conv{1}/kernel:0", "block{0}_conv{1}/block{0}_conv{1}/bias:0"),
        ("block{}_conv{}_kernel", "block{}_conv{}_bias"),
        ("layers/block{}_conv{}/kernel", "layers/block{}_conv{}/bias"),
    ],
)
def test_keras_names(kernel, bias):
    state = {}
    for name, kind, array in torch_to_keras(vgg_state(19)):
        state[(kernel if kind == "kernel:0" else bias).format(name[4], name[6])] = array
    name, arrays = convert.convert(state | {"predictions/kernel:0": np.zeros((2, 2))}, "file")
    assert (name, len(arrays)) == ("vgg19", 2 * 16 + 1)


@pytest.mark.parametrize(
    ("depth", "last", "deepest", "missing"),
    [
        (19, "conv3_4", r"relu3_4 \(then pool3\)", "relu4_1"),
        (19, "conv1_1", r"relu1_1", "conv1_2"),
        (16, "conv4_2", r"relu4_2", "pool4"),
        (16, "conv3_3", r"relu3_3", "pool3"),  # of VGG-19 it would come after conv3_4
    ],
)
def test_a_layer_without_weights(depth, last, deepest, missing):
    with pytest.raises(UserError, match=f"end before {missing}: the deepest layer available is {deepest}"):
        vgg.apply(truncated(depth, last), pixels(8, 8), ["relu1_1", missing])


def test_a_layer_that_does_not_exist():
    params = weights.nested(random_vgg(16))
    with pytest.raises(UserError, match="VGG-16 has no layer 'relu3_4'"):
        vgg.apply(params, pixels(32, 32), ["relu3_4"])
    with pytest.raises(UserError, match="8 x 8 pixels are too small for pool4"):
        vgg.apply(params, pixels(8, 8), ["pool4"])


def test_nothing_after_the_deepest_layer_is_computed():
    params = weights.nested(random_vgg(16))
    text = str(jax.make_jaxpr(lambda x: vgg.apply(params, x, ["relu2_1", "relu1_1"]))(pixels(32, 32)))
    assert text.count("conv_general_dilated[") == 3
    assert vgg.apply(params, pixels(32, 32), []) == {}


def test_odd_sizes_lose_their_last_row():
    x = jnp.arange(2 * 5 * 7 * 3, dtype=jnp.float32).reshape(2, 5, 7, 3)
    assert vgg.pool(x, "max").shape == (2, 2, 3, 3)
    np.testing.assert_array_equal(vgg.pool(x, "max"), x[:, 1:4:2, 1:6:2])
    np.testing.assert_allclose(vgg.pool(x, "average"), (x[:, :4:2, :6:2] + x[:, 1:4:2, 1:6:2]) / 2)


def test_default_weights(tmp_path, monkeypatch, data_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if (data_folder / "weights" / vgg.PARTIAL_FILE).exists():
        assert vgg.load_default("vgg19").layers[-1] == "pool3"
    monkeypatch.setenv("GRADIENT_FIELDS_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / vgg.PARTIAL_FILE).write_text("damaged")
    with pytest.raises(UserError, match=f"{vgg.PARTIAL_FILE} is not a weight file") as damaged:
        vgg.load_default("vgg19")
    assert not isinstance(damaged.value, vgg.NoWeights)
    monkeypatch.delenv("GRADIENT_FIELDS_DATA")
    for name in ("vgg16", "vgg19"):
        with pytest.raises(UserError, match=f"{name}.safetensors is missing: `python -m lib.features get {name}`"):
            vgg.load_default(name)
    sha256 = weights.write(weights.cached("vgg19"), random_vgg(19))
    assert vgg.load_default("vgg19").weights_sha256 == sha256


# VGG-9, the classifier that comes with the package

DESIGN = classifier.Design("vgg", 0, (4, 6, 8, 10), "softmax", 32, 3, 120)


def random_classifier(path: Path, **changes) -> Path:
    """A weight file of random kernels, scales, biases and statistics; variances small enough to tell epsilon."""
    design = dataclasses.replace(DESIGN, **changes)
    blank = jnp.zeros((1, design.size_px, design.size_px, design.channels))
    shapes = jax.eval_shape(lambda: classifier.build(design).init(jax.random.key(0), blank, False))
    rng, arrays = np.random.default_rng(0), {}
    for name, leaf in weights.flat(shapes).items():
        if name.endswith(("scale", "variance")):
            arrays[name] = rng.uniform(0.3, 2, leaf.shape) * (1e-4 if name.endswith("variance") else 1e-2)
        else:
            arrays[name] = rng.normal(size=leaf.shape) * np.sqrt(2 / max(1, np.prod(leaf.shape[:-1])))
    path.write_bytes(classifier.serialize(design, weights.nested(arrays)))
    return path


@pytest.mark.slow
def test_a_folded_classifier_equals_its_own_layers(tmp_path):
    """Also at the borders, and of another size than it was trained for, with odd sides before the pools."""
    path = random_classifier(tmp_path / "small.safetensors")
    folded, variables = vgg.from_classifier(path), classifier.read(path).params
    assert folded.layers == vgg.layer_names(9) and folded.pooling == "average"
    for height, width in ((32, 32), (27, 38)):
        x = pixels(height, width)
        inputs, names = classifier.scaled(DESIGN, x), [name for name in folded.layers if name != "pool4"]
        run: Any = functools.partial(
            classifier.build(DESIGN).apply, capture_intermediates=True, mutable=["intermediates"]
        )
        out, state = run(variables, inputs, False)
        found = vgg.apply(folded.params, x, names, pooling=folded.pooling)
        scale = max(float(jnp.abs(x).max()) for x in found.values())
        assert 1 < scale < 100
        for name, ours in found.items():
            block, i = name[-3:].split("_") if name[0] != "p" else (name[-1], "2")
            (theirs,) = state["intermediates"][f"norm{block}_{i}"]["__call__"]
            theirs = theirs if name.startswith("conv") else jax.nn.relu(theirs)
            theirs = vgg.pool(theirs, "average") if name.startswith("pool") else theirs
            np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
        # and what the pools pass on is what the classifier's own pools do
        np.testing.assert_allclose(found["relu4_2"].mean((1, 2)), out.pool, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_the_borders_see_is_the_zero_pixel(tmp_path):
    """An image of the pixel that becomes zero goes on beyond its borders: every activation is constant."""
    folded = vgg.from_classifier(random_classifier(tmp_path / "small.safetensors"))
    x = jnp.full((1, 16, 16, 3), 120 / 127.5 - 1)
    np.testing.assert_allclose(folded.params["mean"], x[0, 0, 0], rtol=1e-6)
    first = vgg.apply(folded.params, x, ["conv1_1"])["conv1_1"]
    np.testing.assert_allclose(first, np.broadcast_to(folded.params["conv1_1"]["bias"], first.shape), atol=1e-6)


def test_a_classifier_is_loaded_like_other_weights(tmp_path, monkeypatch):
    path = random_classifier(tmp_path / f"{vgg.EMBEDDED}.safetensors")
    folded = vgg.from_classifier(path)
    monkeypatch.setattr(classifier, "FOLDER", tmp_path)
    weights.write(tmp_path / "folded.safetensors", weights.flat(folded.params))
    for found in (vgg.load(path), vgg.load_embedded(), vgg.load(tmp_path / "folded.safetensors")):
        assert found.pooling == "average"
        jax.tree.map(np.testing.assert_array_equal, found.params, folded.params)
    assert vgg.load_embedded().weights_sha256 == classifier.read(path).weights_sha256
    path.unlink()
    for load in (vgg.load_embedded, lambda: vgg.load(path), lambda: vgg.from_classifier(path)):
        with pytest.raises(UserError, match=f"{vgg.EMBEDDED}.safetensors: no such weight file"):
            load()


def test_embedded_weights_have_textures_to_tell_apart():
    net = vgg.load_embedded()
    assert net.layers == vgg.layer_names(9)
    found = vgg.apply(net.params, pixels(40, 48), ["relu1_1", "relu4_2"], pooling=net.pooling)
    assert found["relu1_1"].shape[1:3] == (40, 48) and found["relu4_2"].shape[1:3] == (5, 6)
    for activation in found.values():
        assert 0.01 < float(jnp.mean(activation)) < 100 and float(jnp.mean(activation > 0)) > 0.05


def test_messages_name_the_small_network(tmp_path):
    arrays = weights.flat(vgg.from_classifier(random_classifier(tmp_path / "small.safetensors")).params)
    params = weights.nested(arrays)
    with pytest.raises(UserError, match="VGG-9 has no layer 'relu3_3'; there are conv1_1, .*, pool4$"):
        vgg.apply(params, pixels(32, 32), ["relu3_3"])
    with pytest.raises(UserError, match="8 x 8 pixels are too small for pool4"):
        vgg.apply(params, pixels(8, 8), ["pool4"])
    with pytest.raises(UserError, match=r"end before relu4_2: the deepest layer available is relu4_1 \(then relu4_1\)"):
        vgg.apply({k: v for k, v in params.items() if k != "conv4_2"}, pixels(8, 8), ["relu4_2"])
    for change, message in (
        ({"conv2_2/bias": np.zeros(3)}, r"conv2_2/bias has shape \(3,\), not \(6,\)"),
        ({"conv2_1/kernel": np.zeros(3)}, r"conv2_1/kernel has shape \(3,\), not \(3, 3, 4, 6\)"),
        ({"conv9_1/bias": np.zeros(3)}, "conv9_1/bias is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            vgg.check(arrays | change, "file")
    for lost in ("mean", "conv1_1/bias", "conv2_1/bias"):
        with pytest.raises(UserError, match=f"{lost} is missing"):
            vgg.check({k: v for k, v in arrays.items() if k != lost}, "file")
    published = {k: v for k, v in random_vgg(16).items() if not k.startswith("conv3_3")}
    with pytest.raises(UserError, match="conv3_3/kernel, conv3_3/bias are missing"):  # a gap does not make it a VGG-9
        vgg.check(published, "file")


@pytest.mark.parametrize(
    "changes",
    [{"kind": "residual", "patch_px": 4}, {"channels": 1}, {"widths": (2, 2, 2, 2, 2)}],
    ids=["residual", "grey", "five blocks"],
)
def test_other_classifiers_are_refused(changes, tmp_path):
    path = random_classifier(tmp_path / "other.safetensors", **changes)
    for load in (vgg.load, vgg.from_classifier):
        with pytest.raises(UserError, match="holds another classifier than a VGG-9 of RGB images"):
            load(path)


def test_other_weights_are_refused_by_name(tmp_path):
    batch_normalised = {f"features.{i}.weight": np.zeros(1) for i in range(49)}
    with pytest.raises(UserError, match="neither VGG-16 nor VGG-19 without batch normalisation"):
        convert.convert(batch_normalised, "file")
    arrays = random_vgg(19)
    for change, message in (
        ({"conv2_1/bias": np.zeros(3)}, r"conv2_1/bias has shape \(3,\), not \(128,\)"),
        ({"conv9_1/bias": np.zeros(3)}, "conv9_1/bias is unknown"),
    ):
        weights.write(tmp_path / "bad.safetensors", arrays | change)
        with pytest.raises(UserError, match=message):
            vgg.load(tmp_path / "bad.safetensors")
    weights.write(tmp_path / "gap.safetensors", {k: v for k, v in arrays.items() if not k.startswith("conv2_1/")})
    with pytest.raises(UserError, match="conv2_1/kernel, conv2_1/bias are missing"):
        vgg.load(tmp_path / "gap.safetensors")
