"""stylize/app.py: results are as large as photographs, errors are one sentence, and a browser gets both."""

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest
from PIL import Image

from lib import images
from lib.process import UserError
from lib.run import RunFolder
from lib.shard import make_mesh
from stylize import app, optimize, training
from stylize.__main__ import main
from stylize.config import Config, Network, Optim, Optimization, Perception
from stylize.training import Trained
from tests.stylize_cases import smooth, tiny_network, write_runs, write_vgg

pytestmark = pytest.mark.slow  # long; `make test-slow`

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Config(
    styles=("art/wave.jpg", "art/the_night.png"),
    photos="photos",
    perception=Perception("vgg.safetensors", style_layers=("relu1_1", "relu2_1"), content_layers=("relu2_1",)),
    network=Network(width=2, blocks=1),
    optim=Optim(steps=2, batch_size=2, crop_px=32),
)
NETWORK = tiny_network(("relu1_1",), ("relu2_1",))
ADAM = Optimization("adam", iterations=(5,), smallest_px=64)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A finished run with its initial weights, an unfinished one, weights of a loss network, and images."""
    desk = tmp_path_factory.mktemp("desk")
    write_runs(desk, CONFIG)
    write_vgg(desk)
    images.write(desk / "run" / "styles" / "wave.png", smooth(1, 30, 60))
    for name, height, width in (("photo", 37, 50), ("long", 20, 90), ("dot", 1, 1), ("strip", 4, 60)):
        images.write(desk / f"{name}.png", smooth(2, height, width))
    images.write(desk / "own.png", smooth(3, 40, 40))
    Image.fromarray(images.to_uint8(smooth(2, 37, 50))).save(desk / "turned.jpg", exif=turned())
    (desk / "text.jpg").write_text("no image")
    Image.new("1", (20_000, 20_000)).save(desk / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(desk / "large.png")
    return desk


def turned():
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    return exif


@pytest.fixture(scope="module")
def studio(desk):
    runs = [(desk / "run", Trained(CONFIG, training.start_state(CONFIG).params))]
    return app.Studio(runs, NETWORK, Perception(), longest_px=64, options=ADAM, mesh=make_mesh(2))


def png(path):
    with Image.open(path) as image:
        return image.size


# ---- labels and uploads


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([("a", "wave"), ("b", "the_night")], ["wave", "the night"]),
        ([("a", "wave"), ("b", "wave"), ("b", "sea")], ["wave (a)", "wave (b)", "sea"]),
        ([("a", "wave"), ("a", "wave"), ("a", "wave")], ["wave (a)", "wave (a) 2", "wave (a) 3"]),
        ([("a", app.OWN)], [f"{app.OWN} (a)"]),
        ([("a", "x (a)"), ("a", "x"), ("b", "x")], ["x (a)", "x (a) 2", "x (b)"]),
    ],
)
def test_labels_differ_and_say_no_more_than_needed(names, expected):
    assert app.labels(names) == expected


def test_styles_have_pictures_where_the_run_kept_them(studio):
    assert list(studio.styles) == ["wave", "the night"]
    pictures = [app.thumbnail(style.picture) for style in studio.styles.values()]
    assert pictures[0] is not None and pictures[0].shape == (30, 60, 3) and pictures[0].dtype == np.uint8
    assert pictures[1] is None


@pytest.mark.parametrize(
    ("name", "longest_px", "size"),
    [
        ("photo.png", 64, (37, 50)),
        ("photo.png", 25, (19, 25)),
        ("long.png", 64, (14, 64)),
        ("turned.jpg", 64, (50, 37)),
    ],
)
def test_uploads_are_upright_and_only_made_smaller(desk, name, longest_px, size):
    assert app.read(desk / name, longest_px).shape == (*size, 3)


# ---- the work


@pytest.mark.parametrize(
    ("name", "size"), [("photo.png", (37, 50)), ("long.png", (14, 64)), ("turned.jpg", (50, 37)), ("dot.png", (1, 1))]
)
def test_networks_give_the_size_of_the_photograph(studio, desk, name, size):
    result = studio(str(desk / name), "the night", None, 1.0)
    assert result.image.shape == (*size, 3)
    assert result.name == f"{Path(name).stem}_the_night.png"
    assert result.caption.startswith(f"`{result.name}`: {size[1]} × {size[0]} pixels in ")


def test_networks_use_the_style_and_the_strength_that_were_chosen(desk):
    params = training.start_state(CONFIG).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), params)  # styles differ
    trained = Trained(CONFIG, params)
    studio = app.Studio([(desk / "run", trained)], NETWORK, Perception(), longest_px=64, mesh=make_mesh(1))
    photo = images.read(desk / "photo.png")
    for label, shares in {"wave": [1.0, 0.0], "the night": [0.0, 1.0]}.items():
        for strength in (0.0, 0.5, 1.5):
            stylize = studio.styles[label].stylize
            expected = stylize(photo, stylize.mix(shares, strength))
            np.testing.assert_array_equal(studio(str(desk / "photo.png"), label, None, strength).image, expected)
    wave, night = (studio(str(desk / "photo.png"), label, None, 1.0).image for label in studio.styles)
    assert np.abs(wave - night).max() > 0.01


@pytest.mark.parametrize(
    ("optimizer", "iterations", "smallest_px"),
    [("lbfgs", (3,), 64), ("adam", (3, 2), 16)],
)
def test_an_own_style_is_optimised_as_by_the_command(desk, tmp_path, optimizer, iterations, smallest_px):
    options, steps, seen = Optimization(optimizer, iterations, smallest_px), sum(iterations), []
    studio = app.Studio([], NETWORK, Perception(), longest_px=64, options=options, mesh=make_mesh(2))
    result = studio(str(desk / "photo.png"), app.OWN, str(desk / "own.png"), 0.7, lambda *at: seen.append(at))
    assert sorted(set(seen)) == [(i, steps) for i in range(steps)] and seen == sorted(seen)
    assert result.name == "photo_own.png"
    perception = Perception(style_weight=0.7 * Perception().style_weight)
    task = optimize.Task(images.read(desk / "photo.png"), [images.read(desk / "own.png")], [1.0])
    with RunFolder.start(tmp_path / "run", "stylize.image", {}, resume=False) as folder:
        expected = optimize.optimize(
            NETWORK, perception, options, task, folder, make_mesh(2), seed=0, say=lambda text: None
        )
    np.testing.assert_allclose(result.image, expected, atol=1e-5)
    assert np.abs(expected - task.content).max() > 0.1


def test_beyond_the_size_of_the_optimiser_a_photograph_keeps_its_detail(studio, desk, monkeypatch):
    monkeypatch.setattr(app, "OWN_PX", 32)
    result = studio(str(desk / "photo.png"), app.OWN, str(desk / "own.png"), 1.0).image
    photo = images.read(desk / "photo.png")
    assert result.shape == photo.shape
    small = images.resize(photo, 24, 32)
    change = images.resize(np.clip(result - photo, -1, 1), 24, 32)
    assert np.abs(change).max() > 0.05

    def detail(image):
        return image - images.resize(images.resize(image, *small.shape[:2]), *image.shape[:2])

    inside = (np.abs(result) < 1).all(-1)
    assert np.abs(detail(result) - detail(photo))[inside].mean() < 0.5 * np.abs(result - photo)[inside].mean()


def test_without_strength_an_own_style_changes_nothing(studio, desk):
    result = studio(str(desk / "photo.png"), app.OWN, str(desk / "own.png"), 0.0)
    np.testing.assert_array_equal(result.image, images.read(desk / "photo.png"))


@pytest.mark.parametrize(
    ("photo", "style", "own", "strength", "message"),
    [
        (None, "wave", None, 1.0, "choose a photograph first"),
        ("", "wave", None, 1.0, "choose a photograph first"),
        ("photo.png", app.OWN, None, 1.0, "choose an image whose style is to be taken"),
        ("photo.png", "sea", None, 1.0, "there is no style 'sea'"),
        ("photo.png", "wave", None, 1.6, "the strength must be between 0 and 1.5"),
        ("photo.png", "wave", None, float("nan"), "the strength must be between 0 and 1.5"),
        ("text.jpg", "wave", None, 1.0, "text.jpg cannot be read as an image: it is of no known format"),
        ("absent.jpg", "wave", None, 1.0, "absent.jpg: no such image"),
        ("bomb.png", "wave", None, 1.0, "bomb.png: more than 170,000,000 pixels are too many, reduce it"),
        ("large.png", "wave", None, 1.0, "large.png: 10000 x 10000 pixels are too many, reduce it"),
        ("photo.png", app.OWN, "text.jpg", 1.0, "text.jpg cannot be read as an image: it is of no known format"),
        ("dot.png", app.OWN, "own.png", 1.0, "the photograph is too narrow: 1 pixels at the size of the optimiser"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence_without_the_names_of_folders(studio, desk, photo, style, own, strength, message):
    with pytest.raises(UserError) as caught:
        studio(photo and str(desk / photo), style, own and str(desk / own), strength)
    assert str(caught.value).startswith(message) and str(desk) not in str(caught.value)
    assert studio(str(desk / "dot.png"), "wave", None, 1.0).image.shape == (1, 1, 3)  # it works on


def test_when_the_server_stops_the_job_under_way_ends_and_none_begins(desk):
    runs = [(desk / "run", Trained(CONFIG, training.start_state(CONFIG).params))]
    studio = app.Studio(runs, NETWORK, Perception(), longest_px=64, options=ADAM, mesh=make_mesh(1))
    begun, going_on, told = threading.Event(), threading.Event(), []

    def tell(done, total):
        begun.set()
        assert going_on.wait(60)

    def job():
        try:
            studio(str(desk / "photo.png"), app.OWN, str(desk / "own.png"), 1.0, tell)
        except UserError as error:
            told.append(str(error))

    thread = threading.Thread(target=job)
    thread.start()
    assert begun.wait(60)
    assert not studio.stop(0.05)  # still under way
    going_on.set()
    assert studio.stop(60)
    thread.join(60)
    assert told == ["the server is being stopped"]
    with pytest.raises(UserError, match="being stopped"):
        studio(str(desk / "photo.png"), "wave", None, 1.0)


# ---- the command


@contextlib.contextmanager
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port():
    with taken_port() as port:
        return port


def test_addresses(desk):
    del desk
    app.check_address("127.0.0.1", free_port())
    with taken_port() as port, pytest.raises(UserError, match=f"cannot listen at 127.0.0.1, port {port} .*--port"):
        app.check_address("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen at 203.0.113.7, port 7860"):
        app.check_address("203.0.113.7", 7860)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("serve absent", "absent is not a run folder"),
        ("serve run text.jpg", "text.jpg is a file, not a folder"),
        ("serve stopped --port {free}", "stopped"),
        ("serve run --port {taken}", "port {taken} "),
        ("serve run --port 0", "port must be between 1 and 65535"),
        ("serve run --longest-px 5", "longest-px must be at least 32"),
        ("serve run --port {free} --perception.weights absent", "absent: no such weight file"),
    ],
)
def test_refused_in_one_line(desk, in_process, monkeypatch, line, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # nothing here comes as far as gradio
    call = in_process(main, desk)
    with taken_port() as taken:
        ports = {"taken": taken, "free": free_port()}
        code, _, err = call(line.format(**ports))
    assert code == 2 and len(err.splitlines()) == 1 and message.format(**ports) in err, err


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_it_is_said_at_once(desk):
    start = time.perf_counter()
    command = [sys.executable, "-m", "stylize", "serve", str(desk / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr == "error: the app needs gradio: pip install -e '.[app]'\n"
    assert time.perf_counter() - start < 20


# ---- a browser


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def server(desk, port, monkeypatch):
    """The process, which is listening."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "stylize", "serve", "run", "--port", str(port), "--longest-px", "64"]
    command += ["--perception.weights", "vgg.safetensors"]
    with (
        (desk / "stderr.txt").open("w") as stderr,
        subprocess.Popen(command, cwd=desk, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(f"http://127.0.0.1:{port}"), (desk / "stderr.txt").read_text()
            yield process
        finally:
            process.kill()


def press(page):
    page.get_by_role("button", name="Stylise").click()


def saved(page, path):
    """The size of the result, downloaded to `path`, and its name."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    download.value.save_as(path)
    return png(path), download.value.suggested_filename


def test_in_a_browser(desk, browser, monkeypatch, tmp_path):
    port = free_port()
    with server(desk, port, monkeypatch) as process:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(180_000)
        asked = []
        page.on("request", lambda request: asked.append(urlsplit(request.url)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_label("the night").check()
        page.set_input_files("#photo input[type=file]", desk / "photo.png")
        page.wait_for_selector("#photo img")
        press(page)
        page.wait_for_selector("#result img")
        page.wait_for_selector("#caption :text(': 50 × 37 pixels')")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert saved(page, tmp_path / "network.png") == ((50, 37), "photo_the_night.png")

        page.get_by_label(app.OWN).check()
        page.set_input_files("#own input[type=file]", desk / "own.png")
        page.wait_for_selector("#own img")
        press(page)
        page.wait_for_selector("#caption :text('photo_own.png')")
        assert saved(page, tmp_path / "own.png") == ((50, 37), "photo_own.png")

        page.locator("#photo").get_by_label("Remove Image").or_(page.locator("#photo").get_by_label("Clear")).click()
        page.set_input_files("#photo input[type=file]", desk / "text.jpg")
        page.wait_for_selector("#photo img", state="attached")
        press(page)
        page.wait_for_selector(".toast-body :text('text.jpg cannot be read as an image: it is of no known format')")
        assert page.get_by_role("button", name="Download PNG").is_disabled()
        assert {url.netloc for url in asked if url.scheme not in ("data", "blob")} == {f"127.0.0.1:{port}"}

        start = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert time.perf_counter() - start < 20
    assert "Traceback" not in (desk / "stderr.txt").read_text()
