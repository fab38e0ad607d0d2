"""lib/checkpoint.py: what is restored is what was saved, byte for byte, or an older one, or a UserError."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lib.checkpoint import Checkpoints, checksums
from lib.process import UserError
from lib.shard import make_mesh, place
from lib.train import init_state

ROOT = Path(__file__).resolve().parents[1]


def state_at(step, *, width=3):
    """A state with every kind of leaf; its numbers tell its step."""
    params = {"dense": {"kernel": jnp.full((2, width), step / 7), "bias": jnp.arange(width) + 1e-3 * step}}
    state = init_state(params, optax.adam(1e-3), jax.random.key(step), ema=True)
    return state.replace(step=jnp.asarray(step, jnp.int32), extra={"counts": jnp.arange(300) * step})


def host(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    """A folder with the checkpoints of steps 10 and 20, to be copied."""
    folder = tmp_path_factory.mktemp("saves") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(10, state_at(10))
        checkpoints.save(20, state_at(20))
    return folder


@pytest.fixture
def folder(two_saves, tmp_path):
    return Path(shutil.copytree(two_saves, tmp_path / "checkpoints"))


def restore(folder, like=None, **options):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(state_at(0) if like is None else like, **options)


def test_newest_is_restored_as_it_was(folder):
    got = restore(folder)
    assert_same(got, state_at(20))
    assert jnp.issubdtype(got.key.dtype, jax.dtypes.prng_key)
    np.testing.assert_array_equal(jax.random.normal(got.key, (3,)), jax.random.normal(jax.random.key(20), (3,)))


def test_a_chosen_step(folder):
    assert_same(restore(folder, step=10), state_at(10))
    assert restore(folder, step=15) is None


def test_batches_of_keys_round_trip(tmp_path):
    keys = {"keys": jax.random.split(jax.random.key(3), 5)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, keys)
        checkpoints.wait()
        assert_same(checkpoints.restore(keys), keys)


def test_empty_folder(tmp_path):
    assert restore(tmp_path / "new") is None


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_at(step))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_the_state_may_change_right_after_save(tmp_path):
    """Saving is asynchronous, and training donates the arrays that were given to it."""
    state = {"x": jnp.arange(100_000.0)}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        overwrite(state)
        checkpoints.wait()
        got = checkpoints.restore({"x": jnp.zeros(100_000)})
    np.testing.assert_array_equal(got["x"], np.arange(100_000.0))


def test_saved_on_four_devices_restored_on_one(tmp_path):
    state = place(state_at(5), make_mesh(4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state)
    got = restore(tmp_path)
    assert_same(got, state_at(5))
    assert got.params["dense"]["bias"].devices() == {jax.devices()[0]}


def test_sums_of_arrays_do_not_depend_on_how_they_are_spread_and_notice_every_bit():
    rng = np.random.default_rng(0)
    arrays = {
        "float": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.bfloat16),
        "byte": jnp.asarray(rng.integers(0, 255, 12), jnp.uint8),
        "flag": jnp.asarray([True, False, True, True]),
        "number": jnp.int32(7),
    }
    kinds = dict.fromkeys((f"['{name}']" for name in arrays), "sum")
    whole = checksums(arrays, kinds)
    assert all(isinstance(value, str) for value in whole.values())
    specs = {name: P("data") if x.ndim else P() for name, x in arrays.items()}
    assert checksums(place(arrays, make_mesh(4), specs), kinds) == whole
    found = set()
    for i in range(48):
        for bit in range(32):
            bits = np.array(arrays["float"]).reshape(-1)
            bits.view(np.uint32)[i] ^= np.uint32(1 << bit)
            changed = arrays | {"float": jnp.asarray(bits).reshape(8, 6)}
            found.add(checksums(changed, kinds)["['float']"])
    assert whole["['float']"] not in found


# Damage


def damages(file):
    """Every way in which one file can be torn: (name, change)."""
    yield "deleted", file.unlink
    yield "cut in half", lambda: os.truncate(file, file.stat().st_size // 2)


def files_of(folder, step):
    return sorted(p.relative_to(folder) for p in (folder / str(step)).rglob("*") if p.is_file())


def restored_step(folder):
    """The step of what is restored, after checking that it is intact and that a damage was told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = restore(folder)
    step = int(got.step)
    assert_same(got, state_at(step))
    told = [str(w.message) for w in caught if "is damaged and skipped" in str(w.message)]
    return step, told


def test_any_torn_file_of_the_newest_gives_the_older_one(two_saves, tmp_path):
    assert len(files_of(two_saves, 20)) > 5
    unnoticed = []
    for i, name in enumerate(files_of(two_saves, 20)):
        for j, (damage, _) in enumerate(damages(two_saves / name)):
            folder = Path(shutil.copytree(two_saves, tmp_path / f"{i}.{j}"))
            dict(damages(folder / name))[damage]()
            step, told = restored_step(folder)
            if step == 20:  # Orbax keeps files that nobody reads; then all bytes are right, see restored_step
                unnoticed.append(f"{name} {damage}")
            else:
                assert told == [f"checkpoint {folder / '20'} is damaged and skipped"], (name, damage)
            shutil.rmtree(folder)
    needed = ("record/record", "state/_METADATA", "state/manifest.ocdbt", "state/d/")
    assert not any(name.removeprefix("20/").startswith(needed) for name in unnoticed), unnoticed


