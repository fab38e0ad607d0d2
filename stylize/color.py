"""Keeping the photograph's colours (Gatys et al., "Preserving Color in Neural Artistic Style Transfer", 1606.05897).

Either the style is given the photograph's colours before the transfer (`match_color`, `match_histogram`), or only the
luminance of the result is used (`match_luminance` before the transfer, `luminance_only` after it). Images are float32
[h, w, 3] RGB in [-1, 1]; what a linear map puts outside is clipped, so moments match where nothing was.
"""

from __future__ import annotations

import numpy as np

from lib.images import GREY_LEVEL

_REC601 = np.array([0.299, 0.587, 0.114])
# Differences of less than one of 255 levels are rounding: they are not blown up into colours.
_LEAST_VARIANCE = GREY_LEVEL**2


def luminance(image: np.ndarray) -> np.ndarray:
    """Y of Rec. 601, float64 [h, w] in [-1, 1]: the same in YIQ, YUV and YCbCr."""
    return np.asarray(image, np.float64) @ _REC601


def luminance_only(result: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Y of `result` with I and Q of `content`, both of the same size (the paper's luminance-only transfer, in YIQ).

    Where that lies outside of RGB, I and Q are scaled by the largest common factor that brings it back: luminance and
    hue are kept, and the colour is paler. Raises ValueError for sizes that differ.
    """
    if result.shape != content.shape:
        raise ValueError(f"the result is {result.shape}, the content {content.shape}: resize one of them")
    y = luminance(result).clip(-1, 1)[..., None]
    # With I and Q fixed, a change of Y adds the same to R, G and B: RGB - Y is chroma in itself.
    chroma = np.asarray(content, np.float64) - luminance(content)[..., None]
    room = np.sign(chroma) - y  # to 1 where it is positive, to -1 where it is negative
    factor = np.divide(room, chroma, out=np.ones_like(chroma), where=np.abs(chroma) > np.abs(room))
    return _image(y + factor.min(axis=-1, keepdims=True) * chroma)


def match_luminance(style: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The style in grey [h, w, 3], its luminance shifted and scaled to the content's mean and standard deviation.

    To be made from a grey photograph, or at least to be followed by `luminance_only`.
    """
    y, target = luminance(style), luminance(content)
    gain = target.std() / max(y.std(), _LEAST_VARIANCE**0.5)
    return _image(np.repeat((target.mean() + gain * (y - y.mean()))[..., None], 3, axis=-1))


def match_color(style: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The style with the mean and covariance of the content's RGB values, by an affine map x -> A x + b of its own.

    A S_style A^T = S_content has many solutions (the paper's colour histogram matching): this is S_content^1/2
    S_style^-1/2 with symmetric roots, as in Image Analogies.
    """
    pixels, target = (np.asarray(image, np.float64).reshape(-1, 3) for image in (style, content))
    mean, target_mean = pixels.mean(0), target.mean(0)
    a = _root(target) @ np.linalg.inv(_root(pixels, _LEAST_VARIANCE))
    return _image((target_mean + (pixels - mean) @ a.T).reshape(style.shape))


def match_histogram(style: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The style with the content's distribution in each of R, G and B: monotone maps between the quantiles.

    Exactly that distribution where all values of the style differ; equal values stay equal, and become the mean of
    the quantiles that they stand for.
    """
    channels = [_match_channel(style[..., i], content[..., i]) for i in range(3)]
    return _image(np.stack(channels, axis=-1))


def _match_channel(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)]) / values.size  # of the part of the distribution that a value has
    integral = np.concatenate([[0], np.cumsum(np.sort(target, axis=None), dtype=np.float64)]) / target.size
    at_ends = np.interp(ends, np.linspace(0, 1, target.size + 1), integral)
    return (np.diff(at_ends) / np.diff(ends))[which].reshape(values.shape)


def _root(pixels: np.ndarray, least: float = 0.0) -> np.ndarray:
    """The symmetric S^1/2 of the covariance S of [n, 3], with eigenvalues of S of at least `least`."""
    deviations = pixels - pixels.mean(0)
    variances, axes = np.linalg.eigh(deviations.T @ deviations / len(pixels))
    return (axes * np.sqrt(np.maximum(variances, least))) @ axes.T


def _image(pixels: np.ndarray) -> np.ndarray:
    return np.float32(pixels.clip(-1, 1))
