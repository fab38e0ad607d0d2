"""Tests run on four CPU devices, so that every mesh code path is exercised on a laptop."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
if _SHARED.is_dir():
    os.environ.setdefault("GRADIENT_FIELDS_DATA", str(_SHARED))


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data; tests that need it are skipped where it is absent."""
    root = os.environ.get("GRADIENT_FIELDS_DATA")
    if not root:
        pytest.skip("GRADIENT_FIELDS_DATA is not set: no real data here")
    return Path(root)
