"""Tests run on four CPU devices, so that every mesh code path is exercised on a laptop."""

import gc
import os
import signal
import subprocess
from pathlib import Path

import jax
import pytest

from lib import process, shard

# Most of the time of these tests is compilation: a lighter one, also in the processes that they start, whose results
# are compared with those of this one to the bit.
_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_experimental_ynn_fusion_type="
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("NPROC", "8")  # see lib.shard.start
jax.config.update("jax_num_cpu_devices", 4)
# Traces are millions of objects that live to the end: looking through all of them again and again is time lost.
gc.set_threshold(200_000, 50, 100)

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
if _SHARED.is_dir():
    os.environ.setdefault("GRADIENT_FIELDS_DATA", str(_SHARED))


@pytest.fixture
def in_process(monkeypatch, capsys):
    """`call = in_process(main, folder)`: call("train ...") runs a command there, in this process, where JAX has started
    long ago; it returns exit code, stdout and stderr."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(shard, "start", lambda devices=None, convolutions=True: None)

    def in_process(main, folder):
        monkeypatch.chdir(folder)

        def call(line):
            capsys.readouterr()
            code = process.command(main, line.split())
            return code, *capsys.readouterr()

        return call

    yield in_process
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data; tests that need it are skipped where it is absent."""
    root = os.environ.get("GRADIENT_FIELDS_DATA")
    if not root:
        pytest.skip("GRADIENT_FIELDS_DATA is not set: no real data here")
    return Path(root)


@pytest.fixture
def tiny_disk(request, tmp_path):
    """A real file system of 1 MiB, or of as many as an indirect parameter says."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tiny file system needs root")
    path = tmp_path / "disk"
    path.mkdir()
    size = f"size={getattr(request, 'param', 1)}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    yield path
    subprocess.run(["umount", path], check=True, timeout=30)
