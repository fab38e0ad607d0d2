"""lib/data.py: batches depend on (seed, step) alone, and errors are quick and name what to change."""

import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lib import data
from lib.process import UserError


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (10, 4), (7, 3), (5, 8), (6, 6)])
def test_every_epoch_has_every_row_once(rows, batch_size):
    epochs = 3 * batch_size  # whole epochs end on a whole batch then
    flat = data.shuffled(1, rows, batch_size, 0, epochs * rows // batch_size).reshape(epochs, rows)
    np.testing.assert_array_equal(np.sort(flat, axis=1), np.tile(np.arange(rows), (epochs, 1)))
    assert len({tuple(epoch) for epoch in flat}) > epochs // 2  # and every epoch is another permutation


def test_batches_run_on_across_the_end_of_an_epoch():
    rows, batch_size = 10, 4
    batches = data.shuffled(0, rows, batch_size, 0, 5)
    assert batches.shape == (5, 4)
    flat = batches.reshape(-1)
    assert set(flat[:rows]) == set(flat[rows:]) == set(range(rows))
    np.testing.assert_array_equal(batches[2], flat[8:12])  # two rows of each epoch


def test_batches_depend_on_seed_and_step_alone():
    whole = data.shuffled(3, 10, 4, 0, 30)
    for first, count in ((0, 1), (7, 5), (29, 1), (13, 17)):
        np.testing.assert_array_equal(data.shuffled(3, 10, 4, first, count), whole[first : first + count])
    assert (data.shuffled(4, 10, 4, 0, 30) != whole).any()


def test_rows_are_shuffled_evenly():
    first_of_epoch = [data.shuffled(0, 5, 5, epoch, 1)[0, 0] for epoch in range(500)]
    assert np.bincount(first_of_epoch, minlength=5).min() > 70  # 100 expected, standard deviation 9


def arrays(rows=11):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (rows, 3, 2), np.uint8),
        "label": rng.normal(size=rows).astype(np.float32),
    }


@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 6), (4, 9)])
def test_streamed_equals_resident_bit_for_bit(first, count):
    rows = arrays()
    resident = data.Resident(rows, 4, seed=5)
    streamed = data.Streamed(lambda i: jax.tree.map(lambda x: x[i], rows), 11, 4, seed=5)

    def batches(source):
        xs = source.per_step(first, count)
        return [source.select(source.constant, jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(count)]

    for a, b in zip(batches(resident), batches(streamed), strict=True):
        assert a["image"].shape == (4, 3, 2) and a["image"].dtype == np.uint8
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_rows_are_counted_behind_the_replica_axis():
    stacked = np.zeros((5, 11, 2), np.float32)
    indices = data.Resident(stacked, 4, row_axis=1).per_step(0, 20)
    np.testing.assert_array_equal(indices, data.shuffled(0, 11, 4, 0, 20))


def test_full_batch_is_the_same_in_every_step():
    source = data.FullBatch(arrays())
    np.testing.assert_array_equal(source.per_step(3, 4), [3, 4, 5, 6])
    assert source.select(source.constant, 3) is source.arrays


# Prepared data sets


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def fails_quickly(name, split):
    start = time.process_time()
    with pytest.raises(UserError) as error:
        data.load_tfds(name, split)
    assert time.process_time() - start < 1
    text = str(error.value)
    assert "\n" not in text
    return text


def test_variable_not_set(monkeypatch, no_network):
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    assert "set GRADIENT_FIELDS_DATA" in fails_quickly("mnist", "test")


def test_variable_names_nothing(monkeypatch, no_network, tmp_path):
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "absent"))
    text = fails_quickly("mnist", "test")
    assert str(tmp_path / "absent") in text and "GRADIENT_FIELDS_DATA" in text


@pytest.mark.parametrize("version", [None, "3.0.1"])
def test_absent_data_set(monkeypatch, no_network, tmp_path, version):
    (tmp_path / "tfds").mkdir()
    if version:
        (tmp_path / "tfds" / "mnist" / version).mkdir(parents=True)  # prepared, but interrupted
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    assert str(tmp_path / "tfds" / "mnist") in fails_quickly("mnist", "test")


def prepared(folder: Path, name: str) -> Path:
    path = folder / "tfds" / name
    if not path.is_dir():
        pytest.skip(f"{path} is absent: no prepared {name} here")
    return path


def test_wrong_split(data_folder, no_network):
    prepared(data_folder, "mnist")
    import tensorflow_datasets  # noqa: F401  (its import is not counted)

    assert fails_quickly("mnist", "validation") == "mnist has no split 'validation', only train, test"


@pytest.mark.parametrize("size", [None, 0, 100_000])
def test_a_missing_or_torn_shard_is_one_line(size, data_folder, no_network, monkeypatch, tmp_path):
    source = prepared(data_folder, "mnist")
    (version,) = source.iterdir()
    torn = tmp_path / "tfds" / "mnist" / version.name
    torn.mkdir(parents=True)
    for file in version.iterdir():
        if "array_record" not in file.name:
            (torn / file.name).symlink_to(file)
        elif size is not None:
            with file.open("rb") as whole:
                (torn / file.name).write_bytes(whole.read(size))
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    assert str(torn) in fails_quickly("mnist", "test")


def test_mnist(data_folder, no_network):
    prepared(data_folder, "mnist")
    rows = data.load_tfds("mnist", "test")
    assert rows["image"].shape == (10_000, 28, 28, 1) and rows["image"].dtype == np.uint8
    counts = np.bincount(rows["label"])  # published by its makers
    np.testing.assert_array_equal(counts, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
    assert 0.12 < rows["image"].mean() / 255 < 0.14
