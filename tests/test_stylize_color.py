"""stylize/color.py: moments and distributions match, luminance and hue are kept, degenerate images do no harm."""

import colorsys

import numpy as np
import pytest

from stylize.color import luminance, luminance_only, match_color, match_histogram, match_luminance

MATCHES = {"moments": match_color, "luminance": match_luminance, "histogram": match_histogram}


def picture(seed, height, width, spread):
    """Correlated colours, none of them near the ends of the range: nothing is clipped when they are matched."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(3) + rng.uniform(-0.6, 0.6, (3, 3))
    pixels = rng.uniform(-0.1, 0.1, 3) + spread * rng.uniform(-1, 1, (height, width, 3)) @ mixing
    assert np.abs(pixels).max() < 1
    return np.float32(pixels)


STYLE, CONTENT = picture(0, 40, 50, 0.2), picture(1, 31, 57, 0.15)
ANY = np.random.default_rng(2).uniform(-1, 1, (2, 40, 50, 3)).astype(np.float32)


def moments(image):
    pixels = image.reshape(-1, 3).astype(np.float64)
    return pixels.mean(0), np.cov(pixels, rowvar=False, bias=True)


def hues_and_saturations(image):
    return np.array([colorsys.rgb_to_hsv(*pixel)[:2] for pixel in (np.float64(image).reshape(-1, 3) + 1) / 2]).T


def test_mean_and_covariance():
    matched = match_color(STYLE, CONTENT)
    assert matched.shape == STYLE.shape and matched.dtype == np.float32 and np.abs(matched).max() < 1
    for got, wanted in zip(moments(matched), moments(CONTENT), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-7)


def test_the_map_is_a_product_of_symmetric_roots():
    """It is read off four pixels: the origin, and a step of 0.1 along each axis."""
    style = STYLE.copy()
    style[0, :4] = 0.1 * np.eye(4, 3, -1)
    matched = np.float64(match_color(style, CONTENT)[0, :4])
    a = (matched[1:] - matched[0]).T / 0.1
    covariance, wanted = moments(style)[1], moments(CONTENT)[1]
    np.testing.assert_allclose(a @ covariance @ a.T, wanted, atol=1e-5)
    variances, axes = np.linalg.eigh(covariance)
    root = a @ (axes * np.sqrt(variances)) @ axes.T
    np.testing.assert_allclose(root, root.T, atol=1e-5)
    assert (np.linalg.eigvalsh(root) > 0).all()


def test_luminance_moments():
    matched = match_luminance(STYLE, CONTENT)
    y, target = luminance(matched), luminance(CONTENT)
    np.testing.assert_allclose([y.mean(), y.std()], [target.mean(), target.std()], atol=1e-7)
    np.testing.assert_array_equal(matched, matched[..., :1].repeat(3, -1))
    assert np.corrcoef(y.ravel(), luminance(STYLE).ravel())[0, 1] > 1 - 1e-9


@pytest.mark.parametrize("height", [31, 62])
def test_histograms_are_equal_where_no_values_are(height):
    """Of as many pixels: the same values. Of twice as many: means of equal parts of the distribution."""
    content = np.concatenate([CONTENT] * (height // 31))
    style = picture(3, 31, 57, 0.3)
    assert len(np.unique(style[..., 0])) == 31 * 57
    got = np.sort(match_histogram(style, content).reshape(-1, 3), 0)
    np.testing.assert_allclose(got, np.sort(CONTENT.reshape(-1, 3), 0), atol=1e-7)


def test_histograms_of_other_sizes_are_close():
    matched = match_histogram(STYLE, CONTENT)
    quantiles = np.linspace(0, 1, 101)
    for i in range(3):
        got, wanted = (np.quantile(image[..., i], quantiles) for image in (matched, CONTENT))
        np.testing.assert_allclose(got, wanted, atol=5e-3)
        np.testing.assert_allclose(matched[..., i].mean(), CONTENT[..., i].mean(), atol=1e-6)
        order = np.argsort(STYLE[..., i], axis=None)
        assert (np.diff(matched[..., i].ravel()[order]) >= 0).all()  # a monotone map


def test_equal_values_stay_equal():
    style = np.float32([[[-1] * 3, [0] * 3, [0] * 3, [1] * 3]])
    content = np.float32([[[-0.8] * 3, [0.4] * 3, [-0.2] * 3, [0.9] * 3]])
    np.testing.assert_allclose(match_histogram(style, content)[0, :, 1], [-0.8, 0.1, 0.1, 0.9], atol=1e-7)


@pytest.mark.parametrize("name", MATCHES)
def test_once_is_enough(name):
    once = MATCHES[name](STYLE, CONTENT)
    np.testing.assert_allclose(MATCHES[name](once, CONTENT), once, atol=1e-6)
    if name != "luminance":
        np.testing.assert_allclose(MATCHES[name](CONTENT, CONTENT), CONTENT, atol=1e-6)


@pytest.mark.parametrize("name", MATCHES)
def test_images_stay_in_range(name):
    low_contrast = np.float32(0.05 * ANY[0])
    low_contrast[0, 0] = 1
    matched = MATCHES[name](low_contrast, ANY[1])
    assert matched.max() > 0.99 and np.abs(matched).max() <= 1


SPECIAL = {
    "grey": np.repeat(ANY[0, ..., :1], 3, -1),
    "nearly grey": np.float32(np.round(np.repeat(ANY[0, ..., :1], 3, -1) * 127.5 + 0.51 * ANY[1]) / 127.5).clip(-1, 1),
    "constant": np.full((4, 5, 3), 0.25, np.float32),
    "white": np.ones((4, 5, 3), np.float32),
    "one pixel": np.float32([[[0.1, -0.7, 1.0]]]),
    "one row": ANY[0, :1],
    "blue alone": ANY[0] * np.float32([0, 0, 1]),
    "two colours": np.where(ANY[0, ..., :1] > 0, np.float32([1, -1, 0]), np.float32([-1, 0.3, 1])),
}


@pytest.mark.parametrize("name", MATCHES)
@pytest.mark.parametrize("style", SPECIAL)
@pytest.mark.parametrize("content", [*SPECIAL, "any"])
def test_degenerate_images(name, style, content):
    style, content = SPECIAL[style], SPECIAL.get(content, ANY[1])
    matched = MATCHES[name](style, content)
    assert matched.shape == style.shape and matched.dtype == np.float32
    assert np.isfinite(matched).all() and np.abs(matched).max() <= 1
    if np.ptp(style, axis=(0, 1)).max() == 0:  # nothing to spread: the content's mean
        mean = content.mean((0, 1), dtype=np.float64) if name != "luminance" else luminance(content).mean()
        np.testing.assert_allclose(matched, np.broadcast_to(mean, style.shape), atol=1e-6)
    if np.ptp(content, axis=(0, 1)).max() == 0:
        mean = content[0, 0] if name != "luminance" else luminance(content)[0, 0]
        np.testing.assert_allclose(matched, np.broadcast_to(mean, style.shape), atol=2e-4)


def test_grey_styles_get_one_line_of_colours():
    pixels = match_color(SPECIAL["grey"] * np.float32(0.5), CONTENT).reshape(-1, 3)
    assert np.linalg.matrix_rank(pixels - pixels.mean(0), tol=1e-3) == 1
    np.testing.assert_allclose(pixels.mean(0), CONTENT.mean((0, 1)), atol=1e-6)


def test_rounding_is_not_blown_up():
    """A grey photograph's compression noise, of a third of a level, must not become the noise of all colours."""
    grey = SPECIAL["grey"] * np.float32(0.3)
    noisy = grey + np.float32(0.3 * 2 / 255 * np.random.default_rng(4).standard_normal(grey.shape))
    off = match_color(noisy, CONTENT) - match_color(grey, CONTENT)
    assert off.std() < 0.35 * CONTENT.std()


