"""`python -m lib.features convert FILE OUT.safetensors`: weight files of other frameworks, made ours.

FILE may be pytorch-fid's or torch-fidelity's Inception, torchvision's VGG-16 or VGG-19 (a PyTorch file, read with
weights_only, or safetensors), or Keras' VGG-16 or VGG-19 (.h5, or .npz with an array per weight name).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lib.features import inception, vgg, weights
from lib.process import UserError

Arrays = Mapping[str, np.ndarray]

_KERAS_NAME = re.compile(r"block(\d)_conv(\d)(?:/|_)(?:.*[/_])?(kernel|bias|W|b)(?:_1)?(?::0)?$")
_KINDS = "pytorch-fid's or torch-fidelity's Inception, torchvision's or Keras' VGG-16 or VGG-19"
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_EXTRA = 'pip install -e ".[convert]"'


def convert(state: Arrays, source: Path | str) -> tuple[str, dict[str, np.ndarray]]:
    """(name of the network, its weights as ours) out of the weights of another framework, by their names.

    Raises UserError for those of any other network, with the array that does not fit.
    """
    if "Mixed_7c.branch_pool.conv.weight" in state:
        return "inception", from_pytorch_inception(state, source)
    if "features.0.weight" in state:
        return from_torchvision_vgg(state, source)
    if "conv1_1/kernel" in state and "mean" not in state:  # Caffe's weights under our names
        vgg.check(state, source)
        return f"vgg{vgg.depth_of(weights.nested(state)) or 19}", vgg.from_caffe(state)
    if any(_KERAS_NAME.search(name) for name in state):
        return from_keras_vgg(state, source)
    raise UserError(f"{source} holds none of the networks known here: {_KINDS}")


def from_pytorch_inception(
    state: Arrays, source: Path | str, eps: float = inception.BATCH_NORM_EPS
) -> dict[str, np.ndarray]:
    """Folds the batch normalisation into kernel and bias; [out, in, h, w] becomes [h, w, in, out]."""
    out = {}
    for name in inception.shapes():
        layer, _, kind = name.partition("/")
        if kind == "kernel" and layer != "fc":
            kernel = _get(state, f"{layer}.conv.weight", source).astype(np.float64)
            norm = [_get(state, f"{layer}.bn.{part}", source) for part in _BATCH_NORM]
            gamma, beta, mean, var = (part.astype(np.float64) for part in norm)
            if kernel.ndim != 4 or any(part.shape != kernel.shape[:1] for part in norm):
                raise UserError(f"{source}: {layer}.conv.weight and its batch normalisation do not fit")
            scale = gamma / np.sqrt(var + eps)
            out[name] = np.float32(kernel.transpose(2, 3, 1, 0) * scale)
            out[f"{layer}/bias"] = np.float32(beta - mean * scale)
    out["fc/kernel"] = _get(state, "fc.weight", source).T
    out["fc_bias"] = _get(state, "fc.bias", source)
    weights.check(out, inception.shapes(), source)
    return out


def from_torchvision_vgg(state: Arrays, source: Path | str) -> tuple[str, dict[str, np.ndarray]]:
    """torchvision numbers convolutions, ReLUs and pools through; the classifier is left out."""
    last = max(int(name.split(".")[1]) for name in state if re.fullmatch(r"features\.\d+\.weight", name))
    depth = {28: 16, 34: 19}.get(last)
    if depth is None or "features.1.weight" in state:
        raise UserError(f"{source} is a VGG, but neither VGG-16 nor VGG-19 without batch normalisation")
    out = {}
    for i, name in enumerate(vgg.layer_names(depth)):
        if name.startswith("conv"):
            kernel = _get(state, f"features.{i}.weight", source)
            if kernel.ndim != 4:
                raise UserError(f"{source}: features.{i}.weight is not the kernel of a convolution")
            out[f"{name}/kernel"] = kernel.transpose(2, 3, 1, 0)
            out[f"{name}/bias"] = _get(state, f"features.{i}.bias", source)
    vgg.check(out, source)
    return f"vgg{depth}", vgg.from_torchvision(out)


def from_keras_vgg(state: Arrays, source: Path | str) -> tuple[str, dict[str, np.ndarray]]:
    """Keras' names are block1_conv1/kernel:0, block1_conv1_W_1:0 or the like; the classifier is left out."""
    out = {}
    for name, array in state.items():
        found = _KERAS_NAME.search(name)
        if found:
            kind = "kernel" if found[3] in ("kernel", "W") else "bias"
            out[f"conv{found[1]}_{found[2]}/{kind}"] = np.asarray(array)
    vgg.check(out, source)
    depth = vgg.depth_of({name.split("/")[0]: None for name in out})
    return f"vgg{depth or 19}", vgg.from_caffe(out)


def _get(state: Arrays, name: str, source: Path | str) -> np.ndarray:
    if name not in state:
        raise UserError(f"{source}: {name} is missing")
    return np.asarray(state[name])


def read_state(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a weight file of another framework, by their names there.

    Raises UserError where the file is missing, damaged, or what reads it is not installed.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    if head == b"\x89HDF\r\n\x1a\n":
        return _read_hdf5(path)
    if path.suffix == weights.SUFFIX or _is_npz(path):
        return weights.read(path).arrays
    return _read_pytorch(path)


def _is_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _read_pytorch(path: Path) -> dict[str, np.ndarray]:
    import pickle

    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"reading {path.name} needs PyTorch: {_EXTRA}") from None
    try:
        # weights_only: nothing in the file is executed.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a PyTorch file of plain weights: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict but a {type(state).__name__}")
    return {name: value.float().numpy() for name, value in state.items() if isinstance(value, torch.Tensor)}


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"reading {path.name} needs h5py: {_EXTRA}") from None
    arrays = {}

    def collect(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = np.asarray(item)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(collect)
    except OSError as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    return arrays


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2 or any(word.startswith("-") for word in argv):
        raise UserError(f"usage: python -m lib.features convert FILE OUT{weights.SUFFIX}; FILE is {_KINDS}")
    source, out = Path(argv[0]), Path(argv[1])
    if out.suffix != weights.SUFFIX:
        raise UserError(f"{out}: the converted file must end in {weights.SUFFIX}")
    name, arrays = convert(read_state(source), source)
    print(f"{out}: {name}, SHA-256 {weights.write(out, arrays)}")
