"""Where PyTorch computes in the benchmarks' child processes."""

from __future__ import annotations

import torch

from lib.process import UserError


def compute_on(device: str, threads: int) -> None:
    """Tensors are made on "cpu", with so many threads, or on "cuda", with products as precise as JAX has them there.

    Raises UserError where PyTorch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("JAX sees a GPU here and PyTorch does not: nothing to compare")
    torch.set_num_threads(threads)
    torch.set_default_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
