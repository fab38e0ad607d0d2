"""gan/lines.py: the lines themselves, and the scorer on interpolations whose published scores are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan import lines
from gan.lines import FRAMES, Lines, draw, final, nearest, score, unevenness

PAIRS = 32
T = np.linspace(0, 1, FRAMES)


def covered(angle, row_major, column):
    """The part of one pixel that a line covers, by counting points; rows are along the line's larger component."""
    dx, dy = np.cos(angle), -np.sin(angle)
    along, across = (dy, dx) if abs(dy) >= abs(dx) else (dx, dy)
    first, last = sorted((16.0, 16 + 15 * along))
    if not np.floor(first) <= row_major < np.ceil(last):
        return 0.0
    middle = 16 + (row_major - 0.5 - 16) * across / along
    points = column + (np.arange(4000) + 0.5) / 4000
    part = np.mean(np.abs(points - middle) < 1)
    return part * (np.ceil(first) - first if row_major < first else 1)


def test_axes():
    right, up, left, down = draw(np.array([0, 0.5, 1, 1.5]) * np.pi)[..., 0]
    for image, rows, columns in [
        (right, slice(15, 17), slice(16, 31)),
        (up, slice(1, 16), slice(15, 17)),
        (left, slice(15, 17), slice(1, 16)),
        (down, slice(16, 31), slice(15, 17)),
    ]:
        want = -np.ones((32, 32))
        want[rows, columns] = 1
        np.testing.assert_allclose(image, want, atol=1e-12)


@pytest.mark.parametrize("angle", [0.3, 1.2, 2.0, 2.9, 3.6, 4.4, 5.2, 6.1])
def test_every_pixel_is_as_white_as_it_is_covered(angle):
    image = draw(np.array([angle]))[0, :, :, 0]
    if abs(np.sin(angle)) < abs(np.cos(angle)):
        image = image.T
    want = [[2 * covered(angle, row, column) - 1 for column in range(32)] for row in range(32)]
    np.testing.assert_allclose(image, want, atol=2e-3)


def test_batches_are_pure_and_labelled():
    one, again = (jax.jit(lines.batch, static_argnums=1)(jax.random.key(0), 500) for _ in range(2))
    assert one["image"].shape == (500, 32, 32, 1) and one["image"].dtype == jnp.float32
    assert np.array_equal(one["image"], again["image"])
    assert float(jnp.min(one["image"])) == -1 and float(jnp.max(one["image"])) <= 1
    assert np.bincount(one["label"], minlength=10).min() > 25  # of about 50
    _, angles = nearest(np.asarray(one["image"]))
    away = np.abs(angles * 10 / (2 * np.pi) - np.round(angles * 10 / (2 * np.pi))) > 1e-3
    assert np.array_equal(np.asarray(one["label"])[away], np.floor(angles * 10 / (2 * np.pi))[away])


def test_the_source_gives_every_step_its_own_lines():
    source = Lines(batch_size=6, seed=3)
    whole = source.per_step(0, 5)
    assert whole.shape == (5, 6) and whole.dtype == np.float32
    assert np.array_equal(whole[3:], source.per_step(3, 2))  # as a resumed training asks
    assert len(np.unique(whole)) == 30 and whole.min() >= 0 and whole.max() <= 2 * np.pi
    assert not np.array_equal(whole, dataclasses.replace(source, seed=4).per_step(0, 5))
    batch = source.select(source.constant, jnp.asarray(whole[0]))
    np.testing.assert_allclose(batch["image"], draw(whole[0].astype(np.float64)), atol=1e-4)


@pytest.fixture(scope="module")
def turns():
    """Lines that turn evenly from one random angle to another, [PAIRS, FRAMES, 32, 32, 1]."""
    rng = np.random.default_rng(0)
    start, end = rng.uniform(0, 2 * np.pi, (2, PAIRS, 1))
    return draw((start + T * (end - start)).ravel()).reshape(PAIRS, FRAMES, 32, 32, 1)


def test_the_score_of_a_perfect_interpolation(turns):
    distance, smoothness, undefined = score(turns)
    assert distance == pytest.approx(1.8e-7, abs=0.15e-7) and 0 < smoothness < 0.002 and undefined == 0


def test_the_score_of_a_blend_of_pixels(turns):
    t = T[:, None, None, None]
    distance, smoothness, _ = score((1 - t) * turns[:, :1] + t * turns[:, -1:])
    assert distance == pytest.approx(6.4e-3, abs=0.6e-3) and smoothness == pytest.approx(0.90, abs=0.05)


def test_the_score_of_an_abrupt_change(turns):
    distance, smoothness, _ = score(turns[:, np.where(np.arange(FRAMES) < FRAMES // 2, 0, -1)])
    assert distance == pytest.approx(1.7e-7, abs=0.4e-7) and smoothness == pytest.approx(14 / 15)


def test_the_scores_of_lines_that_stand_still(turns):
    still = np.repeat(turns[:2, :1], FRAMES, axis=1)
    assert np.isnan(score(still).smoothness) and score(still).undefined == 1
    # Beside them, one that turns counts for its share alone.
    mixed = score(np.concatenate([still, turns[:1, np.where(np.arange(FRAMES) < 8, 0, -1)]]))
    assert mixed.smoothness == pytest.approx(14 / 15 / 3) and mixed.undefined == pytest.approx(2 / 3)


def test_unevenness_of_known_angles():
    even = np.linspace(6.0, 7.5, FRAMES)
    assert unevenness(np.stack([even, even[::-1]]) % (2 * np.pi)) == pytest.approx([0, 0], abs=1e-12)
    half = np.array([[0.0, 0.1, 0.5, 1.0]])
    assert unevenness(half)[0] == pytest.approx(0.5 - 1 / 3)


def test_the_distance_to_the_nearest_line_is_that_of_cosines():
    from scipy.spatial.distance import cdist

    images = np.random.default_rng(1).normal(size=(3, 32, 32, 1))
    angles = 2 * np.pi / 10_000 * np.arange(10_000)
    want = cdist(images.reshape(3, -1), draw(angles).reshape(10_000, -1), "cosine")
    distance, found = nearest(images)
    np.testing.assert_allclose(distance, want.min(1), rtol=1e-9)
    np.testing.assert_allclose(found, angles[want.argmin(1)])


def test_an_autoencoder_that_changes_nothing_blends_pixels():
    key = jax.random.key(1)
    frames = np.asarray(lines.interpolations(lambda x: x, lambda z: z, key, 3))
    ends = np.asarray(lines.batch(key, 6)["image"])
    assert frames.shape == (3, FRAMES, 32, 32, 1)
    np.testing.assert_allclose(frames[:, 0], ends[:3], atol=1e-6)
    np.testing.assert_allclose(frames[:, 5], ends[:3] * (10 / 15) + ends[3:] * (5 / 15), atol=1e-6)


def test_the_median_of_the_last_evaluations():
    assert final([100.0] * 30 + [*range(20)]) == 9.5
    assert final([1.0, 5.0, 2.0]) == 2.0
