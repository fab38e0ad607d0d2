"""The networks that come with the package, on a photograph of scikit-image."""

from pathlib import Path

import numpy as np
import pytest

from lib import images
from lib.shard import make_mesh
from stylize import data, networks, training
from stylize.apply import Stylizer
from stylize.evaluate import border_contrast, spectral_peak


@pytest.mark.parametrize("name", networks.PRETRAINED)
def test_a_network_of_the_package_stylises(name):
    """Measured: differences of 0.40 to 0.41, spectral peaks of 0.57 to 1.08, borders of 1.00 to 1.12."""
    folder, config = networks.opened(name)
    trained = training.open_run(config, folder)
    photo, stylize = images.resize_longest(data.read_image(Path("astronaut")), 128), Stylizer(trained, make_mesh(1))
    for k, style in enumerate(trained.styles):
        made = stylize(photo, stylize.only(k))
        assert made.shape == photo.shape == (128, 128, 3), style
        assert np.abs(made - photo).mean() > 0.3, style
        assert spectral_peak([made]) < 1.5, style
        assert 0.8 < border_contrast([made]) / border_contrast([photo]) < 1.3, style
