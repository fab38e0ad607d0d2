"""VGG-16, VGG-19 (Simonyan and Zisserman, 2014) and a small VGG-9 as layers by name, for perceptual losses.

Layers are conv1_1, relu1_1, conv1_2, relu1_2, pool1, conv2_1, ... Images are RGB in [-1, 1] whatever the weights come
from: scale and channel order of their own preprocessing are folded into conv1_1, and the mean that is subtracted
before the zero padding is kept as `mean`. Activations therefore are those of the original network: with Caffe's
weights (pixels 0..255 less the mean) in the hundreds, with torchvision's (standardised pixels) near one.

The VGG-9 comes with the package, for those who have no published weights: a classifier of CIFAR-10 (kind "vgg" of
lib/features/classifier.py) with its batch norm folded into the convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib import conv, winograd
from lib.data import DATA_VARIABLE, data_folder
from lib.features import classifier, weights
from lib.process import UserError

Pooling = Literal["max", "average"]

WIDTHS = (64, 128, 256, 512, 512)
"""channels per block of the published networks; those of a VGG-9 are what its weights say"""
CONVOLUTIONS = {9: (2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""per block, by the number of layers with weights (the last three, of VGG-9 one, are the classifier's, not here)"""
EMBEDDED = "cifar10_vgg"
_WINOGRAD = "winograd"  # key of a layer's kernel in that basis
_WIDE, _MANY_PIXELS = 64 * 128, 256  # channels in times out, and pixels, from which on it is faster
PARTIAL_FILE = "vgg19_conv1_1_to_conv3_4.npz"

# Of pixels in [-1, 1], RGB: the means of ImageNet that Caffe and torchvision subtract.
_CAFFE_MEAN = np.array([123.68, 116.779, 103.939]) / 127.5 - 1
_TORCHVISION_MEAN = 2 * np.array([0.485, 0.456, 0.406]) - 1
_TORCHVISION_STD = 2 * np.array([0.229, 0.224, 0.225])


class NoWeights(UserError):
    """Neither the cache nor the data folder has the weights that were asked for."""


class VGG(NamedTuple):
    """Weights, perhaps of the first layers only, and where they come from."""

    params: dict[str, Any]
    weights_sha256: str
    pooling: Pooling = "max"
    """what they were trained with"""

    @property
    def layers(self) -> list[str]:
        """The layers that there are weights for, in order."""
        return available(self.params)


def layer_names(depth: int) -> list[str]:
    """All layers of VGG-9, VGG-16 or VGG-19 in order."""
    names = []
    for block, count in enumerate(CONVOLUTIONS[depth], 1):
        for i in range(1, count + 1):
            names += [f"conv{block}_{i}", f"relu{block}_{i}"]
        names.append(f"pool{block}")
    return names


def depth_of(params: Mapping[str, Any]) -> int | None:
    """9, 16 or 19; None for weights that end before the networks differ."""
    if "conv3_4" in params:
        return 19
    if "conv4_1" not in params:
        return None
    return 9 if {"conv3_3", "conv4_3", "conv5_1"}.isdisjoint(params) else 16


def available(params: Mapping[str, Any]) -> list[str]:
    """The layers that these weights reach, in order: up to the first convolution that is missing."""
    depth = depth_of(params)
    reached = []
    for name in layer_names(depth or 19):
        if name.startswith("conv") and name not in params:
            break
        reached.append(name)
    return reached


