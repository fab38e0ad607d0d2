"""lib/config.py: command lines override, JSON repeats exactly, and every mistake is one line."""

import dataclasses
import json
from typing import Literal

import pytest

from lib import config
from lib.process import UserError


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    """Learning rate."""
    warmup_steps: int = 0
    """Steps."""
    kind: Literal["adam", "sgd"] = "adam"
    """Update rule."""


@dataclasses.dataclass(frozen=True)
class Config:
    optim: Optim = Optim()
    layers: tuple[int, ...] = (200, 200)
    """Hidden widths."""
    span: tuple[float, float] = (0.0, 3.0)
    """Time span [s]."""
    noise: float | None = None
    """Standard deviation of the observations."""
    schedule: Optim | None = None
    """A second optimiser."""
    solver: Literal["euler", "verlet"] = "verlet"
    """Integrator."""
    ema: bool = False
    """Whether to average."""
    name: str = "spring"
    """System."""


def test_overrides_nested_fields():
    args = ["--optim.lr", "3e-4", "--layers", "8", "16", "32", "--span", "1", "2.5"]
    got = config.parse(Config(), [*args, "--noise", "0.1", "--solver", "euler", "--ema"], "hnn train")
    assert got == Config(optim=Optim(lr=3e-4), layers=(8, 16, 32), span=(1.0, 2.5), noise=0.1, solver="euler", ema=True)


def test_no_arguments_give_the_preset():
    preset = Config(optim=Optim(lr=0.5), noise=0.2)
    assert config.parse(preset, [], "hnn train") == preset


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--optim.lrr", "1"], ["--optim.lrr", "perhaps you meant --optim.lr"]),
        (["--optim.lr", "fast"], ["fast", "optim.lr"]),
        (["--optim.lr"], ["optim.lr"]),
        (["--layers", "8", "x"], ["x", "layers"]),
        (["--solver", "rk4"], ["rk4", "solver"]),
        (["stray"], ["stray"]),
        (["--nothing-like-it-anywhere", "1"], ["--nothing-like-it-anywhere"]),
    ],
)
@pytest.mark.parametrize("columns", ["30", "80", "200"])
def test_mistakes_are_one_line(args, words, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as error:
        config.parse(Config(), args, "hnn train")
    message = str(error.value)
    assert "\n" not in message and "│" not in message
    assert message.endswith("see hnn train --help")
    for word in words:
        assert word in message, message


def test_help_exits_with_zero(capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(Config(), ["--help"], "hnn train")
    assert not stop.value.code
    assert "--optim.lr" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value",
    [
        Config(),
        Config(noise=0.5, layers=(), optim=Optim(lr=1 / 3, kind="sgd")),
        Config(schedule=Optim(warmup_steps=7), ema=True),
    ],
)
def test_json_round_trip(value):
    values = json.loads(json.dumps(config.to_json(value)))
    assert config.from_json(Config, values) == value


def test_a_float_given_as_an_integer_becomes_one():
    values = config.to_json(Config()) | {"noise": 1, "span": [0, 3]}
    got = config.from_json(Config, values)
    assert (got.noise, got.span) == (1.0, (0.0, 3.0))
    assert isinstance(got.noise, float) and all(isinstance(t, float) for t in got.span)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"lr": "x", "warmup_steps": 0, "kind": "adam"}}, "config.optim.lr: expected float, got 'x'"),
        ({"optim": {"lr": 1.0, "kind": "adam"}}, "config.optim.warmup_steps: missing"),
        ({"optim": {"lr": 1.0, "warmup_steps": 0.5, "kind": "adam"}}, "config.optim.warmup_steps: expected int"),
        ({"optim": {"lr": 1.0, "warmup_steps": True, "kind": "adam"}}, "config.optim.warmup_steps: expected int"),
        ({"optim": {"lr": 1.0, "warmup_steps": 0, "kind": "rmsprop"}}, "config.optim.kind: expected "),
        ({"optim": 3}, "config.optim: expected an object"),
        ({"schedule": {"lr": 1.0}}, "config.schedule."),
        ({"layers": [8, "x"]}, "config.layers: expected int, got 'x'"),
        ({"layers": 8}, "config.layers: expected tuple"),
        ({"span": [0.0, 1.0, 2.0]}, "config.span: expected 2 values, got 3"),
        ({"ema": 1}, "config.ema: expected bool, got 1"),
        ({"name": None}, "config.name: expected str, got None"),
        ({"colour": 1}, "config.colour: unknown field"),
    ],
)
def test_wrong_json_names_the_field(change, message):
    with pytest.raises(UserError) as error:
        config.from_json(Config, config.to_json(Config()) | change)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_json_that_is_no_object():
    with pytest.raises(UserError, match="config: expected an object"):
        config.from_json(Config, [1, 2])


def test_the_options_that_make_a_configuration():
    default = Config()
    changed = dataclasses.replace(default, layers=(4, 5), noise=0.25, solver="euler")
    words = config.options_of(changed, default, without=("solver",))
    assert words == ["--layers", "4", "5", "--noise", "0.25"]
    assert config.parse(default, words, "prog") == dataclasses.replace(changed, solver=default.solver)
    assert config.options_of(default, default) == []


def test_flags_among_the_options():
    @dataclasses.dataclass(frozen=True)
    class Flags:
        first: bool = False
        second: bool = True

    changed = Flags(True, False)
    words = config.options_of(changed, Flags())
    assert words == ["--first", "--no-second"]
    assert config.parse(Flags(), words, "prog") == changed
