"""Optical flow between frames, where it can be relied on, and how far a movie departs from the motion it should have.

Images are float32 [h, w, 3] RGB in [-1, 1]; a flow is float32 [h, w, 2], in px to the right and down: what is at
(x, y) of the first image is at (x, y) + flow[y, x] of the second.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np

from lib.images import to_uint8
from lib.process import UserError

Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]

_FADING_PX = 2.0  # standard deviation
_CUT = 0.2  # of the pixels have a way back; in the films at hand at most 0.08 at a cut, at least 0.49 within a scene
_SAME = 0.04  # root of the mean squared difference of colours, 5 of 255 levels: noise and compression
_MIN_DIS_PX = 16  # below it OpenCV 5.0 refuses, returns NaN or, where the image is wide, crashes
_MIN_TVL1_PX = 2  # for a slope


class WarpingError(NamedTuple):
    error: float  # NaN where no pixel of any pair is reliable
    reliable_share: float  # of all pixels
    pairs: int  # that no cut lies between


class Link(NamedTuple):
    """How the previous frame is carried to the current one: `carry(previous, flow)`, as good as `reliable` says."""

    flow: np.ndarray  # float32 [h, w, 2], from the current to the previous frame, px
    reliable: np.ndarray  # float32 [h, w], from 0 to 1


def dis(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dense inverse search (Kroeger et al. 2016, arXiv 1603.03590), OpenCV's medium preset, refined for longer.

    A side shorter than 16 px is continued by its last row or column; an image of one pixel does not move.
    """
    height, width = first.shape[:2]
    one, two = _continued(first, _MIN_DIS_PX), _continued(second, _MIN_DIS_PX)
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setVariationalRefinementIterations(20)
    found = search.calc(one, two, None)  # pyright: ignore[reportCallIssue]
    return np.ascontiguousarray(found[:height, :width])


def tvl1(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Total variation and L1 (Zach, Pock and Bischof 2007): another method than `dis`, to score with what was not
    stylised with.

    scikit-image's, with the weights and warps of the published program (Sanchez, Meinhardt-Llopis and Facciolo, IPOL
    2013) and as many iterations, without which it carries motions into still surroundings: some seconds an image.
    """
    from skimage.registration import optical_flow_tvl1  # only where movies are measured

    height, width = first.shape[:2]
    one, two = (np.float32(_continued(image, _MIN_TVL1_PX)) / 255 for image in (first, second))
    weights = {"attachment": 0.15 * 255, "tightness": 0.3}  # published for grey values up to 255
    down, right = optical_flow_tvl1(one, two, **weights, num_warp=5, num_iter=60, prefilter=True)
    return np.stack([right, down], -1)[:height, :width]


def _continued(image: np.ndarray, least_px: int) -> np.ndarray:
    """The grey levels of an image, its last row and column repeated where a side is shorter than `least_px`."""
    below, right = (max(0, least_px - side) for side in image.shape[:2])
    return cv2.copyMakeBorder(_grey(image), 0, below, 0, right, cv2.BORDER_REPLICATE)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(to_uint8(image), cv2.COLOR_RGB2GRAY)


def warp(image: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`image` [h, w, c] sampled bilinearly at (x, y) + flow[y, x], and inside [h, w]: was that within the image?

    Samples from outside repeat the border.
    """
    height, width = flow.shape[:2]
    x, y = _places(flow)
    warped = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return warped.reshape(image.shape), inside


