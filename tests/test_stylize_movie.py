"""python -m stylize video and evaluate --clips, whole, on a small movie; and the parts that they are made of."""

import json
import shutil
import signal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import config as configs
from lib import images, shard
from lib.checkpoint import Checkpoints
from lib.process import SIGNALS, UserError
from lib.run import RunFolder
from lib.shard import make_mesh
from stylize import clips, commands, movie, movies, training
from stylize import evaluate as evaluation
from stylize.__main__ import main
from stylize.config import Config, Network, Optim, Optimization, Perception
from stylize.loss import content_of, everywhere, style_of
from stylize.optimize import compile_trace
from stylize.writer import Writer
from tests.stylize_cases import compiled_once, smooth, tiny_network, write_vgg

pytestmark = pytest.mark.slow  # long; `make test-slow`

RATE, SHIFT_PX = Fraction(24000, 1001), 2
CONFIG = Config(
    styles=("style.png",),
    photos="photos",
    perception=Perception("vgg.safetensors", style_layers=("relu1_1", "relu2_1"), content_layers=("relu2_1",)),
    network=Network(width=2, blocks=1, memory=True),
    optim=Optim(steps=1),
)
OPTIMIZE = (
    "video style.png clip.mp4 --optimize --optim.iterations 2 --perception.weights vgg.safetensors "
    "--perception.style-layers relu1_1 relu2_1 --perception.content-layers relu2_1"
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A movie of a texture that moves to the right, a style, weights, and the run R of a network with a memory."""
    desk = tmp_path_factory.mktemp("desk")
    scene = smooth(0, 34, 48 + 5 * SHIFT_PX)
    with Writer(desk / "clip.mp4", size=(34, 48), frames_per_s=RATE) as writer:
        for k in range(6):
            left = (5 - k) * SHIFT_PX
            writer.write(scene[:, left : left + 48])
    images.write(desk / "style.png", smooth(1, 24, 32) ** 3)
    write_vgg(desk)
    with pytest.MonkeyPatch.context() as patch, compiled_once(tmp_path_factory.mktemp("cache")):
        patch.chdir(desk)
        patch.setattr(shard, "start", lambda: None)
        state = training.start_state(CONFIG)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: x + np.float32(rng.normal(size=x.shape) * 0.2), state.params)
        with RunFolder.start(desk / "R", "stylize", configs.to_json(CONFIG), resume=False):
            pass
        with Checkpoints(desk / "R" / "checkpoints" / training.NAME) as checkpoints:
            checkpoints.save(1, state.replace(step=jnp.int32(1), params=params))
        yield desk


@pytest.fixture
def here(desk, in_process):
    """Runs a command in the desk: exit code, stdout, stderr."""
    return in_process(main, desk)


def frames_of(path):
    return np.stack([frame.image for frame in movies.read(path)])


def test_a_movie_by_a_network_with_and_without_its_memory(here, desk):
    made = {}
    for name, options in {"memory": "", "alone": "--per-frame"}.items():
        code, out, err = here(f"video R clip.mp4 --out {name}.mp4 {options}")
        assert (code, out, err) == (0, f"6 frames\n{name}.mp4\n", "")
        clip = movies.probe(desk / f"{name}.mp4")
        assert (clip.width, clip.height, clip.frames, clip.frames_per_s) == (48, 34, 6, RATE)
        made[name] = frames_of(desk / f"{name}.mp4")
        assert made[name].shape == (6, 34, 48, 3)
    difference = np.abs(made["memory"] - made["alone"]).mean((1, 2, 3))
    assert difference[1:].min() > 5 * difference[0], difference  # of the first one only the compression differs
    times = [[frame.time_s for frame in movies.read(desk / f"{name}.mp4")] for name in ("clip", "memory")]
    assert times[0] == times[1]


def test_a_smaller_and_shorter_movie(here, desk):
    code, out, err = here("video R clip.mp4 --out small.gif --longest-px 24 --longest-s 0.1 --weights 3 --strength 0.5")
    assert (code, out, err) == (0, "3 frames\nsmall.gif\n", "")
    assert frames_of(desk / "small.gif").shape == (3, 17, 24, 3)


def test_frames_come_with_what_moved(desk):
    found = list(movie.linked(desk / "clip.mp4", longest_px=None, flow=True))
    assert len(found) == 6 and found[0].link is None
    for _, link in found[1:]:
        assert link is not None and link.flow.shape == (34, 48, 2) and link.reliable.mean() > 0.5
        x, y = np.median(link.flow[link.reliable > 0], axis=0)
        assert x == pytest.approx(-SHIFT_PX, abs=0.3) and y == pytest.approx(0, abs=0.3)
    plain = list(movie.linked(desk / "clip.mp4", longest_px=24, flow=False))
    assert [link for _, link in plain] == [None] * 6
    assert {frame.image.shape for frame, _ in plain} == {(17, 24, 3)}
    unfinished = movie.linked(desk / "clip.mp4", longest_px=None, flow=True)
    next(unfinished)
    unfinished.close()


def test_optimised_frames_are_kept_and_a_stopped_movie_goes_on_with_them(here, desk, monkeypatch):
    monkeypatch.setattr(commands.shutil, "rmtree", lambda path: None)  # to look at the frames
    code, out, err = here(f"{OPTIMIZE} --out whole.mp4")
    assert (code, out, err) == (0, "6 frames\nwhole.mp4\n", "")
    clip = movies.probe(desk / "whole.mp4")
    assert (clip.width, clip.height, clip.frames, clip.frames_per_s) == (48, 34, 6, RATE)

    optimised = movie.FrameOptimizer.__call__

    def stopping(self, image, before, mask):
        if self._count == 3:
            signal.raise_signal(signal.SIGTERM)
        return optimised(self, image, before, mask)

    with monkeypatch.context() as patch:
        patch.setattr(movie.FrameOptimizer, "__call__", stopping)
        patch.setattr(SIGNALS, "code", None)
        assert here(f"{OPTIMIZE} --out stopped.mp4")[0] == 75
    kept = {path: path.stat().st_mtime_ns for path in (desk / "stopped.frames" / "samples").iterdir()}
    assert len(kept) == 3 and not (desk / "stopped.mp4").exists()

    assert "already holds a run: --resume" in here(f"{OPTIMIZE} --out stopped.mp4")[2]
    other = here(f"{OPTIMIZE} --out stopped.mp4 --resume --temporal-weight 1")
    assert other[0] == 2 and "temporal_weight was 30.0, now 1.0" in other[2]
    code, out, err = here(f"{OPTIMIZE} --out stopped.mp4 --resume")
    assert (code, out, err) == (0, "6 frames\nstopped.mp4\n", "")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    whole, stopped = (sorted((desk / f"{name}.frames" / "samples").iterdir()) for name in ("whole", "stopped"))
    assert [path.name for path in stopped] == [f"{k:06d}.png" for k in range(6)]
    assert [path.read_bytes() for path in stopped] == [path.read_bytes() for path in whole]
    assert len({path.read_bytes() for path in whole}) == 6


def test_the_frames_of_a_finished_movie_are_removed(here, desk):
    code, _, err = here(f"{OPTIMIZE} --out short.mkv --longest-s 0.05")
    assert (code, err) == (0, "") and not (desk / "short.frames").exists()
    assert len(frames_of(desk / "short.mkv")) == 2


def test_a_frame_is_one_optimisation_however_many_programs_it_takes(tmp_path):
    """45 iterations are two programs of 20 and one of 5; the next frame takes 2."""
    network, mesh, image, seen = tiny_network(), make_mesh(1), smooth(0, 24, 32), np.ones((24, 32), np.float32)
    options = Optimization("adam", iterations=(45, 2))
    style = everywhere(style_of(network, network.params, [jnp.asarray(smooth(1, 24, 32))]))
    optimizer = movie.FrameOptimizer(network, Perception(), options, style, 1.0, tmp_path, mesh)
    batch = {
        "params": network.params,
        "style": style,
        "content": content_of(network, network.params, jnp.asarray(image)[None]),
        "before": jnp.asarray(image)[None],
        "weight": jnp.zeros((1, 24, 32, 1)),
    }
    first = optimizer(image, None, None)
    whole, values, _ = compile_trace(network, Perception(), options, mesh, 45)(image, batch)
    np.testing.assert_allclose(first, np.clip(whole[0], -1, 1), atol=0.6 / 127.5)
    second = optimizer(image, first, seen)
    batch |= {"before": jnp.asarray(first)[None], "weight": jnp.asarray(seen)[None, ..., None]}
    short = compile_trace(network, Perception(), options, mesh, 2)(first, batch)[0]
    np.testing.assert_allclose(second, np.clip(short[0], -1, 1), atol=0.6 / 127.5)
    assert values[-1] < 0.5 * values[0] and np.abs(second - first).max() > 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000001.png"]


def test_flicker_is_measured(here, desk, monkeypatch):
    shutil.copy(desk / "clip.mp4", desk / "my.clip.mp4")
    images.write(desk / "photos" / "0.png", smooth(2, 32, 32))
    still = ({"network.objective": 1.0}, [], "Stills.")
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: still)
    code, out, err = here("evaluate R --photos photos --clips my.clip.mp4 --out E")
    assert code == 0, err
    numbers = json.loads((desk / "E" / "evaluation.json").read_text())
    labels = ("", "_agreed", "_5")
    expected = {f"my_clip.input.{metric}{label}" for metric in ("E_warp", "reliable_share") for label in labels}
    ways = ("my_clip_style", "my_clip_style.per_frame")
    for name in ways:
        expected |= {f"{name}.E_warp{label}" for label in labels}
        expected |= {f"{name}.{metric}" for metric in ("objective", "style", "content")}
    assert numbers.keys() == {*expected, "network.objective", "protocol"}
    assert all(np.isfinite(numbers[name]) and numbers[name] > 0 for name in expected)
    assert 0 < numbers["my_clip.input.E_warp"] < 0.01 and 0.5 < numbers["my_clip.input.reliable_share"] <= 1
    assert numbers["protocol"].startswith("Stills. Movies:")
    assert "my_clip_style.per_frame" in out and "E_warp" in out and "E/report.html" in out
    for name in ways:
        assert movies.probe(desk / "E" / "figures" / f"{name}.mp4").frames == 6


def test_clips_that_cannot_be_measured(desk, tmp_path):
    clips.check([desk / "clip.mp4"])
    with pytest.raises(UserError, match="two of the clips have the same name"):
        clips.check([desk / "clip.mp4", tmp_path / ".." / desk / "clip.mp4"])
