"""The app: a page in the browser where photographs are stylised, by trained networks or after an image of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lib import images
from lib.process import Stopped, UserError
from lib.run import RunFolder
from lib.shard import compile_step, fetch, make_mesh, place
from stylize import training, vgg
from stylize.apply import Stylizer
from stylize.config import Config, Optimization, Perception
from stylize.optimize import Task, begin, build_step, schedule, targets
from stylize.training import Trained
from stylize.vgg import LossNetwork

if TYPE_CHECKING:
    from stylize.__main__ import Serve

OWN = "my own image"
MAX_FILE = "20mb"
MAX_PIXELS = 64_000_000  # of an upload: 0.8 GB as floats
MAX_STRENGTH = 1.5
OWN_PX = 384  # longest side at which pixels are optimised: a minute, not an hour
OWN_OPTIONS = Optimization(iterations=(60, 20), smallest_px=OWN_PX // 2)
_THUMBNAIL_PX = 320
_QUEUE = 20  # people who wait
_KEEP_S = 3600  # files
_PATIENCE_S = 2  # with a job that is under way when the server is stopped

Tell = Callable[[int, int], None]
"""tell(done, total): iterations"""


@dataclasses.dataclass(frozen=True)
class Style:
    """One style of one network."""

    stylize: Stylizer
    index: int
    """among those of its run"""
    picture: Path
    """the style image, which may be missing"""


class Result(NamedTuple):
    image: np.ndarray
    """[h, w, 3] in [-1, 1]"""
    name: str
    """of a PNG file"""
    wall_s: float

    @property
    def caption(self) -> str:
        h, w = self.image.shape[:2]
        return f"`{self.name}`: {w} × {h} pixels in {self.wall_s:.1f} s"


def labels(names: Sequence[tuple[str, str]]) -> list[str]:
    """One label per (run, style), all different: the style, with the run where needed, and numbered if need be."""
    plain = [style.replace("_", " ") for _, style in names]
    often = Counter([*plain, OWN])
    longer = [f"{text} ({run})" if often[text] > 1 else text for text, (run, _) in zip(plain, names, strict=True)]
    found: list[str] = []
    for text in longer:
        number = next(n for n in range(1, len(names) + 1) if (text if n == 1 else f"{text} {n}") not in found)
        found.append(text if number == 1 else f"{text} {number}")
    return found


def styles_of(runs: Sequence[tuple[Path, Trained]], mesh: Mesh) -> dict[str, Style]:
    """All styles of all runs by their labels, in order."""
    found, names = [], []
    for path, trained in runs:
        stylize = Stylizer(trained, mesh)
        for i, name in enumerate(trained.styles):
            found.append(Style(stylize, i, path / "styles" / f"{name}.png"))
            names.append((path.resolve().name, name))
    return dict(zip(labels(names), found, strict=True))


def read(path: Path, longest_px: int) -> np.ndarray:
    """An upload as [h, w, 3] in [-1, 1], made smaller where it is longer than `longest_px`, never larger.

    Raises UserError, which names the file but not its folder, for what is no image or larger than MAX_PIXELS.
    """
    try:
        with images.opened(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels are too many, reduce it")
        pixels = images.read(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from None
    return images.resize_longest(pixels, min(longest_px, max(pixels.shape[:2])))


class Studio:
    """Does the work of the page: one job at a time."""

    def __init__(
        self,
        runs: Sequence[tuple[Path, Trained]],
        network: LossNetwork,
        perception: Perception,
        *,
        longest_px: int,
        options: Optimization = OWN_OPTIONS,
        mesh: Mesh | None = None,
    ):
        self._mesh = make_mesh() if mesh is None else mesh
        self.styles = styles_of(runs, self._mesh)
        self._network, self._perception, self._options = network, perception, options
        self._longest_px = longest_px
        self._working = threading.Lock()
        self._stopping = threading.Event()

    def __call__(
        self, photo: str | None, style: str, own: str | None, strength: float, tell: Tell = lambda done, total: None
    ) -> Result:
        """The photograph (a file) in a style of the networks, or for OWN after the image `own` (a file).

        The result is exactly as large as the photograph, or `longest_px` long where that is longer. Raises UserError
        for what is missing or unreadable, and when the server is being stopped.
        """
        if not photo:
            raise UserError("choose a photograph first")
        if style == OWN and not own:
            raise UserError("choose an image whose style is to be taken")
        if style != OWN and style not in self.styles:
            raise UserError(f"there is no style {style!r}")
        if not 0 <= strength <= MAX_STRENGTH:
            raise UserError(f"the strength must be between 0 and {MAX_STRENGTH}")
        with self._working:
            self._check_open()
            start = time.perf_counter()
            content = read(Path(photo), self._longest_px)
            if style == OWN:
                assert own is not None
                result, name = self._optimized(content, Path(own), strength, tell), Path(own).stem
            else:
                chosen = self.styles[style]
                result, name = chosen.stylize(content, chosen.stylize.only(chosen.index, strength)), style
            name = f"{Path(photo).stem[:80]}_{name[:80].replace(' ', '_')}.png"
            return Result(result, name, time.perf_counter() - start)

    def stop(self, timeout_s: float) -> bool:
        """Ends the job under way; whether it has ended in time."""
        self._stopping.set()
        ended = self._working.acquire(timeout=timeout_s)
        if ended:
            self._working.release()
        return ended

    def _check_open(self) -> None:
        if self._stopping.is_set():
            raise UserError("the server is being stopped")

    def _optimized(self, content: np.ndarray, own: Path, strength: float, tell: Tell) -> np.ndarray:
        """Optimised at OWN_PX at most. Beyond that the photograph keeps its own fine detail."""
        style = read(own, OWN_PX)
        if strength == 0:
            return content  # which is where the optimiser would begin, without a gradient
        h, w = content.shape[:2]
        small = images.resize_longest(content, min(OWN_PX, max(h, w)))
        least, side = self._network.stride, min(small.shape[:2])
        if side < least:
            raise UserError(f"the photograph is too narrow: {side} pixels at the size of the optimiser, not {least}")
        perception = dataclasses.replace(self._perception, style_weight=strength * self._perception.style_weight)
        task = Task(small, [style], [1.0])

        def count(done: int, total: int) -> None:
            self._check_open()
            tell(done, total)

        change = optimize(self._network, perception, self._options, task, self._mesh, count) - small
        return np.clip(content + 2 * images.resize(change / 2, h, w), -1, 1)  # halves are in the range of images


def optimize(
    network: LossNetwork, perception: Perception, options: Optimization, task: Task, mesh: Mesh, tell: Tell
) -> np.ndarray:
    """`stylize.optimize.optimize` without a run folder: [h, w, 3]; `tell` is called before every iteration."""
    h, w = task.content.shape[:2]
    planned = schedule(options, (h, w), network.stride)
    total, done = sum(steps for _, steps in planned), 0
    params = place(network.params, mesh)
    step = compile_step(build_step(network, perception, options, mesh), mesh, "jit", in_specs=(P(), P()))
    x: np.ndarray | None = None
    for size, steps in planned:
        tell(done, total)
        batch = place(targets(network, params, task, size, mesh, tiled=False), mesh)
        state = begin(images.resize(task.content if x is None else x, *size), options, mesh)
        for _ in range(steps):
            tell(done, total)
            state = jax.block_until_ready(step(state, batch)[0])
            done += 1
        x = np.clip(fetch(state.params)[0], -1, 1)
    assert x is not None
    return x


def check_address(host: str, port: int) -> None:
    """Raises UserError where nothing can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}, port {port} ({reason}): choose another --port or --host") from None