def test_any_flipped_byte_of_the_arrays_is_noticed(two_saves, tmp_path):
    """restored_step compares what comes back with what was saved: a wrong number cannot pass."""
    rng = np.random.default_rng(0)
    data = max((two_saves / name for name in files_of(two_saves, 20)), key=lambda file: file.stat().st_size)
    noticed = 0
    for i in range(8):
        folder = Path(shutil.copytree(two_saves, tmp_path / str(i)))
        file = folder / data.relative_to(two_saves)
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        noticed += restored_step(folder)[0] == 10
    assert noticed >= 4  # the other bytes are padding and names that are not read


def test_damaged_step_is_saved_anew(folder):
    damage_all(folder, 20)
    with Checkpoints(folder) as checkpoints:
        with pytest.warns(UserWarning, match="20 is damaged and skipped"):
            assert_same(checkpoints.restore(state_at(0)), state_at(10))
        assert checkpoints.steps() == [10]  # what a message calls the last good one
        checkpoints.save(15, state_at(15))
        checkpoints.save(20, state_at(20))
    assert_same(restore(folder), state_at(20))
    assert_same(restore(folder, step=15), state_at(15))


def test_all_damaged(folder):
    damage_all(folder, 10)
    damage_all(folder, 20)
    with pytest.warns(UserWarning, match="is damaged and skipped") as told:
        assert restore(folder) is None
    assert len(told) == 2


def damage_all(folder, step):
    for name in files_of(folder, step):
        os.truncate(folder / name, (folder / name).stat().st_size // 2)


def test_reading_deletes_nothing(folder):
    damage_all(folder, 20)
    before = sorted(folder.rglob("*"))
    with pytest.warns(UserWarning, match="damaged"):
        restore(folder)
    assert sorted(folder.rglob("*")) == before


def test_what_a_killed_save_leaves_is_ignored(folder):
    shutil.copytree(folder / "20", folder / "30.orbax-checkpoint-tmp")
    shutil.copytree(folder / "20", folder / "30.orbax-checkpoint-tmp-1234567890")
    (folder / "40").mkdir()  # and a folder without anything in it
    step, _ = restored_step(folder)
    assert step == 20
    with Checkpoints(folder) as checkpoints:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoints.restore(state_at(0))
        checkpoints.save(30, state_at(30))
    assert_same(restore(folder, step=30), state_at(30))


# Mistakes


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (lambda: state_at(0, width=4), r"\['dense'\]\['bias'\] is float32\[3\], expected float32\[4\]"),
        (lambda: state_at(0).replace(extra=()), r"\.extra\['counts'\] is int32\[300\], expected None"),
        (lambda: {"x": jnp.zeros(3)}, "is None, expected|expected None"),
        (
            lambda: state_at(0).replace(step=jnp.zeros((), jnp.float32)),
            r"\.step is int32\[\], expected float32\[\]",
        ),
    ],
)
def test_another_network_is_refused_by_the_name_of_an_array(folder, like, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        restore(folder, like())
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("parent", ["/proc", "file"])
def test_unwritable_folder(tmp_path, parent):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write checkpoints to") as error:
        Checkpoints(tmp_path / parent / "checkpoints")
    assert "\n" not in str(error.value) and "None" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


SAVES = """
import subprocess, sys
from pathlib import Path
import jax
from lib.checkpoint import Checkpoints
from lib.process import command

def saves(argv):
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    noise = lambda seed, n: {"x": jax.random.normal(jax.random.key(seed), (n,))}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, noise(1, 1000))
        checkpoints.wait()
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
        checkpoints.save(2, noise(2, 2**21 if kind == "full" else 1000))
        checkpoints.wait()

sys.exit(command(saves))
"""


@pytest.mark.parametrize("tiny_disk", [4], indirect=True)
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_the_older_checkpoint(tiny_disk, kind):
    try:
        done = subprocess.run(
            [sys.executable, "-c", SAVES, tiny_disk / "c", kind],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        subprocess.run(["mount", "-o", "remount,rw", tiny_disk], check=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot save") and done.stderr.count("\n") == 1, done.stderr
    assert kind == "full" or "Read-only file system" in done.stderr
    assert (tiny_disk / "c" / "1").is_dir() and not (tiny_disk / "c" / "2").exists()
    with Checkpoints(tiny_disk / "c") as checkpoints:
        got = checkpoints.restore({"x": jnp.zeros(1000)})
    np.testing.assert_array_equal(got["x"], jax.random.normal(jax.random.key(1), (1000,)))


def test_a_folder_that_is_deleted_meanwhile_is_made_again_or_told(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        save_and_wait(checkpoints, 1)
        shutil.rmtree(tmp_path / "c")
        save_and_wait(checkpoints, 2)
    got = restore(tmp_path / "c", {"x": jnp.zeros(4)})
    np.testing.assert_array_equal(got["x"], np.arange(4.0) + 2)


def save_and_wait(checkpoints, step):
    checkpoints.save(step, {"x": jnp.arange(4.0) + step})
    checkpoints.wait()


TORN = """
import sys
from pathlib import Path
import jax.numpy as jnp
from lib.checkpoint import Checkpoints
from lib.process import command

def read(argv):
    with Checkpoints(Path(argv[0])) as checkpoints:
        print(checkpoints.restore({name: jnp.zeros(100) for name in "abcdefgh"}))

sys.exit(command(read))
"""


def test_torn_checkpoint_prints_a_warning_and_no_traceback(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(20, {name: jnp.ones(100) for name in "abcdefgh"})
    for file in (tmp_path / "c" / "20" / "state" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    done = subprocess.run(
        [sys.executable, "-c", TORN, tmp_path / "c"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert "20 is damaged and skipped" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr
