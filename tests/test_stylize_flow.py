"""stylize/flow.py: known motions are found, undone, and told from what cannot be known."""

import itertools

import cv2
import numpy as np
import pytest

from lib.process import UserError
from stylize import flow, movies

HEIGHT, WIDTH = 96, 128


def textured(height, width, seed=0):
    """float32 [h, w, 3] in [-1, 1] with details of all sizes."""
    rng, image = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for sigma in (1.5, 4, 10):
        smooth = cv2.GaussianBlur(rng.standard_normal(image.shape).astype(np.float32), (0, 0), sigma)
        image += smooth.reshape(image.shape) / smooth.std() / 6
    return np.clip(image, -1, 1)


def view(world, dx, dy, height=HEIGHT, width=WIDTH):
    """`world` moved by (dx, dy) px, of any fraction, cut to size 16 px inside it."""
    x, y = np.meshgrid(np.arange(width, dtype=np.float32) + 16 - dx, np.arange(height, dtype=np.float32) + 16 - dy)
    return cv2.remap(world, x, y, cv2.INTER_CUBIC)


WORLD = textured(HEIGHT + 32, WIDTH + 32)


def warping_error(outputs, inputs, **options):
    """Of one movie."""
    return flow.warping_errors([outputs], inputs, **options)[0][0]


@pytest.mark.parametrize("method", [flow.dis, flow.tvl1])
@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (3, -2), (-1.5, 0.25), (4, 5)])
def test_translations_are_found_and_undone(method, dx, dy):
    first, second = view(WORLD, 0, 0), view(WORLD, dx, dy)
    found = method(first, second)
    assert found.dtype == np.float32 and found.shape == (HEIGHT, WIDTH, 2)
    inner = (slice(16, -16), slice(16, -16))
    assert np.abs(found - [dx, dy])[inner].max() < 0.25
    assert np.abs(found - [dx, dy])[inner].mean() < 0.08
    undone, inside = flow.warp(second, found)
    assert np.abs(undone - first)[inner].mean() < 0.02
    assert inside[inner].all()
    assert flow.reliable(found, method(second, first))[inner].mean() > 0.99


def test_warp_is_bilinear_and_knows_the_borders():
    image = np.random.default_rng(0).uniform(-1, 1, (4, 5, 7)).astype(np.float32)
    motion = np.zeros((4, 5, 2), np.float32)
    warped, inside = flow.warp(image, motion)
    np.testing.assert_array_equal(warped, image)
    assert inside.all() and inside.dtype == bool
    motion[:] = [0.25, -1]
    warped, inside = flow.warp(image, motion)
    np.testing.assert_allclose(warped[1:, :-1], 0.75 * image[:-1, :-1] + 0.25 * image[:-1, 1:], atol=1e-6)
    np.testing.assert_allclose(warped[0, :-1], 0.75 * image[0, :-1] + 0.25 * image[0, 1:], atol=1e-6)
    np.testing.assert_array_equal(inside, np.pad(np.ones((3, 4), bool), ((1, 0), (0, 1))))
    assert flow.warp(image[..., :1], motion)[0].shape == (4, 5, 1)


def constant(dx, dy=0.0, height=20, width=30):
    return np.broadcast_to(np.float32([dx, dy]), (height, width, 2)).copy()


def test_reliable_needs_the_way_back():
    """With f = (4, 0) and b = (-4 + e, 0) the threshold is e^2 < 0.01 (16 + (4 - e)^2) + 0.5."""
    limit = (-0.08 + np.sqrt(0.08**2 + 4 * 0.99 * 0.82)) / (2 * 0.99)
    for error, expected in ((limit - 0.01, True), (limit + 0.01, False)):
        mask = flow.reliable(constant(4), constant(error - 4))
        assert (mask[:, :26] == expected).all()
        assert not mask[:, 26:].any()  # leaves the image
    assert not flow.reliable(constant(0, 30), constant(0, -30)).any()


def test_reliable_ends_at_the_edges_of_motions():
    """Central differences: a step of s px between two columns has a slope of s / 2 on both sides of it."""
    for step, expected in ((0.088, True), (0.092, False)):  # 0.002 = (0.0894 / 2)^2
        forward = constant(0)
        forward[:, 15:, 0] = step
        mask = flow.reliable(forward, -forward)
        assert (mask[:, 14:16] == expected).all()
        assert mask[:, :14].all() and mask[:, 16:-1].all()


def over(background, square, left):
    image = background.copy()
    image[30:62, left : left + 32] = square
    return image


