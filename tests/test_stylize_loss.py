"""stylize/loss.py against direct formulas and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lib.shard import make_mesh, place
from stylize import loss as losses
from stylize.config import Perception
from stylize.optimize import objective
from tests.stylize_cases import smooth, tiny_network


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def double(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def random_features(seed, shape=(2, 3, 5, 4)):
    return np.random.default_rng(seed).normal(size=shape)


def test_gram_against_its_definition():
    f = random_features(0)
    expected = np.zeros((2, 4, 4))
    for b in range(2):
        for i in range(4):
            for j in range(4):
                expected[b, i, j] = sum(f[b, y, x, i] * f[b, y, x, j] for y in range(3) for x in range(5)) / (3 * 5 * 4)
    np.testing.assert_allclose(losses.gram(jnp.asarray(f)), expected, rtol=1e-12)


def test_gram_of_a_region_is_that_of_the_image_cut_to_it():
    f = jnp.asarray(random_features(1, (1, 6, 8, 3)))
    mask = jnp.zeros((6, 8)).at[1:4, 2:7].set(1.0)
    np.testing.assert_allclose(losses.gram(f, mask), losses.gram(f[:, 1:4, 2:7]), rtol=1e-12)


def test_total_variation():
    x = jnp.asarray([[[[1.0]], [[3.0]]], [[[0.0]], [[0.0]]]])  # two columns of two pixels
    np.testing.assert_allclose(losses.total_variation(x), (2.0**2 + 0.0) / 2)
    assert losses.total_variation(jnp.ones((1, 1, 1, 3))) == 0


def setting(relative=True, **options):
    network = tiny_network()
    params = double(network.params)
    x, content, style = (double(smooth(seed, 16, 24))[None] for seed in (1, 2, 3))
    perception = Perception(tv_weight=0.5, scale="relative" if relative else "raw", **options)
    targets = (
        losses.everywhere(losses.style_of(network, params, [style[0]])),
        losses.content_of(network, params, content),
    )
    return network, perception, params, x, targets


@pytest.mark.parametrize("relative", [True, False])
def test_every_term_against_a_direct_formula(relative):
    network, perception, params, x, (style, content) = setting(relative)
    total, terms = losses.perceptual_loss(network, perception, params, x, style, content)
    found = {layer: np.asarray(f[0]) for layer, f in network.features(params, x, network.layers).items()}
    style_terms, content_terms = [], []
    for layer in network.style_layers:
        rows = found[layer].reshape(-1, found[layer].shape[-1])
        difference = rows.T @ rows / rows.size - style.grams[layer][0]
        size = np.sum(np.square(style.grams[layer][0])) if relative else difference.size
        style_terms.append(np.sum(difference**2) / size)
    for layer in network.content_layers:
        target = np.asarray(content.features[layer][0])
        size = np.sum(target**2) if relative else target.size
        content_terms.append(np.sum((found[layer] - target) ** 2) / size)
    np.testing.assert_allclose(terms["style"], np.mean(style_terms), rtol=1e-10)
    np.testing.assert_allclose(terms["content"], np.mean(content_terms), rtol=1e-10)
    expected = perception.style_weight * terms["style"] + perception.content_weight * terms["content"]
    np.testing.assert_allclose(total, expected + 0.5 * terms["tv"], rtol=1e-12)


def test_the_targets_themselves_cost_nothing():
    network, perception, params, x, _ = setting()
    style = losses.everywhere(losses.style_of(network, params, [x[0]]))
    _, terms = losses.perceptual_loss(network, perception, params, x, style, losses.content_of(network, params, x))
    assert terms["style"] == pytest.approx(0, abs=1e-20) and terms["content"] == 0


def test_relative_losses_do_not_depend_on_the_scale_of_the_weights():
    network, perception, params, x, _ = setting()
    large = jax.tree.map(lambda p: p, params)
    # Through one convolution more, scale and bias: relu is homogeneous, so all activations of the last layers scale.
    large["conv1_1"] = jax.tree.map(lambda p: 7 * p, params["conv1_1"])
    layers = ("relu1_1",)
    network = tiny_network(layers, layers)
    grams = [losses.everywhere(losses.style_of(network, p, [x[0, ::-1]])) for p in (params, large)]
    wanted = [losses.content_of(network, p, x[:, ::-1]) for p in (params, large)]
    values = [
        losses.perceptual_loss(network, perception, p, x, s, c)[0]
        for p, s, c in zip((params, large), grams, wanted, strict=True)
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-10)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_gradient_against_finite_differences(devices):
    network, perception, params, x, (style, content) = setting()
    mesh: Mesh = make_mesh(devices)
    f = objective(network, perception, mesh)
    batch = place({"params": params, "style": style, "content": content}, mesh)
    value = jax.jit(lambda x: f(x, batch, jax.random.key(0))[0])
    gradient = jax.jit(jax.grad(value))(place(x, mesh))
    direction = jnp.asarray(np.random.default_rng(5).normal(size=x.shape))
    step = 1e-6
    numeric = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient * direction), numeric, rtol=1e-6)


@pytest.mark.slow
def test_two_styles_mix_by_their_weights():
    network = tiny_network()
    params = double(network.params)
    a, b = double(smooth(3, 16, 16)), double(smooth(4, 24, 12))
    mixed = losses.style_of(network, params, [a, b], [3, 1])
    each = [losses.style_of(network, params, [image]) for image in (a, b)]
    for layer in network.style_layers:
        np.testing.assert_allclose(mixed[layer], 0.75 * each[0][layer] + 0.25 * each[1][layer], rtol=1e-12)


def test_regions_see_their_own_style_only():
    network = tiny_network(("relu1_1",), ("relu1_1",))
    params = double(network.params)
    a, b = double(smooth(3, 16, 16)), double(smooth(4, 16, 16))
    both = jnp.concatenate([a, b], axis=1)
    masks = jnp.zeros((2, 16, 32)).at[0, :, :15].set(1).at[1, :, 17:].set(1)  # a column off: convolutions see beyond
    grams = [losses.style_of(network, params, [image]) for image in (a, b)]
    style = losses.regions(grams, masks, {"relu1_1": (16, 32)})
    found = network.features(params, both[None], network.layers)
    right = losses.style_losses(found, style, relative=True)["relu1_1"][0]
    swapped = losses.style_losses(found, losses.regions(grams[::-1], masks, {"relu1_1": (16, 32)}), relative=True)
    assert right < 0.02 * swapped["relu1_1"][0]
