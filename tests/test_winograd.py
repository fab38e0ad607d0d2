"""Winograd's convolution against the direct one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lib import winograd
from lib.shard import DATA, make_mesh


def direct(x, kernel, padding="SAME", strides=(1, 1)):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def problem(height, width, channels=5, features=7, batch=2):
    rng = np.random.default_rng(height * 100 + width)
    x = rng.normal(size=(batch, height, width, channels))
    kernel = rng.normal(size=(3, 3, channels, features)) / np.sqrt(9 * channels)
    return np.float32(x), np.float32(kernel)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 9), (16, 8), (13, 22)])
def test_equals_the_direct_convolution_at_any_size(size):
    x, kernel = problem(*size)
    close(jax.jit(winograd.conv)(x, winograd.transform(kernel)), direct(x, kernel))


@pytest.mark.parametrize(("taps", "features"), [(2, 4), (2, 2), (3, 4)])
@pytest.mark.parametrize("cache", [1 << 11, 1 << 14, 1 << 20], ids=["bands", "images", "whole"])
def test_parts_of_what_does_not_fit_into_the_cache(taps, features, cache, monkeypatch):
    """Bands of rows of an image; images, of which the last part has too few; all at once."""
    monkeypatch.setattr(winograd, "_CACHE", cache)
    monkeypatch.setattr(winograd, "alone", lambda: True)
    rng = np.random.default_rng(taps)
    x, kernel = rng.normal(size=(5, 13, 10, 3)), rng.normal(size=(taps, taps, 3, features))
    padding = ((1, 0), (2, 1))
    with jax.enable_x64(True):
        found, derive = jax.vjp(lambda kernel: direct(x, kernel, padding), jnp.asarray(kernel))
        g = rng.normal(size=found.shape)
        np.testing.assert_allclose(jax.jit(winograd.results, static_argnums=2)(x, kernel, padding), found, atol=1e-11)
        gradient = jax.jit(winograd.kernel_gradient, static_argnums=2)(x, jnp.asarray(g), padding)
        np.testing.assert_allclose(gradient, derive(jnp.asarray(g))[0], atol=1e-10)


@pytest.mark.parametrize(("taps", "tile"), [(taps, lines + 1 - taps) for taps in (2, 3) for lines in winograd._POINTS])
def test_tiles_of_any_side_with_a_stride(taps, tile, monkeypatch):
    """Blocks as large as the stride are channels."""
    monkeypatch.setattr(winograd, "_tile_for", lambda *_: tile)
    rng = np.random.default_rng(tile)
    x, kernel = rng.normal(size=(3, 18, 25, 4)), rng.normal(size=(2 * taps, 2 * taps, 4, 6))
    padding = ((taps - 1, taps + 1), (1, 2))
    in_blocks = kernel.reshape(taps, 2, taps, 2, 4, 6).transpose(0, 2, 1, 3, 4, 5).reshape(taps, taps, 16, 6)
    with jax.enable_x64(True):
        convolve = lambda kernel: direct(x, kernel, padding, strides=(2, 2))  # noqa: E731
        wanted, derive = jax.vjp(convolve, jnp.asarray(kernel))
        g = rng.normal(size=wanted.shape)
        of_kernel = derive(jnp.asarray(g))[0].reshape(taps, 2, taps, 2, 4, 6).transpose(0, 2, 1, 3, 4, 5)
        found = jax.jit(winograd.results, static_argnums=(2, 3))(x, in_blocks, padding, 2)
        np.testing.assert_allclose(found, wanted, atol=1e-11)
        gradient = jax.jit(winograd.kernel_gradient, static_argnums=(2, 3))(x, g, padding, 2)
        np.testing.assert_allclose(gradient, of_kernel.reshape(taps, taps, 16, 6), atol=1e-10)
    single = jax.jit(winograd.results, static_argnums=(2, 3))(np.float32(x), np.float32(in_blocks), padding, 2)
    close(single, np.float32(wanted))


@pytest.mark.parametrize(
    ("size", "taps", "tile"), [(14, 3, 5), (7, 3, 4), (32, 3, 4), (256, 3, 4), (14, 2, 7), (7, 2, 7), (16, 2, 4)]
)
def test_larger_tiles_where_they_fit(size, taps, tile):
    assert winograd._tile_for((size, size), taps) == tile


def test_no_parts_where_xla_divides_the_work(monkeypatch):
    monkeypatch.setattr(winograd, "_CACHE", 1)
    x, kernel = problem(16, 8)
    convolve = jax.jit(lambda x: winograd.results(x, jnp.asarray(kernel), ((1, 1), (1, 1))))
    assert jax.local_device_count() > 1
    assert "while" not in convolve.lower(x).as_text()
    mapped = jax.shard_map(convolve, mesh=make_mesh(2), in_specs=P(DATA), out_specs=P(DATA))
    assert "while" in jax.jit(mapped).lower(x).as_text()
    close(jax.jit(mapped)(x), direct(x, kernel))


@pytest.mark.parametrize("size", [pytest.param((8, 8), marks=pytest.mark.slow), (5, 11)])
def test_gradients_of_first_and_second_order(size):
    x, kernel = problem(*size)
    fast = winograd.transform(kernel)

    def penalty(conv, x):
        """The squared norm of a gradient, which depends on x."""
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(conv(x))))(x) ** 2)

    ways = [lambda x: winograd.conv(x, fast), lambda x: direct(x, kernel)]
    for derive in (
        lambda conv: jax.grad(lambda x: jnp.sum(conv(x) ** 3)),
        lambda conv: jax.grad(lambda x: penalty(conv, x)),
    ):
        found, wanted = (jax.jit(derive(conv))(x) for conv in ways)
        close(found, wanted)


@pytest.mark.slow
def test_a_kernel_of_one_point_moves_the_image():
    x, _ = problem(6, 9, channels=3)
    kernel = np.zeros((3, 3, 3, 3), np.float32)
    kernel[0, 2] = np.eye(3)
    moved = np.zeros_like(x)
    moved[:, 1:, :-1] = x[:, :-1, 1:]
    np.testing.assert_allclose(winograd.conv(x, winograd.transform(kernel)), moved, atol=1e-5)
