"""Weight files, and how they get here: reading, downloading from a local server, converting."""

import functools
import hashlib
import http.server
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lib.features
from lib.features import convert, download, weights
from lib.features.__main__ import main
from lib.process import UserError, command

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; `cut_after` bytes of an answer it hangs up, at most `cuts` times."""

    daemon_threads = True
    cut_after: int | None = None
    cuts = 0
    ranges = True
    content = CONTENT
    length_known = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if self.path != "/weights.pth":
            self.send_error(404)
            return
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if server.length_known:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cut_after is not None and server.cuts > 0:
            server.cuts -= 1
            body = body[: server.cut_after]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "gradient-fields" / "weights"


def partial_of(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def test_download(server, tmp_path):
    target = tmp_path / "new" / "weights.pth"
    for _ in range(2):  # the second finds it there
        download.fetch(server.url, target, SHA256)
        assert target.read_bytes() == CONTENT
    assert server.asked == [None]
    assert sorted(target.parent.iterdir()) == [target]


def test_no_length_is_announced(server, tmp_path):
    server.length_known = False
    download.fetch(server.url, tmp_path / "a", SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_connection_that_is_cut_goes_on_by_itself(server, tmp_path):
    server.cut_after, server.cuts = 100_000, 2
    download.fetch(server.url, tmp_path / "a", SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]


def test_a_server_that_keeps_cutting_is_given_up_and_resumed_later(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    partial_of(tmp_path / "a").write_bytes(CONTENT[:1000])
    server.cut_after, server.cuts = 0, 1000
    with pytest.raises(UserError, match="cut after 1000 bytes .* run this again"):
        download.fetch(server.url, tmp_path / "a", SHA256)
    assert len(server.asked) == download.ATTEMPTS
    assert not (tmp_path / "a").exists() and partial_of(tmp_path / "a").read_bytes() == CONTENT[:1000]
    server.cuts = 0
    server.asked.clear()
    download.fetch(server.url, tmp_path / "a", SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


def test_resume_where_the_server_knows_no_ranges(server, tmp_path):
    server.ranges = False
    partial_of(tmp_path / "a").write_bytes(b"x" * 1000)
    download.fetch(server.url, tmp_path / "a", SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_all_bytes_were_there_already(server, tmp_path):
    partial_of(tmp_path / "a").write_bytes(CONTENT)
    download.fetch(server.url, tmp_path / "a", SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize("before", [b"", b"x" * 1000])
def test_wrong_checksum(server, tmp_path, before):
    """Other bytes, or a beginning of another file: nothing is left that a later attempt would build on."""
    if not before:
        server.content = CONTENT[:-1] + b"?"
    else:
        partial_of(tmp_path / "a").write_bytes(before)
    with pytest.raises(UserError, match=f"SHA-256 .*, not {SHA256[:16]}.*: it was removed"):
        download.fetch(server.url, tmp_path / "a", SHA256)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_in_its_place_is_neither_used_nor_touched(server, tmp_path):
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"its SHA-256 is not .* remove it"):
        download.fetch(server.url, tmp_path / "a", SHA256)
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_refused_and_nonsensical_addresses(server, tmp_path):
    with pytest.raises(UserError, match="404 Not Found; put the file at"):
        download.fetch(server.url + "x", tmp_path / "a", SHA256)
    with pytest.raises(UserError, match="not an http or https address"):
        download.fetch("ftp://example.org/a", tmp_path / "a", SHA256)
    with pytest.raises(UserError, match="only of inception, vgg16, vgg19"):
        download.get("resnet")


def test_one_download_at_a_time(server, tmp_path):
    import fcntl

    with partial_of(tmp_path / "a").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written by another process"):
            download.fetch(server.url, tmp_path / "a", SHA256)


@pytest.mark.parametrize("tiny_disk", [1], indirect=True)
def test_a_full_disk_is_no_cut_connection(server, tiny_disk):
    server.content = bytes(2**21)
    with pytest.raises(OSError, match="No space left"):
        download.fetch(server.url, tiny_disk / "a", SHA256)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/a.pth",  # refused
        "http://192.0.2.1/a.pth",  # an address of documentation: packets get lost
        "https://weights.invalid/a.pth",  # a name that never resolves
    ],
)
def test_offline_one_line_within_5_seconds(url, cache):
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lib.features", "get", "inception", "--url", url],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    elapsed_s = time.monotonic() - begin
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"put the file at {cache / 'pt_inception-2015-12-05-6726825d.pth'}" in done.stderr
    assert elapsed_s < 5


def test_the_name_look_up_may_hang(monkeypatch, tmp_path):
    release = threading.Event()

    def look_up(*args: object, **kwargs: object) -> None:
        release.wait(30)
        raise OSError

    monkeypatch.setattr(download.socket, "create_connection", look_up)
    monkeypatch.setattr(download, "REACH_S", 0.1)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"weights.org cannot be reached"):
        download.fetch("https://weights.org/a", tmp_path / "a", SHA256)
    release.set()
    assert time.monotonic() - begin < 3


def test_a_proxy_is_what_must_be_reached(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(UserError, match="404"):  # the server is no proxy and does not know the whole address
        download.fetch("http://weights.invalid/weights.pth", tmp_path / "a", SHA256)
    assert server.asked == [None]


def test_get_says_what_to_do_next(server, cache, monkeypatch, capsys):
    source = download.Source("https://official.invalid/net-0123.pth", SHA256)
    monkeypatch.setitem(download.SOURCES, "vgg16", source)
    assert command(main, ["get", "vgg16", "--url", server.url]) == 0
    assert (cache / "net-0123.pth").read_bytes() == CONTENT
    told = f"python -m lib.features convert {cache / 'net-0123.pth'} {weights.cached('vgg16')}\n"
    assert capsys.readouterr().out.endswith(told)


def test_published_files_carry_their_hash_in_their_names():
    for source in download.SOURCES.values():
        assert len(source.sha256) == 64
        assert source.filename.removesuffix(".pth").endswith("-" + source.sha256[:8])


def test_weights_round_trip_with_the_hash_of_their_bytes(tmp_path):
    arrays = {"b/kernel": np.arange(6, dtype=np.float16).reshape(3, 2).T, "a": np.ones(2, np.float32)}
    sha256 = weights.write(tmp_path / "new" / "w.safetensors", arrays)
    found = weights.read(tmp_path / "new" / "w.safetensors")
    assert sha256 == found.sha256 == hashlib.sha256((tmp_path / "new" / "w.safetensors").read_bytes()).hexdigest()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
    assert weights.write(tmp_path / "again.safetensors", dict(reversed(arrays.items()))) == sha256
    nested = weights.nested(found.arrays)
    assert nested["b"]["kernel"].dtype == np.float32
    assert sorted(weights.flat(nested)) == ["a", "b/kernel"]


def pickled(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{}], object), allow_pickle=True)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")


def object_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.array([{}], object))


def truncated(path: Path) -> None:
    weights.write(path, {"a": np.ones(100)})
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    "make",
    [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"PK garbage"), lambda p: p.write_bytes(CONTENT), pickled,
     zipped, object_npz, truncated],
)  # fmt: skip
def test_garbage_is_refused_in_one_line(make, tmp_path):
    path = tmp_path / "w.safetensors"
    make(path)
    with pytest.raises(UserError, match="is not a weight file .* go through `python -m lib.features convert`"):
        weights.read(path)


def test_missing_and_not_finite(tmp_path):
    for path in (tmp_path / "none", tmp_path, tmp_path / "none" / "none"):
        with pytest.raises(UserError, match="no such weight file"):
            weights.read(path)
    weights.write(tmp_path / "w", {"a/b": np.array([1.0, np.nan])})
    with pytest.raises(UserError, match="a/b holds values that are not finite"):
        weights.read(tmp_path / "w")


def test_the_command_line(tmp_path, capsys):
    wrong = tmp_path / "w.safetensors"
    weights.write(wrong, {"a": np.ones(1)})
    for arguments, message in {
        ("fly",): "unknown command 'fly'",
        ("get",): "usage: python -m lib.features get inception|vgg16|vgg19",
        ("get", "alexnet"): "no published weights are known of 'alexnet'",
        ("get", "vgg16", "--ulr", "x"): "perhaps you meant --url",
        ("convert", "a"): "usage: python -m lib.features convert FILE OUT.safetensors",
        ("convert", "a", "b.npz"): "must end in .safetensors",
        ("convert", str(tmp_path / "none.pth"), "b.safetensors"): "no such file",
        ("convert", str(wrong), "b.safetensors"): "holds none of the networks known here",
    }.items():
        assert command(main, list(arguments)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert command(main, []) == 0 and "usage: python -m lib.features COMMAND" in capsys.readouterr().out
    assert command(main, ["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*lib.features.NAMES, "vgg19")) and "(missing)" in listed


def test_convert_writes_the_file_that_get_names(tmp_path, capsys):
    from feature_cases import vgg_state

    weights.write(tmp_path / "vgg16.safetensors", vgg_state(16))
    assert command(main, ["convert", str(tmp_path / "vgg16.safetensors"), str(weights.cached("vgg16"))]) == 0
    from lib.features import vgg

    found = vgg.load_default("vgg16")
    assert found.layers[-1] == "pool5"
    assert found.weights_sha256 in capsys.readouterr().out


def test_what_reads_the_file_is_not_installed(tmp_path, monkeypatch):
    for module, head in (("torch", b"\x80\x02}."), ("h5py", b"\x89HDF\r\n\x1a\n")):
        monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / "file").write_bytes(head)
        with pytest.raises(UserError, match=r'needs (PyTorch|h5py): pip install -e ".\[convert\]"'):
            convert.read_state(tmp_path / "file")


def test_pytorch_files_are_read_as_plain_weights_only(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is an extra")
    for zipfile_format in (True, False):
        tensors = {"a": torch.arange(3.0), "n": torch.tensor(2)}
        torch.save(tensors, tmp_path / "w.pth", _use_new_zipfile_serialization=zipfile_format)
        state = convert.read_state(tmp_path / "w.pth")
        np.testing.assert_array_equal(state["a"], [0, 1, 2])
    torch.save({"a": functools.partial(print)}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="not a PyTorch file of plain weights"):
        convert.read_state(tmp_path / "code.pth")


def test_a_pytorch_file_becomes_inception(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is an extra")
    from feature_cases import inception_state

    state = {name: torch.from_numpy(array) for name, array in inception_state().items()}
    state["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(state, tmp_path / "pt_inception.pth")
    assert command(main, ["convert", str(tmp_path / "pt_inception.pth"), str(weights.cached("inception"))]) == 0
    assert lib.features.load("inception").weights_sha256 == download.file_sha256(weights.cached("inception"))


def test_a_keras_file_becomes_vgg(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is an extra")
    from feature_cases import vgg_state

    from lib.features import vgg

    state = vgg_state(16)
    with h5py.File(tmp_path / "vgg16.h5", "w") as file:
        for i, name in enumerate(vgg.layer_names(16)):
            if name.startswith("conv"):
                group = file.create_group(f"block{name[4]}_conv{name[6]}")
                group[f"block{name[4]}_conv{name[6]}_W_1:0"] = state[f"features.{i}.weight"].transpose(2, 3, 1, 0)
                group[f"block{name[4]}_conv{name[6]}_b_1:0"] = state[f"features.{i}.bias"]
            elif name.startswith("pool"):
                file.create_group(f"block{name[4]}_pool")
    assert command(main, ["convert", str(tmp_path / "vgg16.h5"), str(weights.cached("vgg16"))]) == 0
    found = vgg.load_default("vgg16")
    np.testing.assert_array_equal(found.params["conv5_3"]["bias"], state["features.28.bias"])
    (tmp_path / "cut.h5").write_bytes((tmp_path / "vgg16.h5").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cut.h5 is damaged"):
        convert.read_state(tmp_path / "cut.h5")


def test_names_and_sizes():
    assert lib.features.default_for(8, 8, 1) == "digits_cnn"
    assert lib.features.default_for(28, 28, 1) == "mnist_cnn"
    assert lib.features.default_for(32, 32, 3) == "cifar10_cnn"
    assert lib.features.default_for(64, 64, 3) == lib.features.default_for(32, 32, 1) == "inception"
    with pytest.raises(UserError, match="unknown feature network 'resnet': choose from inception, "):
        lib.features.load("resnet")
