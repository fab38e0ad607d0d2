"""stylize/tiles.py: tile by tile is the same as at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.shard import make_mesh, place
from stylize import optimize, tiles
from stylize.config import Perception
from stylize.loss import content_of, everywhere, style_of
from tests.stylize_cases import smooth, tiny_network

NETWORK = tiny_network(("pixels", "relu1_1", "relu2_1", "relu3_1"), ("pixels", "relu2_2", "relu3_1"))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def double(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def both(height, width, tile_px, devices, scale="relative"):
    """Value, terms and gradient at once (of the image continued to multiples of 4) and tile by tile."""
    mesh, alone = make_mesh(devices), make_mesh(1)
    options = Perception(tv_weight=0.0, scale=scale)
    params = double(NETWORK.params)
    x, picture = (double(smooth(seed, height, width))[None] for seed in (0, 1))
    grams = style_of(NETWORK, params, [double(smooth(2, 40, 30))])

    def continued(x):
        return jnp.pad(x, ((0, 0), (0, -height % 4), (0, -width % 4), (0, 0)), mode="edge")

    wanted = content_of(NETWORK, params, continued(picture))
    at_once, tiled = optimize.objective(NETWORK, options, alone), tiles.objective(NETWORK, options, mesh, tile_px)
    out = []
    for loss, batch in (
        (lambda x, *rest: at_once(continued(x), *rest),
         place({"params": params, "style": everywhere(grams), "content": wanted}, alone)),
        (tiled, place({"params": params, "grams": grams, "picture": picture}, mesh)),
    ):  # fmt: skip
        f = jax.jit(jax.value_and_grad(lambda x, batch, loss=loss: loss(x, batch, jax.random.key(0)), has_aux=True))
        out.append(jax.tree.map(np.asarray, f(x, batch)))
    return out


@pytest.mark.parametrize(
    ("height", "width", "tile_px", "devices", "scale"),
    [
        pytest.param(64, 96, 16, 1, "relative", marks=pytest.mark.slow),
        (61, 75, 32, 4, "raw"),
        pytest.param(32, 32, 64, 1, "relative", marks=pytest.mark.slow),
    ],
)
def test_the_objective_and_its_gradient_are_those_of_the_whole_image(height, width, tile_px, devices, scale):
    ((whole, terms), gradient), ((tiled, tiled_terms), tiled_gradient) = both(height, width, tile_px, devices, scale)
    np.testing.assert_allclose(tiled, whole, rtol=1e-10)
    for name in ("style", "content"):
        np.testing.assert_allclose(tiled_terms[name], terms[name], rtol=1e-10)
    np.testing.assert_allclose(tiled_gradient, gradient, atol=1e-10 * np.abs(gradient).max())


def test_gram_matrices_of_a_style_image_are_those_of_the_whole_image():
    params, image = double(NETWORK.params), double(smooth(2, 61, 74))
    continued = jnp.pad(image, ((0, 3), (0, 2), (0, 0)), mode="edge")
    wanted = style_of(NETWORK, params, [continued])
    found = tiles.style_of(NETWORK, params, image, make_mesh(4), 32)
    for layer in NETWORK.style_layers:
        np.testing.assert_allclose(found[layer], wanted[layer], rtol=1e-10)


def test_every_pixel_is_counted_once():
    found = tiles.grid((72, 100), 16, NETWORK)
    count = np.zeros((72, 100), int)
    for (top, left), ((a, b), (c, d)) in zip(found.starts, found.parts, strict=True):
        assert top >= 0 and left >= 0 and top + found.window_px[0] <= 72 and left + found.window_px[1] <= 100
        count[top + a : top + b, left + c : left + d] += 1
    np.testing.assert_array_equal(count, 1)


def test_the_margin_is_what_the_deepest_layer_sees():
    """relu3_1: two convolutions at every pixel, a pool, two at every second, a pool, one at every fourth."""
    assert tiles.margin(NETWORK) == 2 + 1 + 2 * 2 + 2 + 4 + 3  # 13, to the next multiple of 4