def serve(options: Serve, runs: Sequence[tuple[RunFolder, Config]], say: Callable[[str], None]) -> None:
    """Serves the page until a signal comes. Raises UserError for unusable runs, weights and addresses."""
    check_address(options.host, options.port)
    ended = True
    with contextlib.suppress(Stopped), tempfile.TemporaryDirectory(prefix="stylize-") as name:
        folder = Path(name)
        trained = [(run.path, training.open_run(config, run)) for run, config in runs]
        network = vgg.load(options.perception, say)
        studio = Studio(trained, network, options.perception, longest_px=options.longest_px)
        with _listening(page(_gradio(folder, options.host), studio, folder), options) as url:
            try:
                say(f"{url} (Ctrl-C stops)")
                threading.Event().wait()
            finally:
                ended = studio.stop(_PATIENCE_S)
    if not ended:  # Python would wait for the job's thread, and nothing interrupts a program that is being compiled
        os._exit(0)


def _gradio(folder: Path, host: str) -> Any:
    """The library, told to keep its files in `folder`, to send nothing to anyone, and to ask no proxy about itself."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", "127.0.0.1", host)))
    return importlib.import_module("gradio")


@contextlib.contextmanager
def _listening(blocks: Any, options: Serve) -> Iterator[str]:
    """The page is served inside; the URL. Raises UserError where the port has been taken meanwhile."""
    blocks.queue(max_size=_QUEUE)
    try:
        _, url, _ = blocks.launch(
            server_name=f"[{options.host}]" if ":" in options.host else options.host,
            server_port=options.port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            max_file_size=MAX_FILE,
            footer_links=[],
            theme=_theme(),
            css=_CSS,
        )
        yield url
    except OSError as error:
        raise UserError(f"cannot listen at {options.host}, port {options.port} ({error}): choose another") from None
    finally:
        blocks.close(verbose=False)


def _theme() -> Any:
    """Fonts of the system, so that none is loaded from anywhere."""
    themes = importlib.import_module("gradio").themes
    sans, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    return themes.Default(primary_hue="indigo", neutral_hue="slate", font=sans, font_mono=mono)


_CSS = """
.gradio-container { max-width: 1200px !important; width: 100%; margin: 0 auto !important; }
"""
_ABOUT = """# Style transfer
A photograph in the style of a painting. Photographs stay on the machine that runs this page."""
_STRENGTH = f"0 leaves the photograph nearly as it is, 1 is what the network learned, {MAX_STRENGTH} exaggerates"
_WEIGHT = "the weight of the style against that of the photograph"


def page(gr: Any, studio: Studio, folder: Path) -> Any:
    """The page; results lie below `folder` until the next one comes."""
    names = list(studio.styles)
    latest = folder / "latest"
    progress = gr.Progress()

    def run(photo: str | None, style: str, own: str | None, strength: float, progress: Any = progress) -> tuple:
        def tell(done: int, total: int) -> None:
            progress((done, total), desc="optimising the pixels" if done else "preparing", unit="iterations")

        try:
            result = studio(photo, style, own, strength, tell)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        shutil.rmtree(latest, ignore_errors=True)  # gradio has copied what was there
        path = str(images.write(latest / result.name, result.image))
        return path, gr.DownloadButton(value=path, interactive=True), result.caption

    def choose(style: str) -> tuple:
        own = style == OWN
        picture = None if own else thumbnail(studio.styles[style].picture)
        return (
            gr.Image(value=picture, visible=not own and picture is not None),
            gr.Image(visible=own),
            gr.Slider(info=_WEIGHT if own else _STRENGTH),
            gr.Markdown(visible=own),
        )

    def upload(label: str, **options: Any) -> Any:
        image = gr.Image(
            label=label, type="filepath", sources=["upload", "clipboard"], interactive=True,
            placeholder="Drop an image here,\nor click", **options,
        )  # fmt: skip
        image.preprocess = lambda file: file and file.path  # gradio's own opens the file, with other limits and errors
        return image

    with gr.Blocks(title="Style transfer", analytics_enabled=False, delete_cache=(_KEEP_S, _KEEP_S)) as blocks:
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                photo = upload("Photograph", height=280, elem_id="photo")
                with gr.Row():
                    style = gr.Radio([*names, OWN], value=names[0], label="Style", elem_id="style", min_width=160)
                    first = thumbnail(studio.styles[names[0]].picture)
                    picture = gr.Image(
                        first, label="Style image", height=180, interactive=False, visible=first is not None,
                        buttons=[], min_width=160,
                    )  # fmt: skip
                    own = upload("Style image", height=180, visible=False, elem_id="own", min_width=160)
                note = gr.Markdown(
                    f"No network has learned this style, so the pixels are optimised, at {OWN_PX} pixels at most: "
                    "that takes a minute or two.",
                    visible=False,
                )
                strength = gr.Slider(0, MAX_STRENGTH, 1, step=0.05, label="Strength", info=_STRENGTH)
                button = gr.Button("Stylise", variant="primary", elem_id="run")
            with gr.Column(scale=3, min_width=320):
                result = gr.Image(
                    label="Result",
                    format="png",
                    interactive=False,
                    height=560,
                    buttons=["fullscreen"],
                    elem_id="result",
                )
                caption = gr.Markdown(elem_id="caption")
                download = gr.DownloadButton("Download PNG", interactive=False, elem_id="download")
        private = {"api_visibility": "private"}
        style.change(choose, style, [picture, own, strength, note], queue=False, show_progress="hidden", **private)
        results = [result, download, caption]
        job = button.click(
            run, [photo, style, own, strength], results, concurrency_limit=1, show_progress_on=result, **private
        )
        job.failure(lambda: (None, gr.DownloadButton(value=None, interactive=False), ""), None, results, **private)
    return blocks


def thumbnail(path: Path) -> np.ndarray | None:
    """The style image as uint8 [h, w, 3], or none where it is missing or damaged: it is only decoration."""
    try:
        return images.to_uint8(read(path, _THUMBNAIL_PX))
    except UserError:
        return None
