"""lib/report.py and lib/plot.py: one page that needs nothing else."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lib import plot, report


class Reader(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.sources, self.text, self.open, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path):
    picture = plot.curves(tmp_path / "a.png", {"hnn": ([1, 2, 3], [1.0, 0.1, 0.01])}, x="step", y="loss")
    animation = tmp_path / "b.gif"
    Image.new("L", (4, 4)).save(animation)
    made = report.Page('Spring <b> & "friends"', "lead with <script>alert(1)</script>")
    made.heading("A < B")
    made.text("p & q")
    made.code("python -m hnn train spring --out 'R' <x>")
    made.code("{}", summary="configuration & more")
    made.table(["model", "energy_mse"], [["hnn", "1.0e-05"], ["<baseline>", "2.0"]], best=[(0, 1)])
    made.figure(picture, 'phase "portrait" <q>')
    made.figure(animation, "decoded")
    path = made.write(tmp_path / "report.html")
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return path.read_text(encoding="utf-8"), reader, (picture, animation)


def test_self_contained(page):
    source, reader, _ = page
    assert not re.search(r"https?://|//\w+\.\w|@import|url\(", source)
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert len(reader.sources) == 2
    assert all(value.startswith("data:image/") for value in reader.sources)
    assert reader.open == []


def test_pages_in_one(page, tmp_path):
    single = tmp_path / "report.html"
    reader = Reader()
    both = report.join([single, single], tmp_path / "both.html", title="Two <of> them")
    reader.feed(both.read_text(encoding="utf-8"))
    assert reader.open == [] and reader.tags.count("h1") == 2 and reader.tags.count("style") == 1
    assert len(reader.sources) == 4


def test_figures_are_embedded_as_they_are(page):
    _, reader, files = page
    for value, file, mime in zip(reader.sources, files, ("image/png", "image/gif"), strict=True):
        head, data = value.split(",", 1)
        assert head == f"data:{mime};base64"
        assert base64.b64decode(data) == file.read_bytes()


def test_text_is_escaped(page):
    source, reader, _ = page
    text = "".join(reader.text)
    for part in ('Spring <b> & "friends"', "<script>alert(1)</script>", "A < B", "p & q", "<x>", "<baseline>"):
        assert part in text
    assert "<script" not in source and "<baseline>" not in source


def test_best_cell_is_marked(page):
    source, _, _ = page
    assert re.findall(r"<td class=best>([^<]*)</td>", source) == ["1.0e-05"]


@pytest.mark.parametrize(
    ("value", "sd", "text"),
    [
        (0.0, None, "0"),
        (1.2345, None, "1.23"),
        (0.0123, None, "0.0123"),
        (-0.5, None, "-0.5"),
        (123.4, None, "123"),
        (1234.5, None, "1.23e+03"),
        (1.234e-4, 5.6e-5, "1.23e-04 ± 5.6e-05"),
        (1.5, 0.25, "1.5 ± 0.25"),
        (50.0, 12.3, "50 ± 12"),
        (1.5, 0.0, "1.5 ± 0"),
        (500.0, 123.0, "500 ± 1.2e+02"),
        (1.5, float("nan"), "1.5"),
        (None, None, "diverged"),
        (float("nan"), None, "diverged"),
        (float("inf"), 1.0, "diverged"),
        (float("-inf"), None, "diverged"),
    ],
)
def test_number(value, sd, text):
    assert report.number(value, sd) == text


def test_text_table_is_aligned():
    lines = report.text_table(["model", "mse"], [["hnn", "1e-05"], ["baseline", "2"]]).splitlines()
    assert lines == ["model       mse", "---------------", "hnn       1e-05", "baseline      2"]


def test_image_rows_accept_rows_of_different_length(tmp_path):
    rows = {"truth": np.zeros((3, 4, 4)), "hnn": np.ones((2, 4, 4))}
    path = plot.image_rows(tmp_path / "x.png", rows, columns=["0 s", "1 s", "2 s"])
    with Image.open(path) as image:
        assert image.width > image.height


def test_metrics_become_a_row_per_name_and_variant():
    numbers = {
        "real.fid.net": 0.5,
        "heun.fid.net": 1.0,
        "heun.fid.net.sd": 0.25,
        "heun.noisy.fid.net": 2.0,
        "heun.nfe": 35,
    }
    columns, rows = report.metric_table(numbers)
    assert columns == ["", "fid.net", "nfe"]
    assert rows == [["real", "0.5", ""], ["heun", "1 ± 0.25", "35"], ["heun.noisy", "2", ""]]
