"""How much a stylised movie flickers, beside the same network frame by frame, and beside the clip itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from lib import images
from lib.process import UserError
from stylize import movies
from stylize.apply import Stylizer
from stylize.evaluate import Judge, Picture
from stylize.flow import dis, warping_errors
from stylize.movie import stylize_movie
from stylize.training import Trained
from stylize.vgg import LossNetwork

PROTOCOL = (
    "Movies: CLIP_STYLE.E_warp is the mean squared difference (pixels in [0, 1]) of each frame to the next one brought "
    "to its place, where the motion is reliable (reliable_share: of the pixels); motion of the input by TV-L1, while "
    "the network's memory uses DIS. E_warp_agreed: only where both find the same to less than a pixel. E_warp_5: five "
    "frames apart. Pairs with a cut between them do not count. CLIP_STYLE.per_frame: the same network without its "
    "memory. CLIP.input: the clip itself. All of every tenth frame, also objective, style and content."
)
_EVERY, _FAR = 10, 5
_SHOWN_PX = 400


def check(paths: Sequence[Path]) -> None:
    """Raises UserError for what is no movie, for one that is too short, and for two of the same name."""
    for path in paths:
        count = movies.probe(path).frames
        if count is not None and count <= _FAR:
            raise UserError(f"{path} has {count} frames: flicker is measured over {_FAR + 1} or more")
    if len({_plain(path.stem) for path in paths}) < len(paths):
        raise UserError("two of the clips have the same name: their numbers would be one")


def _plain(name: str) -> str:
    return name.replace(".", "_")  # numbers are called CLIP_STYLE.METRIC


def evaluate(
    path: Path, trained: Trained, network: LossNetwork, mesh: Mesh, out: Path, say: Callable[[str], None]
) -> tuple[dict[str, float], list[Picture], str]:
    """Numbers CLIP_STYLE.METRIC and CLIP_STYLE.per_frame.METRIC, the movies beside the figures, and the protocol."""
    clip, name = movies.probe(path), _plain(path.stem)
    stylize = Stylizer(trained, mesh)
    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, tuple[Path, Judge]] = {}
    for k, style in enumerate(trained.styles):
        judge = Judge(trained, network, mesh, k)
        key = f"{name}_{_plain(style)}"
        ways = {f"{key}.per_frame": False} | ({key: True} if trained.config.network.memory else {})
        for way, memory in ways.items():
            say(f"stylising {path.name} as {style}{'' if memory else ', frame by frame'}")
            made[way] = out / f"{way}.mp4", judge
            stylize_movie(clip, made[way][0], stylize.frames_in(stylize.only(k)), flow=memory)
    say(f"measuring {path.name}")
    sources = {key: movie for key, (movie, _) in made.items()} | {f"{name}.input": path}
    numbers: dict[str, float] = {}
    for gap, checks in ((1, {"": None, "_agreed": dis}), (_FAR, {f"_{_FAR}": None})):
        read = [_images(source) for source in sources.values()]
        errors = warping_errors(read, _images(path), checks=list(checks.values()), gap=gap, every=_EVERY)
        for label, found in zip(checks, errors, strict=True):
            numbers |= {f"{key}.E_warp{label}": one.error for key, one in zip(sources, found, strict=True)}
            numbers[f"{name}.input.reliable_share{label}"] = found[0].reliable_share
    for key, (movie, judge) in made.items():
        numbers |= _objective(key, movie, path, judge)
    return numbers, [_frames(movie, out / f"{key}.png") for key, (movie, _) in made.items()], PROTOCOL


def _objective(key: str, made: Path, source: Path, judge: Judge) -> dict[str, float]:
    frames = enumerate(zip(_images(made), _images(source), strict=True))
    rows = [judge(image, photo) for k, (image, photo) in frames if k % _EVERY == 0]
    return {
        f"{key}.{metric}": float(np.mean([row[metric] for row in rows])) for metric in ("objective", "style", "content")
    }


def _images(path: Path) -> Iterator[np.ndarray]:
    return (frame.image for frame in movies.read(path))


def _frames(movie: Path, out: Path) -> Picture:
    """Four consecutive frames from the middle, made smaller where they are large."""
    count = movies.probe(movie).frames or 8
    middle = [
        images.resize_longest(image, min(_SHOWN_PX, max(image.shape[:2])))
        for k, image in enumerate(_images(movie))
        if count // 2 <= k < count // 2 + 4
    ]
    return images.write(out, images.grid(np.stack(middle), columns=2)), f"Four consecutive frames of {movie.name}."
