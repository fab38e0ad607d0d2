"""Figures: arrays in, PNG files out. One look for all packages; never touches a model or a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart under all common colour-vision deficiencies.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

plt.rcParams.update(
    {
        "figure.dpi": 120,
        "savefig.dpi": 120,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
    }
)


def panels(rows: int, columns: int, *, width: float = 3.4, height: float = 3.0, **options: Any) -> tuple[Figure, Any]:
    """A figure of `rows` x `columns` axes (always a 2-D array of them); sizes in inches per panel."""
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)


def save(figure: Figure, path: Path) -> Path:
    """Writes the PNG and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def curves(path: Path, series: dict[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str) -> Path:
    """Lines `{label: (x values, y values)}` on a logarithmic y axis."""
    figure, axes = panels(1, 1, width=6.5, height=3.2)
    ax = axes[0, 0]
    for i, (label, (xs, ys)) in enumerate(series.items()):
        ax.semilogy(xs, ys, label=label, color=COLORS[i % len(COLORS)])
    ax.set(xlabel=x, ylabel=y)
    ax.legend()
    return save(figure, path)


def image_rows(path: Path, rows: dict[str, np.ndarray], *, columns: Sequence[str] = ()) -> Path:
    """Rows of small grey images: `{label: [n, h, w] in [0, 1]}`, with optional captions over the columns."""
    count = max(len(images) for images in rows.values())
    figure, axes = panels(len(rows), count, width=0.8, height=0.85)
    for axes_row, (label, images) in zip(axes, rows.items(), strict=True):
        for i, ax in enumerate(axes_row):
            ax.set_axis_off()
            if i < len(images):
                ax.imshow(images[i], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes_row[0].set_axis_on()
        axes_row[0].set(xticks=[], yticks=[])
        axes_row[0].grid(False)
        axes_row[0].spines[:].set_visible(False)
        axes_row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for ax, caption in zip(axes[0], columns, strict=False):
        ax.set_title(caption, fontsize=7, fontweight="normal")
    return save(figure, path)
