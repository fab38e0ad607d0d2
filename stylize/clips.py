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
    "Movies: CLIP.E_warp is the mean squared difference (pixels in [0, 1]) of each frame to the next one brought to "
    "its place, where the motion is reliable (reliable_share: of the pixels); motion of the input by Farneback's "
    "method, while the network's memory uses DIS. E_warp_agreed: only where both find the same to less than a pixel, "
    "which leaves out smooth surfaces that move fast and by Farneback's method stand still. E_warp_5: five frames "
    "apart. CLIP.per_frame: the same network without its memory. CLIP.input: the clip itself. objective, style, "
    "content: of every tenth frame."
)
_EVERY, _FAR = 10, 5


def check(paths: Sequence[Path]) -> None:
    """Raises UserError for what is no movie, for one that is too short, and for two of the same name."""
    for path in paths:
        count = movies.probe(path).frames
        if count is not None and count <= _FAR:
            raise UserError(f"{path} has {count} frames: flicker is measured over {_FAR + 1} or more")
    if len({_name(path) for path in paths}) < len(paths):
        raise UserError("two of the clips have the same name: their numbers would be one")


def _name(path: Path) -> str:
    return path.stem.replace(".", "_")  # numbers are called CLIP.METRIC


def evaluate(
    path: Path, trained: Trained, network: LossNetwork, mesh: Mesh, style: int, out: Path, say: Callable[[str], None]
) -> tuple[dict[str, float], list[Picture], str]:
    """Numbers CLIP.METRIC and CLIP.per_frame.METRIC, the movies themselves beside the figures, and the protocol."""
    clip, name = movies.probe(path), _name(path)
    stylize, judge = Stylizer(trained, mesh), Judge(trained, network, mesh, style)
    mix = stylize.mix([float(i == style) for i in range(len(trained.config.styles))])
    ways = {f"{name}.per_frame": False} | ({name: True} if trained.config.network.memory else {})
    made = {key: out / f"{key}.{trained.styles[style]}.mp4" for key in ways}
    out.mkdir(parents=True, exist_ok=True)
    for key, memory in ways.items():
        say(f"stylising {path.name}{'' if memory else ', frame by frame'}")
        stylize_movie(clip, made[key], lambda x, before, mask: stylize(x, mix, before, mask), flow=memory)
    say(f"measuring {path.name}")
    sources = {**made, f"{name}.input": path}
    numbers: dict[str, float] = {}
    for gap, checks in ((1, {"": None, "_agreed": dis}), (_FAR, {f"_{_FAR}": None})):
        movies_read = [_images(source) for source in sources.values()]
        errors = warping_errors(movies_read, _images(path), checks=list(checks.values()), gap=gap)
        for label, found in zip(checks, errors, strict=True):
            numbers |= {f"{key}.E_warp{label}": one.error for key, one in zip(sources, found, strict=True)}
            numbers[f"{name}.input.reliable_share{label}"] = found[0].reliable_share
    for key, movie in made.items():
        numbers |= _objective(key, movie, path, judge)
    return numbers, [_frames(movie, out / f"{key}.png") for key, movie in made.items()], PROTOCOL


def _objective(key: str, made: Path, source: Path, judge: Judge) -> dict[str, float]:
    frames = enumerate(zip(_images(made), _images(source), strict=True))
    rows = [judge(image, photo) for k, (image, photo) in frames if k % _EVERY == 0]
    return {
        f"{key}.{metric}": float(np.mean([row[metric] for row in rows])) for metric in ("objective", "style", "content")
    }


def _images(path: Path) -> Iterator[np.ndarray]:
    return (frame.image for frame in movies.read(path))


def _frames(movie: Path, out: Path) -> Picture:
    """Four consecutive frames from the middle."""
    count = movies.probe(movie).frames or 8
    middle = [image for k, image in enumerate(_images(movie)) if count // 2 <= k < count // 2 + 4]
    return images.write(out, images.grid(np.stack(middle), columns=2)), f"Four consecutive frames of {movie.name}."
