"""The FID Inception against torch-fidelity's and pytorch-fid's, at random weights (see reference/)."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_cases import images, inception_state, positions

from lib.features import convert, inception, load, weights
from lib.process import UserError

REFERENCE = np.load(Path(__file__).parent / "reference" / "features.npz")
TOLERANCE, VISIBLE = 1e-5, 1e-3


@functools.cache
def converted() -> dict[str, np.ndarray]:
    return convert.convert(inception_state(), "random")[1]


def compiled() -> Callable[[Any, jax.Array], inception.Outputs]:
    """The network as it is now, after the preprocessing; unoptimised, as compiling is the cost."""
    apply = inception.Inception().apply
    return jax.jit(
        lambda params, x: apply({"params": params}, x), compiler_options={"xla_backend_optimization_level": 0}
    )


@functools.cache
def unswitched() -> Callable[[Any, jax.Array], inception.Outputs]:
    return compiled()


@functools.cache
def params() -> dict[str, Any]:
    return jax.device_put(weights.nested(converted()))


def error(ours: jax.Array, name: str) -> float:
    """The largest difference, relative to the largest reference value."""
    return float(np.abs(np.asarray(ours) - REFERENCE[name]).max() / np.abs(REFERENCE[name]).max())


def switched_error() -> float:
    return error(compiled()(params(), inception.preprocess_fid(images(32, 32))).pool, "inception.pool")


def test_equals_torch_fidelity():
    outputs = unswitched()(params(), inception.preprocess_fid(images(32, 32)))
    for name in ("pool", "logits_unbiased", "logits"):
        assert error(getattr(outputs, name), f"inception.{name}") < TOLERANCE
    assert error(outputs.logits_unbiased, "inception.logits") > VISIBLE


def test_equals_pytorch_fid_and_the_resize_of_the_other_tool_is_visible():
    found = unswitched()(params(), inception.preprocess_pytorch_fid(images(32, 32))).pool
    assert error(found, "inception.pytorch_fid.pool") < TOLERANCE
    assert error(found, "inception.pool") > VISIBLE


def test_half_pixel_resize_alone_is_visible():
    x = (inception.resize_half_pixel(images(32, 32)) - 128) / 128
    assert error(unswitched()(params(), x).pool, "inception.pool") > VISIBLE


def test_another_scale_of_pixels_is_visible():
    x = inception.resize_tensorflow1(images(32, 32)) / 127.5 - 1
    assert error(unswitched()(params(), x).pool, "inception.pool") > VISIBLE


def test_counting_the_padding_of_average_pools_is_visible(monkeypatch):
    monkeypatch.setattr(inception, "average_pool", lambda x: inception.nn.avg_pool(x, (3, 3), padding="SAME"))
    assert switched_error() > VISIBLE


def test_an_average_pool_in_the_last_block_is_visible(monkeypatch):
    monkeypatch.setitem(inception.BLOCKS, "Mixed_7c", inception.BLOCKS["Mixed_7b"])
    assert switched_error() > VISIBLE


def test_a_max_pool_in_the_last_but_one_block_is_visible(monkeypatch):
    monkeypatch.setitem(inception.BLOCKS, "Mixed_7b", inception.BLOCKS["Mixed_7c"])
    assert switched_error() > VISIBLE


def test_another_epsilon_is_visible():
    other = weights.nested(convert.from_pytorch_inception(inception_state(), "random", eps=1e-5))
    found = unswitched()(other, inception.preprocess_fid(images(32, 32)))
    assert error(found.pool, "inception.pool") > VISIBLE


@pytest.mark.parametrize(
    ("name", "preprocess"),
    [("inception", inception.preprocess_fid), ("inception.pytorch_fid", inception.preprocess_pytorch_fid)],
)
def test_the_instrument_preprocesses_and_scores_get_the_logits_without_bias(name, preprocess, monkeypatch):
    class Echo:
        """Instead of the network: what reaches it."""

        def apply(self, variables: dict, x: jax.Array) -> inception.Outputs:
            assert variables["params"] is net.params
            return inception.Outputs(x, x[..., 0], x[..., 1])

    net = inception.feature_net(name, converted(), "0" * 64)
    monkeypatch.setattr(inception, "Inception", Echo)
    found = net.apply(net.params, jnp.asarray(images(20, 33)))
    np.testing.assert_array_equal(found.pool, preprocess(images(20, 33)))
    np.testing.assert_array_equal(found.logits, found.pool[..., 0])
    assert (net.name, net.dimension, net.classes, net.channels, net.sizes_px) == (name, 2048, 1008, 3, None)
    with pytest.raises(UserError, match="uint8 images, not float32"):
        net.apply(net.params, jnp.zeros((1, 32, 32, 3)))


def test_whole_images_keep_their_range():
    x = images(32, 32)
    assert inception.preprocess_fid(x).min() >= -1 and inception.preprocess_fid(x).max() <= 127 / 128
    assert inception.preprocess_pytorch_fid(x).min() >= -1 and inception.preprocess_pytorch_fid(x).max() <= 1


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
