"""Makes ncsn.npz: what NCSN and NCSNv2 in PyTorch say about random weights and images, for tests/test_ncsn_model.py.

    pip install torch==2.13.0
    PYTHONPATH=.:tests python tests/reference/make_ncsn.py

The networks are those of the benchmark, written once more with PyTorch's own layers and nothing of ours, and evaluated
in float64. Weights and images come from tests/ncsn_networks.py.
"""

from pathlib import Path

import ncsn_networks as cases
import numpy as np
import torch

from launch.bench.ncsn_torch_nets import RefineNet, state_dict

OUT = Path(__file__).with_name("ncsn.npz")


def by_name(params: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays by their names, joined by dots."""
    arrays = {}
    for name, value in params.items():
        arrays |= by_name(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return arrays


def main() -> None:
    x = torch.from_numpy(cases.images()).permute(0, 3, 1, 2).double()
    sigma = torch.from_numpy(cases.SIGMA).double()[:, None, None, None]
    out = {}
    with torch.no_grad():
        for name, model in cases.refinenets().items():
            levels = len(cases.SIGMAS) if name == "v1" else None
            net = RefineNet(cases.SHAPE[-1], cases.NGF, levels)
            net.load_state_dict(state_dict(by_name(cases.random_params(model)["params"])))
            score = net.double()(x, torch.from_numpy(cases.LEVEL) if name == "v1" else None)
            out[name] = (score if name == "v1" else score / sigma).permute(0, 2, 3, 1).float().numpy()
    np.savez_compressed(OUT, **out)
    print({name: (array.shape, float(array.std())) for name, array in out.items()}, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
