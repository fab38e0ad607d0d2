"""ncsn/loss.py: the papers' formulas on captured draws, minimisers known in closed form, one loss on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lib import pixels
from lib.pixels import Pixels
from lib.process import UserError
from lib.shard import DATA, compile_step, example_keys, fetch, make_mesh, pmean
from ncsn import loss as losses
from ncsn import sde, toys
from ncsn.noise import expand, geometric, log_normal, uniform_level

RNG = np.random.default_rng(0)
KEY = jax.random.key(4)
IMAGES = RNG.integers(0, 256, (8, 4, 4, 1), np.uint8)
BATCH = {"image": IMAGES, "label": np.arange(8) % 3}
SIGMAS = geometric(3, 0.1, 5)
UNIT = Pixels((0.0, 1.0))
PROCESSES = {"ve": sde.VE(), "vp": sde.VP(), "sub_vp": sde.SubVP()}


def some_score(params, x, sigma):
    return -params * x / (1 + expand(sigma, x) ** 2) + 0.1


def some_net(params, x, sigma):
    return expand(sigma, x) * some_score(params, x, sigma)


def some_denoiser(params, x, sigma, label, keys):
    assert label is None and keys.shape == x.shape[:1]
    return x + expand(sigma, x) ** 2 * some_score(params, x, sigma)


def numpy_score(x, sigma, params=1.5):
    return -params * x / (1 + sigma**2) + 0.1


def captured(builds, batch=BATCH):
    """Per name the loss of `build(score_fn)`, its metrics, and the x~ and sigma [b, 1, ..] that score_fn was given.

    All in one program, since compiling is what takes the time.
    """

    def one(build, batch):
        given = []

        def score_fn(params, x, sigma):
            given.append((x, expand(sigma, x)))
            return some_score(params, x, sigma)

        return (*build(score_fn)(1.5, batch, KEY), *given[0])

    got = jax.jit(lambda batch: {name: one(build, batch) for name, build in builds.items()})(batch)
    return jax.tree.map(lambda a: np.asarray(a, np.float64), got)


def test_denoising_is_the_formula_of_ncsn():
    got = captured({"": lambda s: losses.denoising(s, uniform_level(SIGMAS), pixels=UNIT)})
    value, metrics, noisy, sigma = got[""]
    assert set(sigma.flat) <= set(SIGMAS.astype(np.float64)) and len(set(sigma.flat)) > 1  # each example has its own
    error = numpy_score(noisy, sigma) + (noisy - IMAGES / 255) / sigma**2
    np.testing.assert_allclose(value, (error**2 * sigma**2).sum() / 2 / 8, rtol=1e-4)
    np.testing.assert_allclose(metrics["noise_error"], (error**2 * sigma**2).mean(), rtol=1e-4)


@pytest.fixture(scope="module")
def of_diffusions():
    def build(process, weight):
        return lambda s: losses.denoising(s, sde.uniform_time(process), weight)

    plain = {(name, False): build(process, None) for name, process in PROCESSES.items()}
    weighted = {(name, True): build(process, sde.likelihood_weight(process)) for name, process in PROCESSES.items()}
    return captured(plain | weighted)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("likelihood", [False, True])
def test_denoising_is_the_formula_of_the_diffusions_in_their_coordinates(name, likelihood, of_diffusions):
    process = PROCESSES[name]
    value, _, noisy, sigma = of_diffusions[name, likelihood]
    t = process.time(sigma)
    scale, std, g = (np.asarray(f(t), np.float64) for f in (process.scale, process.std, process.diffusion))
    x, x_t = IMAGES / 127.5 - 1, scale * noisy
    score = numpy_score(x_t / scale, sigma) / scale
    z = (x_t - scale * x) / std
    weight = g**2 if likelihood else std**2
    np.testing.assert_allclose(value, np.sum(weight * (score + z / std) ** 2) / 2 / 8, rtol=1e-3)


def test_the_losses_of_denoising_are_one_up_to_their_weights():
    draw = log_normal()
    compared = {
        "denoising": losses.denoising(some_score, draw),
        "noise_prediction": losses.noise_prediction(some_net, draw),
        "denoiser": losses.edm(some_denoiser, draw, lambda s: 1 / (2 * s**2)),
        "weighted": losses.denoising(some_score, draw, lambda s: 2 * (s**2 + 0.3**2) / 0.3**2),
        "edm": losses.edm(some_denoiser, draw, losses.edm_weight(0.3)),
    }
    got = jax.jit(lambda batch: {name: loss(1.5, batch, KEY) for name, loss in compared.items()})(BATCH)
    for a, b in (("denoising", "noise_prediction"), ("denoising", "denoiser"), ("weighted", "edm")):
        np.testing.assert_allclose(got[a][0], got[b][0], rtol=1e-4)
        np.testing.assert_allclose(got[a][1]["noise_error"], got[b][1]["noise_error"], rtol=1e-4)
    assert abs(got["edm"][0] / got["denoising"][0] - 1) > 0.1


def test_a_silent_network_has_noise_error_1():
    batch = {"x": RNG.normal(size=(4000, 2)).astype(np.float32)}
    score = losses.denoising(lambda params, x, sigma: 0 * x, uniform_level(SIGMAS))
    denoiser = losses.edm(lambda params, x, *_: x, log_normal(), losses.edm_weight(0.5))
    got = jax.jit(lambda batch: [loss(0.0, batch, KEY) for loss in (score, denoiser)])(batch)
    np.testing.assert_allclose(got[0][0], got[0][1]["noise_error"], rtol=1e-5)  # one half, of two dimensions
    for _, metrics in got:
        assert abs(metrics["noise_error"] - 1) < 4 * np.sqrt(2 / 8000)


@pytest.mark.parametrize("directions", [jax.random.rademacher, jax.random.normal])
def test_sliced_score_matching_of_a_linear_score(directions):
    """s = W x + b: 1/2 |s|^2 + tr W; with diagonal W, Rademacher directions make the trace exact."""
    w, b = np.array([[-1.0, 0.0], [0.0, -0.4]], np.float32), np.array([0.2, 0.1], np.float32)
    x = RNG.normal(size=(64, 2)).astype(np.float32)
    rademacher = directions is jax.random.rademacher
    options = {"directions": directions, "projections": 1 if rademacher else 2}
    noisy = lambda w, x, sigma: (x @ w.T + b) / expand(sigma, x)  # noqa: E731
    plain = losses.sliced(lambda w, x: x @ w.T + b, **options)
    scaled = losses.sliced_noisy(noisy, uniform_level(SIGMAS[:1]), **options)
    got = jax.jit(lambda batch: [loss(w, batch, KEY) for loss in (plain, scaled)])({"x": x})
    error = 1e-5 if rademacher else 4 * np.sqrt(2 * 1.16 / (64 * 2))  # Var v'Wv = 2 |W|^2 for a normal v
    for (value, parts), factor in zip(got, (1, SIGMAS[0]), strict=True):  # sigma^2 / sigma
        assert abs(parts["trace"] / factor + 1.4) < error
        np.testing.assert_allclose(value, parts["norm"] + parts["trace"], rtol=1e-5)
    np.testing.assert_allclose(got[0][1]["norm"], ((x @ w.T + b) ** 2).sum(1).mean() / 2, rtol=1e-5)


# Data that are one Gaussian, and the score functions of all Gaussians with its axes: the truth minimises every loss.
TRUE = toys.gaussian([1.0, -0.5], [[1.0, 0.6], [0.6, 0.8]])
TRUTH = {"means": TRUE.means, "variances": TRUE.variances}
WRONG = {"means": TRUE.means + np.float32([[0.8, 0.2]]), "variances": TRUE.variances * 2}


def model(params):
    return TRUE._replace(**params)


def model_score(params, x, sigma):
    return model(params).score(x, sigma)


VP = sde.VP(t_min=0.05)
MINIMISED = {
    "denoising": losses.denoising(model_score, uniform_level(SIGMAS)),
    "noise_prediction": losses.noise_prediction(
        lambda p, x, sigma: expand(sigma, x) * model_score(p, x, sigma), uniform_level(SIGMAS)
    ),
    "edm": losses.edm(
        lambda p, x, sigma, *_: model(p).denoise(x, sigma), log_normal(-0.5, 1.0), losses.edm_weight(1.0)
    ),
    "ve": losses.denoising(model_score, sde.uniform_time(sde.VE(0.1, 5.0))),
    "vp": losses.denoising(model_score, sde.uniform_time(VP)),
    "sub_vp": losses.denoising(model_score, sde.uniform_time(sde.SubVP(t_min=0.05))),
    "likelihood": losses.denoising(model_score, sde.uniform_time(VP), sde.likelihood_weight(VP)),
    "sliced": losses.sliced(lambda p, x: model(p).score(x)),
    "sliced_noisy": losses.sliced_noisy(model_score, uniform_level(SIGMAS), directions=jax.random.normal),
}


@pytest.fixture(scope="module")
def standard_errors():
    """params -> {loss: its mean gradient, in units of the standard error}, over 32 batches of 512."""

    @jax.jit
    def gradients(params):
        def one(key):
            data, key = jax.random.split(key)
            batch = {"x": TRUE.means + jax.random.normal(data, (512, 2)) * np.sqrt(TRUE.variances[0]) @ TRUE.axes[0]}
            return {name: jax.grad(lambda p: loss(p, batch, key)[0])(params) for name, loss in MINIMISED.items()}  # noqa: B023

        return jax.lax.map(one, jax.random.split(KEY, 32))

    def of(params):
        flat = {
            name: np.concatenate([a.reshape(32, -1) for a in g.values()], 1) for name, g in gradients(params).items()
        }
        return {name: g.mean(0) / (g.std(0, ddof=1) / np.sqrt(32)) for name, g in flat.items()}

    return of(TRUTH), of(WRONG)


@pytest.mark.parametrize("name", MINIMISED)
def test_the_gradient_vanishes_at_the_true_score_and_not_elsewhere(name, standard_errors):
    at_truth, elsewhere = standard_errors
    assert np.all(abs(at_truth[name]) < 4)
    assert np.all(abs(elsewhere[name]) > 6)


def test_the_number_of_devices_changes_neither_the_draws_nor_the_loss():
    def on(devices):
        def body(params, batch):
            seen = {}

            def denoise(params, x, sigma, label, keys):
                seen.update(x=x, sigma=sigma, label=label, dropout=jax.vmap(jax.random.uniform)(keys))
                return params * x / (1 + expand(sigma, x)) + expand(0.01 * label, x)

            pixels = Pixels(dequantize=True, flip=True)
            edm = losses.edm(denoise, log_normal(), losses.edm_weight(0.5), pixels, classes=3, label_dropout=0.4)
            value, metrics = edm(params, batch, KEY)
            return params, {"mean": pmean({"loss": value, **metrics}), "seen": seen}

        out_specs = (P(), {"mean": P(), "seen": P(DATA)})
        step = compile_step(body, make_mesh(devices), "jit" if devices == 1 else "shard_map", out_specs=out_specs)
        return fetch(step(jnp.float32(0.7), BATCH)[1])

    one, four = on(1), on(4)  # batches of 8 and of 2
    jax.tree.map(np.testing.assert_array_equal, one["seen"], four["seen"])
    assert 3 in one["seen"]["label"]
    for name, expected in one["mean"].items():
        np.testing.assert_allclose(four["mean"][name], expected, rtol=1e-6)


def test_pixels():
    recipes = {
        "plain": Pixels(),
        "unit": UNIT,
        "v1": Pixels((0.0, 1.0), dequantize=True),
        "likelihood": Pixels(dequantize=True),
    }
    got = jax.jit(lambda x: {name: pixels(x, example_keys(KEY, 8)) for name, pixels in recipes.items()})(IMAGES)
    np.testing.assert_allclose(got["plain"], IMAGES / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(got["unit"], IMAGES / 255, atol=1e-7)
    np.testing.assert_array_equal(np.floor(got["v1"] * 256), IMAGES)
    np.testing.assert_array_equal(np.floor((got["likelihood"] + 1) * 128), IMAGES)
    with pytest.raises(ValueError, match="images must be uint8, not float64"):
        Pixels()(IMAGES / 255, KEY)


def test_dequantization_fills_each_grey_level_evenly_and_stays_inside():
    white = np.full((40, 32, 32, 1), 255, np.uint8)
    x = np.asarray(jax.jit(pixels.dequantized)(white, jax.random.split(KEY, 40)))
    assert x.min() >= 255 / 256 and x.max() < 1
    within = x.astype(np.float64) * 256 - 255
    assert abs(within.mean() - 0.5) < 4 / np.sqrt(12 * x.size)
    assert abs(within.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / x.size)
    assert len(np.unique(x[:, 0, 0, 0])) > 35  # every example has its own


def test_flips_and_dropped_labels():
    images = RNG.normal(size=(2000, 3, 5, 2)).astype(np.float32)
    label = np.arange(2000) % 7

    @jax.jit
    def both(images, label):
        keys = example_keys(KEY, 2000)
        return pixels.flipped(images, keys), [losses.dropped(label, keys, p, 7) for p in (0.0, 0.1, 1.0)]

    flipped, dropped = jax.tree.map(np.asarray, both(images, label))
    mirrored, same = ((flipped == x).all((1, 2, 3)) for x in (images[:, :, ::-1], images))
    assert np.all(mirrored ^ same)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)

    lost = dropped[1] == 7
    assert abs(lost.mean() - 0.1) < 4 * 0.3 / np.sqrt(2000)
    np.testing.assert_array_equal(dropped[1][~lost], label[~lost])
    np.testing.assert_array_equal(dropped[0], label)
    np.testing.assert_array_equal(dropped[2], 7)


def test_noise_is_standard_normal_and_its_own_for_every_example():
    batch = {"x": np.ones((2000, 3), np.float32)}
    _, _, noisy, sigma = captured({"": lambda s: losses.denoising(s, log_normal())}, batch)[""]
    z = (noisy - 1) / sigma
    assert np.all(abs(z.mean(0)) < 4 / np.sqrt(2000))
    np.testing.assert_allclose(np.cov(z.T), np.eye(3), atol=4 / np.sqrt(1000))
    assert abs(np.corrcoef(np.log(sigma[:, 0]), z[:, 0])[0, 1]) < 4 / np.sqrt(2000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_dropout": 1.5, "classes": 3}, "label_dropout is 1.5: it must be between 0 and 1"),
        ({"label_dropout": 0.1}, "the network knows no classes"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        losses.edm(some_denoiser, log_normal(), losses.edm_weight(0.5), **options)


def test_classes_without_labels():
    loss = losses.edm(some_denoiser, log_normal(), losses.edm_weight(0.5), classes=3)
    with pytest.raises(UserError, match="the network knows 3 classes, but the data have no labels"):
        jax.eval_shape(lambda batch: loss(1.0, batch, KEY), {"image": IMAGES})
