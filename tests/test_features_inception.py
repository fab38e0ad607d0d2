"""The FID Inception against torch-fidelity's and pytorch-fid's, at random weights (see reference/)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_cases import images, inception_state, positions

from lib.features import convert, inception, load, weights
from lib.features.net import FeatureNet
from lib.run import UserError

REFERENCE = np.load(Path(__file__).parent / "reference" / "features.npz")
TOLERANCE, VISIBLE = 1e-5, 1e-3


@functools.cache
def converted() -> dict[str, np.ndarray]:
    return convert.convert(inception_state(), "random")[1]


def net(name: str = "inception", arrays: dict[str, np.ndarray] | None = None) -> FeatureNet:
    return inception.feature_net(name, arrays or converted(), "0" * 64)


def error(ours: jax.Array, name: str) -> float:
    """The largest difference, relative to the largest reference value."""
    return float(np.abs(np.asarray(ours) - REFERENCE[name]).max() / np.abs(REFERENCE[name]).max())


def pool_error(network: FeatureNet, name: str = "inception.pool") -> float:
    # Not compiled as a whole: networks that differ in one stage then share all other compiled operations.
    return error(network.apply(network.params, images(32, 32)).pool, name)


def test_equals_torch_fidelity():
    x = inception.preprocess_fid(images(32, 32))
    outputs = inception.Inception().apply({"params": net().params}, x)
    for name in ("pool", "logits_unbiased", "logits"):
        assert error(getattr(outputs, name), f"inception.{name}") < TOLERANCE


def test_scores_get_the_logits_without_bias():
    found = net().apply(net().params, images(32, 32))
    assert error(found.logits, "inception.logits_unbiased") < TOLERANCE
    assert error(found.logits, "inception.logits") > VISIBLE
    assert (found.pool.shape, found.logits.shape) == ((2, net().dimension), (2, net().classes))


def test_equals_pytorch_fid():
    assert pool_error(net("inception.pytorch_fid"), "inception.pytorch_fid.pool") < TOLERANCE


def test_the_resize_of_the_other_tool_is_visible():
    assert pool_error(net("inception.pytorch_fid")) > VISIBLE
    assert pool_error(net(), "inception.pytorch_fid.pool") > VISIBLE


def test_counting_the_padding_of_average_pools_is_visible(monkeypatch):
    monkeypatch.setattr(inception, "average_pool", lambda x: inception.nn.avg_pool(x, (3, 3), padding="SAME"))
    assert pool_error(net()) > VISIBLE


def test_an_average_pool_in_the_last_block_is_visible(monkeypatch):
    monkeypatch.setattr(inception, "max_pool", inception.average_pool)
    assert pool_error(net()) > VISIBLE


def test_a_max_pool_in_the_last_but_one_block_is_visible(monkeypatch):
    monkeypatch.setitem(inception.BLOCKS, "Mixed_7b", inception.BLOCKS["Mixed_7c"])
    assert pool_error(net()) > VISIBLE


def test_another_epsilon_is_visible():
    assert pool_error(net(arrays=convert.from_pytorch_inception(inception_state(), "random", eps=1e-5))) > VISIBLE


def test_another_scale_of_pixels_is_visible(monkeypatch):
    half_open = inception.preprocess_fid(images(32, 32))
    np.testing.assert_allclose([half_open.min() >= -1, half_open.max() <= 127 / 128], True)
    monkeypatch.setitem(
        inception.PREPROCESSING, "inception", (lambda x: inception.resize_tensorflow1(x) / 127.5 - 1, "closed")
    )
    assert pool_error(net()) > VISIBLE


@pytest.mark.parametrize("size", [(400, 350), (20, 33)])
@pytest.mark.parametrize("name", ["tensorflow1", "half_pixel"])
def test_resize(name, size):
    height, width = size
    resized = getattr(inception, f"resize_{name}")(images(height, width))
    assert (resized.shape, resized.dtype) == ((2, 299, 299, 3), jnp.float32)
    sampled = np.asarray(resized).ravel()[positions(f"{height}x{width}", resized.size)]
    np.testing.assert_allclose(sampled, REFERENCE[f"resize.{name}.{height}x{width}"], rtol=0, atol=1e-3)


def test_images_of_299_pixels_are_not_resized():
    x = images(299, 299, count=1)
    for resize in (inception.resize_tensorflow1, inception.resize_half_pixel):
        np.testing.assert_array_equal(resize(x), x)


@pytest.mark.parametrize("c", [1, 5])
def test_pools_equal_their_definition(c):
    x = np.random.default_rng(0).standard_normal((2, 9, 8, c)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    np.testing.assert_allclose(inception.average_pool(x), np.nanmean(windows, (-2, -1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(inception.max_pool(x), np.nanmax(windows, (-2, -1)))
    inner = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2]
    np.testing.assert_array_equal(inception.max_pool_halving(x), inner.max((-2, -1)))


def test_a_converted_file_is_loaded_with_its_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="get inception"):
        load("inception")
    sha256 = weights.write(weights.cached("inception"), converted())
    for found in (load("inception"), load("inception.pytorch_fid", weights.cached("inception"))):
        assert found.weights_sha256 == sha256
        assert sorted(weights.flat(found.params)) == sorted(inception.shapes())
    assert (found.name, found.channels, found.sizes_px) == ("inception.pytorch_fid", 3, None)


def test_other_weights_are_refused_by_name(tmp_path):
    state = inception_state()
    without = {name: array for name, array in state.items() if name != "Mixed_6c.branch7x7_2.bn.running_var"}
    with pytest.raises(UserError, match=r"Mixed_6c.branch7x7_2.bn.running_var is missing"):
        convert.convert(without, "file")
    thousand = state | {"fc.weight": state["fc.weight"][:1000], "fc.bias": state["fc.bias"][:1000]}
    with pytest.raises(UserError, match=r"fc/kernel has shape \(2048, 1000\), not \(2048, 1008\)"):
        convert.convert(thousand, "file")
    weights.write(tmp_path / "few.safetensors", {"fc_bias": state["fc.bias"]})
    with pytest.raises(UserError, match="more are missing: these are the weights of another network"):
        load("inception", tmp_path / "few.safetensors")


def test_only_uint8_is_measured():
    with pytest.raises(UserError, match="uint8 images, not float32"):
        net().apply(net().params, jnp.zeros((1, 32, 32, 3)))
