"""What a measurement is: a number, how far it can be trusted, and exactly what was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

from lib.report import number, text_table


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Two numbers compare only where their protocols are the same but for the images."""

    features: str
    """feature net; "coordinates" where points themselves are compared"""
    weights_sha256: str
    """of the net's weight file"""
    preprocessing: str
    """what happens to pixels before the net, resizing included"""
    real: str
    """the reference set, with its split"""
    generated: str
    """the set that is judged"""
    n_real: int
    n_generated: int
    rounding: str
    """how the judged pixels became whole numbers"""
    settings: str
    """the metric's own"""


@dataclasses.dataclass(frozen=True)
class Result:
    """One metric of one set against another."""

    value: float
    uncertainty: float
    """one standard deviation; NaN where there is none"""
    uncertainty_kind: str
    """what was resampled or split to get it"""
    protocol: Protocol


def to_json(results: dict[str, Result]) -> dict[str, Any]:
    """{"fid.mnist_cnn": {"value": ..., "uncertainty": ..., "uncertainty_kind": ..., "protocol": {...}}, ...}"""
    return {name: dataclasses.asdict(result) for name, result in results.items()}


def table(results: dict[str, Result]) -> str:
    """For a terminal: the numbers, then once what they share."""
    rows = [
        [name, number(r.value), "–" if r.uncertainty != r.uncertainty else number(r.uncertainty), r.uncertainty_kind]
        for name, r in results.items()
    ]
    common = next(iter(results.values())).protocol
    lines = [
        text_table(("metric", "value", "±", "± is"), rows),
        "",
        f"real       {common.real} ({common.n_real} images)",
        f"generated  {common.generated} ({common.n_generated} images, {common.rounding})",
        f"features   {common.features}, weights {common.weights_sha256[:12]}; {common.preprocessing}",
    ]
    lines += [f"{name}: {r.protocol.settings}" for name, r in results.items()]
    return "\n".join(lines)
