"""python -m stylize train, apply and evaluate, whole, on small images; and the parts that training is made of."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import config as configs
from lib import images, shard
from lib.process import SIGNALS, UserError
from lib.run import RunFolder
from lib.shard import make_mesh
from stylize import data, training
from stylize.__main__ import main
from stylize.apply import Stylizer
from stylize.config import PRESETS, Config, Optim
from stylize.evaluate import _reached, border_contrast, spectral_peak
from stylize.flow import carry
from tests.stylize_cases import compiled_once, smooth, write_photos, write_vgg

pytestmark = pytest.mark.slow  # long; `make test-slow`

# A network with a memory, so that every term counts. The learning rate makes three steps visible in 256 levels.
TRAIN = (
    "train style.png other.png --photos photos --style-px 24 --network.width 2 --network.blocks 1 --network.memory "
    "--optim.steps 3 --optim.batch-size 4 --optim.crop-px 32 --optim.lr 0.1 --optim.identity 0.3 "
    "--photo-px 40 --optim.whole 0.34 "
    "--optim.temporal-weight 5 --checkpoint-every 1 --perception.tv-weight 0.1 --perception.weights vgg.safetensors "
    "--perception.style-layers relu1_1 relu2_1 --perception.content-layers relu2_1"
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with photographs, styles, weights, and the run R, of four devices."""
    desk = tmp_path_factory.mktemp("desk")
    write_photos(desk / "photos", (40, 50), (64, 40), (32, 96))
    images.write(desk / "style.png", smooth(3, 24, 32))
    images.write(desk / "other.png", smooth(4, 30, 20) ** 3)
    images.write(desk / "photo.png", smooth(5, 32, 48))
    write_vgg(desk)
    with pytest.MonkeyPatch.context() as patch, compiled_once(tmp_path_factory.mktemp("cache")):
        patch.chdir(desk)
        patch.setattr(shard, "start", lambda: None)
        patch.setattr(training, "_STEPS_PER_CALL", 1)
        main([*TRAIN.split(), "--out", "R"])
        yield desk


@pytest.fixture
def call(desk, in_process):
    """Runs a command in the desk; it must end well. Returns what it says."""
    here = in_process(main, desk)

    def call(line):
        code, out, err = here(line)
        assert code == 0, err
        return out

    return call


def params_of(run):
    folder, values = RunFolder.open(run, "stylize")
    return training.open_run(configs.from_json(Config, values), folder).params


def rows_of(run):
    return [{name: value for name, value in row.items() if name != "wall_s"} for row in RunFolder(run).metrics()]


def test_the_run_folder(desk):
    run = desk / "R"
    assert {path.name for path in run.iterdir()} >= {"config.json", "environment.json", "metrics.jsonl", "checkpoints"}
    assert sorted(path.name for path in (run / "styles").iterdir()) == ["other.png", "style.png"]
    assert {len(value) for value in json.loads((run / "data.json").read_text()).values()} == {64}
    rows, terms = rows_of(run), ("loss", "style", "content", "identity", "tv", "beyond", "temporal")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row.keys() == {"step", *(f"transfer.{term}" for term in terms)}
        assert all(np.isfinite(list(row.values()))), row
    assert all(max(row[f"transfer.{term}"] for row in rows) > 0 for term in terms)
    assert json.loads((run / "config.json").read_text())["config"]["styles"] == ["style.png", "other.png"]


def test_weights_and_strength_change_the_result(call, desk):
    folder, values = RunFolder.open(desk / "R", "stylize")
    stylize = Stylizer(training.open_run(configs.from_json(Config, values), folder), make_mesh())
    ways = {
        "first": ((1, 0), 1),
        "second": ((0, 1), 1),
        "both": ((1, 1), 1),
        "half": ((1, 1), 0.5),
        "weak": ((1, 1), 0),
    }
    made = {name: stylize(images.read(desk / "photo.png"), stylize.mix(*mix)) for name, mix in ways.items()}
    names = list(made)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert np.abs(made[one] - made[other]).mean() > 0.002, (one, other)
    for name, options in {"first": "", "half": "--weights 2 2 --strength 0.5"}.items():
        call(f"apply R photo.png --out {name}.png {options}")
        np.testing.assert_allclose(images.read(desk / f"{name}.png"), made[name], atol=1 / 127)