def test_luminance_of_the_result_with_the_hue_of_the_content():
    result, content = ANY
    kept = luminance_only(result, content)
    assert kept.dtype == np.float32 and np.abs(kept).max() <= 1
    np.testing.assert_allclose(luminance(kept), luminance(result), atol=2e-7)
    (hue, _), (wanted, saturation) = hues_and_saturations(kept), hues_and_saturations(content)
    away = np.abs(hue - wanted)
    sure = (saturation > 0.05) & (np.abs(luminance(result)).ravel() < 0.95)  # others have a hue of rounding
    assert sure.sum() > 1500 and np.minimum(away, 1 - away)[sure].max() < 1e-4


def test_chroma_is_that_of_the_content_where_it_fits():
    result, content = ANY
    chroma = content - luminance(content)[..., None]
    naive = luminance(result)[..., None] + chroma
    fits = np.abs(naive).max(-1) <= 1
    assert 0.2 < fits.mean() < 0.9
    kept = luminance_only(result, content)
    np.testing.assert_allclose(kept[fits], naive[fits], atol=1e-7)
    # and elsewhere as much of it as there is room for
    np.testing.assert_allclose(np.abs(kept[~fits]).max(-1), 1, atol=1e-6)


def test_yiq():
    """Against the transform itself (FCC: Y, I, Q in [0, 1] units)."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    result, content = STYLE, picture(5, 40, 50, 0.2)
    mixed = np.concatenate([(result @ to_yiq.T)[..., :1], (content @ to_yiq.T)[..., 1:]], -1)
    np.testing.assert_allclose(luminance_only(result, content), mixed @ np.linalg.inv(to_yiq).T, atol=1e-4)


def test_same_image_twice():
    np.testing.assert_allclose(luminance_only(ANY[0], ANY[0]), ANY[0], atol=1e-6)
    once = luminance_only(*ANY)
    np.testing.assert_allclose(luminance_only(once, ANY[1]), once, atol=1e-6)


@pytest.mark.parametrize("name", SPECIAL)
def test_luminance_of_degenerate_images(name):
    image = SPECIAL[name]
    other = np.resize(ANY[0], image.shape)
    np.testing.assert_allclose(luminance(luminance_only(other, image)), luminance(other), atol=2e-7)
    np.testing.assert_allclose(luminance(luminance_only(image, other)), luminance(image), atol=2e-7)


def test_black_and_white_stay_so():
    for value in (-1, 1):
        flat = np.full((40, 50, 3), value, np.float32)
        np.testing.assert_array_equal(luminance_only(flat, ANY[0]), flat)


def test_sizes_that_differ():
    with pytest.raises(ValueError, match="resize"):
        luminance_only(STYLE, CONTENT)
