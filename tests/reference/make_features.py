"""Makes features.npz: what PyTorch's networks say about random weights and images, for tests/test_features_*.py.

    pip install torch==2.13.0 && pip install --no-deps pytorch-fid==0.3.0 torch-fidelity==0.4.0
    PYTHONPATH=.:tests python tests/reference/make_features.py

Weights and images come from tests/feature_cases.py. Both packages want torchvision, whose Inception pytorch-fid builds
on: a stand-in with the blocks of torch-fidelity (same names, same shapes) takes its place, and pytorch-fid's own
forward passes are patched in by pytorch-fid itself. With GRADIENT_FIELDS_DATA set, the real partial VGG-19 is measured
as well.
"""

import importlib.machinery
import os
import sys
import types
from pathlib import Path

import feature_cases as cases
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lib.features import vgg

OUT = Path(__file__).with_name("features.npz")
STAND_INS = ("datasets", "models", "models.inception", "transforms", "transforms.functional")
RESIZED = ((400, 350), (20, 33))
VGG_LAYERS = {depth: [name for name in vgg.layer_names(depth) if not name.startswith("conv")] for depth in (16, 19)}
PARTIAL_LAYERS = ("relu1_1", "relu1_2", "relu2_1", "relu2_2", "relu3_1", "relu3_4", "pool3")


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def stand_in_for_torchvision() -> None:
    """Enough of torchvision for both packages to be imported."""
    root = "torchvision"
    for name in (root, *(f"{root}.{part}" for part in STAND_INS)):
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    sys.modules[root].__version__ = "0"
    for dataset in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(sys.modules[f"{root}.datasets"], dataset, object)


def inceptions(state: dict[str, torch.Tensor]) -> tuple[nn.Module, nn.Module]:
    """(torch-fidelity's network, pytorch-fid's) with these weights."""
    stand_in_for_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    fidelity.load_state_dict_from_url = lambda *args, **kwargs: state
    features = ["2048", "logits_unbiased", "logits"]
    one = fidelity.FeatureExtractorInceptionV3("inception", features)

    blocks = sys.modules["torchvision.models.inception"]
    blocks.InceptionA, blocks.InceptionC, blocks.InceptionE = (
        fidelity.InceptionA, fidelity.InceptionC, fidelity.InceptionE_1,
    )  # fmt: skip
    # The network that pytorch-fid takes from torchvision: the blocks that it does not replace are all of it.
    sys.modules["torchvision.models"].inception_v3 = lambda **kwargs: fidelity.FeatureExtractorInceptionV3(
        "inception", features
    )
    from pytorch_fid import inception as pytorch_fid

    pytorch_fid.load_state_dict_from_url = lambda *args, **kwargs: state
    return one, pytorch_fid.InceptionV3([3]).eval()


def measure_inception() -> dict[str, np.ndarray]:
    state = {name: torch.from_numpy(array) for name, array in cases.inception_state().items()}
    fidelity, pytorch_fid = inceptions(state)
    images = tensor(cases.images(32, 32))
    pool, unbiased, logits = fidelity(images)
    out = {"inception.pool": pool, "inception.logits_unbiased": unbiased, "inception.logits": logits}
    out["inception.pytorch_fid.pool"] = pytorch_fid(images.float() / 255)[0][:, :, 0, 0]

    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    for h, w in RESIZED:
        x = tensor(cases.images(h, w)).float()
        tensorflow1 = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
        half_pixel = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        for name, y in (("tensorflow1", tensorflow1), ("half_pixel", half_pixel)):
            out[f"resize.{name}.{h}x{w}"] = sampled(f"{h}x{w}", y)
    return {name: value.numpy() for name, value in out.items()}


def sampled(name: str, activation: torch.Tensor) -> torch.Tensor:
    flat = activation.movedim(1, -1).flatten()
    return flat[torch.from_numpy(cases.positions(name, flat.numel()))]


def torch_vgg(depth: int, average: bool) -> nn.Sequential:
    """The `features` of torchvision's VGG: convolutions, ReLUs and pools numbered through."""
    layers, inputs = [], 3
    for width, count in zip(vgg.WIDTHS, vgg.CONVOLUTIONS[depth], strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.AvgPool2d(2, 2) if average else nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def activations(net: nn.Sequential, names: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = {}
    for name, layer in zip(names, net, strict=True):
        out[name] = x = layer(x)
    return out


def measure_vgg() -> dict[str, np.ndarray]:
    out = {}
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for depth in (16, 19):
        state = cases.vgg_state(depth)
        net = torch_vgg(depth, average=depth == 16)
        net.load_state_dict({name.removeprefix("features."): torch.from_numpy(a) for name, a in state.items()})
        x = (tensor(cases.images(cases.VGG_SIZE_PX, cases.VGG_SIZE_PX)).float() / 255 - mean) / std
        found = activations(net, vgg.layer_names(depth), x)
        for name in VGG_LAYERS[depth]:
            out[f"vgg{depth}.{name}"] = sampled(f"vgg{depth}.{name}", found[name]).numpy()
    return out


def measure_partial(folder: Path) -> dict[str, np.ndarray]:
    """The real weights, conv1_1 to conv3_4, Caffe's preprocessing; and a gradient to the pixels (scaled to [-1, 1]).

    The gradient is taken in float64, since rounding turns a few ReLUs.
    """
    found, _ = partial_vgg(folder, torch.float32)
    out = {f"partial.{name}": sampled(f"partial.{name}", found[name]).detach().numpy() for name in PARTIAL_LAYERS}
    found, pixels = partial_vgg(folder, torch.float64)
    (found["relu3_3"] ** 2).mean().backward()
    out["partial.gradient"] = sampled("partial.gradient", pixels.grad * 127.5).float().numpy()
    return out


def partial_vgg(folder: Path, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(activations, the pixels 0..255 that they are of)."""
    names = vgg.layer_names(19)
    names = names[: names.index("pool3") + 1]
    net = torch_vgg(19, average=False)[: len(names)].to(dtype)
    with np.load(folder / "weights" / vgg.PARTIAL_FILE) as arrays:
        for name, layer in zip(names, net, strict=True):
            if name.startswith("conv"):
                kernel = torch.from_numpy(arrays[f"{name}/kernel"].transpose(3, 2, 0, 1).copy())
                layer.load_state_dict({"weight": kernel, "bias": torch.from_numpy(arrays[f"{name}/bias"])})
    pixels = tensor(cases.images(40, 48)).to(dtype).requires_grad_()
    bgr = pixels.flip(1) - torch.tensor([103.939, 116.779, 123.68], dtype=dtype)[:, None, None]
    return activations(net, names, bgr), pixels


def main() -> None:
    with torch.no_grad():
        out = measure_inception() | measure_vgg()
    root = os.environ.get("GRADIENT_FIELDS_DATA")
    if root:
        out |= measure_partial(Path(root))
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {len(out)} arrays, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