def test_what_was_hidden_is_not_reliable():
    square = textured(32, 32, seed=1)
    background = view(WORLD, 0, 0)
    first, second = over(background, square, 30), over(background, square, 38)
    back, reliable = flow.link(first, second)
    assert reliable.dtype == np.float32 and reliable.min() >= 0 and reliable.max() <= 1 + 1e-6
    uncovered, moved, still = reliable[32:60, 31:37], reliable[36:56, 46:64], reliable[70:90, 10:-10]
    assert uncovered.mean() < 0.25 and moved.mean() > 0.98 and still.mean() > 0.98
    sharp = flow.reliable(back, flow.dis(first, second))
    uncovered, moved, still = sharp[32:60, 31:37], sharp[36:56, 46:64], sharp[70:90, 10:-10]
    assert uncovered.mean() < 0.15 and moved.mean() > 0.95 and still.mean() > 0.98
    assert np.abs(np.diff(reliable, axis=1)).max() < 0.25  # it fades
    np.testing.assert_allclose(back[46, 54], [-8, 0], atol=0.2)
    carried, _ = flow.warp(first, back)
    assert np.abs(carried - second)[reliable > 0.95].mean() < 0.01


@pytest.mark.parametrize("method", [flow.dis, flow.tvl1])
@pytest.mark.parametrize(
    "size", [(1, 1), (2, 2), (7, 7), (8, 300), (12, 300), (15, 16), (16, 15), (7, 1001), (1001, 7), (1, 300), (300, 1)]
)
def test_any_size(method, size):
    first, second = textured(*size), textured(*size, seed=1)
    found = method(first, second)
    assert found.shape == (*size, 2) and np.isfinite(found).all()
    assert flow.reliable(found, method(second, first)).shape == size
    assert flow.link(first, first, flow=method).flow.shape == (*size, 2)


def test_one_pixel_does_not_move():
    np.testing.assert_array_equal(flow.dis(np.ones((1, 1, 3)), -np.ones((1, 1, 3))), np.zeros((1, 1, 2)))


def test_small_images_move_too():
    found = flow.dis(view(WORLD, 0, 0, 9, 60), view(WORLD, 1, 0, 9, 60))
    np.testing.assert_allclose(np.median(found, (0, 1)), [1, 0], atol=0.1)


def shifting(dx, dy):
    """The true flow of a movie that moves by (dx, dy) px; its first pixel says which frame is the later one."""

    def method(first, second):
        later = first[0, 0, 0] < second[0, 0, 0]
        return constant(dx if later else -dx, dy if later else -dy, *first.shape[:2])

    return method


def test_warping_error_of_a_movie_that_moves_as_its_input():
    inputs = [view(WORLD, 2 * i, -i) for i in range(4)]
    outputs = [-0.5 * image for image in inputs]
    for method, gap, pairs in ((flow.dis, 1, 3), (flow.tvl1, 2, 2)):
        error, share, count = warping_error(outputs, iter(inputs), flow=method, gap=gap)
        assert error < 1e-4 and share > 0.8 and count == pairs
    still = warping_error([inputs[0]] * 4, inputs, flow=flow.dis)  # does not move along
    assert still.error > 100 * warping_error(outputs, inputs, flow=flow.dis).error


def test_warping_error_of_a_known_difference():
    inputs = []
    for i in range(4):
        inputs.append(view(WORLD, 3 * i, 0))
        inputs[-1][0, 0, 0] = i  # what `shifting` reads
    steps = np.float32([0.1, 0.2, 0.4])
    outputs = [view(WORLD, 3 * i, 0) + steps * i for i in range(4)]
    exact = np.mean((steps / 2) ** 2)
    error, share, pairs = warping_error(iter(outputs), inputs, flow=shifting(3, 0))
    assert (error, share, pairs) == (pytest.approx(exact, rel=1e-3), pytest.approx(1 - 3 / WIDTH), 3)
    error, share, pairs = warping_error(outputs, inputs, flow=shifting(9, 0), gap=3)
    assert (error, share, pairs) == (pytest.approx(9 * exact, rel=1e-3), pytest.approx(1 - 9 / WIDTH), 1)


def test_several_movies_share_the_motion_of_their_input():
    inputs = [view(WORLD, 2 * i, -i) for i in range(4)]
    movies = [[-0.5 * image for image in inputs], [inputs[0]] * 4]
    calls = []

    def counted(first, second):
        calls.append(1)
        return flow.dis(first, second)

    (together,) = flow.warping_errors([iter(movie) for movie in movies], inputs, flow=counted)
    assert together == [warping_error(movie, inputs, flow=flow.dis) for movie in movies]
    assert len(calls) == 6


