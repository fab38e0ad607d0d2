"""`python -m lib.features get NAME`: weight files from their official addresses into the cache folder.

A file counts only once its SHA-256 is right; until then its bytes are in NAME.partial, and the next attempt goes on
after them (HTTP Range).
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import http.client
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from lib.process import UserError

REACH_S = 3.5
"""seconds in which the server must accept a connection, name look-up included"""
STALL_S = 30.0
"""seconds without a byte after which a connection counts as cut"""
ATTEMPTS = 5
"""connections that may be cut one after the other without a new byte"""
_CHUNK_BYTES = 2**20
# Not every OSError: a full disk is no matter of the connection.
_CUT = (urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException)


@dataclasses.dataclass(frozen=True)
class Source:
    """A published weight file."""

    url: str
    sha256: str

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]


_PYTORCH = "https://download.pytorch.org/models"
SOURCES = {
    "inception": Source(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "vgg16": Source(
        f"{_PYTORCH}/vgg16-397923af.pth", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
    ),
    "vgg19": Source(
        f"{_PYTORCH}/vgg19-dcbb9e9d.pth", "dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44"
    ),
}


def weights_folder() -> Path:
    """The cache folder: $XDG_CACHE_HOME/gradient-fields/weights, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradient-fields" / "weights"


def get(name: str, url: str | None = None) -> Path:
    """Downloads the published file of network `name` (from `url` instead, where given) and returns its path."""
    if name not in SOURCES:
        raise UserError(f"no published weights are known of {name!r}, only of {', '.join(SOURCES)}")
    source = SOURCES[name]
    target = weights_folder() / source.filename
    fetch(url or source.url, target, source.sha256)
    return target


def fetch(url: str, target: Path, sha256: str) -> None:
    """Makes `target` hold the bytes with this hash, downloading what is missing of them.

    Raises UserError where the server cannot be reached (within REACH_S), refuses, keeps cutting the connection, or
    sends other bytes; what arrived of the right ones is kept for the next attempt.
    """
    if target.exists():
        if file_sha256(target) == sha256:
            return
        raise UserError(f"{target} is there, but its SHA-256 is not {sha256[:16]}...: remove it and run this again")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial} is being written by another process: wait for it") from None
        _fill(file, url, target)
        file.flush()
        os.fsync(file.fileno())
        found = file_sha256(partial)
        if found != sha256:
            partial.unlink()
            raise UserError(
                f"{url} gave a file with SHA-256 {found[:16]}..., not {sha256[:16]}...: it was removed; try again, or "
                f"put the right file at {target}"
            )
        partial.replace(target)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(file: IO[bytes], url: str, target: Path) -> None:
    """Appends to `file` until the server says that it is complete."""
    _check_reachable(url, target)
    cuts, reason = 0, None
    with tqdm(desc=target.name, unit="B", unit_scale=True, disable=None) as progress:
        while cuts < ATTEMPTS:
            before = file.tell()
            reason = _connection(file, url, target, progress)
            if reason is None:
                return
            cuts = 0 if file.tell() > before else cuts + 1
            time.sleep(0.1 * cuts)
    raise UserError(f"{url}: cut after {file.tell()} bytes ({reason}): run this again to go on from there")


def _connection(file: IO[bytes], url: str, target: Path, progress: tqdm) -> str | None:
    """One request for the bytes after those in `file`. Returns None once the file is complete, or what went wrong."""
    start = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.build_opener().open(request, timeout=STALL_S) as response:
            if start and response.status != http.HTTPStatus.PARTIAL_CONTENT:  # the server sends everything again
                file.truncate(start := 0)
            length = response.headers.get("Content-Length")
            progress.total = start + int(length) if length else None
            progress.n = start
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                progress.update(len(chunk))
            file.seek(0, os.SEEK_END)
            return None if length is None or file.tell() == start + int(length) else "the connection was closed"
    except urllib.error.HTTPError as error:
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None  # there are no bytes beyond these: the checksum tells whether they are right
        raise UserError(f"{url}: {error.code} {error.reason}; put the file at {target}") from None
    except _CUT as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def _check_reachable(url: str, target: Path) -> None:
    """Connects once, in a thread: neither name look-up nor a silent firewall can then hold us for long."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url} is not an http or https address")
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 80)
    reached: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=REACH_S).close()
        except OSError:
            return
        reached.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_S)
    if not reached:
        raise UserError(f"{parts.hostname} cannot be reached: download {url} elsewhere and put the file at {target}")


@dataclasses.dataclass(frozen=True)
class Get:
    """Download published weights into the cache folder."""

    url: str | None = None
    """a mirror to download from; the checksum stays the official one"""


def main(argv: Sequence[str]) -> None:
    from lib.config import parse

    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        raise UserError(f"usage: python -m lib.features get {'|'.join(SOURCES)} [--url URL]")
    if argv[0] in ("-h", "--help"):
        parse(Get(), argv, "python -m lib.features get NAME")
    name = argv[0]
    path = get(name, parse(Get(), argv[1:], f"python -m lib.features get {name}").url)
    print(f"{path}\nnext: python -m lib.features convert {path} {weights_folder() / name}.safetensors")