def test_evaluation(call, desk):
    out = call("evaluate R --photos photos --count 2 --size-px 32 --iterations 2 --style 1")
    numbers = json.loads((desk / "R" / "evaluation.json").read_text())
    for name in ("network", "photograph", "style_image", "noise"):
        for metric in (
            "objective",
            "style",
            "content",
            "tv",
            "ssim",
            "style_relu1_1",
            "style_relu2_1",
            "content_relu2_1",
        ):
            assert np.isfinite(numbers[f"{name}.{metric}"])
        terms = {term: numbers[f"{name}.{term}"] for term in ("style", "content", "tv")}
        total = PRESETS["small"].perception.style_weight * terms["style"] + terms["content"] + 0.1 * terms["tv"]
        assert numbers[f"{name}.objective"] == pytest.approx(total, rel=1e-4)
    assert numbers["photograph.ssim"] == pytest.approx(1, abs=1e-3) and numbers["photograph.content"] < 1e-3
    assert numbers["network.seconds"] > 0 and numbers["network.spectral_peak"] > 0
    assert numbers["network.border_contrast"] > 0
    assert 0 < numbers["photograph.half_contrast_ssim"] < 0.9
    assert numbers["network.half_contrast_ssim"] == pytest.approx(1, abs=0.01)  # instance norm takes contrast out
    for method in ("gatys", "lbfgs_noise", "adam_noise", "lbfgs_content"):
        assert 0 <= numbers[f"{method}.equal_iterations"] <= 2
        assert 0 <= numbers[f"{method}.never_reached"] <= 1
        assert numbers[f"{method}.evaluations"] >= 2 and numbers[f"{method}.seconds"] > 0
    assert 0 <= numbers["lbfgs_noise.equals_adam_iterations"] <= 3
    assert numbers["lbfgs_noise.equals_adam_share_of_seconds"] >= 0
    assert numbers["lbfgs_content.objective"] < numbers["photograph.objective"]
    assert numbers["lbfgs_noise.objective"] < numbers["noise.objective"]
    assert "2 photographs" in numbers["protocol"] and "style other" in numbers["protocol"]
    assert "gatys: as the published" in numbers["protocol"] and "equals_adam: " in numbers["protocol"]
    page = (desk / "R" / "report.html").read_text()
    assert page.count("<img") == 8 and "lbfgs_content" in page and numbers["protocol"].split(";")[0] in page
    assert "network" in out and "R/report.html" in out


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(desk, in_process, monkeypatch):
    here, logger = in_process(main, desk), RunFolder.logger

    def stopping(self, name, step):
        log = logger(self, name, step)

        def stop(step, metrics):
            log(step, metrics)
            signal.raise_signal(signal.SIGTERM)

        return stop

    monkeypatch.setattr(training, "_STEPS_PER_CALL", 1)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "logger", stopping)
        patch.setattr(SIGNALS, "code", None)
        code, _, err = here(f"{TRAIN} --out S")
        assert (code, err) == (75, "stopped: at step 1 of 3; --resume goes on from there\n")
    code, out, err = here("apply S photo.png")
    assert code == 2 and "is not finished; continue it with train --resume" in err
    code, out, err = here("train S --resume")
    assert (code, err) == (0, "") and "from step 1" in out
    jax.tree.map(np.testing.assert_array_equal, params_of(desk / "S"), params_of(desk / "R"))
    assert rows_of(desk / "S") == rows_of(desk / "R")
    shutil.rmtree(desk / "S")


def test_devices_do_not_change_the_training(call, desk, monkeypatch):
    """Nor the batches: the losses agree, each of which depends on the updates before."""
    monkeypatch.setattr(training, "_STEPS_PER_CALL", 1)
    call(f"{TRAIN} --out one --devices 1")
    for alone, spread in zip(rows_of(desk / "one"), rows_of(desk / "R"), strict=True):
        assert alone == pytest.approx(spread, rel=1e-4, abs=1e-5)


