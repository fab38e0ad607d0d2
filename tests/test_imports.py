"""Who may import whom: hnn | ncsn | stylize | gan -> lib <- launch, and lib none of them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("hnn", "ncsn", "stylize", "gan")
OURS = {*MODELS, "lib", "launch"}
MAY_IMPORT = {name: {name, "lib"} for name in MODELS} | {"lib": {"lib"}, "launch": {"launch", "lib"}}
PACKAGES = [name for name in MAY_IMPORT if (ROOT / name).is_dir()]
TORCH_ALLOWED = (Path("launch", "bench"), Path("lib", "features", "convert.py"))


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, top-level name) of every import in `source`, at any depth; `import_module` counts too."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name.split(".")[0]
            case ast.ImportFrom(module=module, level=level):
                yield node.lineno, package if level else str(module).split(".")[0]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name.split(".")[0] or package


def violations(root: Path) -> list[str]:
    """`file:line imports name` for every import under `root` that the rules forbid."""
    found = []
    for package, allowed in MAY_IMPORT.items():
        for path in sorted((root / package).rglob("*.py")):
            relative = path.relative_to(root)
            forbidden = (OURS - allowed) | {"tensorflow"}
            if not any(relative.is_relative_to(allowed_path) for allowed_path in TORCH_ALLOWED):
                forbidden |= {"torch"}
            for line, name in imported(path.read_text(encoding="utf-8"), package):
                if name in forbidden:
                    found.append(f"{relative}:{line} imports {name}")
    return found


def test_layers():
    assert {"lib", "launch", "hnn"} <= set(PACKAGES)
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "name"),
    [
        ("hnn/a.py", "import gan.model", "gan"),
        ("hnn/deep/a.py", "def f():\n    from ncsn import noise", "ncsn"),
        ("gan/a.py", "from launch.local import run", "launch"),
        ("lib/a.py", "import os, hnn", "hnn"),
        ("lib/a.py", "import importlib\nimportlib.import_module('stylize.vgg')", "stylize"),
        ("launch/a.py", "import hnn.systems as systems", "hnn"),
        ("lib/a.py", "import tensorflow as tf", "tensorflow"),
        ("hnn/a.py", "from torch import nn", "torch"),
        ("launch/a.py", "import torch", "torch"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, source, name):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == [f"{path}:{len(source.splitlines())} imports {name}"]


def test_what_is_allowed_is_not_reported(tmp_path):
    for path, source in {
        "hnn/a.py": "import lib.run\nfrom hnn import systems\nfrom . import b\nimport tensorflow_datasets",
        "lib/a.py": "from lib import run\nfrom .run import UserError",
        "launch/bench/a.py": "import torch\nfrom lib import conv",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    assert violations(tmp_path) == []
