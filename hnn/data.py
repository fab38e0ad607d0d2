"""Where trajectories come from: simulation in float64, npz files, a measured pendulum, rendered films.

A data set has a train and a test part, each a set of trajectories sampled at common times. Arrays are NumPy.
"""

import os
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from hnn.pixels import render
from hnn.solvers import rollout
from hnn.systems import SYSTEMS, System, system_field
from lib.process import UserError

REAL_PENDULUM_FILE = "real_pendulum/real_pend_h_1.txt"
MIN_POINTS = 3
MIN_REAL_POINTS = 50


class Trajectories(NamedTuple):
    """Trajectories sampled at common times; arrays may carry a leading axis of seeds (t never does).

    t: [T] strictly increasing; y: [n_traj, T, 2n] observations with noise; y_true: [n_traj, T, 2n] without;
    dy: [n_traj, T, 2n] clean derivatives at y_true, the targets of derivative matching as in the paper.
    """

    t: np.ndarray
    y: np.ndarray
    y_true: np.ndarray
    dy: np.ndarray


class Dataset(NamedTuple):
    """Train and test trajectories of one system."""

    train: Trajectories
    test: Trajectories


class Films(NamedTuple):
    """Films of the pixel pendulum: t [T], frames uint8 [n_traj, T, 28, 28] (255 = rod), y [n_traj, T, 2]."""

    t: np.ndarray
    frames: np.ndarray
    y: np.ndarray


class PixelDataset(NamedTuple):
    """Train and test films."""

    train: Films
    test: Films


# ---- simulation


def simulate(
    system: System,
    key: Array,
    *,
    n_trajectories: int | None = None,
    noise_std: float | None = None,
    n_points: int | None = None,
    t_span: tuple[float, float] | None = None,
) -> Dataset:
    """Integrate a system from its training distribution, float64, and split it as in the paper.

    What is None is the system's own. Trajectory i depends on the key and i alone, not on how many there are.
    Raises UserError for sizes that make no data set, and for a recording.
    """
    seeds = simulate_seeds(
        system,
        key[None],
        n_trajectories=n_trajectories,
        noise_std=noise_std,
        n_points=n_points,
        t_span=t_span,
    )
    return Dataset(*(Trajectories(part.t, part.y[0], part.y_true[0], part.dy[0]) for part in seeds))


def simulate_seeds(
    system: System,
    keys: Array,
    *,
    n_trajectories: int | None = None,
    noise_std: float | None = None,
    n_points: int | None = None,
    t_span: tuple[float, float] | None = None,
) -> Dataset:
    """`simulate` for keys [n_seeds]: y, y_true and dy get a leading axis of seeds."""
    n_trajectories = system.n_trajectories if n_trajectories is None else n_trajectories
    noise_std = system.noise_std if noise_std is None else noise_std
    n_points = system.n_points if n_points is None else n_points
    t_span = system.t_span if t_span is None else t_span
    if system.sample_initial is None:
        raise UserError(f"{system.name} is a recording and cannot be simulated; choose a simulated system")
    if n_trajectories < 2:
        raise UserError(f"n_trajectories must be at least 2 (one to train, one to test), not {n_trajectories}")
    if n_points < MIN_POINTS:
        raise UserError(f"n_points must be at least {MIN_POINTS}, not {n_points}")
    if not (np.isfinite(noise_std) and noise_std >= 0):
        raise UserError(f"noise_std must be zero or positive, not {noise_std}")
    if not (np.all(np.isfinite(t_span)) and t_span[0] < t_span[1]):
        raise UserError(f"t_span must increase, not {t_span}")
    t = np.linspace(*t_span, n_points)
    with jax.enable_x64(True):
        arrays = _trajectories(system, n_trajectories, keys, noise_std, t)
        y, y_true, dy = (np.asarray(array) for array in arrays)
    if not np.isfinite(y).all():
        raise UserError(f"the simulation of {system.name} diverged within t_span {t_span}: shorten t_span")
    train, test = split_indices(system, n_trajectories)
    return Dataset(*(Trajectories(t, y[:, part], y_true[:, part], dy[:, part]) for part in (train, test)))


