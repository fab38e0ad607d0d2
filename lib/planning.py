"""`python -m PACKAGE plan PRESET --devices 256 --hosts 32`: what a training costs on devices that are not here.

The training step is compiled for a virtual mesh of that size, and read: bytes of each collective, memory and
operations of a device. What accelerators can do is the user's to say, for the time of a step to be predicted:

    python -m ncsn plan cifar10_edm --devices 256 --hosts 32 --accelerators A:2e14:4e11:5e10 B:1e14:6e11:2.5e10

Options of the training follow `--`, e.g. `-- --optim.batch-size 4096`. Nothing is computed, and no data are needed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lib.config import parse, to_json
from lib.process import UserError
from lib.report import Page, text_table
from lib.run import write_json

if TYPE_CHECKING:
    from lib.plan import Cost, Machine, Outline

_COLUMNS = ["accelerator", "step", "examples/s", "of ideal"]
_PARTS = ("FLOPS", "LINK", "NETWORK", "LATENCY")


@dataclass(frozen=True)
class Plan:
    """What a step of a preset costs on a mesh that is not here."""

    preset: Annotated[str, tyro.conf.Positional]
    """of the trainings"""
    devices: int = 8
    """of the mesh"""
    hosts: int = 1
    """that they belong to, equally many each"""
    sharded: bool = False
    """parameters and optimiser states spread over the devices, for networks that do not fit one"""
    accelerators: tuple[str, ...] = ()
    """NAME:FLOPS:LINK:NETWORK[:LATENCY]: operations per second of a device, bytes per second between two of a host and
    between hosts, seconds of a collective; as they are reached"""
    out: Path | None = None
    """folder for plan.json, scaling.png and report.html (default: only print)"""

    def __post_init__(self) -> None:
        if self.devices < 1 or self.hosts < 1 or self.devices % self.hosts:
            raise UserError(f"{self.devices} devices do not divide over {self.hosts} hosts")


def main(args: Sequence[str], package: str, presets: Mapping[str, Any], outline_of: Callable[[Any], Outline]) -> None:
    """The command. `outline_of(config)`, called once JAX has its virtual devices, is a training in shapes.

    With `--presets` alone it prints their names.
    """
    if list(args) == ["--presets"]:
        print("\n".join(presets))
        return
    at = list(args).index("--") if "--" in args else len(args)
    options = parse(Plan(tyro.MISSING), args[:at], f"python -m {package} plan")
    machines = dict(accelerator(text, options) for text in options.accelerators)
    if options.preset not in presets:
        raise UserError(f"unknown preset {options.preset!r}: choose from {', '.join(presets)}")
    config = parse(presets[options.preset], args[at + 1 :], f"python -m {package} plan {options.preset} --")
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jax.sharding import PartitionSpec

    from lib import shard

    shard.start(options.devices, convolutions=False)  # nothing is computed
    from lib import plan

    outline = outline_of(config)
    wanted, outline = outline.rows, outline.over(options.devices)
    if outline.rows != wanted:
        print(f"a batch of {wanted} does not divide over {options.devices} devices: {outline.rows} are assumed")
    mesh = shard.make_mesh(options.devices)
    spec = shard.shard_largest(outline.state, mesh) if options.sharded else PartitionSpec()
    found = plan.cost(
        outline.step, outline.state, outline.batch, mesh, batch_spec=outline.batch_spec, state_spec=spec,
        how="jit" if options.sharded else "shard_map",
    )  # fmt: skip
    rows, seconds = facts(outline, found), predictions(found, machines)
    print(text_table(["of a step", "on each device"], rows))
    if machines:
        print(text_table(_COLUMNS, _table(outline, seconds)))
    if options.out is not None:
        _write(options, to_json(config), outline, found, rows, seconds)


def accelerator(text: str, options: Plan) -> tuple[str, Machine]:
    """(name, what it can do) of NAME:FLOPS:LINK:NETWORK[:LATENCY]. Raises UserError for anything else."""
    from lib.plan import Machine

    name, *parts = text.split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not name or len(numbers) not in (3, 4) or not all(map(math.isfinite, numbers)):
        raise UserError(f"{text!r} is not NAME:{':'.join(_PARTS[:3])}[:{_PARTS[3]}]")
    latency_s = numbers[3] if len(numbers) == 4 else 0.0
    return name, Machine(*numbers[:3], per_host=options.devices // options.hosts, latency_s=latency_s)


def facts(outline: Outline, found: Cost) -> list[list[str]]:
    """Rows of what was read from the program."""
    kinds = dict.fromkeys(kind for kind, _ in found.collectives)
    sizes = {kind: [size for other, size in found.collectives if other == kind] for kind in kinds}
    return [
        ["examples", f"{outline.rows / found.devices:g} of {outline.rows}"],
        ["operations", f"{found.flops:.3e}"],
        *([kind, f"{len(each)} of {_bytes(sum(each))} in all"] for kind, each in sizes.items()),
        *([["collectives", "none"]] if not sizes else []),
        ["parameters and optimiser", _bytes(found.state_bytes)],
        ["state and batch", _bytes(found.argument_bytes)],
        ["beside them, at most", _bytes(found.temporary_bytes)],
    ]


def _bytes(count: float) -> str:
    power = min(int(math.log(count, 1024)), 3) if count >= 1 else 0
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def predictions(found: Cost, machines: dict[str, Machine]) -> dict[str, dict[int, float]]:
    """{accelerator: {devices: seconds of a step}} where every device always has what it has in `found`."""
    from lib.plan import predicted_s

    alone = dataclasses.replace(found, devices=1, collectives=())
    counts = sorted({2**k for k in range(found.devices.bit_length()) if 2**k < found.devices} | {found.devices})
    return {
        name: {n: predicted_s(dataclasses.replace(found, devices=n) if n > 1 else alone, machine) for n in counts}
        for name, machine in machines.items()
    }


def _table(outline: Outline, seconds: dict[str, dict[int, float]]) -> list[list[str]]:
    rows = []
    for name, by_count in seconds.items():
        alone, step_s = by_count[1], by_count[max(by_count)]
        rows.append([name, f"{1e3 * step_s:.3g} ms", f"{outline.rows / step_s:.4g}", f"{alone / step_s:.1%}"])
    return rows


def _write(
    options: Plan,
    config: dict[str, Any],
    outline: Outline,
    found: Cost,
    rows: list[list[str]],
    seconds: dict[str, dict[int, float]],
) -> None:
    assert options.out is not None
    record = {
        "preset": options.preset, "config": config, "devices": options.devices, "hosts": options.hosts,
        "sharded": options.sharded, "examples": outline.rows, **dataclasses.asdict(found),
        "accelerators": list(options.accelerators), "predicted_s": seconds,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "plan.json", record)
    hosts = f"{options.devices} devices of {options.hosts} hosts"
    page = Page(f"{options.preset} on {hosts}", "Read from the program of a training step that was compiled for them.")
    page.heading("Of a step")
    page.table(["", "on each device"], rows)
    if seconds:
        each = outline.rows / found.devices
        speeds = {name: {n: n * each / s for n, s in by_count.items()} for name, by_count in seconds.items()}
        page.heading("Predicted")
        page.table(_COLUMNS, _table(outline, seconds))
        caption = "Where every device always has the same work. Dashed: without communication."
        page.figure(_curve(options.out / "scaling.png", speeds), caption)
        page.text(
            f"Accelerators, as they were said to be ({':'.join(('NAME', *_PARTS))}): {' '.join(options.accelerators)}"
        )
    page.code(json.dumps(record, indent=2), summary="all numbers")
    print(page.write(options.out / "report.html"))


def _curve(path: Path, speeds: dict[str, dict[int, float]]) -> Path:
    from lib import plot

    figure, axes = plot.panels(1, 1, width=6.0, height=3.6)
    ax = axes[0, 0]
    for color, (name, by_count) in zip(plot.COLORS, speeds.items(), strict=False):
        counts = list(by_count)
        ax.loglog(counts, list(by_count.values()), "o-", base=2, label=name, color=color)
        ax.loglog(counts, [n * by_count[1] for n in counts], "--", base=2, color=color, linewidth=0.8)
    ax.set(xlabel="devices", ylabel="examples per second")
    ax.legend()
    return plot.save(figure, path)
