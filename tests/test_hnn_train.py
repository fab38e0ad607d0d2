"""python -m hnn: what train, evaluate, rollout and simulate write."""

import contextlib
import io
import json
import re

import jax
import numpy as np
import pytest

from hnn import experiment
from hnn.__main__ import main
from hnn.config import PRESETS, Config, Data
from hnn.data import load_npz
from hnn.pixels import SIZE_PX
from hnn.systems import SYSTEMS
from lib import config as configs
from lib import shard

PNG = b"\x89PNG\r\n\x1a\n"


TINY = (
    "--seeds 3 --hidden 8 --derivative.steps 120 --checkpoint-every 100 "
    "--evaluation.n-initial 2 --evaluation.n-points 20 --evaluation.t-end 2"
)


@pytest.fixture(scope="module")
def call():
    """Runs a command: what it prints."""

    def call(line):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(line.split())
        return out.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "start", lambda devices=None, convolutions=True: None)  # JAX has started long ago
        yield call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def spring_run(call, folder):
    """A small study of two models: its folder and what was printed."""
    out = call(f"train spring {TINY} --models baseline hnn --out {folder}/spring")
    return folder / "spring", out


@pytest.fixture(scope="module")
def small_run(call, folder):
    """The smallest study."""
    call(f"train spring {TINY} --models hnn --evaluation.no-sweep --out {folder}/small --devices 2")
    return folder / "small"


@pytest.fixture(scope="module")
def other_run(call, folder):
    """The other models, without the sweep."""
    models = "--models separable hnn_rollout dissipative lstm"
    short = "--rollout.steps 100 --sequence.steps 100 --rollout.roughness-weight 0"
    call(f"train spring {TINY} {models} {short} --seeds 1 --evaluation.no-sweep --out {folder}/other")
    return folder / "other"


def numbers_of(run):
    return json.loads((run / "evaluation.json").read_text())


def params_of(run):
    """Every array of the last checkpoints."""
    _, values = experiment.RunFolder.open(run, "hnn")
    config = configs.from_json(Config, values)
    data = experiment.load_data(config)
    trained = experiment.load_trained(config, data, experiment.RunFolder(run), config.models)
    return {name: one.params for name, one in trained.items()}


def test_run_folder(spring_run):
    run, out = spring_run
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        "config.json", "environment.json", "metrics.jsonl", "checkpoints", "figures", "report.html",
        "evaluation.json", "evaluated.json",
    }  # fmt: skip
    record = json.loads((run / "config.json").read_text())
    config = configs.from_json(Config, record["config"])
    assert record["package"] == "hnn"
    assert (config.seeds, config.hidden, config.derivative.steps) == (3, 8, 120)
    (environment,) = json.loads((run / "environment.json").read_text())
    assert {"utc_start", "argv", "git_commit", "git_dirty", "versions", "devices"} <= set(environment)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [100, 120, 100, 120]
    assert ["baseline.loss" in row for row in rows] == [True, True, False, False]
    assert ["hnn.loss" in row for row in rows] == [False, False, True, True]
    assert all(row["wall_s"] > 0 for row in rows)
    for name in ("baseline", "hnn"):
        steps = {int(p.name) for p in (run / "checkpoints" / name).iterdir() if p.name.isdigit()}
        assert steps == {100, 120}
    figures = {p.name for p in (run / "figures").iterdir()}
    assert figures == {
        "phase_portraits.png", "energy.png", "learned_hamiltonian.png", "vector_fields.png", "training.png",
        "error_against_step.png",
    }  # fmt: skip
    assert all((run / "figures" / name).read_bytes().startswith(PNG) for name in figures)
    assert out.rstrip().endswith(str(run / "report.html"))
    for name in ("true_field", "baseline", "hnn", "euler"):
        assert re.search(rf"^{name} ", out, re.MULTILINE)


METRICS = {
    "energy_mse", "coordinate_mse", "energy_mse_extrapolation", "coordinate_mse_extrapolation",
}  # fmt: skip
LOSSES = {"train_loss", "test_loss"}
FIELD_METRICS = LOSSES | METRICS | {"reversal_error", "energy_mse_original_recipe"}


