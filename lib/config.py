"""Configurations: frozen dataclasses that the command line overrides (tyro) and that JSON repeats exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lib.process import UserError
from lib.run import RunFolder, read_json

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What every training is told beside its configuration."""

    out: Path | None = None
    """run folder (default: a name of its own under runs/)"""
    resume: bool = False
    """go on with the run in --out"""
    devices: int | None = None
    """devices to spread the work over (default: all that divide it; on a CPU one per core)"""


@dataclasses.dataclass(frozen=True)
class ShardedRunOptions(RunOptions):
    """What a training is told whose batch is spread over the devices."""

    shard_state: bool = False
    """parameters and optimiser states spread over the devices too, for networks that do not fit one"""


def parse(default: T, args: Sequence[str], prog: str) -> T:
    """`default` with the fields that `args` override, as in `--optim.lr 3e-4`.

    Raises UserError in one line for anything that does not parse; prints help and exits for `--help`.
    """
    import tyro

    def cli() -> T:
        return tyro.cli(type(default), default=default, args=list(args), prog=prog)

    # Errors are read back below, so tyro must not fit them to the terminal: no colours, always the same box.
    no_terminal, errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    try:
        with contextlib.redirect_stdout(no_terminal), contextlib.redirect_stderr(errors):
            return cli()
    except SystemExit as stop:
        if not stop.code:
            return cli()  # help, now for the terminal
    raise UserError(_one_line(errors.getvalue(), prog))


def _one_line(boxed: str, prog: str) -> str:
    """The message out of tyro's box: its first paragraph and the fields that it suggests."""
    lines = [line.strip("│ ").strip() for line in boxed.splitlines() if line.startswith("│")]
    sections = [[]]
    for line in lines:
        if line and set(line) == {"─"}:
            sections.append([])
        else:
            sections[-1].append(line)
    message = " ".join(sections[0])
    near = [line.split()[0] for section in sections[1:] for line in section if line.startswith("--")]
    if near and "Unrecognized" in message:
        message += f" (perhaps you meant {' or '.join(near[:2])})"
    return f"{message}; see {prog} --help"


def starting_point(
    presets: Mapping[str, T], package: str, args: Sequence[str], default: T | None = None
) -> tuple[T, Path | None, list[str]]:
    """(what a command of `package` starts from, the run folder that it is from, the arguments that are left).

    `args` begin with the name of a preset or a run folder, or hold `--config FILE`; where they do neither, it is
    `default`. Raises UserError for a name that is none of them, and where there is no default.
    """
    cls, rest = type(next(iter(presets.values()))), list(args)
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name in presets:
            return presets[name], None, rest
        if (Path(name) / "config.json").exists():
            return from_json(cls, RunFolder.open(Path(name), package)[1]), Path(name), rest
        raise UserError(f"unknown preset {name!r}: choose from {', '.join(presets)}, or give a run folder")
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise UserError("--config needs a file")
        record = read_json(Path(rest[at + 1]))
        if not isinstance(record, dict) or record.get("package") != package:
            raise UserError(f"{rest[at + 1]} is not the configuration of a run of {package}")
        return from_json(cls, record.get("config")), None, rest[:at] + rest[at + 2 :]
    if default is None:
        raise UserError(f"which preset? choose from {', '.join(presets)}")
    return default, None, rest


def trained_run(cls: type[T], package: str, name: str, args: Sequence[str]) -> tuple[RunFolder, T, list[str]]:
    """(the run that the arguments of command `name` begin with, its configuration, the arguments that are left).

    Raises UserError where they do not begin with a run of `package`.
    """
    if not args or args[0].startswith("-"):
        raise UserError(f"python -m {package} {name} needs the folder of a run")
    folder, values = RunFolder.open(Path(args[0]), package)
    return folder, from_json(cls, values), list(args[1:])


def options_of(config: Any, default: Any, *, without: Collection[str] = ()) -> list[str]:
    """The words that make the dataclass `config` of `default` on a command line; fields `without` are left out."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in without and value != getattr(default, field.name):
            name = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (tuples become lists, paths text)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_json(cls: type[T], values: Any, name: str = "config") -> T:
    """The dataclass `cls` out of `to_json`'s values. Raises UserError that names the first wrong field."""
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected an object with fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for unknown in sorted(set(values) - fields):
        raise UserError(f"{name}.{unknown}: unknown field")
    for missing in sorted(fields - set(values)):
        raise UserError(f"{name}.{missing}: missing")
    return cls(**{key: _value(hints[key], value, f"{name}.{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, name)  # type: ignore[arg-type]
    if origin is typing.Literal:
        if value in arguments:
            return value
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, name)
    elif origin is tuple:
        if isinstance(value, list):
            any_length = arguments[-1] is Ellipsis
            if not any_length and len(value) != len(arguments):
                raise UserError(f"{name}: expected {len(arguments)} values, got {len(value)}")
            kinds = arguments[:1] * len(value) if any_length else arguments
            return tuple(_value(kind, item, name) for kind, item in zip(kinds, value, strict=True))
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise UserError(f"{name}: expected {expected}, got {value!r}")
