"""From a trained run to its numbers, pictures and report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hnn import evaluate, figures, pixel_evaluation
from hnn.config import Config
from hnn.data import Dataset, PixelDataset
from hnn.experiment import interval
from hnn.systems import SYSTEMS, System, system_field
from lib import plot
from lib.report import Page, number, text_table
from lib.run import RunFolder, write_evaluation

_ORDER = (
    "true_field",
    "baseline",
    "lstm",
    "hnn",
    "hnn_rollout",
    "separable",
    "dissipative",
    "euler",
    "constant",
)
_COLUMNS = {
    "train_loss": "train loss",
    "test_loss": "test loss",
    "energy_mse": "energy MSE",
    "coordinate_mse": "coordinate MSE",
    "energy_mse_extrapolation": "energy MSE, outside",
    "coordinate_mse_extrapolation": "coordinate MSE, outside",
    "reversal_error": "reversal error",
    "energy_mse_original_recipe": "energy MSE, paper's recipe",
}


def evaluate_run(
    config: Config, data: Dataset | PixelDataset, trained: dict[str, evaluate.Trained], folder: RunFolder
) -> dict[str, float]:
    """Measures every model of a run; writes evaluation.json, the figures and report.html. Returns the numbers."""
    system = SYSTEMS[config.system]
    if isinstance(data, PixelDataset):
        numbers, pictures = _films(data, trained, folder.figures)
    elif system.sample_initial is None:
        numbers, pictures = _recorded(config, system, data, trained, folder.figures)
    else:
        numbers, pictures = _simulated(config, system, data, trained, folder.figures)
    curve = _training_curves(folder)
    if curve:
        pictures.append((curve, "Training loss, mean over seeds; the losses of different kinds of training differ."))
    write_evaluation(folder.path, numbers, _protocol(config, system))
    _write_page(config, system, folder, numbers, pictures)
    return numbers


Picture = tuple[Path, str]


def _simulated(
    config: Config, system: System, data: Dataset, trained: dict[str, evaluate.Trained], out: Path
) -> tuple[dict[str, float], list[Picture]]:
    options, step = config.evaluation, interval(data.train)
    fields = {name: one for name, one in trained.items() if name != "lstm"}
    scenes = evaluate.make_scenes(system, options.t_end, options.n_initial, options.n_points)
    numbers = evaluate.true_field_losses(system, data)
    runs: dict[str, np.ndarray] = {}
    for name, one in fields.items():
        numbers |= evaluate.derivative_losses(name, one.model.field, one.params, data)
        found, runs[name] = evaluate.field_numbers(name, one, system, scenes, options.average, options.rtol)
        numbers |= found
    ts = np.linspace(0, options.t_end, options.n_points)
    lines = {"truth": (ts, scenes.truth[0])} | {name: (ts, ys[0, 0]) for name, ys in runs.items()}
    if "lstm" in trained:
        found, own_ts, ys = evaluate.lstm_numbers(trained["lstm"], system, scenes, step, options.average)
        numbers |= found
        lines["lstm"] = (own_ts, ys[0, 0])
    pictures = []
    if options.sweep:
        found, picture, euler = _sweep(config, system, fields, scenes, step, runs, out)
        numbers |= found
        lines["euler"] = euler
        pictures.append(picture)
    return numbers, _paths(system, lines, out) + _fields(system, fields, data, out) + pictures


def _recorded(
    config: Config, system: System, data: Dataset, trained: dict[str, evaluate.Trained], out: Path
) -> tuple[dict[str, float], list[Picture]]:
    """A recording has no true field: models are followed from the first test row and compared with the others."""
    ts, observed = data.test.t - data.test.t[0], data.test.y[0, 0]
    numbers = evaluate.constant_energy_numbers(system, observed)
    lines = {"measurement": (ts, observed)}
    for name, one in trained.items():
        numbers |= evaluate.derivative_losses(name, one.model.field, one.params, data)
        found, ys = evaluate.recorded_numbers(name, one, system, ts, observed, config.evaluation.rtol)
        numbers |= found
        lines[name] = (ts, ys[0])
    path = figures.over_time(out / "energy.png", system, lines)
    caption = f"Rollouts from the first of the {len(ts)} held-out rows (first seed); grey: the measurement."
    phase = figures.phase_portrait(out / "phase_portraits.png", system, {name: ys for name, (_, ys) in lines.items()})
    coordinates = figures.coordinates_over_time(out / "coordinates.png", lines)
    pictures = [(coordinates, caption), (path, "Energy along them, and distance to the measurement."), (phase, caption)]
    return numbers, pictures + _fields(system, trained, data, out)


def _films(
    data: PixelDataset, trained: dict[str, evaluate.Trained], out: Path
) -> tuple[dict[str, float], list[Picture]]:
    numbers: dict[str, float] = {}
    decoded = {}
    for name, one in trained.items():
        found, decoded[name] = pixel_evaluation.film_numbers(name, one, data)
        numbers |= found
    path = pixel_evaluation.film_strip(out / "film.png", data, decoded)
    caption = "A test film, and what each model imagines from its first two frames alone (first seed)."
    return numbers, [(path, caption)]


def _paths(system: System, lines: dict[str, tuple[np.ndarray, np.ndarray]], out: Path) -> list[Picture]:
    paths = {name: ys for name, (_, ys) in lines.items()}
    pictures = []
    if system.dimension == 1:
        path = figures.phase_portrait(out / "phase_portraits.png", system, paths)
        caption = "One fresh initial condition inside the training range, followed by each model (first seed)."
        pictures.append((path, f"{caption} Grey: the truth; thin lines: levels of the true H."))
    elif system.name in ("two_body", "three_body"):
        path = figures.orbits(out / "orbits.png", paths, system.dimension // 2)
        pictures.append(
            (
                path,
                "Orbits from one fresh initial condition (first seed); open circle start, full circle end.",
            )
        )
    path = figures.over_time(out / "energy.png", system, lines)
    pictures.append((path, "The same rollouts: true energy along each, and distance to the true trajectory."))
    return pictures


def _fields(system: System, fields: dict[str, evaluate.Trained], data: Dataset, out: Path) -> list[Picture]:
    pictures = []
    points = data.train.y[0].reshape(-1, 2 * system.dimension)
    known = system.sample_initial is not None
    learned = {name: one for name, one in fields.items() if one.model.hamiltonian is not None}
    if learned:
        path = figures.learned_hamiltonian(out / "learned_hamiltonian.png", system, learned, points[:4000])
        caption = "The learned Hamiltonian beside the true one, shifted by a constant (first seed)."
        pictures.append((path, caption + (" White dots: training observations." if system.dimension == 1 else "")))
    if system.dimension == 1:
        reach = 1.1 * np.abs(points).max(0)
        path = figures.vector_fields(out / "vector_fields.png", fields, reach, system_field(system) if known else None)
        pictures.append((path, f"Vector fields: {'the true one and ' if known else ''}those learned (first seed)."))
    return pictures


def _sweep(config, system, fields, scenes, step, runs, out):
    """Euler in both senses: on the true field against learned flows, and as the solver of learned fields."""
    options = config.evaluation
    y0 = scenes.y0[scenes.inside][: evaluate.SWEPT]
    learned = {name: one for name, one in fields.items() if name in ("hnn", "hnn_rollout")}
    sweep = evaluate.euler_sweep(system, step, options.t_end, y0, learned)
    found = evaluate.euler_numbers(sweep, step)
    adaptive = {name: evaluate.first_seed_errors(system, scenes, ys) for name, ys in runs.items()}
    wins = []
    for name, (_, coordinate_mse) in adaptive.items():
        dt = evaluate.step_size_to_match(sweep, coordinate_mse)
        if dt is None:
            wins.append(f"no step of the sweep is small enough for Euler to match {name}")
        else:
            found[f"euler.step_size_to_match_{name}"] = dt
            wins.append(f"at steps of {dt:.2g} or less Euler wins against {name}")
    path = figures.error_against_step(out / "error_against_step.png", sweep, adaptive)
    caption = (
        "Errors against the step size. Euler knows the exact equations, the networks only the data. Judged by "
        f"coordinates over {options.t_end:g} time units: {'; '.join(wins)}. Dashed: the learned field itself under "
        "Euler; dotted: under an adaptive solver, where only the error of learning is left."
    )
    coarse = evaluate.fixed_path(system, y0[0], step, options.t_end)
    return found, (path, caption), coarse


def _training_curves(folder: RunFolder) -> Path | None:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in folder.metrics():
        for key, value in row.items():
            if key.endswith(".loss") and value is not None:
                xs, ys = series.setdefault(key.removesuffix(".loss"), ([], []))
                xs.append(row["step"])
                ys.append(value)
    if not series:
        return None
    return plot.curves(folder.figures / "training.png", series, x="step", y="training loss")


def _protocol(config: Config, system: System) -> str:
    options = config.evaluation
    own = "data and initial weights" if config.data.per_seed else "initial weights"
    text = (
        f"{config.seeds} seeds, each with its own {own}; NAME is the mean over seeds, NAME.sd the standard deviation. "
    )
    if system.name == "pixel_pendulum":
        return text + (
            "The first two frames of each test film are encoded, the latent field is followed for 100 frames (float64, "
            "adaptive Tsit5), and an affine map from latent to true coordinates, fitted on encodings of the training "
            "films, is applied. energy_mse: squared error of the exactly conserved H = 1.875 (1 - cos q) + p^2 against "
            "the truth at the same times; _original_recipe: of the paper's 1.9 (1 - cos q) + p^2; _cubic_map: through "
            "a cubic map; energy_mse_encoded: of encodings, without dynamics; pixel_mse: of decoded rollouts."
        )
    text += "Losses: mean squared error of the derivative at the observations. "
    if system.sample_initial is None:
        return text + (
            "Derivatives are forward differences of the measurement. Each model is followed from the first of the "
            f"held-out rows over all of them (float64, adaptive Tsit5, tolerance {options.rtol:g}). energy_mse: "
            "squared error of H = 2.4 (1 - cos q) + p^2 against the measured one at the same times; coordinate_mse: of "
            "(q, p). energy_mse_original_recipe: the same with Dormand-Prince 5 at rtol 1e-3, atol 1e-6. constant: the "
            "energy of the first row for ever."
        )
    where = "positions" if system.name in ("two_body", "three_body") else "all coordinates"
    return text + (
        f"Rollouts: {options.n_initial} fresh initial conditions from the training distribution, "
        f"T = {options.t_end:g}, {options.n_points} times, float64, adaptive Tsit5, tolerance {options.rtol:g}. "
        f"energy_mse: squared error of the true H along the rollout; coordinate_mse: of {where}; {options.average} "
        "over initial conditions. _extrapolation: initial conditions outside the training range. reversal_error: mean "
        "squared distance to the start after following the field, flipping the momenta and following it back. "
        "energy_mse_original_recipe: initial conditions, horizon and energy of the paper's notebook, its defects "
        "included. euler: explicit Euler on the true field at the sampling interval of the data; euler_dt_X: "
        "at step X; both over 8 of the initial conditions."
    )


def table(numbers: dict[str, float]) -> tuple[list[str], list[list[str]], list[tuple[int, int]]]:
    """Column names, rows of text, and the (row, column) of the best trained model in each column."""
    names = [name for name in _ORDER if any(key.startswith(f"{name}.") for key in numbers)]
    metrics = [m for m in _COLUMNS if any(f"{name}.{m}" in numbers for name in names)]
    rows, best = [], []
    for name in names:
        row = [name]
        for metric in metrics:
            key = f"{name}.{metric}"
            row.append(number(numbers[key], numbers.get(f"{key}.sd")) if key in numbers else "")
        rows.append(row)
    for j, metric in enumerate(metrics, start=1):
        scores = {
            i: numbers[f"{name}.{metric}"]
            for i, name in enumerate(names)
            if f"{name}.{metric}" in numbers and name not in ("true_field", "euler", "constant")
        }
        finite = {i: value for i, value in scores.items() if np.isfinite(value)}
        if finite:
            best.append((min(finite, key=finite.__getitem__), j))
    return ["model", *(_COLUMNS[m] for m in metrics)], rows, best


def summary(numbers: dict[str, float]) -> str:
    """The table of a run for the terminal: means of the four main metrics."""
    columns, rows, _ = table(numbers)
    keep = [0, *(j for j, c in enumerate(columns) if c in ("test loss", "energy MSE", "coordinate MSE"))]
    return text_table([columns[j] for j in keep], [[row[j] for j in keep] for row in rows])


def _write_page(config: Config, system: System, folder: RunFolder, numbers: dict, pictures: list[Picture]) -> None:
    page = Page(
        f"Hamiltonian networks: {system.name.replace('_', ' ')}",
        "Networks that learn a conserved quantity from trajectories, compared with a plain network, with Euler's "
        "method on the exact equations, and with the truth.",
    )
    page.heading("Numbers")
    columns, rows, best = table(numbers)
    page.table(columns, rows, best=best)
    page.text(_protocol(config, system))
    page.pictures(pictures)
    page.repeat("hnn", folder, numbers)
    page.write(folder.path / "report.html")
