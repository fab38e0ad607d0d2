"""python -m stylize: what is refused, in one line, soon and without a trace, and images of every kind."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lib import config as configs
from lib import images
from lib.features import weights
from lib.run import RunFolder
from stylize import apply, export, networks, record, training, vgg
from stylize.__main__ import main
from stylize.commands import outputs
from stylize.config import Config, Network, Optim, Perception
from stylize.writer import Writer
from tests.stylize_cases import smooth, tiny_network, write_photos, write_runs, write_vgg

ROOT = Path(__file__).resolve().parents[1]
VGG = (
    "--perception.weights vgg.safetensors --perception.style-layers relu1_1 relu2_1 --perception.content-layers relu2_1"
)
DEEP = "--perception.weights vgg.safetensors --perception.style-layers relu4_1 --perception.content-layers relu4_1"
CONFIG = Config(
    styles=("style.png", "other.png"),
    photos="photos",
    perception=Perception("vgg.safetensors", style_layers=("relu1_1", "relu2_1"), content_layers=("relu2_1",)),
    network=Network(width=2, blocks=1),
    optim=Optim(steps=2, batch_size=2, crop_px=32),
)
SMALL = "--optim.steps 2 --optim.batch-size 2 --optim.crop-px 32 --network.width 2 --network.blocks 1"
TRAIN = f"--photos photos --out R {SMALL} {VGG}"
OPTIMIZE = f"--optimize --optim.iterations 1 {VGG}"


def write_other_runs(desk):
    others = {"untrained": "stylize", "other": "ncsn", "image.run": "stylize.image", "clip.frames": "stylize.video"}
    for name, package in others.items():
        with RunFolder.start(desk / name, package, configs.to_json(CONFIG), resume=False):
            pass


def write_clips(desk):
    for name, count in {"clip.mp4": 6, "short.mp4": 5}.items():
        with Writer(desk / name, size=(18, 32), frames_per_s=10) as writer:
            for k in range(count):
                writer.write(smooth(k, 18, 32))
    with av.open(str(desk / "sound.mp4"), "w") as container:
        track = container.add_stream("aac", rate=44100)
        track.codec_context.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    with av.open(str(desk / "still.mp4"), "w") as container:  # a header, and no frame
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 18, "yuv420p"
        container.start_encoding()
    (desk / "text.mp4").write_text("no movie")
    (desk / "void.mp4").touch()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    desk = tmp_path_factory.mktemp("desk")
    images.write(desk / "photo.png", smooth(0, 20, 30))
    images.write(desk / "style.png", smooth(1, 24, 16))
    images.write(desk / "other.png", smooth(2, 16, 24))
    images.write(desk / "dot.png", smooth(3, 1, 1))
    images.write(desk / "thin.png", smooth(4, 1, 40))
    images.write(desk / "long.png", np.zeros((1, 16384, 3)))
    write_photos(desk / "photos", *[(40, 50)] * 3)
    shutil.copytree(desk / "photos", desk / "mixed")
    (desk / "mixed" / "3.jpg").write_text("no image")
    for name in ("a", "b"):
        (desk / name).mkdir()
        shutil.copy(desk / "photo.png", desk / name / "photo.png")
    (desk / "empty").mkdir()
    (desk / "strange").mkdir()
    (desk / "strange" / "holiday.txt").write_text("mine")
    (desk / "text.jpg").write_text("no image")
    (desk / "void.png").touch()
    (desk / "cut.png").write_bytes((desk / "photo.png").read_bytes()[:200])
    write_vgg(desk)
    weights.write(desk / "odd.safetensors", {"conv1_1/kernel": np.zeros((3, 3, 3, 4), np.float32)})
    write_runs(desk, CONFIG)
    write_other_runs(desk)
    shutil.copytree(desk / "stopped", desk / "foreign")
    record.write(RunFolder(desk / "foreign"), record.Record("0" * 64))
    write_clips(desk)
    return desk


@pytest.fixture
def desk(template, tmp_path):
    shutil.copytree(template, tmp_path / "desk")
    return tmp_path / "desk"


@pytest.fixture
def here(desk, in_process):
    """Runs a command in a desk of its own: exit code, stdout, stderr."""
    return in_process(main, desk)


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def untouched(template):
    return contents(template)


REFUSED = [
    ("paint", "unknown command 'paint'"),
    # image: files
    ("image", "a photograph and at least one style are needed"),
    ("image photo.png", "a photograph and at least one style are needed"),
    (f"image absent.jpg style.png {VGG}", "absent.jpg: no such image"),
    (f"image text.jpg style.png {VGG}", "text.jpg cannot be read as an image"),
    (f"image cut.png style.png {VGG}", "cut.png cannot be read as an image"),
    (f"image void.png style.png {VGG}", "void.png cannot be read as an image"),
    (f"image photos style.png {VGG}", "photos: no such image"),
    (f"image photo.png style.png absent.png {VGG}", "absent.png: no such image"),
    (f"image photo.png style.png --start absent.png {VGG}", "absent.png: no such image"),
    (f"image photo.png style.png --masks text.jpg {VGG}", "text.jpg cannot be read as an image"),
    (f"image photo.png style.png --masks dot.png dot.png {VGG}", "2 masks for 1 styles"),
    (f"image photo.png style.png --weights 1 2 {VGG}", "2 weights for 1 styles"),
    (f"image dot.png style.png {VGG}", "images of 1 x 1 pixels are too small"),
    (f"image photo.png style.png --longest-px 6 {DEEP}", "images of 4 x 6 pixels are too small for relu4_1"),
    (f"image photo.png style.png --masks photo.png --optim.tile-px 64 {VGG}", "regions are not possible in tiles"),
    ("image photo.png style.png --out result.txt", "result.txt: it must end in .png"),
    ("image photo.png style.png --out nowhere/x.png", "there is no folder nowhere"),
    ("image photo.png style.png --out photo.png", "photo.png is one of the images"),
    ("image long.png style.png --out long.webp", "long.webp: a side of 16384 pixels is more than the 16383"),
    ("image photo.png style.png --out a/../style.png", "is one of the images"),
    # image: options
    ("image photo.png style.png --optimm.lr 1", "Unrecognized"),
    ("image photo.png style.png --optim.optimizer sgd", "invalid choice 'sgd'"),
    ("image photo.png style.png --optim.iterations 5 -1", "optim.iterations must be positive"),
    ("image photo.png style.png --optim.lr nan", "optim.lr must be positive"),
    ("image photo.png style.png --optim.smallest-px -1", "optim.smallest_px must be at least 16"),
    ("image photo.png style.png --perception.style-weight nan", "style_weight"),
    ("image photo.png style.png --perception.tv-weight -1", "tv_weight must not be negative"),
    ("image photo.png style.png --style-scale nan", "style-scale must be between"),
    ("image photo.png style.png --weights nan", "weights must not be negative"),
    ("image photo.png style.png --longest-px -5", "longest-px must be at least 1"),
    ("image photo.png style.png --seed -1", "seed must be between"),
    # image: the loss network
    ("image photo.png style.png --perception.weights absent", "absent: no such weight file"),
    ("image photo.png style.png --perception.weights text.jpg", "text.jpg is not a weight file"),
    ("image photo.png style.png --perception.weights odd.safetensors", "these are the weights of another network"),
    (f"image photo.png style.png {VGG} --perception.style-layers brush", "no layer 'brush'"),
    (f"image photo.png style.png {VGG} --perception.content-layers relu5_1", "no layer 'relu5_1'"),
    # image: its run folder
    ("image photo.png style.png --out image.png", "image.run already holds a run"),
    ("image photo.png style.png --out image.png --resume", "image.run was started with another configuration"),
    ("image photo.png style.png --run run --resume", "run is a run of stylize, not of stylize.image"),
    ("image photo.png style.png --run strange", "it holds holiday.txt"),
    ("image photo.png style.png --run text.jpg", "text.jpg is a file"),
    # train
    ("train", "a style and photographs are needed"),
    ("train style.png", "a style and photographs are needed"),
    ("train paper --photos photos", "a style and photographs are needed"),
    (f"train smal style.png {TRAIN}", "smal: no such image"),
    (f"train style.png absent.png {TRAIN}", "absent.png: no such image"),
    (f"train text.jpg {TRAIN}", "text.jpg cannot be read as an image"),
    (f"train thin.png {TRAIN}", "images of 1 x 40 pixels are too small"),
    (f"train style.png {TRAIN} --photos absent", "absent: no such folder"),
    (f"train style.png {TRAIN} --photos empty", "empty holds no images"),
    (f"train style.png {TRAIN} --photos style.png", "style.png is not a folder"),
    (f"train style.png {TRAIN} --photos mixed", "mixed/3.jpg cannot be read as an image"),
    (f"train style.png {TRAIN} --perception.style-layers relu9_9", "no layer 'relu9_9'"),
    (f"train style.png {TRAIN} --perception.weights absent", "absent: no such weight file"),
    (f"train style.png {TRAIN} --optim.steps 0", "steps and batch_size must be at least 1"),
    (f"train style.png {TRAIN} --optim.crop-px 30", "crop_px must be a multiple of 4"),
    (f"train style.png {TRAIN} --photo-px 31", "photo_px must be at least optim.crop_px, 32"),
    (f"train style.png {TRAIN} --optim.whole 1.5", "whole must be between 0 and 1"),
    (f"train style.png {TRAIN} --optim.whole 0.5 --photo-px 42", "needs a photo_px that is a multiple of 4"),
    (f"train style.png {TRAIN} --optim.lr -1", "optim.lr must be positive"),
    (f"train style.png {TRAIN} --optim.identity nan", "optim.identity must be"),
    (f"train style.png {TRAIN} --network.kernel-px -1", "network.kernel_px must be odd, and at least 1"),
    (f"train style.png {TRAIN} --optim.temporal-weight 1", "set network.memory"),
    (f"train style.png {TRAIN} --devices 99", "devices is 99"),
    (f"train style.png {TRAIN} --devices 4", "2 photographs do not divide evenly over 4 devices"),
    (f"train style.png {TRAIN} --config absent.json", "absent.json: no such file"),
    (f"train style.png {TRAIN} --out run", "run already holds a run"),
    (f"train style.png {TRAIN} --out run --resume", "run was started with another configuration"),
    (f"train style.png {TRAIN} --out other --resume", "other is a run of ncsn, not of stylize"),
    (f"train style.png {TRAIN} --out strange", "it holds holiday.txt"),
    (f"train style.png {TRAIN} --warm-start stopped", "the training of transfer is not finished"),
    (f"train style.png {TRAIN} --warm-start run --network.width 3", "run has another network"),
    ("train run --optim.steps 3 --resume", "optim.steps was 2, now 3"),
    ("train foreign --resume", "foreign was started with other weights or photographs: SHA-256 of loss_network was"),
    ("train other --resume", "other is a run of ncsn, not of stylize"),
    # apply
    ("apply", "needs the folder of a run"),
    ("apply run", "which images?"),
    ("apply absent photo.png", "absent is not a run folder"),
    ("apply style.png photo.png", "style.png is a file"),
    ("apply other photo.png", "other is a run of ncsn"),
    ("apply untrained photo.png", "untrained holds no trained transfer"),
    ("apply stopped photo.png", "the training of transfer is not finished"),
    ("apply run absent.png", "absent.png: no such image"),
    ("apply run cut.png", "cut.png cannot be read as an image"),
    ("apply run empty", "empty holds no images"),
    ("apply run photo.png absent.png", "absent.png: no such image"),
    ("apply run mixed", "mixed/3.jpg cannot be read as an image"),
    ("apply run photo.png style.png --out both.png", "both.png: several images need a folder"),
    ("apply run photos --out all.png", "all.png: several images need a folder"),
    ("apply run a/photo.png b/photo.png", "two of the images have the same name"),
    ("apply run photo.png --out photo.png", "photo.png is one of the images"),
    ("apply run photos --out photos", "photos/0.png is one of the images"),
    ("apply run photo.png --out photo.mp4", "must end in .png"),
    ("apply run long.png --out long.webp", "long.webp: a side of 16384 pixels is more than the 16383"),
    ("apply run photo.png --out no/where", "there is no folder no"),
    ("apply run photo.png --weights 1 2 3", "3 weights for 2 styles: style, other"),
    ("apply run photo.png --weights 0 0", "weights must not be negative, nor all zero"),
    ("apply run photo.png --weights -1 2", "weights must not be negative, nor all zero"),
    ("apply run photo.png --strength nan", "strength must be between 0 and 3"),
    # video
    ("video", "needs the folder of a run, or a style image with --optimize"),
    ("video run", "required"),
    ("video run absent.mp4", "absent.mp4: no such movie"),
    ("video run text.mp4", "text.mp4 cannot be read as a movie"),
    ("video run void.mp4", "void.mp4 cannot be read as a movie"),
    ("video run photos", "photos is a folder, not a movie"),
    ("video run photo.png", "photo.png is not a movie"),
    ("video run sound.mp4", "sound.mp4 holds no moving pictures"),
    ("video run still.mp4", "still.mp4"),
    ("video style.png clip.mp4", "style.png is not a run folder"),
    ("video absent clip.mp4", "absent is not a run folder"),
    ("video other clip.mp4", "other is a run of ncsn"),
    ("video stopped clip.mp4", "is not finished"),
    ("video run clip.mp4 --out x.avi", "must end in .mp4"),
    ("video run clip.mp4 --out nowhere/x.mp4", "there is no folder nowhere"),
    ("video run clip.mp4 --out clip.mp4", "clip.mp4 is the clip itself"),
    ("video run clip.mp4 --longest-px 0", "longest-px must be at least 1"),
    ("video run clip.mp4 --longest-s nan", "longest-s must be positive"),
    ("video run clip.mp4 --strength -1", "strength must be between 0 and 3"),
    ("video run clip.mp4 --weights 1", "1 weights for 2 styles"),
    (f"video style.png clip.mp4 --optim.tile-px 64 {OPTIMIZE}", "optim.tile-px is for images"),
    (f"video style.png clip.mp4 --optim.start noise {OPTIMIZE}", "optim.smallest-px and optim.start are for images"),
    (f"video style.png clip.mp4 {OPTIMIZE} --optim.iterations 3 2 1", "optim.iterations are two for movies"),
    (f"video absent.png clip.mp4 {OPTIMIZE}", "absent.png: no such image"),
    (f"video style.png clip.mp4 --weights 1 2 {OPTIMIZE}", "2 weights for 1 styles"),
    (f"video style.png clip.mp4 --temporal-weight -1 {OPTIMIZE}", "temporal-weight must not be negative"),
    (f"video style.png clip.mp4 --longest-px 2 {OPTIMIZE}", "images of 1 x 2 pixels are too small"),
    (f"video thin.png clip.mp4 {OPTIMIZE}", "images of 1 x 32 pixels are too small"),
    (f"video style.png clip.mp4 --out clip.mkv {OPTIMIZE}", "clip.frames already holds a run"),
    # export
    ("export", "needs the folder of a run"),
    ("export stopped alone", "is not finished"),
    ("export run photos", "photos is there already"),
    ("export run style.png/alone", "style.png/alone cannot be made"),
    # evaluate
    ("evaluate", "needs the folder of a run"),
    ("evaluate run", "--photos"),
    ("evaluate stopped --photos photos", "is not finished"),
    ("evaluate run --photos absent", "absent: no such folder"),
    ("evaluate run --photos empty", "empty holds no images"),
    ("evaluate run --photos mixed --size-px 32", "mixed/3.jpg cannot be read as an image"),
    ("evaluate run --photos photos --style 2", "style 2: the network has 2, counted from 0"),
    ("evaluate run --photos photos --count 0", "count and iterations must be at least 1"),
    ("evaluate run --photos photos --size-px 31", "size-px 32"),
    ("evaluate run --photos photos --clips absent.mp4", "absent.mp4: no such movie"),
    ("evaluate run --photos photos --clips short.mp4", "short.mp4 has 5 frames: flicker is measured over 6"),
    ("evaluate run --photos photos --clips clip.mp4 text.mp4", "text.mp4 cannot be read as a movie"),
    ("evaluate run --photos photos --clips clip.mp4 a/../clip.mp4", "two of the clips have the same name"),
    ("evaluate run --photos photos --out style.png", "style.png is a file, not a folder"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line.replace(VGG, "") for line, _ in REFUSED])
def test_refused(template, untouched, in_process, monkeypatch, line, message):
    monkeypatch.delenv("GRADIENT_FIELDS_DATA", raising=False)
    code, out, err = in_process(main, template)(line)
    assert code == 2, (out, err)
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and message in err, err
    after = contents(template)
    assert after.keys() == untouched.keys(), after.keys() ^ untouched.keys()
    assert after == untouched


def test_the_last_steps_see_whole_squares():
    for whole, found in ((0.4, [(128, 6), (256, 10)]), (0.0, [(128, 10)]), (1.0, [(256, 10)])):
        assert training.phases(Config(photo_px=256, optim=Optim(steps=10, crop_px=128, whole=whole))) == found


@pytest.mark.slow
def test_a_training_begins_with_the_weights_of_another(template):
    """Styles beyond those that it knows begin like its last; the set that is no style stays the last one."""
    known = training.start_state(CONFIG).params
    styles, network = ("style.png", "other.png", "third.png"), dataclasses.replace(CONFIG.network, memory=True)
    config = dataclasses.replace(CONFIG, styles=styles, network=network, warm_start=str(template / "run"))
    found = training.initial_params(config)
    shapes = jax.tree.map(jnp.shape, training.start_state(config).params)
    assert jax.tree.map(jnp.shape, found) == shapes
    np.testing.assert_array_equal(found["Norm_0"]["bias"], known["Norm_0"]["bias"][np.array([0, 1, 1, 2])])
    first, before = found["Reflected_0"]["conv"]["kernel"], known["Reflected_0"]["conv"]["kernel"]
    np.testing.assert_array_equal(first, np.concatenate([before, np.zeros((9, 9, 4, 2))], axis=2))
    np.testing.assert_array_equal(found["Upsampled_0"]["kernel"], known["Upsampled_0"]["kernel"])


@pytest.mark.parametrize(
    ("line", "package"),
    [(f"train style.png {TRAIN}", "stylize"), (f"image photo.png style.png --run R {VGG}", "stylize.image")],
)
def test_a_run_folder_in_use(here, desk, line, package, monkeypatch):
    monkeypatch.setattr(RunFolder, "check", staticmethod(lambda *args, **options: None))
    with RunFolder.start(desk / "R", package, {}, resume=False):
        code, _, err = here(f"{line} --resume")
    assert (code, err) == (2, "error: R is in use by another process\n")


SCRIPT = """
import sys
from lib.process import command
from stylize.__main__ import main
code = command(main, sys.argv[1:])
slow = {"jax", "flax", "optax", "matplotlib", "skimage", "cv2"} & set(sys.modules)
sys.exit(f"{code}: imported {sorted(slow)}" if slow else code)
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("image photo.png style.png --out result.txt", "must end in .png"),
        ("train style.png", "a style and photographs are needed"),
        ("apply absent photo.png", "absent is not a run folder"),
        ("video run text.mp4", "cannot be read as a movie"),
    ],
)
def test_refused_by_a_process_before_anything_slow(template, line, message, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", SCRIPT, *line.split()]
    done = subprocess.run(command, cwd=template, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_fits_a_screen(here):
    code, out, err = here("")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 110
    for command in ("image", "train", "apply", "video", "evaluate"):
        assert command in out


@pytest.mark.parametrize("command", ["image", "train", "apply", "video", "evaluate"])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code and "--out" in capsys.readouterr().out


def images_of_every_kind(folder):
    """Writes them; {stem: (width, height) when upright}."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def noise(height, width, *channels, high=256, kind=np.uint8):
        return rng.integers(0, high, (height, width, *channels)).astype(kind)

    Image.fromarray(noise(7, 1001, 3)).save(folder / "wide.png")
    Image.fromarray(noise(8, 32, 3)).save(folder / "four_to_one.jpg")
    Image.fromarray(noise(13, 30)).save(folder / "grey.png")
    Image.fromarray(noise(9, 31, 4)).save(folder / "transparent.webp")
    Image.fromarray(noise(10, 17, 3)).quantize(16).save(folder / "palette.png")
    Image.fromarray(noise(11, 29, high=65536, kind=np.uint16)).save(folder / "deep.png")
    turned = Image.fromarray(noise(31, 15, 3))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(noise(12, 28, 4), "CMYK").save(folder / "print.tif")
    Image.fromarray(noise(1, 1, 3)).save(folder / "dot.png")
    return {
        "wide": (1001, 7), "four_to_one": (32, 8), "grey": (30, 13), "transparent": (31, 9), "palette": (17, 10),
        "deep": (29, 11), "turned": (31, 15), "print": (28, 12), "dot": (1, 1),
    }  # fmt: skip


def test_apply_keeps_the_size_of_every_kind_of_image(here, desk):
    sizes = images_of_every_kind(desk / "kinds")
    code, out, err = here("apply run kinds --out made --weights 1 1")
    assert (code, err) == (0, "") and out == "9 images\nmade\n"
    for name, size in sizes.items():
        with Image.open(desk / "made" / f"{name}.png") as made:
            assert (made.size, made.mode) == (size, "RGB"), name


def test_an_exported_network_is_the_same_one_anywhere(here, desk):
    record.write(RunFolder(desk / "run"), record.of(tiny_network(), np.zeros((1, 8, 8, 3), np.uint8)))
    code, out, err = here("export run kept/alone")
    assert (code, out, err) == (0, "kept/alone\n", "")
    for name in ("run", "style.png", "other.png"):
        (desk / name).rename(desk / "kept" / name)
    (desk / "kept" / "alone").rename(desk / "moved")
    for source in ("kept/run", "moved"):
        assert here(f"apply {source} photo.png --out {Path(source).name}.png --weights 1 2")[0] == 0
    assert (desk / "moved.png").read_bytes() == (desk / "run.png").read_bytes()
    folder, config = networks.opened(str(desk / "moved"))
    assert [images.read(Path(path)).shape for path in config.styles] == [(24, 16, 3), (16, 24, 3)]
    assert training.style_names(config) == ["style", "other"] and config.perception.weights is None
    assert [row["step"] for row in folder.metrics()] == [2]
    assert str(desk) not in "".join(path.read_text() for path in folder.path.glob("*.json*"))
    said = []
    record.compare(folder.path, tiny_network(), said.append)
    assert not said
    record.compare(folder.path, dataclasses.replace(tiny_network(), weights_sha256="1" * 64), said.append)
    assert len(said) == 1 and "moved was trained with another loss network, weights 000000000000" in said[0]
    wrong = {"Norm_0/bias": np.zeros((3, 2), np.float32)}
    weights.write(desk / "moved" / export.WEIGHTS, wrong)
    code, _, err = here("apply moved photo.png --out again.png")
    assert code == 2 and "these are the weights of another network" in err and not (desk / "again.png").exists()


def test_image_keeps_an_odd_size_and_goes_on_where_it_was(here, desk):
    images.write(desk / "odd.png", smooth(5, 17, 33))
    line = f"image odd.png style.png thin.png --out made.png {VGG} --optim.optimizer adam --optim.iterations 2"
    code, out, err = here(line)
    assert (code, err) == (0, "") and "made.png\nmade.run/report.html" in out
    made = images.read(desk / "made.png")
    assert made.shape == (17, 33, 3) and np.ptp(made) > 0
    assert record.read(desk / "made.run") == record.of(vgg.load(Perception("vgg.safetensors", "johnson")))
    assert here(line)[0] == 2
    code, _, err = here(f"{line} --resume")
    assert (code, err) == (0, "")
    np.testing.assert_array_equal(images.read(desk / "made.png"), made)


def test_where_results_go(tmp_path):
    for name in ("in/x.jpg", "in/deep/x.jpg", "in/y.v2.png"):
        images.write(tmp_path / name, smooth(0, 4, 4))
    source, out = tmp_path / "in", tmp_path / "out"
    assert dict(outputs([source], out)) == {
        source / "x.jpg": out / "x.png",
        source / "deep" / "x.jpg": out / "deep" / "x.png",
        source / "y.v2.png": out / "y.v2.png",
    }
    assert outputs([source / "x.jpg"], out) == [(source / "x.jpg", out / "x.png")]
    assert outputs([source / "x.jpg"], tmp_path / "one.webp") == [(source / "x.jpg", tmp_path / "one.webp")]


@pytest.mark.parametrize("kernel_px", [9, 17, 33])
def test_devices_get_rows_enough_for_the_kernel(kernel_px):
    for height in range(16, 400, 16):
        for devices in range(1, 9):
            n = apply.rows_over(height, devices, kernel_px)
            assert 1 <= n <= devices and height % (4 * n) == 0
            assert n == 1 or height // n > kernel_px // 2
