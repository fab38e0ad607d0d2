"""What the commands do, once their options are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lib import config as configs
from lib import images
from lib.process import UserError
from lib.run import RunFolder
from lib.shard import make_mesh
from stylize import clips, color, data, page, record, training, vgg
from stylize import evaluate as evaluation
from stylize.apply import Stylizer
from stylize.config import Config
from stylize.loss import everywhere, style_of
from stylize.movie import FrameOptimizer, stylize_movie
from stylize.movies import Clip
from stylize.optimize import Task, optimize, tile_side
from stylize.vgg import LossNetwork

if TYPE_CHECKING:
    from stylize.__main__ import Apply, Evaluate, Image, Video

_NOT_OF_FRAMES = ("out", "resume", "longest_s", "strength")


def task_of(options: Image) -> Task:
    """The images of a command. Raises UserError for unreadable ones and for numbers of them that do not match."""
    content_path, *style_paths = options.images
    weights = list(options.weights) or [1.0] * len(style_paths)
    if len(weights) != len(style_paths):
        raise UserError(f"{len(weights)} weights for {len(style_paths)} styles")
    if options.masks and len(options.masks) != len(style_paths):
        raise UserError(f"{len(options.masks)} masks for {len(style_paths)} styles: one each is needed")
    content = data.read_image(content_path)
    content = images.resize_longest(content, options.longest_px)
    size = content.shape[:2]
    if options.color == "luminance":  # both are transferred without colours, which come back at the end
        content = np.float32(np.repeat(color.luminance(content)[..., None], 3, axis=-1))
    styles = [_recolored(data.read_image(path), content, options.color) for path in style_paths]
    masks = np.stack([images.read_mask(path, *size) for path in options.masks]) if options.masks else None
    start = images.resize(images.read(options.start), *size) if options.start else None
    return Task(content, styles, weights, masks, options.style_scale, start)


def prepared(options: Image, say: Callable[[str], None]) -> tuple[Task, LossNetwork]:
    """The images and the loss network of a command. Raises UserError as both do, and where they do not fit together."""
    task = task_of(options)
    images.check_size(options.out, *task.content.shape[:2])
    network = vgg.load(options.perception, say)
    _check_size(network, *task.content.shape[:2])
    if options.masks and tile_side(options.optim, task.content.shape[:2], regions=True):
        raise UserError("regions are not possible in tiles: choose a smaller --longest-px, and no --optim.tile-px")
    return task, network


def _check_size(network: LossNetwork, height: int, width: int) -> None:
    """Raises UserError where an image is too small for the deepest layer; computes nothing."""
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    jax.eval_shape(lambda x: network.features(network.params, x, network.layers), image)


def _recolored(style: np.ndarray, content: np.ndarray, how: str) -> np.ndarray:
    if how == "luminance":
        return color.match_luminance(style, content)
    if how == "match":
        return color.match_color(style, content)
    return color.match_histogram(style, content) if how == "histogram" else style


def image(options: Image, task: Task, network: LossNetwork, folder: RunFolder, say: Callable[[str], None]) -> str:
    """Optimises; writes the image and the trace of the objective. Returns where they are."""
    result = optimize(network, options.perception, options.optim, task, folder, make_mesh(), seed=options.seed, say=say)
    if options.color == "luminance":
        result = color.luminance_only(result, images.resize(data.read_image(options.images[0]), *result.shape[:2]))
    images.write(options.out, result)
    page.write_image(folder, options.out, task, images.to_uint8(result))
    return f"{options.out}\n{folder.path / 'report.html'} (previews and checkpoints beside it)"


def apply(options: Apply, config: Config, folder: RunFolder, say: Callable[[str], None]) -> str:
    """Stylises all images with the network in a run folder; returns where they are."""
    pairs = outputs(options.images, options.out)
    for source, target in pairs:
        images.check_size(target, *data.size_of(source))
    mix, stylize = _network(options, config, folder)
    for source, target in tqdm(pairs, unit="image", disable=None if len(pairs) > 1 else True, leave=False):
        images.write(target, stylize(data.read_image(source), mix))
    say(f"{len(pairs)} image{'s' if len(pairs) > 1 else ''}")
    return str(options.out)


def outputs(sources: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """(source, target) of each image; folders among the sources are walked and keep their layout below `out`.

    Raises UserError where two results would be one file, or would replace an image.
    """
    several = len(sources) > 1 or sources[0].is_dir()
    if several and out.suffix:
        raise UserError(f"{out}: several images need a folder")
    pairs = []
    for source in sources:
        for path in images.files(source) if source.is_dir() else [source]:
            below = path.relative_to(source) if source.is_dir() else Path(path.name)
            pairs.append((path, out if out.suffix else out / below.with_suffix(".png")))
    if len({target for _, target in pairs}) < len(pairs):
        raise UserError("two of the images have the same name: their results would be one file")
    kept = {source.resolve() for source, _ in pairs}
    for _, target in pairs:
        if target.resolve() in kept:
            raise UserError(f"{target} is one of the images: choose another --out")
    return pairs


def video(options: Video, clip: Clip, config: Config, folder: RunFolder) -> str:
    """Stylises a clip with a network; with a memory, each frame after the one before. Returns where it is."""
    mix, stylize = _network(options, config, folder)
    memory = config.network.memory and not options.per_frame
    count = stylize_movie(
        clip,
        options.out,
        stylize.frames_in(mix),
        flow=memory,
        longest_px=options.longest_px,
        longest_s=options.longest_s,
    )
    return f"{count} frames\n{options.out}"


def optimized_video(options: Video, clip: Clip, styles: Sequence[Path], say: Callable[[str], None]) -> str:
    """Stylises a clip by optimisation of each frame; frames are kept beside the result until it is there."""
    if options.weights and len(options.weights) != len(styles):
        raise UserError(f"{len(options.weights)} weights for {len(styles)} styles")
    network, mesh = vgg.load(options.perception, say), make_mesh()
    h, w = images.fit_within(clip.height, clip.width, options.longest_px)
    _check_size(network, h, w)
    pictures = [data.read_image(path) for path in styles]
    fitted = [images.resize_longest(x, max(h, w)) for x in pictures]
    style = everywhere(
        style_of(network, network.params, [jnp.asarray(x) for x in fitted], list(options.weights) or None)
    )
    chosen = {name: value for name, value in configs.to_json(options).items() if name not in _NOT_OF_FRAMES}
    values, known = {"styles": [str(path) for path in styles], **chosen}, record.of(network)
    frames = options.out.with_suffix(".frames")
    record.check(frames, known)
    with RunFolder.start(frames, "stylize.video", values, resume=options.resume) as folder:
        record.write(folder, known)
        optimizer = FrameOptimizer(
            network, options.perception, options.optim, style, options.temporal_weight, folder.path / "samples", mesh
        )
        count = stylize_movie(
            clip, options.out, optimizer, flow=not options.per_frame,
            longest_px=options.longest_px, longest_s=options.longest_s,
        )  # fmt: skip
    shutil.rmtree(folder.path)
    return f"{count} frames\n{options.out}"


def evaluate(options: Evaluate, config: Config, folder: RunFolder, say: Callable[[str], None]) -> str:
    """Measures a network; writes evaluation.json, figures and report.html. Returns the main numbers."""
    out = options.out or folder.path
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder")
    photos = images.files(options.photos)
    clips.check(options.clips)
    trained = training.open_run(config, folder)
    network, mesh = vgg.load(config.perception, say), make_mesh()
    record.compare(folder.path, network, say)
    measured = options.measured
    numbers, pictures, protocol = evaluation.evaluate(trained, network, photos, measured, mesh, out / "figures", say)
    for path in options.clips:
        found, more, text = clips.evaluate(path, trained, network, mesh, out / "figures", say)
        numbers |= found
        pictures += more
        protocol = protocol if text in protocol else f"{protocol} {text}"
    return page.write(trained, folder, out, numbers, pictures, protocol)


def _network(options: Apply | Video, config: Config, folder: RunFolder) -> tuple[jax.Array, Stylizer]:
    if options.weights and len(options.weights) != len(config.styles):
        names = ", ".join(training.style_names(config))
        raise UserError(f"{len(options.weights)} weights for {len(config.styles)} styles: {names}")
    stylize = Stylizer(training.open_run(config, folder), make_mesh())
    return stylize.mix(list(options.weights) or None, options.strength), stylize
