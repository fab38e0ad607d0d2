"""The diagram of a model, drawn from its modules: what a change of the network changes, it changes too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from lib import plot

_ROW, _BOX = 0.42, 0.3  # inches


class Part(NamedTuple):
    """One module inside another, or an array of its own: such a one has no inputs, and its shape as outputs."""

    kind: str
    inputs: str
    outputs: str
    parameters: int


def parts(module: nn.Module, *inputs: Any) -> list[Part]:
    """The modules that `module(*inputs)` calls directly, in the order of their calls, then the arrays of its own.

    Computes nothing.
    """
    found: dict[str, tuple[str, str, str]] = {}  # a module that is made of another one in its own place counts once

    def record(call: Any, args: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        outputs = call(*args, **options)
        path = context.module.path
        if context.method_name == "__call__" and len(path) == 1:
            found[path[0]] = type(context.module).__name__, _shape(args[0]), _shape(outputs)
        return outputs

    with nn.intercept_methods(record):
        made = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    params = nn.meta.unbox(made["params"])
    modules = [
        Part(kind, given, outputs, sum(leaf.size for leaf in jax.tree.leaves(params.get(name, {}))))
        for name, (kind, given, outputs) in found.items()
    ]
    own = [Part(name, "", _product(x.shape), x.size) for name, x in params.items() if hasattr(x, "shape")]
    return modules + own


def _shape(x: Any) -> str:
    """Of one example."""
    return _product(x.shape[1:]) if hasattr(x, "shape") else ""


def _product(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def draw(path: Path, columns: Mapping[str, Sequence[Part]]) -> Path:
    """One column per network, from top to bottom: kind, shape in, shape out, number of parameters."""
    rows = max(len(column) for column in columns.values())
    figure, axes = plot.panels(1, len(columns), width=4.2, height=0.5 + _ROW * rows)
    for ax, (title, column) in zip(axes[0], columns.items(), strict=True):
        ax.set(xlim=(0, 1), ylim=(rows * _ROW, 0), title=f"{title}: {sum(p.parameters for p in column):,} parameters")
        ax.set_axis_off()
        for i, part in enumerate(column):
            color = plot.COLORS[sorted({p.kind for p in column}).index(part.kind) % len(plot.COLORS)]
            box = {"boxstyle": "round,pad=0.35", "facecolor": color, "alpha": 0.18, "edgecolor": color}
            shapes = f"{part.inputs} → {part.outputs}" if part.inputs else part.outputs
            text = f"{part.kind}  {shapes}   {part.parameters:,}"
            ax.text(0.5, _ROW * i + _BOX / 2, text, ha="center", va="center", fontsize=8, bbox=box)
            if i and part.inputs:
                ends = {"xy": (0.5, _ROW * i - 0.01), "xytext": (0.5, _ROW * (i - 1) + _BOX + 0.01)}
                ax.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": "0.5", "linewidth": 0.8})
    return plot.save(figure, path)