@pytest.mark.slow
def test_names_of_the_numbers(spring_run, other_run):
    numbers = numbers_of(spring_run[0])
    assert isinstance(numbers.pop("protocol"), str)
    expected = {f"{name}.{metric}" for name in ("baseline", "hnn") for metric in FIELD_METRICS}
    expected |= {f"true_field.{metric}" for metric in LOSSES}
    expected |= {f"{name}.sd" for name in expected}
    euler = {name for name in numbers if name.startswith("euler")}
    assert set(numbers) - euler == expected
    assert {"euler.energy_mse", "euler.coordinate_mse"} <= euler
    extras = euler - {"euler.energy_mse", "euler.coordinate_mse"}
    assert all(re.fullmatch(r"euler_dt_[\d.e-]+\.(energy|coordinate)_mse|euler\.step_size_\w+", n) for n in extras)
    finite = {name: value for name, value in numbers.items() if not name.startswith("euler_dt")}
    assert all(isinstance(value, float) and np.isfinite(value) and value >= 0 for value in finite.values()), finite

    numbers = numbers_of(other_run)
    del numbers["protocol"]
    expected = {f"{n}.{m}" for n in ("separable", "hnn_rollout", "dissipative") for m in FIELD_METRICS}
    assert set(numbers) == expected | {f"lstm.{m}" for m in METRICS} | {f"true_field.{m}" for m in LOSSES}
    assert all(np.isfinite(value) for value in numbers.values())


def test_true_field_has_the_noise_floor_of_the_spring(spring_run):
    # y' is linear with factor 2, the noise 0.1: 4 * 0.01.
    assert abs(numbers_of(spring_run[0])["true_field.test_loss"] - 0.04) < 0.004


def test_report_is_self_contained(spring_run):
    run, _ = spring_run
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(list((run / "figures").iterdir()))
    assert not re.search(r"""\b(src|href)\s*=(?!"data:image/png;base64,)""", page)
    for forbidden in ("<script", "<link", "@import", "url("):
        assert forbidden not in page
    for present in ("Euler", "baseline", "train --config", "derivative", "git_commit"):
        assert present in page


def assert_same_run(a, b):
    assert (a / "evaluation.json").read_bytes() == (b / "evaluation.json").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, params_of(a), params_of(b))


@pytest.mark.slow
def test_the_configuration_repeats_the_run(call, folder, small_run):
    call(f"train --config {small_run}/config.json --out {folder}/again --devices 2")
    assert (folder / "again" / "config.json").read_bytes() == (small_run / "config.json").read_bytes()
    assert_same_run(folder / "again", small_run)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_the_number_of_devices_changes_no_bit(call, folder, small_run, devices):
    call(f"train --config {small_run}/config.json --out {folder}/on-{devices} --devices {devices}")
    assert_same_run(folder / f"on-{devices}", small_run)


@pytest.mark.slow
def test_models_do_not_depend_on_each_other(spring_run, small_run):
    """Beside the baseline and a sweep, hnn is what it is alone."""
    together, alone = numbers_of(spring_run[0]), numbers_of(small_run)
    assert together.items() >= {(k, v) for k, v in alone.items() if k != "protocol"}
    jax.tree.map(np.testing.assert_array_equal, params_of(spring_run[0])["hnn"], params_of(small_run)["hnn"])


@pytest.mark.slow
def test_another_seed_gives_another_run(call, folder, small_run):
    call(f"train --config {small_run}/config.json --seed 1 --out {folder}/seed-1")
    ours, theirs = numbers_of(folder / "seed-1"), numbers_of(small_run)
    for name in ("hnn.train_loss", "hnn.energy_mse", "true_field.train_loss"):
        assert ours[name] != theirs[name]


@pytest.mark.slow
def test_evaluate_again_with_other_options(call, small_run):
    before = (small_run / "evaluation.json").read_bytes()
    config = (small_run / "config.json").read_bytes()
    try:
        call(f"evaluate {small_run} --t-end 1")
        first, then = json.loads(before), numbers_of(small_run)
        assert then["hnn.train_loss"] == first["hnn.train_loss"]
        assert then["hnn.coordinate_mse"] < first["hnn.coordinate_mse"]
        assert "T = 1," in then["protocol"]
        assert (small_run / "config.json").read_bytes() == config
    finally:
        call(f"evaluate {small_run}")
    assert (small_run / "evaluation.json").read_bytes() == before


# ---- rollout