def test_pixels_count_where_another_method_finds_the_same():
    """In the left half the other method finds a pixel and a half more."""
    inputs = [view(WORLD, 0, 0)] * 3
    left = np.arange(WIDTH) < WIDTH // 2
    movie = [0.2 * k * left[:, None] + np.zeros_like(inputs[0]) for k in range(3)]
    still = lambda first, second: constant(0, 0, HEIGHT, WIDTH)  # noqa: E731
    other = lambda first, second: constant(0.9, 0, HEIGHT, WIDTH) + np.where(left, 0.6, 0)[:, None]  # noqa: E731
    (whole,), (agreed,) = flow.warping_errors([movie], inputs, flow=still, checks=(None, other))
    assert (whole.error, whole.reliable_share) == (pytest.approx(0.1**2 / 2), 1)
    assert (agreed.error, agreed.reliable_share) == (0, 0.5)


def test_warping_error_without_a_reliable_pixel():
    frames = [view(WORLD, 0, 0)] * 3
    error, share, pairs = warping_error(frames, frames, flow=lambda first, second: constant(999, 0, HEIGHT, WIDTH))
    assert np.isnan(error) and (share, pairs) == (0, 2)


def test_what_looks_the_same_without_a_way_back_is_half_reliable():
    """In the right half both ways lead to the right; its lower part changes by more than noise."""

    def astray(first, second):
        motion = constant(0, 0, HEIGHT, WIDTH)
        motion[:, 64:, 0] = 3
        return motion

    first = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    second = first + 0.02
    second[48:, 64:] = 0.1
    reliable = flow.link(first, second, flow=astray).reliable
    assert reliable[:, :50].min() == pytest.approx(1)
    assert reliable[:40, 80:].max() == reliable[:40, 80:].min() == pytest.approx(0.5)
    assert reliable[60:, 80:].max() == 0


def test_nothing_moves_across_a_cut():
    other = textured(HEIGHT + 32, WIDTH + 32, seed=1)
    frames = [view(WORLD, 0, 0), view(WORLD, 1, 0), view(other, 0, 0), view(other, 1, 0)]
    assert [flow.link(*pair) is None for pair in itertools.pairwise(frames)] == [False, True, False]
    error, share, pairs = warping_error(frames, frames, flow=flow.dis)
    scenes = [warping_error(scene, scene, flow=flow.dis) for scene in (frames[:2], frames[2:])]
    assert pairs == 2 and error == pytest.approx(np.mean([scene.error for scene in scenes]))
    assert share == pytest.approx(np.mean([scene.reliable_share for scene in scenes]))
    error, share, pairs = warping_error(frames, frames, flow=flow.dis, gap=2)
    assert np.isnan(error) and np.isnan(share) and pairs == 0


def test_warping_error_of_what_does_not_belong_together():
    frames = [view(WORLD, 0, 0)] * 3
    with pytest.raises(UserError, match="different numbers of frames"):
        warping_error(frames[:2], frames)
    with pytest.raises(UserError, match=r"\(95, 128\) px, of its input \(96, 128\)"):
        warping_error([frame[1:] for frame in frames], frames)
    with pytest.raises(UserError, match="over 3 frames needs at least 4"):
        warping_error(frames, frames, gap=3)
    with pytest.raises(ValueError, match="a gap of 0 frames"):
        warping_error(frames, frames, gap=0)


def test_every_so_many_th_frame_is_compared_with_the_one_after_the_gap():
    inputs = [view(WORLD, 0, 0)] * 8
    movie = [inputs[0] + np.float32(k**2) for k in range(8)]
    still = lambda first, second: constant(0, 0, HEIGHT, WIDTH)  # noqa: E731
    steps = np.array([2**2 - 0**2, 5**2 - 3**2]) / 2  # frames 0 and 3; frame 6 has none two frames later
    found = warping_error(movie, inputs, flow=still, gap=2, every=3)
    assert (found.error, found.pairs) == (pytest.approx(np.mean(steps**2)), 2)


def test_a_real_movie(data_folder):
    frames = [f.image[::3, ::3] for f in itertools.islice(movies.read(data_folder / "video" / "bikes.mp4"), 40, 43)]
    own = warping_error(frames, frames, every=2)
    assert 0 < own.error < 0.005 and 0.5 < own.reliable_share < 1
    rng = np.random.default_rng(0)
    flickering = [np.clip(frame + rng.normal(0, 0.2, 3).astype(np.float32), -1, 1) for frame in frames]
    assert warping_error(flickering, frames, every=2).error > 3 * own.error
