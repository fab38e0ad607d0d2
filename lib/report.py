"""One self-contained HTML page per run: it can be mailed, and opens without a network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from lib.run import RunFolder, write_text

_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:1080px;margin:2.5rem auto;
padding:0 1.2rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.4rem 0 .6rem;
border-bottom:1px solid #d8dee4;padding-bottom:.25rem}p{max-width:46rem}.lead{color:#57606a;font-size:1.05rem}
table{border-collapse:collapse;font-size:.87rem;margin:.6rem 0 1rem;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}th,td{padding:.3rem .75rem;text-align:right;border-bottom:1px solid #eaeef2;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #57606a;font-weight:600}
td.best{font-weight:700;color:#0b5cad}figure{margin:1rem 0 1.6rem}img{max-width:100%;height:auto}
figcaption{color:#57606a;font-size:.87rem;max-width:46rem}pre{background:#f6f8fa;padding:.8rem 1rem;overflow-x:auto;
font-size:.82rem;border-radius:6px}details{margin:.6rem 0}summary{cursor:pointer}
"""


class Page:
    """Sections in the order they are added; `write` makes the file."""

    def __init__(self, title: str, lead: str):
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str, *, summary: str | None = None) -> None:
        """Preformatted text, folded away behind `summary` where there is one."""
        block = f"<pre>{html.escape(text)}</pre>"
        if summary:
            block = f"<details><summary>{html.escape(summary)}</summary>{block}</details>"
        self._parts.append(block)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, best: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Cells are text, the first column names the row; `best` lists (row, column) to be set in bold."""
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        marked = set(best)

        def cell(i: int, j: int, value: str) -> str:
            return f"<td{' class=best' if (i, j) in marked else ''}>{html.escape(value)}</td>"

        body = "".join(
            "<tr>" + "".join(cell(i, j, value) for j, value in enumerate(row)) + "</tr>" for i, row in enumerate(rows)
        )
        self._parts.append(f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")

    def figure(self, path: Path, caption: str) -> None:
        """The picture itself goes into the page."""
        data = base64.b64encode(path.read_bytes()).decode()
        mime = "image/gif" if path.suffix == ".gif" else "image/png"
        text = html.escape(caption)
        self._parts.append(
            f'<figure><img src="data:{mime};base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )

    def numbers(self, numbers: dict[str, float], protocol: str) -> None:
        """The section of a run's numbers, called as `metric_table` has them, and of how they were taken."""
        self.heading("Numbers")
        self.table(*metric_table(numbers))
        self.text(protocol)

    def pictures(self, pictures: Sequence[tuple[Path, str]]) -> None:
        """The section of (file, caption) of a run's pictures."""
        self.heading("Pictures")
        for path, caption in pictures:
            self.figure(path, caption)

    def repeat(self, package: str, folder: RunFolder, numbers: dict[str, float]) -> None:
        """How the run of a package is repeated: the command, the configuration, the environment and all numbers."""
        self.heading("How to repeat it")
        self.code(f"python -m {package} train --config {folder.path.name}/config.json --out NEW_FOLDER")
        self.records(folder, numbers)

    def records(self, folder: RunFolder, numbers: dict[str, float]) -> None:
        """What a run folder holds as JSON, each folded away."""
        for name, summary in (("config", "configuration"), ("environment", "environment")):
            self.code((folder.path / f"{name}.json").read_text(encoding="utf-8"), summary=summary)
        self.code(json.dumps(numbers, indent=2), summary="all numbers")

    def write(self, path: Path) -> Path:
        return _write(path, self._title, "\n".join(self._parts))


_BODY, _END = "</style></head><body>", "</body></html>\n"


def _write(path: Path, title: str, body: str) -> Path:
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}"
    )
    write_text(path, head + _BODY + body + _END)
    return path


def join(pages: Sequence[Path], out: Path, *, title: str) -> Path:
    """One page of several that `Page.write` made, one below the other."""
    bodies = [path.read_text(encoding="utf-8").split(_BODY, 1)[1].removesuffix(_END) for path in pages]
    return _write(out, title, "\n<hr>\n".join(bodies))


def number(value: float | None, sd: float | None = None) -> str:
    """`1.23e-04 ± 5.6e-05`; a value that is not finite is said to have diverged."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return "diverged"
    text = _short(value, 3)
    return text if sd is None or sd != sd else f"{text} ± {_short(sd, 2)}"


def _short(value: float, digits: int) -> str:
    plain = value == 0 or 1e-2 <= abs(value) < 10**digits
    return f"{value:.{digits}g}" if plain else f"{value:.{digits - 1}e}"


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for a terminal."""
    widths = [max(len(str(row[j])) for row in [columns, *rows]) for j in range(len(columns))]
    lines = [
        "  ".join(
            str(cell).ljust(w) if j == 0 else str(cell).rjust(w)
            for j, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [columns, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(numbers: dict[str, float], main: Collection[str]) -> str:
    """For a terminal: the columns of `metric_table` whose metric is one of `main`, and the rows that have any."""
    columns, rows = metric_table(numbers)
    keep = [0, *(j for j, c in enumerate(columns) if c.partition(".")[0] in main)]
    rows = [row for row in rows if any(row[j] for j in keep[1:])]
    return text_table([columns[j] for j in keep], [[row[j] for j in keep] for row in rows])


_VARIANTS = ("noisy", "analytic", "per_frame", "input")


def metric_table(numbers: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of numbers called NAME.METRIC, NAME.METRIC.sd, NAME.noisy.METRIC and the like.

    A row per name (and per variant of it), a column per metric.
    """
    found: dict[str, dict[str, float]] = {}
    metrics: list[str] = []
    for key, value in numbers.items():
        name, _, metric = key.partition(".")
        for variant in _VARIANTS:
            if metric.startswith(f"{variant}."):
                name, metric = f"{name}.{variant}", metric.removeprefix(f"{variant}.")
        found.setdefault(name, {})[metric] = value
        if metric not in metrics and not metric.endswith(".sd"):
            metrics.append(metric)
    rows = [
        [name, *(number(row[m], row.get(f"{m}.sd")) if m in row else "" for m in metrics)]
        for name, row in found.items()
    ]
    return ["", *metrics], rows
