"""stylize/optimize.py: scales, both optimisers, and going on after a stop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lib.images import GREY_LEVEL
from lib.process import UserError
from lib.run import RunFolder
from lib.shard import make_mesh
from stylize.config import BASELINES, Optimization, Perception
from stylize.optimize import (
    PUBLISHED_SCALE,
    Task,
    compile_trace,
    noise,
    objective,
    optimize,
    scales,
    targets,
    transformation,
)
from tests.stylize_cases import compiled_once, smooth, tiny_network

pytestmark = pytest.mark.slow  # long; `make test-slow`

PERCEPTION = Perception()
CONTENT, STYLE, OTHER = smooth(0, 24, 36), smooth(1, 40, 28), smooth(2, 30, 30)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("programs")):
        yield


def torch_lbfgs(gradient, x, count, memory):
    """torch.optim.LBFGS, lr 1, without a line search, in NumPy: [count + 1, *x.shape]."""
    pairs, scale, last, path = [], 1.0, None, [x]
    for _ in range(count):
        g = gradient(x)
        if last is not None:
            s, y = x - last[0], g - last[1]
            if np.vdot(s, y) > 0:
                pairs, scale = [*pairs, (s, y)][-memory:], np.vdot(s, y) / np.vdot(y, y)
        q, taken = g, []
        for s, y in pairs[::-1]:
            taken.append(np.vdot(s, q) / np.vdot(s, y))
            q = q - taken[-1] * y
        q = scale * q
        for (s, y), a in zip(pairs, taken[::-1], strict=True):
            q = q + (a - np.vdot(y, q) / np.vdot(s, y)) * s
        if last is None:
            q = g * GREY_LEVEL / np.abs(g).sum()
        last, x = (x, g), x - q
        path.append(x)
    return np.stack(path)


def run(folder, options, task, perception=PERCEPTION, devices=1):
    run = RunFolder.start(folder, "stylize.image", {}, resume=(folder / "config.json").exists())
    with run:
        image = optimize(tiny_network(), perception, options, task, run, make_mesh(devices), seed=0, say=lambda t: None)
    return image, run.metrics()


def test_scales_double_up_to_the_size_of_the_image():
    assert scales(768, 1024, 256) == [(192, 256), (384, 512), (768, 1024)]
    assert scales(481, 321, 256) == [(481, 321)]
    assert scales(1, 2002, 256) == [(1, 500), (1, 1001), (1, 2002)]


@pytest.mark.parametrize(("optimizer", "devices"), [("lbfgs", 4), ("adam", 1), ("adam", 4)])
def test_the_objective_falls_and_the_size_stays(tmp_path, optimizer, devices):
    options = Optimization(optimizer, iterations=(12,))
    image, rows = run(tmp_path / "run", options, Task(CONTENT, [STYLE], [1.0]), devices=devices)
    assert image.shape == CONTENT.shape and np.abs(image).max() <= 1
    losses = [row["36px.loss"] for row in rows]
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0]
    assert sum(row["36px.evaluations"] for row in rows) >= 12


def test_without_style_noise_becomes_the_activations_of_the_photograph(tmp_path):
    task = Task(CONTENT, [STYLE], [1.0])
    _, rows = run(tmp_path / "run", Optimization(iterations=(40,), start="noise"), task, Perception(style_weight=0))
    losses = [row["36px.loss"] for row in rows]
    assert losses[-1] < 0.05 * losses[0]


def test_the_published_iterations_are_those_of_torch():
    """Beside the two loops of Nocedal and Wright (algorithm 7.4) in NumPy; the first step is so small that single
    precision would decide what comes next."""
    network, mesh, count = tiny_network(), make_mesh(1), 6
    with jax.enable_x64(True):
        batch = targets(network, network.params, Task(CONTENT, [STYLE], [1.0]), CONTENT.shape[:2], mesh, tiled=False)
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), batch)
        start = noise(0, CONTENT.shape[:2]).astype(np.float64)
        image, values, evaluations = compile_trace(network, PERCEPTION, BASELINES["gatys"], mesh, count)(start, batch)
        loss = objective(network, PERCEPTION, mesh)
        gradient = jax.jit(jax.grad(lambda x: loss(x[None], batch, jax.random.key(0))[0]))
        path = torch_lbfgs(lambda x: PUBLISHED_SCALE["relative"] * np.asarray(gradient(x)), start, count, 100)
        shown = loss(jnp.clip(path[-1], -1, 1)[None], batch, jax.random.key(0))[0]
    assert np.all(np.asarray(evaluations) == 1) and np.abs(path[1] - start).sum() == pytest.approx(GREY_LEVEL)
    assert np.abs(path[-1] - start).mean() > GREY_LEVEL
    np.testing.assert_allclose(image[0], path[-1], atol=1e-6)
    np.testing.assert_allclose(values[-1], shown, rtol=1e-6)


def test_coarse_to_fine(tmp_path):
    options = Optimization("adam", iterations=(3, 2), smallest_px=16)
    image, rows = run(tmp_path / "run", options, Task(smooth(0, 48, 64), [STYLE], [1.0]))
    assert image.shape == (48, 64, 3)
    counts = {name: sum(f"{name}.loss" in row for row in rows) for name in ("16px", "32px", "64px")}
    assert counts == {"16px": 3, "32px": 2, "64px": 2}


def test_in_tiles_as_at_once(tmp_path):
    task = Task(smooth(0, 48, 64), [STYLE], [1.0])
    whole, _ = run(tmp_path / "whole", Optimization("adam", iterations=(3,)), task)
    tiled, _ = run(tmp_path / "tiled", Optimization(iterations=(3,), tile_px=64), task)
    np.testing.assert_allclose(tiled, whole, atol=1e-3)
    masks = np.ones((1, 48, 64), np.float32)
    with pytest.raises(UserError, match="regions are not possible in tiles"):
        run(tmp_path / "masks", Optimization(tile_px=64), Task(task.content, [STYLE], [1.0], masks))


def test_several_styles_by_weight_and_by_region(tmp_path):
    options = Optimization("adam", iterations=(2,))
    left = np.zeros((24, 36), np.float32)
    left[:, :18] = 1
    tasks = {
        "first": Task(CONTENT, [STYLE, OTHER], [1.0, 0.0]),
        "both": Task(CONTENT, [STYLE, OTHER], [1.0, 1.0]),
        "regions": Task(CONTENT, [STYLE, OTHER], [1.0, 1.0], np.stack([left, 1 - left])),
        "alone": Task(CONTENT, [STYLE], [1.0]),
    }
    found = {name: run(tmp_path / name, options, task)[0] for name, task in tasks.items()}
    np.testing.assert_allclose(found["first"], found["alone"], atol=1e-5)
    assert np.abs(found["both"] - found["alone"]).max() > 0.01
    assert np.abs(found["regions"] - found["both"]).max() > 0.01


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, optimizer):
    task = Task(CONTENT, [STYLE], [1.0])
    short, whole = Optimization(optimizer, iterations=(5,)), Optimization(optimizer, iterations=(9,))
    expected, rows = run(tmp_path / "whole", whole, task)
    run(tmp_path / "stopped", short, task)
    image, again = run(tmp_path / "stopped", whole, task)
    np.testing.assert_array_equal(image, expected)
    assert [row["36px.loss"] for row in again] == [row["36px.loss"] for row in rows]


def test_an_image_that_is_too_small_for_the_layers(tmp_path):
    with pytest.raises(UserError, match="an image of 3 x 36 pixels is too small: 4 are needed"):
        run(tmp_path / "run", Optimization(iterations=(1,)), Task(smooth(0, 3, 36), [STYLE], [1.0]))


def test_a_style_that_is_too_small_is_enlarged(tmp_path):
    image, _ = run(tmp_path / "run", Optimization("adam", iterations=(1,)), Task(CONTENT, [smooth(1, 1, 50)], [1.0]))
    assert image.shape == CONTENT.shape and np.isfinite(image).all()


def test_lbfgs_without_a_line_search_leaves_out_what_bends_down():
    """A sum of cosines is convex in its valleys alone; plain optax goes astray from here."""
    start, wave = np.array([2.5, -1.7, 0.8]), np.array([1.0, 1.5, 0.7])
    tx = transformation(Optimization(line_search=False, memory=20))
    expected = torch_lbfgs(lambda x: wave * np.sin(wave * x), start, 12, 20)
    x, path = jnp.asarray(start, jnp.float32), [start]
    state = tx.init(x)
    for _ in range(12):
        updates, state = tx.update(wave * jnp.sin(wave * x) / PUBLISHED_SCALE["relative"], state, x)
        x = optax.apply_updates(x, updates)
        path.append(np.asarray(x))
    curvatures = [np.diff(wave * np.sin(wave * expected), axis=0)[k] @ np.diff(expected, axis=0)[k] for k in range(12)]
    assert min(curvatures) < -0.01 and np.cos(wave * expected[-1]).min() > 0.999
    np.testing.assert_allclose(np.stack(path), expected, atol=2e-3)