@partial(jax.jit, static_argnames=("system", "n_trajectories"))
def _trajectories(
    system: System, n_trajectories: int, keys: Array, noise_std: ArrayLike, t: ArrayLike
) -> tuple[Array, Array, Array]:
    field, sample_initial = system_field(system), system.sample_initial
    assert sample_initial is not None

    def one_seed(key: Array) -> tuple[Array, Array, Array]:
        initial_key, noise_key = jax.random.split(key)
        y0 = sample_initial(initial_key, n_trajectories)
        # The original's rtol was 1e-10 too, but beside an absolute tolerance of 1e-6.
        y_true = jax.vmap(lambda start: rollout(field, start, t, rtol=1e-10, atol=1e-10))(y0)
        noise_keys = jax.vmap(partial(jax.random.fold_in, noise_key))(jnp.arange(n_trajectories))
        noise = jax.vmap(lambda noise_key: jax.random.normal(noise_key, y_true.shape[1:]))(noise_keys)
        return y_true + noise_std * noise, y_true, jax.vmap(jax.vmap(field))(y_true)

    return jax.vmap(one_seed)(keys)


def split_indices(system: System, n_trajectories: int) -> tuple[slice, slice]:
    """Slices of the train and the test trajectories; at least one of each."""
    n_test = min(max(1, int(n_trajectories * system.test_fraction)), n_trajectories - 1)
    if system.test_position == "first":
        return slice(n_test, None), slice(0, n_test)
    return slice(0, n_trajectories - n_test), slice(n_trajectories - n_test, None)


def simulate_films(key: Array, *, n_trajectories: int | None = None) -> PixelDataset:
    """Films of the pixel pendulum at 20 frames a second, and the true coordinates of each frame."""
    data = simulate(SYSTEMS["pixel_pendulum"], key, n_trajectories=n_trajectories)
    return PixelDataset(*(Films(part.t, np.asarray(_film(part.y_true[..., 0])), part.y_true) for part in data))


@jax.jit
def _film(theta: Array) -> Array:
    frames = jax.lax.map(render, theta.ravel(), batch_size=512)
    return jnp.round(255 * frames).astype(jnp.uint8).reshape(*theta.shape, *frames.shape[1:])


# ---- files


def save_npz(path: str | os.PathLike, dataset: Dataset, system_name: str) -> None:
    """Write a data set; an existing file is replaced only once the new one is complete.

    Raises UserError where the file cannot be written.
    """
    arrays: dict[str, Any] = {
        f"{part_name}_{name}": array
        for part_name, part in dataset._asdict().items()
        for name, array in part._asdict().items()
    }
    _save(path, {"system": np.array(system_name), **arrays})


def save_films(path: str | os.PathLike, films: PixelDataset) -> None:
    """Write films as npz: train_t, train_frames, train_y and the same for test. Raises UserError."""
    _save(
        path,
        {f"{part}_{name}": a for part, film in films._asdict().items() for name, a in film._asdict().items()},
    )


def _save(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    path = Path(path)
    partial_path = path.with_name(path.name + ".partial")
    try:
        with partial_path.open("wb") as file:
            np.savez_compressed(file, **arrays)
        partial_path.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial_path.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def load_npz(path: str | os.PathLike, system: System | None = None) -> tuple[Dataset, str]:
    """Read what `save_npz` wrote: the data set and the name of its system; never unpickles.

    Raises UserError, one line with the file and the problem, for a file that is missing, is no npz, lacks an
    array, or holds arrays of wrong shape, NaN, too few points, or times that do not increase; and, where
    `system` is given, for another system's data.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    name = str(arrays.pop("system"))
    parts = {}
    for part_name in Dataset._fields:
        part = Trajectories(*(arrays[f"{part_name}_{field_name}"] for field_name in Trajectories._fields))
        _check_trajectories(f"{path}: {part_name}", part)
        parts[part_name] = part
    size = parts["train"].y.shape[-1]
    if parts["test"].y.shape[-1] != size:
        raise UserError(f"{path}: train has {size} coordinates but test has {parts['test'].y.shape[-1]}")
    if system is not None and name != system.name:
        raise UserError(f"{path}: holds data of {name!r}, not of {system.name!r}")
    if system is not None and size != 2 * system.dimension:
        raise UserError(f"{path}: has {size} coordinates, but {name} has {2 * system.dimension}")
    return Dataset(**parts), name


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    names = ["system", *(f"{part}_{name}" for part in Dataset._fields for name in Trajectories._fields)]
    try:
        # NumPy leaves a file open that turns out to be no archive, unless it is given one already open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise UserError(f"{path}: lacks the array {missing[0]!r}; write it with the simulate command")
            return {name: file[name] for name in names}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    # A single .npy array has no context manager: TypeError.
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        raise UserError(f"{path}: not a readable npz file; write it with the simulate command") from error


def _check_trajectories(where: str, part: Trajectories) -> None:
    for name, array in part._asdict().items():
        if array.dtype.kind not in "fiu":
            raise UserError(f"{where}_{name} must hold numbers, not {array.dtype}")
    if part.t.ndim != 1 or part.t.size < MIN_POINTS:
        raise UserError(f"{where}_t must be one row of at least {MIN_POINTS} times, not shape {part.t.shape}")
    shape = part.y.shape
    if part.y.ndim != 3 or shape[0] < 1 or shape[1] != part.t.size or shape[2] < 2 or shape[2] % 2:
        raise UserError(
            f"{where}_y must have shape [trajectories >= 1, {part.t.size} times, 2n coordinates], not {shape}"
        )
    for name in ("y_true", "dy"):
        if getattr(part, name).shape != shape:
            raise UserError(f"{where}_{name} must have the shape {shape} of y, not {getattr(part, name).shape}")
    for name, array in part._asdict().items():
        if not np.isfinite(array).all():
            raise UserError(f"{where}_{name} holds NaN or infinite values; remove those trajectories")
    if not (np.diff(part.t) > 0).all():
        raise UserError(f"{where}_t must increase strictly from one time to the next")


# ---- the measured pendulum


def real_pendulum_path(path: str | os.PathLike | None = None) -> Path:
    """The given path, or the default one below the folder that GRADIENT_FIELDS_DATA names."""
    if path is not None:
        return Path(path)
    folder = os.environ.get("GRADIENT_FIELDS_DATA")
    if not folder:
        raise UserError(
            "real_pendulum needs the measured data: give the path of real_pend_h_1.txt, or set "
            f"GRADIENT_FIELDS_DATA to a folder that holds {REAL_PENDULUM_FILE}"
        )
    return Path(folder) / REAL_PENDULUM_FILE


def load_real_pendulum(path: str | os.PathLike | None = None) -> Dataset:
    """The pendulum of Schmidt and Lipson (2009), [1, T, 2]: angle [rad] and angular velocity [rad/s].

    Derivatives are forward differences divided by the time between rows, which costs the last row. Of N such
    rows, as in the original, the first int(0.8 N) train, the next int(0.2 N) test, the rest trains too: 445
    and 110 for the published file. So train.t jumps over the 18.5 s of the test rows before its last row,
    besides the recording's own gaps (rows are 1/6 s apart, but 1/3 s eight times, 1/2 s twice). Windows for
    rollouts must take their times from t and leave out the long jump. The truth is unknown: y_true is y.
    Raises UserError for a file that is missing, garbled, too short, or holds NaN, infinities, or times that
    do not increase.
    """
    file = real_pendulum_path(path)
    rows = _read_table(file)
    t, states = rows[:, 1], rows[:, 2:4]
    dy = np.diff(states, axis=0) / np.diff(t)[:, None]
    n_rows = len(dy)
    # int(N (1 - 0.8)) rather than int(0.2 N): one row less for some N, as in the original.
    test_start, n_test = int(n_rows * 0.8), int(n_rows * (1 - 0.8))
    test = np.arange(test_start, test_start + n_test)
    train = np.delete(np.arange(n_rows), test)
    return Dataset(
        *(Trajectories(t[part], states[None, part], states[None, part], dy[None, part]) for part in (train, test))
    )


def _read_table(file: Path) -> np.ndarray:
    """Rows (trial, t, angle, angular velocity) of a text file whose header lines start with %."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; give the path of real_pend_h_1.txt") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file of four columns") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("%"):
            continue
        try:
            row = [float(word) for word in line.split()]
        except ValueError as error:
            raise UserError(f"{file}: line {number} is not four numbers: {line.strip()[:40]!r}") from error
        if len(row) != 4:
            raise UserError(f"{file}: line {number} has {len(row)} columns, not trial, t, angle, velocity")
        if not np.isfinite(row).all():
            raise UserError(f"{file}: line {number} holds NaN or an infinite value")
        if rows and row[0] != rows[-1][0]:
            raise UserError(f"{file}: line {number} starts a second trial; keep one trial in the file")
        if rows and row[1] <= rows[-1][1]:
            raise UserError(f"{file}: line {number}: the time does not increase")
        rows.append(row)
    if len(rows) < MIN_REAL_POINTS:
        raise UserError(f"{file}: has {len(rows)} rows of data; at least {MIN_REAL_POINTS} are needed")
    return np.array(rows)