def carry(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """`warp`, bicubically and clipped to [-1, 1]: bilinear frames of frames of frames would lose all that is fine."""
    moved = cv2.remap(image, *_places(flow), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return moved.reshape(image.shape).clip(-1, 1)


def _places(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) [h, w] that a flow leads to."""
    height, width = flow.shape[:2]
    x = np.arange(width, dtype=np.float32) + flow[..., 0]
    return x, np.arange(height, dtype=np.float32)[:, None] + flow[..., 1]


def reliable(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """bool [h, w], on the pixels that `forward` starts from: may what it says be relied on?

    Not where it leaves the image, where `backward` does not lead back (|f + b~|^2 >= 0.01 (|f|^2 + |b~|^2) + 0.5, with
    b~ the backward flow at the point that f leads to: occlusions), or at the edge of a motion
    (|grad f|^2 > 0.01 |f|^2 + 0.002). The rule of Ruder et al. (2016, arXiv 1604.08610) and its thresholds; the mask is
    not smoothed.
    """
    length = np.sum(forward**2, -1)
    slopes = [np.sum(np.gradient(forward, axis=axis) ** 2, -1) for axis in (0, 1) if forward.shape[axis] > 1]
    return _returning(forward, backward) & (sum(slopes) <= 0.01 * length + 0.002)


def _returning(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """bool [h, w]: does `forward` stay in the image, and `backward` lead back?"""
    back, inside = warp(backward, forward)
    lengths = np.sum(forward**2, -1) + np.sum(back**2, -1)
    return inside & (np.sum((forward + back) ** 2, -1) < 0.01 * lengths + 0.5)


def link(previous: np.ndarray, current: np.ndarray, *, flow: Flow = dis) -> Link | None:
    """What carries a stylised `previous` to `current`, frames of the input; None at a cut, where nothing should.

    The edges of motions count, unlike in `reliable`, and half of it what looks the same there without a way back: how
    a smooth surface moves nobody sees, but whether it flickers; carried whole, stains would grow on it. Reliability
    fades where it ends: what is made anew in one frame and carried in the next one flickers more than what is carried
    a little wrong.
    """
    back = flow(current, previous)
    returning = _returning(back, flow(previous, current))
    if returning.mean() < _CUT:
        return None
    same = np.square(warp(previous, back)[0] - current).mean(-1) < _SAME**2
    return Link(back, cv2.GaussianBlur(np.where(returning, 1, np.float32(0.5) * same), (0, 0), _FADING_PX))


def warping_errors(
    movies: Sequence[Iterable[np.ndarray]],
    inputs: Iterable[np.ndarray],
    *,
    flow: Flow = tvl1,
    checks: Sequence[Flow | None] = (None,),
    gap: int = 1,
    every: int = 1,
) -> list[list[WarpingError]]:
    """How much outputs t and t + gap differ where the motion of the inputs says that they show the same.

    By [check][movie], of several movies made of one input, whose motion is found once for them all.

    E = sum M (warp(O_{t+gap}, f) - O_t)^2 / sum M, the mean over pairs; f is the flow from input t to t + gap, M its
    `reliable` mask, and squares are means over the three channels of values in [0, 1], as Lai et al. compute it (2018,
    arXiv 1808.00449); t is every `every`-th frame. Pairs without a reliable pixel do not count, nor do those with a cut
    between (`link`): across it nothing moves, but by chance some pixels look as if. The error of a grey movie is 0:
    compare it with that of the input, warping_errors([inputs], inputs), and look at the style too. Holds `gap` pairs of
    frames in memory.

    With a check, another method, pixels count only where the two find the same to less than a pixel: what moves fast
    and has little texture can pass for standing still, forward and backward.

    Raises UserError where the numbers or the sizes of frames differ, and where there is no pair.
    """
    if min(gap, every) < 1:
        raise ValueError(f"a gap of {gap} frames, at every {every}")
    errors: list[list[list[float]]] = [[[] for _ in movies] for _ in checks]
    shares: list[list[float]] = [[] for _ in checks]
    past: deque[tuple[np.ndarray, ...]] = deque(maxlen=gap)
    cuts: deque[bool] = deque(maxlen=gap)  # between each of the past frames and the one after it
    for t, frames in enumerate(itertools.zip_longest(*movies, inputs)):
        if any(image is None for image in frames):
            raise UserError("the stylised movie and its input have different numbers of frames")
        *outputs, frame = frames
        for output in outputs:
            if output.shape != frame.shape:
                raise UserError(
                    f"frames of the stylised movie are {output.shape[:2]} px, of its input {frame.shape[:2]}"
                )
        if past:
            between = (t - 1) % every < gap  # within a pair that counts; others are not looked at
            cuts.append(between and link(past[-1][-1], frame) is None)
        if len(cuts) == gap and (t - gap) % every == 0 and not any(cuts):
            *earlier_outputs, earlier = past[0]
            with ThreadPoolExecutor(2) as pool:
                motion, back = pool.map(flow, (earlier, frame), (frame, earlier))
            mask = reliable(motion, back)
            squares = [
                np.square((warp(output, motion)[0] - earlier_output) / 2, dtype=np.float64).mean(-1)  # of [0, 1]
                for output, earlier_output in zip(outputs, earlier_outputs, strict=True)
            ]
            for check, share, found in zip(checks, shares, errors, strict=True):
                agreed = mask if check is None else mask & _same(motion, check(earlier, frame))
                share.append(float(agreed.mean()))
                if agreed.any():
                    for movie, square in zip(found, squares, strict=True):
                        movie.append(square[agreed].mean())
        past.append(frames)
    if len(cuts) < gap:
        raise UserError(f"a warping error over {gap} frames needs at least {gap + 1} of them")
    return [
        [WarpingError(_mean(of), _mean(share), len(share)) for of in found]
        for found, share in zip(errors, shares, strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _same(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where two flows [h, w, 2] differ by less than a pixel."""
    return np.sum((first - second) ** 2, -1) < 1