def test_as_many_devices_as_the_batch_divides_over():
    sizes = {size: Config(optim=Optim(batch_size=size)) for size in (1, 2, 3, 4, 6, 8)}
    assert [training.choose_mesh(config, None).size for config in sizes.values()] == [1, 2, 3, 4, 3, 4]
    assert training.choose_mesh(sizes[6], 2).size == 2
    with pytest.raises(UserError, match="3 photographs do not divide evenly over 2 devices"):
        training.choose_mesh(sizes[3], 2)


CONFIGS = {
    "one step": Config(optim=Optim("adam", steps=1)),
    "all warm-up": Config(optim=Optim(steps=3, warmup=0.99)),
    **PRESETS,
}


@pytest.mark.parametrize(("name", "config"), CONFIGS.items(), ids=list(CONFIGS))
def test_the_first_step_of_a_learning_rate(name, config):
    tx = training.optimizer(config)
    params = {"w": jnp.zeros(1)}
    updates, _ = jax.jit(tx.update)({"w": jnp.ones(1)}, tx.init(params), params)
    at_once = name in ("one step", "paper")
    np.testing.assert_allclose(updates["w"], -config.optim.lr if at_once else 0, rtol=1e-4)


def test_whole_squares_have_a_learning_rate_of_their_own():
    """Crops fall to nothing, whole squares begin anew; without any crops, the rate is that of one phase."""
    shared = Optim("adam", steps=100, lr=0.1, warmup=0.02)
    rates = lambda **options: _rates(dataclasses.replace(shared, **options))  # noqa: E731
    own = rates(whole=0.4, whole_lr=0.02)
    cosine = lambda n: (1 + np.cos(np.pi * np.arange(n) / n)) / 2  # noqa: E731
    np.testing.assert_allclose(own, [0.0, 0.05, *0.1 * cosine(58), *0.02 * cosine(40)], rtol=1e-3, atol=1e-6)
    one = rates(whole=0.4)
    np.testing.assert_array_equal(rates(whole=1.0, whole_lr=0.02), one)
    np.testing.assert_array_equal(rates(whole=0.0, whole_lr=0.02), one)
    with pytest.raises(UserError, match="optim.whole_lr must be positive"):
        Optim(whole_lr=0.0)


def _rates(optim):
    """The learning rates of all steps: Adam's updates of a gradient that does not change are as large."""
    tx = training.optimizer(Config(photo_px=256, optim=optim))
    params, gradient = jnp.zeros(1), jnp.full(1, 0.5)

    def step(state, _):
        update, state = tx.update(gradient, state, params)
        return state, -update[0]

    return np.asarray(jax.lax.scan(step, tx.init(params), length=optim.steps)[1])


def test_muon_moves_all_directions_of_a_kernel_equally():
    config = Config(optim=Optim("muon", steps=1, lr=0.5))
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 6))
    tx = training.optimizer(config)
    params = {"kernel": kernel}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    found = np.linalg.svd(np.asarray(updates["kernel"]).reshape(18, 6), compute_uv=False)
    before = np.linalg.svd(np.asarray(kernel).reshape(18, 6), compute_uv=False)
    # Orthogonal up to the five Newton-Schulz iterations, and about as large as Adam's steps.
    assert found.min() > 0.6 * found.max() and before.min() < 0.5 * before.max()
    assert np.sqrt(np.mean(updates["kernel"] ** 2)) == pytest.approx(0.2 * 0.5, rel=0.3)


