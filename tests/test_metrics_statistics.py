"""lib/metrics: streaming, sharding, padding, the cache, and what a measurement says about itself."""

import dataclasses
import multiprocessing
import os

import jax
import numpy as np
import pytest
from metrics_cases import pixels, toy_net

from lib.metrics import cache, frechet, measure, result, statistics
from lib.metrics.images import Images, of_array
from lib.process import UserError
from lib.shard import make_mesh


def expected(net, images):
    pool, logits = jax.jit(net.apply)(net.params, images)
    return np.asarray(pool, np.float64), np.asarray(logits, np.float64)


# Moments


@pytest.mark.parametrize("rows", [2, 1023, 1024, 1025, 5000])
def test_moments_of_a_stream(rows):
    x = 1e4 + np.random.default_rng(0).standard_normal((rows, 5))
    moments = statistics.Moments(5)
    for part in np.array_split(x, 7):
        moments.add(part)
    np.testing.assert_allclose(moments.covariance(), np.cov(x.T), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-14)
    assert moments.count == rows


def test_moments_far_from_zero_where_sums_of_squares_fail():
    x = 1e8 + np.random.default_rng(0).standard_normal((4000, 3))
    naive = (x.T @ x - len(x) * np.outer(x.mean(0), x.mean(0))) / (len(x) - 1)
    moments = statistics.Moments(3)
    moments.add(x)
    np.testing.assert_allclose(moments.covariance(), np.cov((x - 1e8).T), atol=1e-6)
    assert np.abs(naive - np.cov((x - 1e8).T)).max() > 0.1


def test_moments_do_not_depend_on_the_cuts():
    x = np.random.default_rng(0).standard_normal((3000, 4))
    one, other = statistics.Moments(4), statistics.Moments(4)
    one.add(x)
    for part in np.array_split(x, 41):
        other.add(part)
    np.testing.assert_array_equal(one.covariance(), other.covariance())


# A pass over images


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize(("count", "batch_size"), [(2, 8), (16, 8), (37, 8), (37, 9), (3, 1)])
def test_every_image_counts_once(count, batch_size, devices):
    net, images = toy_net(), pixels(count)
    got = statistics.summarize(of_array(images), net, batch_size=batch_size, mesh=make_mesh(devices))
    pool, _ = expected(net, images)
    assert got.count == count
    np.testing.assert_allclose(got.features, pool, atol=1e-6)
    np.testing.assert_allclose(got.mean, pool.mean(0), atol=1e-6)
    np.testing.assert_allclose(got.covariance, np.cov(pool.T), atol=1e-6)
    assert np.isnan(got.scores).all() == (count < 10)


def test_chunks_of_any_size_give_the_same_batches():
    images = pixels(50)
    cut = lambda: np.split(images, [1, 1, 30, 33])  # noqa: E731
    whole, ragged = of_array(images), Images("ragged", 50, (4, 4, 1), cut)
    for size in (1, 7, 50, 64):
        for a, b in zip(whole.batches(size), ragged.batches(size), strict=True):
            np.testing.assert_array_equal(a, b)
    assert whole.sha256() == ragged.sha256()


@pytest.mark.parametrize("announced", [49, 51])
def test_images_that_are_lost_or_too_many_are_an_error(announced):
    images = pixels(50)
    wrong = Images("a stream", announced, (4, 4, 1), lambda: iter([images]))
    with pytest.raises(UserError, match=f"a stream: {announced} images were announced, 50 came"):
        list(wrong.batches(8))


def test_only_a_sample_of_features_is_kept_but_all_images_count():
    net, images = toy_net(), pixels(300)
    got = statistics.summarize(of_array(images), net, max_features=40, batch_size=16)
    pool, _ = expected(net, images)
    assert got.features.shape == (40, 6) and (np.diff(got.rows) > 0).all()
    np.testing.assert_allclose(got.features, pool[got.rows], atol=1e-6)
    np.testing.assert_allclose(got.mean, pool.mean(0), atol=1e-6)


def test_the_sample_is_even():
    hits = np.zeros(200)
    for seed in range(300):
        statistics.SAMPLE_SEED, before = seed, statistics.SAMPLE_SEED
        hits[statistics.sample_rows(200, 20)] += 1
        statistics.SAMPLE_SEED = before
    assert hits.min() > 10 and hits.max() < 55  # 30 expected, standard deviation 5


def test_grey_images_for_a_colour_net_are_repeated():
    net, grey = toy_net(channels=3), pixels(20)
    got = statistics.summarize(of_array(grey), net)
    pool, _ = expected(net, np.repeat(grey, 3, axis=3))
    np.testing.assert_allclose(got.features, pool, atol=1e-6)
    found = measure.measure(of_array(grey), of_array(grey), net, metrics=("fid",), cached=False)
    assert "grey repeated to 3 channels" in found["fid.toy"].protocol.preprocessing


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pixels(1), "1 image: at least 2"),
        (pixels(20, shape=(4, 5, 1)), "toy takes 4 x 4 pixels, the images of some have 4 x 5"),
        (pixels(20, shape=(5, 5, 1)), "toy takes 4 x 4 pixels"),
        (pixels(20, shape=(4, 4, 3)), "images of 1 channel"),
    ],
)
def test_images_that_do_not_fit(images, message):
    with pytest.raises(UserError, match=message):
        statistics.summarize(of_array(images, "some"), toy_net())


@pytest.mark.parametrize("which", ["pool", "logits"])
def test_features_that_are_not_finite_name_the_image(which):
    net = toy_net()
    broken = dataclasses.replace(net, params=net.params | {which: np.full_like(net.params[which], np.nan)})
    with pytest.raises(UserError, match="toy: features of image 0 of an array are not finite"):
        statistics.summarize(of_array(pixels(20)), broken)