def arrays_of(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.slow
def test_rollout_of_every_model_starts_where_it_is_told(call, folder, other_run):
    for name in ("separable", "hnn_rollout", "dissipative", "lstm"):
        out = call(f"rollout {other_run} --model {name} --y0 0.6 -0.2 --t-end 1.5 --points 7 --out {folder}/{name}.npz")
        assert name in out and "largest change of the true energy" in out
        got = arrays_of(folder / f"{name}.npz")
        assert set(got) == {"t", "y", "truth"}
        assert got["y"].shape == got["truth"].shape == (len(got["t"]), 2)
        np.testing.assert_allclose(got["y"][0], [0.6, -0.2], atol=1e-7)
        angle = 2 * got["t"]
        exact = [0.6 * np.cos(angle) - 0.2 * np.sin(angle), -0.2 * np.cos(angle) - 0.6 * np.sin(angle)]
        np.testing.assert_allclose(got["truth"].T, exact, atol=1e-8)
        if name != "lstm":  # which has the time grid of its data
            np.testing.assert_allclose(got["t"], np.linspace(0, 1.5, 7))
    assert not list(folder.glob("*partial*"))


@pytest.mark.slow
def test_rollout_with_fixed_steps(call, folder, other_run):
    line = f"rollout {other_run} --model separable --y0 0.6 -0.2 --t-end 1.5 --points 7 --out {folder}/r.npz"
    call(line)
    adaptive = arrays_of(folder / "r.npz")["y"]
    for solver, largest in (("euler", 0.2), ("midpoint", 1e-3), ("verlet", 1e-3), ("yoshida", 1e-6)):
        call(f"{line} --solver {solver} --dt 0.01")
        assert 0 < np.abs(arrays_of(folder / "r.npz")["y"] - adaptive).max() < largest, solver


@pytest.mark.slow
def test_rollout_from_a_fresh_state_and_as_a_picture(call, folder, spring_run):
    run, _ = spring_run
    for seed in (0, 1):
        call(f"rollout {run} --seed {seed} --points 7 --out {folder}/fresh-{seed}.npz")
    first, second = (arrays_of(folder / f"fresh-{seed}.npz") for seed in (0, 1))
    np.testing.assert_array_equal(first["truth"], second["truth"])
    assert not np.allclose(first["y"], second["y"])
    assert SYSTEMS["spring"].inside(first["y"][0])
    assert first["t"][-1] == 2.0  # that of the run's evaluation
    call(f"rollout {run} --model baseline --points 7 --out {folder}/r.png")
    assert (folder / "r.png").read_bytes().startswith(PNG)


# ---- simulate


def test_simulate_writes_what_training_reads(call, folder):
    path = folder / "pendulum.npz"
    out = call(f"simulate pendulum --out {path} --n-trajectories 6 --n-points 8 --t-end 2 --noise-std 0 --seed 3")
    data, name = load_npz(path, SYSTEMS["pendulum"])
    assert name == "pendulum"
    assert data.train.y.shape[0] + data.test.y.shape[0] == 6
    np.testing.assert_allclose(data.train.t, np.linspace(0, 2, 8))
    np.testing.assert_array_equal(data.train.y, data.train.y_true)
    assert out == f"{path}: {len(data.train.y)} + {len(data.test.y)} trajectories of 8 points\n"
    assert list(folder.glob("pendulum*")) == [path]


def test_training_from_a_file_is_training_from_the_simulation(call, folder):
    path = folder / "spring.npz"
    call(f"simulate spring --out {path} --seed 4")
    config = Config("spring", seeds=2, seed=4)
    simulated = experiment.load_data(config)
    read = experiment.load_data(Config("spring", seeds=2, data=Data(path=str(path))))
    jax.tree.map(np.testing.assert_array_equal, simulated, read)
    own = experiment.load_data(Config("spring", seeds=2, seed=4, data=Data(per_seed=True)))
    assert own.train.y.shape == read.train.y.shape
    assert not np.allclose(own.train.y[0], own.train.y[1])


@pytest.mark.slow
def test_simulate_films(call, folder):
    path = folder / "films.npz"
    out = call(f"simulate pixel_pendulum --out {path} --n-trajectories 3")
    films = arrays_of(path)
    assert set(films) == {f"{part}_{name}" for part in ("train", "test") for name in ("t", "frames", "y")}
    assert out == f"{path}: {len(films['train_y'])} + {len(films['test_y'])} films\n"
    count = len(films["train_t"])
    assert films["train_frames"].dtype == np.uint8
    assert films["train_frames"].shape == (len(films["train_y"]), count, SIZE_PX, SIZE_PX)
    assert films["train_frames"].max() > 200 and films["train_frames"].min() == 0
    assert films["train_y"].shape == (len(films["train_y"]), count, 2)


# ---- presets


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    config = PRESETS[name]
    assert configs.from_json(Config, json.loads(json.dumps(configs.to_json(config)))) == config
