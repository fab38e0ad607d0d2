"""The loss network: which weights, and which of their layers are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lib.data import DATA_VARIABLE
from lib.features import vgg
from lib.features.vgg import VGG
from lib.process import UserError
from stylize.config import Perception

_STYLE = {
    "gatys": ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),  # arXiv 1508.06576, section "Methods"
    "johnson": ("relu1_2", "relu2_2", "relu3_3", "relu4_3"),  # arXiv 1603.08155; some sources: content relu3_3
}
_CONTENT = {"gatys": "relu4_2", "johnson": "relu2_2"}
PIXELS = "pixels"
"""the image itself, from black 0 to white 1: its Gram matrix is what the colours have in common"""


@dataclass(frozen=True, eq=False)
class LossNetwork:
    """A VGG and the layers that are compared; each equals itself alone, so that programs are compiled once for it."""

    params: Any
    weights_sha256: str
    style_layers: tuple[str, ...]
    content_layers: tuple[str, ...]
    pooling: vgg.Pooling

    def features(self, params: Any, x: jax.Array, layers: tuple[str, ...]) -> dict[str, jax.Array]:
        """{layer: [b, h', w', c]} of images [b, h, w, 3] in [-1, 1]; `params` are these or a copy of them."""
        deeper = tuple(layer for layer in layers if layer != PIXELS)
        found = vgg.apply(params, x, deeper, pooling=self.pooling) if deeper else {}
        return {**found, PIXELS: (x + 1) / 2} if PIXELS in layers else found

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.style_layers, *self.content_layers)))

    def up_to(self, layers: tuple[str, ...]) -> list[str]:
        """Everything that is computed for these layers, in order."""
        names = vgg.available(self.params)
        return names[: 1 + max((names.index(layer) for layer in layers if layer != PIXELS), default=-1)]

    @staticmethod
    def scale(layer: str) -> int:
        """Pixels per value of a layer."""
        return 1 if layer == PIXELS else 2 ** (int(layer[4]) - 1)

    def channels(self, layer: str) -> int:
        """Of a layer."""
        return 3 if layer == PIXELS else self.params[layer.replace("relu", "conv")]["bias"].shape[0]

    @property
    def stride(self) -> int:
        """Pixels per value of the deepest layer: images must be at least as high and wide."""
        return max(map(self.scale, self.layers))


def load(options: Perception, say: Callable[[str], None] = lambda text: None) -> LossNetwork:
    """The network of `options`: its file, else VGG-19 from the cache or the data folder, else the embedded one.

    `say` hears about the embedded one. Raises UserError for a bad file and for layers that the weights do not have.
    """
    if options.weights is not None:
        found = vgg.load(Path(options.weights))
    else:
        try:
            found = vgg.load_default("vgg19")
        except vgg.NoWeights:
            found = vgg.load_embedded()
            say(
                "no VGG-19 found: the small loss network of the package is used, with less quality; "
                f"`python -m lib.features get vgg19`, --perception.weights FILE or {DATA_VARIABLE} bring VGG"
            )
    style = options.style_layers or _default_style(found, options.layers)
    content = options.content_layers or (_default_content(found, options.layers),)
    network = LossNetwork(vgg.prepared(found.params), found.weights_sha256, style, content, options.pooling)
    possible = [PIXELS, *(layer for layer in found.layers if not layer.startswith("pool"))]
    for layer in network.layers:
        if layer not in possible:
            raise UserError(f"the weights have no layer {layer!r} to compare; there are {', '.join(possible)}")
    return network


def _default_style(found: VGG, whose: str) -> tuple[str, ...]:
    """The published ones that there are; of Gatys et al. also the deepest of all where blocks are missing.

    A network as small as that of the package knows edges but hardly any colours: there the pixels count too.
    """
    style = [layer for layer in _STYLE[whose] if layer in found.layers]
    last = _relus(found)[-1]
    if whose == "gatys" and len(style) < len(_STYLE[whose]) and last not in style:
        style.append(last)
    return (PIXELS, *style) if found.layers == vgg.layer_names(9) else tuple(style)


def _default_content(found: VGG, whose: str) -> str:
    """The published one, or the deepest but one."""
    return _CONTENT[whose] if _CONTENT[whose] in found.layers else _relus(found)[-2]


def _relus(found: VGG) -> list[str]:
    return [layer for layer in found.layers if layer.startswith("relu")]