def test_squares_cover_the_photograph(tmp_path):
    wide, tall = smooth(0, 40, 130), smooth(1, 97, 40)
    paths = [images.write(tmp_path / f"{k}.png", image) for k, image in enumerate((wide, tall))]
    found = data.squares(paths, 40)
    assert found.shape == (4 + 3, 40, 40, 3) and found.dtype == np.uint8
    for left, square in zip((0, 30, 60, 90), found[:4], strict=True):
        np.testing.assert_array_equal(square, images.to_uint8(wide[:, left : left + 40]))
    for top, square in zip((0, 28, 57), found[4:], strict=True):
        np.testing.assert_array_equal(square, images.to_uint8(tall[top : top + 40]))
    small = images.write(tmp_path / "2.png", smooth(2, 5, 8))
    assert data.squares([small], 40).shape == (2, 40, 40, 3)
    thin = images.write(tmp_path / "thin.png", smooth(0, 1, 4000))
    assert data.squares([thin], 40).shape == (8, 40, 40, 3)


def test_crops_are_parts_of_the_square_in_range():
    square = np.arange(40 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 40, 3)
    square[..., 1], square[..., 2] = np.arange(40)[:, None], np.arange(40)
    keys = jax.random.split(jax.random.key(0), 64)
    crops = np.asarray(jax.jit(jax.vmap(lambda key: data.crop(square, key, 32)))(keys))
    levels = np.uint8(np.round((crops + 1) * 127.5))
    mirrored = tops = 0
    for crop in levels:
        top, left = crop[0, 0, 1], crop[0, :, 2].min()
        expected = square[top : top + 32, left : left + 32]
        flipped = crop[0, 0, 2] != left
        np.testing.assert_array_equal(crop, expected[:, ::-1] if flipped else expected)
        mirrored, tops = mirrored + flipped, tops | 1 << int(top)
    assert 20 < mirrored < 44 and tops == 2**9 - 1


def test_a_camera_sees_as_frames_are_carried():
    """By nothing, by whole pixels, and as OpenCV does it in between (to a 32nd of a pixel)."""
    image, see = smooth(0, 12, 17), jax.jit(data.seen_by)
    same, inside = see(data.still(), image)
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(inside, 1)
    moved, inside = map(np.asarray, see(data.Camera(jnp.ones(()), jnp.array([2.0, -3.0])), image))
    np.testing.assert_allclose(moved[:10, 3:], image[2:, :14], atol=1e-6)
    expected = np.zeros((12, 17))
    expected[:10, 3:] = 1
    np.testing.assert_array_equal(inside, expected)
    camera = data.Camera(jnp.float32(0.75), jnp.array([1.25, -0.5]))
    rows, columns = np.float32(np.mgrid[:12, :17])
    flow = np.stack([-0.25 * columns - 0.5, -0.25 * rows + 1.25], -1)
    np.testing.assert_allclose(see(camera, image)[0].clip(-1, 1), carry(image, flow), atol=1e-5)


def test_a_camera_behind_a_camera():
    image = smooth(0, 40, 40)
    first = data.Camera(jnp.float32(0.7), jnp.array([5.7, 8.2]))
    second = data.Camera(jnp.float32(1.03), jnp.array([-4.0, 2.5]))
    inner = lambda x: np.asarray(x)[4:-4, 4:-4]  # noqa: E731
    twice = inner(data.seen_by(second, data.seen_by(first, image)[0])[0])
    off = np.abs(inner(data.seen_by(second.of(first), image)[0]) - twice).mean()
    assert off < 0.01 < 5 * off < np.abs(inner(data.seen_by(first.of(second), image)[0]) - twice).mean()


def test_the_camera_shifts_and_zooms_a_little():
    size = 50
    keys = jax.random.split(jax.random.key(0), 2000)
    zoom, shift = map(np.asarray, jax.jit(jax.vmap(lambda key: data.moving(key, size)))(keys))
    assert 0.95 <= zoom.min() < 0.97 and 1.03 < zoom.max() <= 1.05
    centre = (size - 1) / 2
    shift = zoom[:, None] * centre + shift - centre  # of the middle
    assert 0.07 * size < np.abs(shift).max() <= 0.0801 * size and np.abs(shift.mean(0)).max() < 0.02 * size
    assert np.median(np.abs(shift)) < 0.02 * size  # slow most of the time


