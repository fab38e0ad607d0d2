"""Simulation, npz files, the measured pendulum and the rendered one: what they give and what they refuse."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnn.data import (
    Dataset,
    Trajectories,
    load_npz,
    load_real_pendulum,
    real_pendulum_path,
    save_npz,
    simulate,
    simulate_films,
    simulate_seeds,
)
from hnn.pixels import EXTENT, PIVOT_BELOW_TOP, ROD_LENGTH, ROD_RADIUS, SIZE_PX, render
from hnn.systems import SYSTEMS
from lib.process import UserError

SPRING = SYSTEMS["spring"]
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def spring():
    return simulate(SPRING, KEY)


# ---- simulation


def test_spring_data_are_the_exact_solution_with_noise(spring):
    assert spring.train.y.shape == spring.test.y.shape == (25, 30, 2)
    np.testing.assert_allclose(spring.train.t, np.linspace(0, 3, 30))
    for part in spring:
        assert {array.dtype for array in part} == {np.dtype("float64")}
        q0, p0 = part.y_true[:, :1, 0], part.y_true[:, :1, 1]
        cos, sin = np.cos(2 * part.t), np.sin(2 * part.t)
        exact = np.stack([q0 * cos + p0 * sin, p0 * cos - q0 * sin], axis=-1)
        np.testing.assert_allclose(part.y_true, exact, atol=1e-8)
        np.testing.assert_allclose(part.dy, 2 * np.stack([exact[..., 1], -exact[..., 0]], axis=-1), atol=2e-8)
        noise = part.y - part.y_true
        assert abs(noise.std() - 0.1) < 0.01
        assert abs(noise.mean()) < 0.01


def test_the_same_key_gives_the_same_data_and_another_key_other_data(spring):
    again = simulate(SPRING, KEY)
    jax.tree.map(np.testing.assert_array_equal, spring, again)
    assert not np.allclose(simulate(SPRING, jax.random.key(4)).train.y, spring.train.y)


@pytest.mark.slow
def test_fewer_trajectories_are_the_first_ones(spring):
    few = simulate(SPRING, KEY, n_trajectories=6)
    assert len(few.train.y) == len(few.test.y) == 3
    joined = np.concatenate([few.train.y, few.test.y])
    np.testing.assert_allclose(joined, spring.train.y[:6], atol=1e-7)


@pytest.mark.slow
def test_seeds_get_a_leading_axis(spring):
    keys = jnp.stack([jax.random.key(1), KEY])
    seeds = simulate_seeds(SPRING, keys)
    assert seeds.train.y.shape == (2, 25, 30, 2)
    assert seeds.train.t.shape == (30,)
    np.testing.assert_allclose(seeds.train.y[1], spring.train.y, atol=1e-9)
    np.testing.assert_allclose(seeds.test.dy[1], spring.test.dy, atol=1e-9)


@pytest.mark.slow
def test_two_body_tests_on_its_first_fifth_without_noise():
    data = simulate(SYSTEMS["two_body"], KEY, n_trajectories=10)
    assert data.train.y.shape == (8, 50, 8)
    assert data.test.y.shape == (2, 50, 8)
    np.testing.assert_array_equal(data.train.y, data.train.y_true)
    with jax.enable_x64(True):
        first = SYSTEMS["two_body"].sample_initial(jax.random.split(KEY)[0], 2)
    np.testing.assert_allclose(data.test.y[:, 0], first, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_trajectories": 1}, "n_trajectories"),
        ({"n_points": 2}, "n_points"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"noise_std": float("nan")}, "noise_std"),
        ({"t_span": (1.0, 1.0)}, "t_span"),
        ({"t_span": (0.0, float("inf"))}, "t_span"),
    ],
)
def test_sizes_that_make_no_data_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        simulate(SPRING, KEY, **options)


def test_a_recording_cannot_be_simulated():
    with pytest.raises(UserError, match="recording"):
        simulate(SYSTEMS["real_pendulum"], KEY)


# ---- npz files


@pytest.fixture
def arrays(spring):
    return {
        "system": np.array("spring"),
        **{f"{part}_{k}": v for part, ts in spring._asdict().items() for k, v in ts._asdict().items()},
    }


def refusal(load, path):
    """The one-line message with which a file is refused."""
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_npz_round_trip(tmp_path, spring):
    path = tmp_path / "data.npz"
    save_npz(path, spring, "spring")
    loaded, name = load_npz(path, SPRING)
    assert name == "spring"
    jax.tree.map(np.testing.assert_array_equal, spring, loaded)
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def test_npz_of_another_system_is_refused(tmp_path, spring):
    path = tmp_path / "data.npz"
    save_npz(path, spring, "spring")
    assert "'spring', not of 'pendulum'" in refusal(lambda p: load_npz(p, SYSTEMS["pendulum"]), path)
    save_npz(path, spring, "two_body")
    assert "2 coordinates" in refusal(lambda p: load_npz(p, SYSTEMS["two_body"]), path)


def test_unwritable_folder_is_one_line(tmp_path, spring):
    with pytest.raises(UserError, match="cannot be written"):
        save_npz(tmp_path / "no_such_folder" / "data.npz", spring, "spring")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="cannot be written"):
        save_npz(tmp_path / "file" / "data.npz", spring, "spring")
    assert (tmp_path / "file").read_text() == "kept"


def with_nan(array):
    array = array.copy()
    array[0, 0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_y", None, "lacks the array 'train_y'"),
        ("system", None, "lacks the array 'system'"),
        ("train_y", with_nan, "train_y holds NaN"),
        ("test_dy", lambda a: np.where(a > 0, np.inf, a), "test_dy holds NaN or infinite"),
        ("train_y", lambda a: a[..., 0], "train_y must have shape"),
        ("train_y", lambda a: a[..., :1], "train_y must have shape"),
        ("train_y", lambda a: a[:0], "train_y must have shape"),
        ("train_y", lambda a: a[:, :10], "train_y must have shape"),
        ("test_y_true", lambda a: a[:5], "test_y_true must have the shape"),
        ("train_dy", lambda a: a[:, :5], "train_dy must have the shape"),
        ("train_t", lambda a: a[:2], "at least 3 times"),
        ("train_t", lambda a: a[None], "at least 3 times"),
        ("train_t", lambda a: a[::-1], "increase strictly"),
        ("train_t", lambda a: np.zeros_like(a), "increase strictly"),
        ("train_t", lambda a: np.where(a == 0, np.nan, a), "train_t holds NaN"),
        ("train_y", lambda a: a.astype(str), "must hold numbers"),
    ],
)
def test_npz_with_bad_arrays_is_refused(tmp_path, arrays, name, change, message):
    path = tmp_path / "bad.npz"
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    np.savez(path, **arrays)
    assert message in refusal(load_npz, path)


def test_npz_whose_parts_disagree_is_refused(tmp_path, arrays):
    path = tmp_path / "bad.npz"
    for name in ("test_y", "test_y_true", "test_dy"):
        arrays[name] = np.tile(arrays[name], 2)
    np.savez(path, **arrays)
    assert "train has 2 coordinates but test has 4" in refusal(load_npz, path)


def test_files_that_are_no_npz_are_refused(tmp_path, arrays):
    assert "no such file" in refusal(load_npz, tmp_path / "missing.npz")
    assert "not a readable npz" in refusal(load_npz, tmp_path)
    whole = tmp_path / "whole.npz"
    np.savez_compressed(whole, **arrays)
    content = whole.read_bytes()
    middle = len(content) // 2
    for name, text in (
        ("empty", b""),
        ("text", b"t,y\n0,1\n"),
        ("truncated", content[:middle]),
        ("garbled", content[:500] + bytes(200) + content[700:]),
        ("pickle", pickle.dumps({"train_y": 1})),
    ):
        path = tmp_path / f"{name}.npz"
        path.write_bytes(text)
        assert "not a readable npz" in refusal(load_npz, path), name
    np.save(tmp_path / "single.npy", np.zeros(3))
    assert "not a readable npz" in refusal(load_npz, tmp_path / "single.npy")


def test_pickled_arrays_are_never_loaded(tmp_path, arrays):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    arrays["train_y"] = np.array([Trap()], dtype=object)
    path = tmp_path / "trap.npz"
    np.savez(path, **arrays)
    assert "not a readable npz" in refusal(load_npz, path)


# ---- the measured pendulum


def pendulum_text(n=60, change=None):
    t = 5 + np.arange(n) / 6
    lines = [f"  0.0  {a:.8e}  {np.sin(2 * a):.8e}  {2 * np.cos(2 * a):.8e} " for a in t]
    if change is not None:
        row, text = change
        lines[row] = text
    return "%o v\n" + "\n".join(lines) + "\n"


def test_real_pendulum_splits_and_differentiates_as_the_original(tmp_path):
    path = tmp_path / "pendulum.txt"
    path.write_text(pendulum_text(556))
    data = load_real_pendulum(path)
    assert data.train.y.shape == (1, 445, 2)
    assert data.test.y.shape == (1, 110, 2)
    np.testing.assert_allclose(data.test.t, 5 + np.arange(444, 554) / 6)
    np.testing.assert_allclose(data.train.t[[0, 443, 444]], 5 + np.array([0, 443, 554]) / 6)
    np.testing.assert_allclose(data.train.y[0, :, 0], np.sin(2 * data.train.t), atol=1e-6)
    expected = (np.sin(2 * (data.test.t + 1 / 6)) - np.sin(2 * data.test.t)) * 6
    np.testing.assert_allclose(data.test.dy[0, :, 0], expected, atol=1e-6)


def test_the_published_recording(data_folder):
    path = real_pendulum_path()
    if not path.is_file():
        pytest.skip(f"no {path.name} in {data_folder}")
    data = load_real_pendulum()
    assert data.train.y.shape == (1, 445, 2)
    assert data.test.y.shape == (1, 110, 2)
    np.testing.assert_allclose(data.train.y[0, 0], [1.1383885512243586, 0.9197795905867725])
    steps, counts = np.unique(np.round(np.diff(data.train.t), 2), return_counts=True)
    np.testing.assert_allclose(steps, [0.17, 0.33, 0.5, 18.5])
    np.testing.assert_array_equal(counts, [433, 8, 2, 1])
    np.testing.assert_allclose(np.diff(data.test.t), 1 / 6, atol=1e-6)
    # The recorded velocity is the derivative of the recorded angle.
    assert np.corrcoef(data.train.dy[0, :, 0], data.train.y[0, :, 1])[0, 1] > 0.9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pendulum_text(20), "20 rows"),
        ("", "0 rows"),
        (pendulum_text(60, (10, "0 6.6 nan 1.0")), "line 12 holds NaN"),
        (pendulum_text(60, (10, "0 6.6 1.0 inf")), "line 12 holds NaN or an infinite"),
        (pendulum_text(60, (10, "0 6.6 1.0")), "line 12 has 3 columns"),
        (pendulum_text(60, (10, "0 6.6 one 1.0")), "line 12 is not four numbers"),
        (pendulum_text(60, (10, "0 5.0 1.0 1.0")), "line 12: the time does not increase"),
        (pendulum_text(60, (10, "1 6.6 1.0 1.0")), "line 12 starts a second trial"),
        (b"\x80\x04\x95garbled\xff" * 20, "not a text file"),
    ],
)
def test_bad_recordings_are_refused(tmp_path, content, message):
    path = tmp_path / "pendulum.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(load_real_pendulum, path)


def test_a_missing_recording_says_how_to_give_its_path(tmp_path, monkeypatch):
    assert "no such file" in refusal(load_real_pendulum, tmp_path / "none.txt")
    assert "cannot be read" in refusal(load_real_pendulum, tmp_path)
    monkeypatch.delenv("GRADIENT_FIELDS_DATA", raising=False)
    with pytest.raises(UserError, match="GRADIENT_FIELDS_DATA"):
        load_real_pendulum()
    monkeypatch.setenv("GRADIENT_FIELDS_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"real_pend_h_1\.txt: no such file"):
        load_real_pendulum()


# ---- pixels


@pytest.mark.slow
def test_films_show_the_true_angle():
    data = simulate_films(KEY, n_trajectories=5)
    assert data.train.frames.shape == (4, 103, 28, 28)
    assert data.test.frames.shape == (1, 103, 28, 28)
    assert data.train.frames.dtype == np.uint8
    np.testing.assert_allclose(np.diff(data.train.t), 0.1)
    frame, angle = data.test.frames[0, 40] / 255, data.test.y[0, 40, 0]
    np.testing.assert_allclose(frame, render(jnp.float32(angle)), atol=0.003)
    again = simulate_films(KEY, n_trajectories=5)
    np.testing.assert_array_equal(again.train.frames, data.train.frames)


@pytest.mark.parametrize("theta", [0.1, 0.3, -0.52])
def test_the_rod_has_its_place_its_size_and_smooth_edges(theta):
    image = np.asarray(render(jnp.float32(theta)))
    assert image.shape == (28, 28)
    assert image.min() == 0
    assert 0.9 < image.max() <= 1
    assert ((image > 0.1) & (image < 0.9)).sum() > 20
    pixel = EXTENT / SIZE_PX
    area = image.sum() * pixel**2
    assert area == pytest.approx(2 * ROD_LENGTH * ROD_RADIUS + np.pi * ROD_RADIUS**2, rel=0.05)
    centres = (np.arange(SIZE_PX) + 0.5) * pixel
    x = (image.sum(0) @ centres) / image.sum() - EXTENT / 2
    down = (image.sum(1) @ centres) / image.sum() - PIVOT_BELOW_TOP
    # The centre of the rod: half its length from the pivot, in the direction of theta.
    np.testing.assert_allclose([x, down], [0.5 * np.sin(theta), 0.5 * np.cos(theta)], atol=0.01)


@pytest.mark.slow
def test_opposite_angles_are_mirror_images_and_the_render_is_differentiable():
    np.testing.assert_allclose(render(jnp.float32(0.4)), np.asarray(render(jnp.float32(-0.4)))[:, ::-1], atol=1e-5)
    with jax.enable_x64(True):
        derivative = np.asarray(jax.jacfwd(render)(0.3))
        numeric = np.asarray(render(0.3 + 1e-6) - render(0.3 - 1e-6)) / 2e-6
    np.testing.assert_allclose(derivative, numeric, atol=1e-4)
    assert np.abs(derivative).max() > 1


def test_data_sets_are_pytrees(spring):
    doubled = jax.tree.map(lambda array: 2 * array, spring)
    assert isinstance(doubled, Dataset)
    assert isinstance(doubled.train, Trajectories)