# The cache


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gradient-fields" / "statistics"


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def test_cached_statistics_are_those_computed(cache_folder):
    images, net = of_array(pixels(60)), toy_net()
    path = cache.path_of(images, net, 20)
    assert path.parent == cache_folder and cache.load(path) is None
    computed = statistics.summarize(images, net, max_features=20)
    cache.save(path, computed)
    assert same(cache.load(path), computed)
    assert [p.name for p in cache_folder.iterdir()] == [path.name]


def test_the_key_is_what_statistics_depend_on():
    images, net = pixels(30), toy_net()
    key = cache.path_of(of_array(images), net, 20)
    assert cache.path_of(of_array(images.copy(), "of another name"), net, 20) == key
    changed = images.copy()
    changed[29, 3, 3] ^= 1
    others = [
        (of_array(changed), net, 20),
        (of_array(images[::-1]), net, 20),
        (of_array(images), net, 21),
        (of_array(images), toy_net(seed=1), 20),
        (of_array(images), dataclasses.replace(net, preprocessing="other"), 20),
        (of_array(images), dataclasses.replace(net, name="other"), 20),
    ]
    assert len({key, *(cache.path_of(*other) for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_file_is_computed_again(cache_folder, damage):
    real, generated, net = of_array(pixels(60)), of_array(pixels(50, 1)), toy_net()
    first = measure.measure(real, generated, net)
    (path,) = cache_folder.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"torn": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    assert cache.load(path) is None
    assert measure.measure(real, generated, net) == first
    assert cache.load(path) is not None


def test_kept_statistics_are_used(cache_folder, monkeypatch):
    real, generated, net = of_array(pixels(60)), of_array(pixels(50, 1)), toy_net()
    first = measure.measure(real, generated, net)
    passes = []
    summarize = statistics.summarize
    monkeypatch.setattr(
        measure, "summarize", lambda images, *a, **k: passes.append(images) or summarize(images, *a, **k)
    )
    assert measure.measure(real, generated, net) == first
    assert passes == [generated]
    assert measure.measure(real, generated, net, cached=False) == first
    assert passes == [generated, real, generated]


def _write_many(path, seed):
    rng = np.random.default_rng(seed)
    for _ in range(30):
        x = rng.standard_normal((200, 20))
        cache.save(path, statistics.Statistics(200, x[0], x[:20], np.arange(200), x.astype(np.float32), x[0, :10]))


@pytest.mark.slow
def test_concurrent_writers_never_leave_a_mixture(cache_folder):
    path = cache_folder / "x.safetensors"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert cache.load(path) is not None  # whole at every instant
            seen += 1
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    assert seen > 10 and [p.name for p in cache_folder.iterdir()] == ["x.safetensors"]


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "gradient-fields").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache.folder() / "x.safetensors"
    x = np.zeros((3, 3))
    cache.save(path, statistics.Statistics(3, x[0], x, np.arange(3), x, x[0]))
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_leaves_nothing_behind(tiny_disk, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny_disk))
    x = np.random.default_rng(0).standard_normal((600, 600))
    cache.save(cache.folder() / "x.safetensors", statistics.Statistics(600, x[0], x, np.arange(3), x, x[0]))
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(cache.folder()) == []


# Measuring


def test_results_carry_name_and_protocol(cache_folder):
    real, generated, net = pixels(120), np.float32(pixels(80, 1, low=60)) / 127.5 - 1, toy_net()
    found = measure.measure(of_array(real, "train"), of_array(generated, "model"), net, max_features=70)
    assert list(found) == [f"{m}.toy" for m in measure.LEAST]
    for r in found.values():
        assert np.isfinite(r.value) and r.uncertainty >= 0 and r.uncertainty_kind
        p = r.protocol
        assert (p.features, p.weights_sha256, p.preprocessing) == ("toy", net.weights_sha256, "minus 128")
        assert (p.real, p.generated, p.n_real, p.n_generated) == ("train", "model", 120, 80)
        assert "rounded to the nearest" in p.rounding and "real: uint8 as given" in p.rounding
    assert "70 real and 70 generated" in found["kid.toy"].protocol.settings
    a, _ = expected(net, real)
    b, _ = expected(net, np.uint8(np.round((generated + 1) * 127.5)))
    exact = frechet.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert found["fid.toy"].value == pytest.approx(exact, abs=1e-6)
    as_json = result.to_json(found)["fid.toy"]
    assert as_json["value"] == found["fid.toy"].value and as_json["protocol"]["n_real"] == 120
    assert "fid.toy" in result.table(found)


def test_a_set_with_itself(cache_folder):
    found = measure.measure(of_array(pixels(200)), of_array(pixels(200)), toy_net())
    assert abs(found["fid.toy"].value) < 1e-3
    assert found["precision.toy"].value == found["recall.toy"].value == found["coverage.toy"].value == 1
    assert found["copying.toy"].value == 1


@pytest.mark.parametrize(("metric", "count"), [("is", 9), ("precision", 3), ("density", 5)])
def test_too_few_images_for_a_metric(metric, count):
    with pytest.raises(UserError, match=f"{metric} needs at least {count + 1} images, an array gives {count}"):
        measure.measure(of_array(pixels(50)), of_array(pixels(count)), toy_net(), metrics=(metric,), cached=False)
    found = measure.measure(of_array(pixels(50)), of_array(pixels(2)), toy_net(), metrics=("fid", "kid"), cached=False)
    assert np.isfinite([r.value for r in found.values()]).all()
