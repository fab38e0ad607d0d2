"""From a clip to a stylised clip, frame by frame: by a trained network, or by optimisation of each frame."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lib import images
from lib.shard import fetch, place
from stylize import movies
from stylize.config import Optimization, Perception
from stylize.flow import Link, carry, link
from stylize.loss import Style, content_of
from stylize.movies import Clip, Frame
from stylize.optimize import begin, compile_iterations
from stylize.vgg import LossNetwork
from stylize.writer import Writer

_CHUNK = 20  # iterations in one program
Stylize = Callable[[np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]
"""(frame, the stylised frame before at the places of this one, where that is reliable [h, w]) -> stylised frame"""


class Linked(NamedTuple):
    frame: Frame
    link: Link | None
    """to the frame before; none for the first one, after a cut, and where it is not asked for"""


def linked(path: Path, *, longest_px: int | None, flow: bool) -> Iterator[Linked]:
    """The frames of a clip, and with `flow` the motion from one to the next.

    Frame t + 1 is read and its motion found on another core while frame t is stylised.
    """

    def prepared() -> Iterator[Linked]:
        previous: np.ndarray | None = None
        for frame in movies.read(path):
            small = dataclasses.replace(frame, image=images.resize_longest(frame.image, longest_px))
            found = link(previous, small.image) if flow and previous is not None else None
            previous = small.image
            yield Linked(small, found)

    frames = prepared()
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, frames, None)
        while (here := coming.result()) is not None:
            coming = worker.submit(next, frames, None)
            yield here


def stylize_movie(
    clip: Clip,
    out: Path,
    stylize: Stylize,
    *,
    flow: bool,
    longest_px: int | None = None,
    longest_s: float | None = None,
) -> int:
    """Writes the stylised clip; returns the number of frames. Memory does not depend on the length.

    `longest_px` makes the frames smaller, `longest_s` ends after that time. Raises UserError as `movies` does.
    """
    size = images.fit_within(clip.height, clip.width, longest_px)
    before: np.ndarray | None = None
    count = 0
    with (
        Writer(out, clip, size=size) as writer,
        tqdm(total=clip.frames_within(longest_s), desc=out.name, unit="frame", disable=None, leave=False) as bar,
    ):
        for frame, motion in linked(clip.path, longest_px=longest_px, flow=flow):
            if longest_s is not None and frame.time_s >= longest_s:
                break
            moved, mask = None, None
            if motion is not None and before is not None:
                moved, mask = carry(before, motion.flow), motion.reliable
            before = stylize(frame.image, moved, mask)
            writer.write(before, frame.time_s, frame.duration_s)
            count += 1
            bar.update()
    return count


class FrameOptimizer:
    """Stylises a frame by optimisation (Ruder et al., arXiv 1604.08610), each from the one before where there is one.

    Frames with none before take the first of `iterations`, the others the last, all at one scale. Frames are kept in
    `folder`, and a stopped movie goes on with them: what comes before a frame is what was saved of it.
    """

    def __init__(
        self,
        network: LossNetwork,
        perception: Perception,
        options: Optimization,
        style: Style,
        temporal_weight: float,
        folder: Path,
        mesh: Mesh,
    ):
        self._network, self._options, self._folder, self._weight = network, options, folder, temporal_weight
        self._params, self._style = place(network.params, mesh), style
        self._mesh, self._count = mesh, 0
        self._run = functools.cache(lambda count: compile_iterations(network, perception, options, mesh, count))

    def __call__(self, image: np.ndarray, before: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
        path = self._folder / f"{self._count:06d}.png"
        self._count += 1
        if path.exists():
            return images.read(path)
        x = image if before is None or mask is None else mask[..., None] * before + (1 - mask[..., None]) * image
        weight = np.zeros(image.shape[:2], np.float32) if mask is None else self._weight * mask
        batch = place(
            {
                "params": self._params,
                "style": self._style,
                "content": content_of(self._network, self._params, jnp.asarray(image)[None]),
                "before": jnp.asarray(image if before is None else before)[None],
                "weight": jnp.asarray(weight)[None, ..., None],
            },
            self._mesh,
        )
        iterations = self._options.iterations[0 if before is None else -1]
        state = begin(x, self._options, self._mesh)
        for done in range(0, iterations, _CHUNK):  # between programs a signal is heard
            state, _ = jax.block_until_ready(self._run(min(_CHUNK, iterations - done))(state, batch))
        return images.read(images.write(path, fetch(state.params)[0]))