def prepared(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` for many calls of `apply` with the same weights: on the CPU wide kernels also as Winograd's algorithm
    takes them, eight times the memory. Elsewhere, and where they are narrow, as they were; so are those of a VGG-9,
    whose programs would be compiled for longer than they run.
    """
    if jax.default_backend() != "cpu" or depth_of(params) == 9:
        return dict(params)
    out = dict(params)
    for name in available(params):
        if name.startswith("conv") and math.prod(np.shape(params[name]["kernel"])[2:]) >= _WIDE:
            out[name] = {**params[name], _WINOGRAD: winograd.transform(params[name]["kernel"])}
    return out


def _convolution(x: jax.Array, layer: Mapping[str, Any]) -> jax.Array:
    """3x3, stride 1, zero padding."""
    if _WINOGRAD in layer and math.prod(x.shape[:3]) >= _MANY_PIXELS:
        return winograd.conv(x, layer[_WINOGRAD]) + layer["bias"]
    order = ("NHWC", "HWIO", "NHWC")
    return conv.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=order) + layer["bias"]


def pool(x: jax.Array, pooling: Pooling) -> jax.Array:
    """2x2, stride 2: [b, h, w, c] -> [b, h // 2, w // 2, c]; an odd last row or column is dropped."""
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    corners = [x[:, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1)]
    if pooling == "average":
        return sum(corners[1:], corners[0]) / 4
    return jnp.maximum(jnp.maximum(corners[0], corners[1]), jnp.maximum(corners[2], corners[3]))


def apply(
    params: Mapping[str, Any], x: jax.Array, layers: Sequence[str], *, pooling: Pooling = "max"
) -> dict[str, jax.Array]:
    """Activations {layer: [b, h', w', c]} of images `x`, float [b, h, w, 3] RGB in [-1, 1] (values beyond pass).

    Pure, and its gradient stays on the fast path inside loops on a CPU. Nothing after the deepest of `layers` is
    computed. Raises UserError for a layer that does not exist or that the weights do not reach, and for images that
    are too small to be pooled as often as that layer needs.
    """
    names = available(params)
    for layer in layers:
        _check_layer(layer, names, depth_of(params))
    names = names[: 1 + max((names.index(layer) for layer in layers), default=-1)]
    pools = sum(name.startswith("pool") for name in names)
    if min(x.shape[1:3]) < 2**pools:
        raise UserError(f"images of {x.shape[1]} x {x.shape[2]} pixels are too small for {names[-1]}")
    x, found = x - params["mean"], {}
    for name in names:
        if name.startswith("conv"):
            x = _convolution(x, params[name])
        elif name.startswith("relu"):
            x = jax.nn.relu(x)
        else:
            x = pool(x, pooling)
        found[name] = x
    return {layer: found[layer] for layer in layers}


def _check_layer(layer: str, names: list[str], depth: int | None) -> None:
    if layer in names:
        return
    if layer not in layer_names(depth or 19):
        raise UserError(f"VGG-{depth or 19} has no layer {layer!r}; there are {', '.join(names)}")
    relus = [name for name in names if name.startswith("relu")]
    raise UserError(f"these weights end before {layer}: the deepest layer available is {relus[-1]} (then {names[-1]})")


def from_caffe(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights for BGR pixels 0..255 less the mean (Caffe's and Keras' own), as ours; names as `apply` has them."""
    return _fold(arrays, _CAFFE_MEAN, np.full(3, 127.5), slice(None, None, -1))


def from_torchvision(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights for standardised RGB pixels (torchvision's), as ours; names as `apply` has them."""
    return _fold(arrays, _TORCHVISION_MEAN, 1 / _TORCHVISION_STD, slice(None))


def _fold(arrays: Mapping[str, np.ndarray], mean: np.ndarray, scale: np.ndarray, order: slice) -> dict[str, np.ndarray]:
    kernel = np.asarray(arrays["conv1_1/kernel"], np.float64)[:, :, order] * scale[:, None]
    return {**arrays, "mean": np.float32(mean), "conv1_1/kernel": np.float32(kernel)}


def check(arrays: Mapping[str, np.ndarray], source: Path | str) -> None:
    """Raises UserError that names the first array which does not belong into (a beginning of) VGG-9, -16 or -19.

    Widths are those of the published networks, but of VGG-9 any. Only the published ones may lack a mean (Caffe's).
    """
    convolutions = {name.split("/")[0] for name in arrays if "/" in name} | {"conv1_1"}
    depth = depth_of(dict.fromkeys(convolutions))
    expected: dict[str, tuple[int, ...]] = {"mean": (3,)} if "mean" in arrays or depth == 9 else {}
    c = 3
    for name in layer_names(depth or 19):
        if not name.startswith("conv") or not convolutions:
            continue
        convolutions.discard(name)
        block = int(name[4])
        width = np.size(arrays.get(f"conv{block}_1/bias", ())) if depth == 9 else WIDTHS[block - 1]
        expected |= {f"{name}/kernel": (3, 3, c, width), f"{name}/bias": (width,)}
        c = width
    weights.check(arrays, expected, source)


def load(path: Path) -> VGG:
    """The weights in a converted file, in an .npz of Caffe's weights in Keras layout ("conv1_1/kernel", ...), or in
    the file of a classifier of kind "vgg".

    Raises UserError where the file is missing or none of these.
    """
    if _is_classifier(path):
        return from_classifier(path)
    found = weights.read(path)
    check(found.arrays, path)
    arrays = found.arrays if "mean" in found.arrays else from_caffe(found.arrays)
    params = weights.nested(arrays)
    return VGG(params, found.sha256, "average" if depth_of(params) == 9 else "max")


def _is_classifier(path: Path) -> bool:
    try:
        classifier.read_design(path)
    except UserError:
        return False
    return True


def from_classifier(path: Path) -> VGG:
    """The convolutions of a small classifier of kind "vgg", batch norm and scale of the pixels folded in.

    Images of any size, average pools. Raises UserError where the file is missing or holds another network.
    """
    net, design = classifier.read(path), classifier.read_design(path)
    if design.kind != "vgg" or design.channels != 3 or len(design.widths) > len(CONVOLUTIONS[9]):
        raise UserError(f"{path} holds another classifier than a VGG-9 of RGB images")
    learned, statistics = net.params["params"], net.params["statistics"]
    params: dict[str, Any] = {"mean": np.full(3, design.zero / 127.5 - 1, np.float32)}
    for name in learned:
        if name.startswith("conv"):
            norm = name.replace("conv", "norm")
            mean, variance = (np.asarray(statistics[norm][part], np.float64) for part in ("mean", "variance"))
            gain = learned[norm]["scale"] / np.sqrt(variance + classifier.EPSILON)
            scale = 127.5 / classifier.PIXEL_SCALE if name == "conv1_1" else 1.0
            kernel, bias = learned[name]["kernel"] * (scale * gain), learned[norm]["bias"] - mean * gain
            params[name] = {"kernel": np.float32(kernel), "bias": np.float32(bias)}
    return VGG(params, net.weights_sha256, "average")


def load_embedded() -> VGG:
    """The VGG-9 that comes with the package."""
    return from_classifier(classifier.FOLDER / f"{EMBEDDED}{weights.SUFFIX}")


def load_default(name: Literal["vgg16", "vgg19"] = "vgg19") -> VGG:
    """The converted weights in the cache folder; failing those, for VGG-19, the partial file among the data.

    Raises NoWeights where there are neither, with what to do about it; UserError where the file is damaged.
    """
    path = weights.cached(name)
    if path.exists():
        return load(path)
    if name == "vgg19":
        try:
            partial = data_folder("weights", PARTIAL_FILE)
        except UserError:
            pass
        else:
            return load(partial)
    also = f", or set {DATA_VARIABLE} to a folder with weights/{PARTIAL_FILE}" if name == "vgg19" else ""
    raise NoWeights(
        f"{path} is missing: `python -m lib.features get {name}` downloads the published weights, `python -m "
        f"lib.features convert FILE {path}` makes this file of them{also}"
    )
