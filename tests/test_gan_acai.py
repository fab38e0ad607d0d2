"""gan/acai.py: the networks as published, the losses against their formulas, and steps on any number of devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gan.acai import acai, autoencoder, interpolate, mixed, optimiser, pixels, shares
from gan.acai_config import AUTOENCODERS, Options
from lib.data import Resident
from lib.process import UserError
from lib.shard import fetch, make_mesh
from lib.train import fit, init_state, make_step

TINY = Options(size_px=8, depth=3, latent_width=8, latent_channels=2)  # no scales: fewer layers to compile
CLASSES = 3
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, 8).astype(np.int32)
BATCH = {"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS)}
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model():
    return acai(TINY, 1, CLASSES)


@pytest.fixture(scope="module")
def params(model):
    """With a critic that says something, as it would not at first: the mean of its random outputs is nearly 0."""
    params = fetch(model.init(jax.random.key(0)))
    return {**params, "critic": jax.tree.map(lambda x: 2 * x + np.float32(0.05), params["critic"])}


def kernels(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]


@pytest.mark.parametrize(("decay", "moves"), [("constant", [0.1, 0.1, 0.1]), ("linear", [0.1, 0.05, 0.0])])
def test_the_learning_rate_falls_to_zero(decay, moves):
    tx = optimiser(Options(steps=2, lr=0.1, decay=decay))
    state = tx.init(jnp.zeros(()))
    for move in moves:  # of Adam where the gradient is always the same: the learning rate
        update, state = tx.update(jnp.ones(()), state)
        assert float(update) == pytest.approx(-move, abs=1e-5)


def test_networks_of_the_published_recipe():
    shapes = jax.eval_shape(acai(AUTOENCODERS["mnist_acai_32"].autoencoder, 1, 10).init, KEY)
    sizes = {name: [leaf.shape for leaf in kernels(tree)] for name, tree in shapes.items()}
    encoder = [
        (1, 1, 1, 16), (3, 3, 16, 16), (3, 3, 16, 16), (3, 3, 16, 32), (3, 3, 32, 32), (3, 3, 32, 64), (3, 3, 64, 64),
        (3, 3, 64, 128), (3, 3, 128, 2),
    ]  # fmt: skip
    assert sizes["encoder"] == sizes["critic"] == encoder
    assert sizes["decoder"] == [
        (3, 3, 2, 64), (3, 3, 64, 64), (3, 3, 64, 32), (3, 3, 32, 32), (3, 3, 32, 16), (3, 3, 16, 16), (3, 3, 16, 16),
        (3, 3, 16, 1),
    ]  # fmt: skip
    assert sizes["classifier"] == [(32, 10)]


@pytest.mark.parametrize(
    ("name", "channels", "width", "dimensions"),
    [
        ("lines_acai", 1, 2, 64),
        ("mnist_acai_32", 1, 4, 32),
        ("mnist_acai_256", 1, 4, 256),
        ("cifar10_acai_256", 3, 4, 256),
        ("cifar10_acai_1024", 3, 4, 1024),
    ],
)
def test_shapes_of_the_published_configurations(name, channels, width, dimensions):
    options = AUTOENCODERS[name].autoencoder
    model = acai(options, channels, 10)
    params = jax.eval_shape(model.init, KEY)
    images = jax.ShapeDtypeStruct((2, 32, 32, channels), jnp.float32)
    z = jax.eval_shape(model.encode, params, images)
    assert z.shape[:3] == (2, width, width) and math.prod(z.shape[1:]) == dimensions == options.latent_dimensions
    assert jax.eval_shape(model.decode, params, z).shape == images.shape
    assert jax.eval_shape(model.classify, params, z).shape == (2, 10)
    assert jax.eval_shape(model.critic, params, images).shape == (2,)
    assert options.steps * options.batch_size == 2**24


def test_initial_weights():
    model = acai(AUTOENCODERS["mnist_acai_256"].autoencoder, 1, 10)
    params = fetch(model.init(jax.random.key(1)))
    for name in ("encoder", "decoder", "critic"):
        for leaf in jax.tree.leaves(params[name]):
            if leaf.ndim == 1:
                assert not leaf.any()
                continue
            unit = leaf * np.sqrt(1.04 * math.prod(leaf.shape[:-1]))
            assert np.std(unit) == pytest.approx(1, abs=4 / np.sqrt(2 * leaf.size))
            assert np.mean(unit) == pytest.approx(0, abs=4 / np.sqrt(leaf.size))
    large = np.concatenate([np.ravel(x / np.std(x)) for x in kernels(params) if x.size > 10_000])
    assert np.mean(np.abs(large) > 2) == pytest.approx(0.0455, abs=0.002)  # normal, and no truncated normal
    assert not np.array_equal(params["encoder"]["Conv_1"]["kernel"], params["critic"]["encoder"]["Conv_1"]["kernel"])
    baseline = fetch(autoencoder(AUTOENCODERS["mnist_acai_256"].autoencoder, 1, 10).init(jax.random.key(1)))
    assert "critic" not in baseline
    for a, b in zip(jax.tree.leaves(baseline), jax.tree.leaves({k: params[k] for k in baseline}), strict=True):
        assert np.array_equal(a, b)  # both start from the same autoencoder


def test_networks_pool_and_upsample():
    """With kernels that copy, an encoder is the mean over squares of pixels, and a decoder repeats pixels."""
    model = autoencoder(dataclasses.replace(TINY, depth=1, latent_width=4, latent_channels=1), 1)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(model.init, KEY))
    for tree in params.values():
        for conv in tree.values():
            middle = conv["kernel"].shape[0] // 2
            conv["kernel"][middle, middle, 0, 0] = 1
    z = jax.jit(model.encode)(params, jnp.concatenate([jnp.abs(BATCH["image"]), -jnp.ones((1, 8, 8, 1))]))
    want = np.abs(IMAGES).reshape(8, 4, 2, 4, 2).mean((2, 4))
    np.testing.assert_allclose(z[:8, ..., 0], want, rtol=1e-5)
    np.testing.assert_allclose(z[8], -(0.2**3), rtol=1e-5)  # three rectifiers of slope 0.2
    restored = jax.jit(model.decode)(params, z[:8])
    np.testing.assert_allclose(restored[..., 0], want.repeat(2, 1).repeat(2, 2), rtol=1e-5)


def test_losses_are_their_formulas(model, params):
    """In NumPy, from what the networks give."""

    @jax.jit
    def network_outputs(params, x, alpha):
        z = model.encode(params, x)
        restored = model.decode(params, z)
        fused = model.decode(params, alpha * z + (1 - alpha) * z[jnp.array([1, 0, 3, 2, 5, 4, 7, 6])])
        return z, restored, model.critic(params, fused), model.critic(params, 0.2 * x + 0.8 * restored)

    loss, metrics = jax.jit(model.loss)(params, BATCH, KEY)
    x, alpha = IMAGES, np.asarray(shares(KEY, 8))
    z, restored, d_fused, d_real = map(np.asarray, network_outputs(params, x, alpha[:, None, None, None]))
    logits = z.reshape(8, -1) @ np.asarray(params["classifier"]["Dense_0"]["kernel"])
    cross_entropy = np.mean(np.log(np.sum(np.exp(logits), 1)) - logits[np.arange(8), LABELS])
    want = {
        "mse": np.mean((x - restored) ** 2),
        "found": np.mean(d_fused**2),
        "critic_mixed": np.mean((d_fused - alpha) ** 2),
        "critic_real": np.mean(d_real**2),
        "classifier": float(cross_entropy),
        "accuracy": float(np.mean(np.argmax(logits, 1) == LABELS)),
    }
    assert want["found"] > 1e-3 and want["critic_real"] > 1e-3  # so that a missing one would be seen
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(want, rel=1e-4)
    total = want["mse"] + 0.5 * want["found"] + want["critic_mixed"] + want["critic_real"] + want["classifier"]
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_gradients_are_those_of_two_players_on_the_reversed_batch(model, params):
    """The published code mixes a batch with its reverse: for batches in another order, that is the same step."""
    order = np.array([0, 7, 1, 6, 2, 5, 3, 4])  # its neighbours are first and last, second and last but one, ...
    alpha = jnp.zeros(8).at[order].set(shares(KEY, 8))[:, None, None, None]

    def images(ae):
        z = model.encode(ae, BATCH["image"])
        return model.decode(ae, z), model.decode(ae, alpha * z + (1 - alpha) * z[::-1])

    def player(ae):
        restored, fused = images(ae)
        return jnp.mean((BATCH["image"] - restored) ** 2) + 0.5 * jnp.mean(model.critic(params, fused) ** 2)

    def opponent(critic):
        restored, fused = images(params)
        of_fused = jnp.mean((model.critic(critic, fused) - alpha.ravel()) ** 2)
        return of_fused + jnp.mean(model.critic(critic, 0.2 * BATCH["image"] + 0.8 * restored) ** 2)

    reordered = {name: value[order] for name, value in BATCH.items()}
    got = jax.jit(jax.grad(lambda p: model.loss(p, reordered, KEY)[0]))(params)
    want = jax.jit(lambda p: (jax.grad(player)(p), jax.grad(opponent)(p)))(params)
    for side, names in zip(want, (("encoder", "decoder"), ("critic",)), strict=True):
        for name in names:
            for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(side[name]), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * float(jnp.max(jnp.abs(b))) + 1e-9)


def test_the_baseline_has_the_squared_error_alone(params):
    plain = autoencoder(TINY, 1)
    assert plain.critic is None and plain.classify is None

    @jax.jit
    def both(params):
        restored = plain.decode(params, plain.encode(params, BATCH["image"]))
        return plain.loss(params, {"image": BATCH["image"]}, KEY), jnp.mean((BATCH["image"] - restored) ** 2)

    (loss, metrics), want = both(params)
    assert float(loss) == float(metrics["mse"]) == pytest.approx(float(want), rel=1e-5) and set(metrics) == {"mse"}


def trained(devices):
    model, tx = acai(TINY, 1, CLASSES), optax.sgd(0.1)
    state = init_state(model.init(jax.random.key(2)), tx, jax.random.key(3))
    before = fetch(state.params)
    logged = []
    source = Resident({"image": IMAGES, "label": LABELS}, batch_size=8, seed=1)
    state = fit(
        state, make_step(model.loss, tx), source,
        steps=4, steps_per_call=2, mesh=make_mesh(devices), log=lambda *row: logged.append(row),
    )  # fmt: skip
    return before, fetch(state.params), logged


@pytest.fixture(scope="module")
def on_one_device():
    return trained(1)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_number_of_devices_changes_nothing(devices, on_one_device):
    """With SGD, since Adam hides a wrong gradient scale."""
    before, want, logged = on_one_device
    _, got, logged_here = trained(devices)
    for name in ("encoder", "decoder", "critic", "classifier"):
        steps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before[name], want[name])
        moved = max(jax.tree.leaves(steps))
        assert moved > 1e-3, name  # so that the comparison below says something
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * moved)
    for (step, metrics), (other_step, other) in zip(logged, logged_here, strict=True):
        assert step == other_step and other == pytest.approx(metrics, rel=1e-4, abs=1e-7)


def test_mixing_pairs_neighbours_on_any_number_of_devices():
    z = jnp.arange(16.0).reshape(8, 1, 1, 2)
    assert np.array_equal(mixed(z, jnp.zeros(8)), z[jnp.array([1, 0, 3, 2, 5, 4, 7, 6])])
    alpha = shares(KEY, 8)
    whole = mixed(z, alpha)
    for parts in (2, 4):
        apart = [mixed(a, b) for a, b in zip(jnp.split(z, parts), jnp.split(alpha, parts), strict=True)]
        assert np.array_equal(whole, jnp.concatenate(apart))
    np.testing.assert_allclose(whole.sum((0, 1, 2)) + mixed(z, 1 - alpha).sum((0, 1, 2)), 2 * z.sum((0, 1, 2)))
    with pytest.raises(UserError, match="3 on a device"):
        mixed(z[:3], alpha[:3])


def test_shares_are_uniform_up_to_a_half():
    alpha = np.sort(shares(KEY, 4000))
    assert alpha[0] >= 0 and alpha[-1] <= 0.5
    assert np.abs(alpha - np.linspace(0, 0.5, 4000)).max() < 0.02  # Kolmogorov and Smirnov at 1e-4, times a half


def test_pixels_of_bytes_and_of_floats():
    image = np.zeros((1, 28, 28, 1), np.uint8)
    image[0, 0, 0] = 255
    x = np.asarray(pixels(jnp.asarray(image), 32))
    assert x.shape == (1, 32, 32, 1) and x[0, 2, 2, 0] == 1 and np.sum(x == -1) == 32 * 32 - 1
    assert np.array_equal(pixels(BATCH["image"], 8), IMAGES)
    with pytest.raises(ValueError, match="uint8 or float32"):
        pixels(jnp.zeros((1, 8, 8, 1), jnp.int32), 8)
    with pytest.raises(ValueError, match="larger than 8 px"):
        pixels(jnp.zeros((1, 9, 8, 1)), 8)


def test_interpolation_is_straight_and_has_its_ends():
    start, end = jnp.asarray(IMAGES[0]), jnp.asarray(IMAGES[1])
    path = np.asarray(interpolate(start, end, 16))
    assert path.shape == (16, 8, 8, 1)
    assert np.array_equal(path[0], start) and np.array_equal(path[-1], end)
    np.testing.assert_allclose(np.diff(path, axis=0), np.broadcast_to((end - start) / 15, (15, 8, 8, 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latent_width": 5}, "latent_width 5 is not size_px 32 halved"),
        ({"latent_width": 64}, "latent_width 64"),
        ({"batch_size": 7}, "must be even"),
        ({"critic_regularization": 1.5}, "between 0 and 1"),
        ({"lr": 0.0}, "lr must be positive"),
    ],
)
def test_options_that_cannot_be(wrong, message):
    with pytest.raises(UserError, match=message):
        Options(**wrong)


def test_labels_are_asked_for(model, params):
    with pytest.raises(UserError, match="needs labels"):
        jax.eval_shape(model.loss, params, {"image": BATCH["image"]}, KEY)
