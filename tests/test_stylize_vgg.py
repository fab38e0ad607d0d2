"""stylize/vgg.py: which loss network is taken, and which of its layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from lib.process import UserError
from stylize import vgg
from stylize.config import Perception
from tests.stylize_cases import smooth, tiny_network


@pytest.fixture
def without_vgg(monkeypatch, tmp_path):
    monkeypatch.delenv("GRADIENT_FIELDS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("without_vgg")
def test_the_small_network_stands_in_and_sees_colours_by_the_pixels():
    said = []
    network = vgg.load(Perception(), said.append)
    assert network.style_layers == ("pixels", "relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu4_2")
    assert network.content_layers == ("relu4_2",)
    fast = vgg.load(Perception(layers="johnson"))
    assert fast.style_layers == ("pixels", "relu1_2", "relu2_2") and fast.content_layers == ("relu2_2",)
    (line,) = said
    assert line.startswith("no VGG-19 found: the small loss network of the package is used, with less quality")


def test_vgg_19_as_far_as_its_weights_reach(data_folder):
    network = vgg.load(Perception())
    assert network.style_layers == ("relu1_1", "relu2_1", "relu3_1", "relu3_4")
    assert network.content_layers == ("relu3_3",)
    fast = vgg.load(Perception(layers="johnson"))
    assert fast.style_layers == ("relu1_2", "relu2_2", "relu3_3") and fast.content_layers == ("relu2_2",)
    chosen = vgg.load(Perception(layers="johnson", style_layers=("relu3_1",), content_layers=("relu3_2",)))
    assert chosen.layers == ("relu3_1", "relu3_2")
    assert (
        network.weights_sha256 == vgg.load(Perception(weights=str(next(data_folder.glob("weights/*"))))).weights_sha256
    )


@pytest.mark.usefixtures("without_vgg")
@pytest.mark.parametrize("layer", ["relu5_1", "pool1", "pixel"])
def test_layers_that_cannot_be_compared(layer):
    with pytest.raises(
        UserError, match=f"no layer '{layer}' to compare; there are pixels, conv1_1, relu1_1, .*relu4_2$"
    ):
        vgg.load(Perception(content_layers=(layer,)))


def test_pixels_are_a_layer_of_their_own():
    x = jnp.asarray(smooth(0, 12, 20))[None]
    network = tiny_network(("pixels", "relu2_1"), ("pixels",))
    found = network.features(network.params, x, network.layers)
    assert found.keys() == {"pixels", "relu2_1"} and network.stride == 2
    np.testing.assert_allclose(found["pixels"], (x + 1) / 2)
    assert [network.channels(layer) for layer in network.layers] == [3, 6]
    alone = tiny_network(("pixels",), ("pixels",))
    assert alone.features(alone.params, x, alone.layers).keys() == {"pixels"}
    assert (alone.up_to(alone.layers), alone.stride) == ([], 1)