def test_a_film_is_followed(monkeypatch):
    """What was made of the frame before lies where its photograph does, and the mask tells where that is known."""
    monkeypatch.setattr(data, "film_noise", lambda key, size: jnp.zeros((size, size, 3)))
    photo = jnp.stack([smooth(k, 48, 48) for k in range(60)])
    seen = []

    def inverted(x, before):
        seen.append(before.shape)
        return -x

    clean, noisy, before = training._film(inverted, photo, 5, jax.random.split(jax.random.key(0), 60))
    np.testing.assert_array_equal(clean, noisy)
    mask = before[..., 3:]
    assert set(np.unique(mask)) == {0, 1} and seen == [(60, 48, 48, 4)]
    cuts = np.mean(np.max(mask, (1, 2, 3)) == 0)
    assert 0 < cuts < 0.3 and 0.3 < np.mean(mask) < 0.9
    off = np.abs(before[..., :3] + mask * clean)
    moved = np.mean(np.abs(clean - photo), (1, 2, 3))
    assert np.mean(off) < 0.02 and 20 <= np.sum(moved == 0) <= 40  # in half of them the camera stands still
    assert np.mean(moved[moved > 0]) > 0.05


def test_noise_of_films():
    keys = jax.random.split(jax.random.key(0), 400)
    noise = np.asarray(jax.jit(jax.vmap(lambda key: data.film_noise(key, 30)))(keys))
    assert noise.shape == (400, 30, 30, 3) and abs(noise.mean()) < 1e-3
    spread = noise.std((1, 2, 3))
    assert spread.min() < 0.002 and 0.045 < spread.max() < 0.055 and spread.mean() == pytest.approx(0.025, rel=0.1)
    pairs = noise[:, 1:] * noise[:, :-1]  # half of it is the same within a block of four
    within, across = pairs[:, [0, 1, 2]].mean(), pairs[:, [3, 7, 11]].mean()
    assert within == pytest.approx((noise**2).mean() / 2, rel=0.1) and abs(across) < 0.1 * within


def test_styles_are_made_smaller_but_never_larger(tmp_path):
    path = str(images.write(tmp_path / "style.png", smooth(0, 20, 40)))
    assert [data.load_styles([path], longest)[0].shape for longest in (10, 40, 80, None)] == [
        (5, 10, 3), (20, 40, 3), (20, 40, 3), (20, 40, 3)
    ]  # fmt: skip


def noises(count, size):
    rng = np.random.default_rng(0)
    return [np.float32(rng.uniform(-1, 1, (size, size, 3))) for _ in range(count)]


def test_a_checkerboard_stands_out_of_the_spectrum():
    plain = {"noise": noises(8, 64), "smooth": [smooth(k, 64, 64) for k in range(8)]}
    rows, columns = np.mgrid[:64, :64]
    for name, pictures in plain.items():
        assert 0.5 < spectral_peak(pictures) < 2, name
        for period in (2, 4):
            pattern = (2 * rows // period + 2 * columns // period) % 2
            marked = [x + 0.3 * (pattern[..., None] - 0.5) for x in pictures]
            assert spectral_peak(marked) > 3, name
    assert 0.5 < spectral_peak([x[:63, :61] for x in plain["noise"]]) < 2


def test_a_frame_raises_the_contrast_of_the_border():
    pictures = noises(4, 64)
    assert border_contrast(pictures) == pytest.approx(1, abs=0.05)
    framed = [x.copy() for x in pictures]
    for x in framed:
        x[:4] = x[-4:] = 3
        x[:, :4] = x[:, -4:] = 3
    assert border_contrast(framed) > 1.5


def test_the_iteration_at_which_an_objective_is_reached():
    traces = np.tile([9.0, 5.0, 3.0, 4.0, 2.0], (5, 1))
    np.testing.assert_array_equal(_reached(traces, np.array([10, 5, 3.5, 2, 1])), [0, 1, 2, 4, 5])
    traces[:, 3:] = np.nan
    np.testing.assert_array_equal(_reached(traces, np.array([10, 5, 3.5, 2, 1])), [0, 1, 2, 5, 5])
