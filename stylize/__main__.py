"""python -m stylize image|train|apply|video|evaluate|serve|export|plan: the command line of style transfer."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lib import config as configs
from lib import planning
from lib.process import UserError, command, dispatch
from lib.run import RunFolder, check_out
from stylize import networks
from stylize.config import PRESETS, Config, Evaluation, Optimization, Perception

HELP = f"""usage: python -m stylize COMMAND ...

  image CONTENT STYLE... --out PNG      optimise an image (Gatys et al.); slow, best quality
  image ... --out PNG --resume          go on where a stopped run was
  train [PRESET] STYLE... --photos DIR --out RUN   train a network that stylises any image at once
  train RUN --resume                    go on where a stopped training was
  apply RUN IMAGE... --out PNG|DIR      stylise images with a trained network
  video RUN CLIP --out MP4|GIF          stylise a movie; its sound is kept
  video STYLE CLIP --optimize --out MP4 the same by optimisation of every frame; slow
  plan PRESET --devices N               what a training step costs on devices that are not here
  evaluate RUN --photos DIR             measure a trained network on photographs, and on --clips
  serve [RUN...]                        a page in the browser where photographs are stylised
  export RUN OUT                        a trained network alone, in a folder that is a RUN to all of these

presets of train: {", ".join(PRESETS)}
come with the package, each a RUN: {", ".join(networks.PRETRAINED)}

`python -m stylize COMMAND ... --help` lists every option, e.g. --perception.style-weight 30"""

_PERCEPTION, _STILL, _MOVIE = Perception(), Optimization(), Optimization(iterations=(200, 60))
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Image:
    """Stylise one image by optimising its pixels."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """the photograph, and one style or more"""
    out: Path = Path("stylized.png")
    """the result, exactly as large as the photograph"""
    longest_px: int | None = None
    """longest side of the result (default: as large as the photograph)"""
    weights: tuple[float, ...] = ()
    """of several styles (default: all the same)"""
    masks: tuple[Path, ...] = ()
    """an image per style, white where that style goes (default: all styles everywhere, mixed)"""
    style_scale: float = 1.0
    """size of the styles' strokes: longest side of the style images relative to that of the result"""
    color: Literal["style", "luminance", "match", "histogram"] = "style"
    """colours of the style; of the photograph, by luminance alone; or by recolouring the styles, linearly or by
    histograms"""
    start: Path | None = None
    """image to begin with (default: see --optim.start)"""
    run: Path | None = None
    """folder for previews, checkpoints and the trace of the objective (default: OUT.run beside the result)"""
    resume: bool = False
    """go on with a stopped run"""
    seed: int = 0
    """of the noise"""
    perception: Perception = _PERCEPTION
    optim: Optimization = _STILL

    def __post_init__(self) -> None:
        if self.longest_px is not None and self.longest_px < 1:
            raise UserError("longest-px must be at least 1")
        if not 0.05 <= self.style_scale <= 20:
            raise UserError("style-scale must be between 0.05 and 20")
        if any(not 0 <= w < float("inf") for w in self.weights) or (self.weights and not sum(self.weights)):
            raise UserError("weights must not be negative, nor all zero")
        if not 0 <= self.seed < 2**32:
            raise UserError("seed must be between 0 and 2**32 - 1")


@dataclass(frozen=True, kw_only=True)
class Train(configs.ShardedRunOptions):
    """Train a network for one style or more."""

    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Apply:
    """Stylise images with a trained network."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """files, or folders of them"""
    out: Path = Path("stylized")
    """a file for one image, or a folder; results are exactly as large as the images"""
    weights: tuple[float, ...] = ()
    """share of each style of the network (default: the first one alone)"""
    strength: float = 1.0
    """0 leaves the image nearly as it is, 1 is what was trained, more exaggerates"""

    def __post_init__(self) -> None:
        _check_strength(self.weights, self.strength)


@dataclass(frozen=True)
class Video:
    """Stylise a movie."""

    clip: Annotated[Path, tyro.conf.Positional]
    out: Path = Path("stylized.mp4")
    """.mp4, .mov, .mkv or .gif; same frames, size, rate and sound as the clip"""
    longest_px: int | None = None
    """longest side of the result (default: as large as the clip)"""
    longest_s: float | None = None
    """stop after so many seconds"""
    weights: tuple[float, ...] = ()
    """share of each style of the network (default: the first one alone)"""
    strength: float = 1.0
    """0 leaves frames nearly as they are, 1 is what was trained"""
    per_frame: bool = False
    """each frame by itself, which flickers"""
    optimize: bool = False
    """optimise the pixels of every frame, instead of using a network"""
    temporal_weight: float = 30.0
    """optimize: of the mean squared difference to the frame before, where that is visible"""
    resume: bool = False
    """optimize: go on with the frames that are there"""
    perception: Perception = _PERCEPTION
    optim: Optimization = _MOVIE

    def __post_init__(self) -> None:
        _check_strength(self.weights, self.strength)
        if self.longest_px is not None and self.longest_px < 1:
            raise UserError("longest-px must be at least 1")
        if self.longest_s is not None and not self.longest_s > 0:
            raise UserError("longest-s must be positive")
        if not 0 <= self.temporal_weight < float("inf"):
            raise UserError("temporal-weight must not be negative")
        if self.optim.tile_px is not None:
            raise UserError(
                "optim.tile-px is for images: frames are optimised at once, --longest-px makes them smaller"
            )
        if self.optim.smallest_px != _MOVIE.smallest_px or self.optim.start != _MOVIE.start:
            raise UserError("optim.smallest-px and optim.start are for images: frames begin as they are, at one scale")
        if len(self.optim.iterations) > 2:
            raise UserError("optim.iterations are two for movies: of frames with none before, and of the others")


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained network."""

    measured: Annotated[Evaluation, tyro.conf.arg(name="")]
    photos: Path
    """folder of photographs that it has not seen"""
    clips: tuple[Path, ...] = ()
    """movies whose flicker is measured"""
    out: Path | None = None
    """folder for evaluation.json, figures and report.html (default: the run's own)"""


@dataclass(frozen=True)
class Export:
    """Write a trained network to a folder of its own."""

    out: Annotated[Path, tyro.conf.Positional]
    """a new folder: weights, configuration, a short log, and the style images"""


@dataclass(frozen=True)
class Serve:
    """Stylise photographs on a page in the browser."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = tuple(map(Path, networks.PRETRAINED))
    """folders of trained networks (default: those that come with the package)"""
    port: int = 7860
    host: str = "127.0.0.1"
    """address to listen at: by default this machine alone; 0.0.0.0 lets in whoever reaches it"""
    longest_px: int = 1024
    """longest side of results; smaller photographs keep their size"""
    perception: Perception = _PERCEPTION

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise UserError("port must be between 1 and 65535")
        if self.longest_px < 32:
            raise UserError("longest-px must be at least 32")


def _check_strength(weights: tuple[float, ...], strength: float) -> None:
    if not 0 <= strength <= 3:
        raise UserError("strength must be between 0 and 3")
    if any(not 0 <= w < float("inf") for w in weights) or (weights and not sum(weights)):
        raise UserError("weights must not be negative, nor all zero")


def image(args: Sequence[str]) -> None:
    chosen = configs.parse(Image(tyro.MISSING), args, "python -m stylize image CONTENT STYLE...")
    if len(chosen.images) < 2:
        raise UserError("a photograph and at least one style are needed: python -m stylize image CONTENT STYLE...")
    check_out(chosen.out, *_IMAGES)
    _check_kept(chosen.out, [*chosen.images, *chosen.masks, *filter(None, [chosen.start])])
    run = chosen.run or chosen.out.with_suffix(".run")
    values = {k: v for k, v in configs.to_json(chosen).items() if k not in ("out", "run", "resume")}
    RunFolder.check(run, "stylize.image", values, resume=chosen.resume)
    shard = _start()
    from stylize import commands, record

    task, network = commands.prepared(chosen, _say)
    known = record.of(network)
    record.check(run, known)
    with RunFolder.start(run, "stylize.image", values, resume=chosen.resume, primary=shard.primary()) as folder:
        record.write(folder, known)
        _say(commands.image(chosen, task, network, folder, _say))


def train(args: Sequence[str]) -> None:
    words, rest = _positional(args)
    starts = [word for word in words if word in PRESETS or (Path(word) / "config.json").exists()]
    if len(starts) > 1:
        raise UserError(f"{' and '.join(starts)}: one preset or run folder is enough")
    base, where, rest = configs.starting_point(PRESETS, "stylize", [*starts, *rest], PRESETS["small"])
    styles = tuple(word for word in words if word not in starts)
    chosen = configs.parse(
        Train(config=dataclasses.replace(base, styles=styles or base.styles)), rest, "python -m stylize train STYLE..."
    )
    config = chosen.config
    if not config.styles or not config.photos:
        raise UserError("a style and photographs are needed: python -m stylize train STYLE... --photos DIR")
    out = chosen.out or where or Path("runs") / f"stylize-{Path(config.styles[0]).stem}"
    values = configs.to_json(config)
    shard = _start()
    if shard.primary():  # it is this one that makes the folder, perhaps before another looks
        RunFolder.check(out, "stylize", values, resume=chosen.resume)
    from stylize import record, training, vgg

    mesh = training.choose_mesh(config, chosen.devices)
    say = _say if shard.primary() else lambda text: None
    network = vgg.load(config.perception, say)
    materials = training.load_materials(config, network)
    known = record.of(network, materials.photos)
    if shard.primary():
        record.check(out, known)
    with RunFolder.start(out, "stylize", values, resume=chosen.resume, primary=shard.primary()) as folder:
        record.write(folder, known)
        training.train(config, network, materials, folder, mesh, say, sharded=chosen.shard_state)
        say(str(folder.path))


def apply(args: Sequence[str]) -> None:
    usage = "python -m stylize apply RUN IMAGE..."
    _show_help(args, Apply(tyro.MISSING), usage)
    folder, config, rest = _network("apply", args)
    options = configs.parse(Apply(tyro.MISSING), rest, usage)
    if not options.images:
        raise UserError("which images? python -m stylize apply RUN IMAGE...")
    check_out(options.out, *_IMAGES, "")
    _start()
    from stylize import commands

    _say(commands.apply(options, config, folder, _say))


def video(args: Sequence[str]) -> None:
    usage = "python -m stylize video RUN CLIP"
    _show_help(args, Video(tyro.MISSING), usage)
    if not args or args[0].startswith("-"):
        raise UserError("python -m stylize video needs the folder of a run, or a style image with --optimize")
    options = configs.parse(Video(tyro.MISSING), args[1:], usage)
    from stylize import movies

    clip = movies.probe(options.clip)
    check_out(options.out, *movies.FORMATS)
    if options.out.resolve() == options.clip.resolve():
        raise UserError(f"{options.out} is the clip itself: choose another --out")
    is_run = (networks.place(args[0]) / "config.json").exists()
    if not options.optimize and not is_run:
        raise UserError(
            f"{args[0]} is not a run folder: python -m stylize train makes one, or --optimize a style image"
        )
    folder, config = networks.opened(args[0]) if is_run else (None, None)
    _start()
    from stylize import commands

    if options.optimize:
        style = [Path(path) for path in config.styles] if config else [Path(args[0])]
        _say(commands.optimized_video(options, clip, style, _say))
    else:
        assert folder is not None and config is not None
        _say(commands.video(options, clip, config, folder))


def evaluate(args: Sequence[str]) -> None:
    usage = "python -m stylize evaluate RUN"
    _show_help(args, Evaluate(Evaluation(), tyro.MISSING), usage)
    folder, config, rest = _network("evaluate", args)
    options = configs.parse(Evaluate(Evaluation(), tyro.MISSING), rest, usage)
    if options.out is None and networks.pretrained(folder):
        raise UserError(f"{args[0]} comes with the package: --out says where its evaluation goes")
    if options.measured.style >= len(config.styles):
        raise UserError(f"style {options.measured.style}: the network has {len(config.styles)}, counted from 0")
    _start()
    from stylize import commands

    _say(commands.evaluate(options, config, folder, _say))


def serve(args: Sequence[str]) -> None:
    options = configs.parse(Serve(), args, "python -m stylize serve RUN...")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the app needs gradio: pip install -e '.[app]'")
    runs = [networks.opened(str(path)) for path in options.runs]
    _start()
    from stylize import app

    app.serve(options, runs, _say)


def export(args: Sequence[str]) -> None:
    usage = "python -m stylize export RUN OUT"
    _show_help(args, Export(tyro.MISSING), usage)
    folder, config, rest = _network("export", args)
    options = configs.parse(Export(tyro.MISSING), rest, usage)
    if options.out.exists():
        raise UserError(f"{options.out} is there already: choose another folder")
    _start()
    from stylize import export, training

    trained = training.open_run(config, folder)
    export.write(config, trained.params, trained.styles, folder, options.out)
    _say(str(options.out))


def plan(args: Sequence[str]) -> None:
    def outline(config: Config):
        from stylize import training, vgg

        return training.outline(config, vgg.load(config.perception))

    planning.main(args, "stylize", PRESETS, outline)


def _check_kept(out: Path, sources: Sequence[Path]) -> None:
    if out.resolve() in {source.resolve() for source in sources}:
        raise UserError(f"{out} is one of the images: choose another --out")


def _positional(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first option, and the rest."""
    at = next((i for i, word in enumerate(args) if word.startswith("-")), len(args))
    return list(args[:at]), list(args[at:])


def _show_help(args: Sequence[str], options: object, usage: str) -> None:
    """Ends with the help where that is asked for in the place of the run folder."""
    if args and args[0] in ("-h", "--help"):
        configs.parse(options, args, usage)


def _network(name: str, args: Sequence[str]) -> tuple[RunFolder, Config, list[str]]:
    """(its folder, its configuration, the arguments that are left) of the network that a command begins with."""
    folder, config, rest = configs.trained_run(Config, "stylize", name, networks.placed(args))
    return folder, networks.located(config, folder), rest


def _start():
    from lib import shard

    shard.start()
    return shard


def _say(text: str) -> None:
    print(text, flush=True)


COMMANDS = {"image": image, "train": train, "apply": apply, "video": video, "evaluate": evaluate, "serve": serve,
            "export": export, "plan": plan}  # fmt: skip


def main(args: Sequence[str]) -> None:
    dispatch(COMMANDS, HELP, args)


if __name__ == "__main__":
    sys.exit(command(main))
