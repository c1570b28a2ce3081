# SPDX-License-Identifier: Apache-2.0
"""Downloads from a server on this machine: cut off, gone on with, started anew, refused."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import shutil
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from monai.apps.utils import HashCheckError

from monai_deq.data import check_checksum, parse_checksum, resumable_download

CONTENT = np.random.default_rng(0).bytes(300_000)


def download(server, tmp_path, **more):
    return resumable_download(f"{server.url}/data.bin", tmp_path / "sub" / "data.bin", progress=False, **more)


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "sub").iterdir())


@pytest.fixture(autouse=True)
def content(server, no_waiting):
    server.content = CONTENT


def test_whole(server, tmp_path):
    path = download(server, tmp_path)
    assert path == tmp_path / "sub" / "data.bin" and path.read_bytes() == CONTENT
    assert names(tmp_path) == ["data.bin"] and server.asked == [None]
    # there already: not asked for again, unless wanted
    path.write_bytes(b"mine")
    download(server, tmp_path)
    assert path.read_bytes() == b"mine" and len(server.asked) == 1
    download(server, tmp_path, overwrite=True)
    assert path.read_bytes() == CONTENT and len(server.asked) == 2


def test_cut_off_and_taken_up_in_one_call(server, tmp_path, caplog):
    server.cuts = [100_000, 50_000, 0]
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        path = download(server, tmp_path)
    assert path.read_bytes() == CONTENT and names(tmp_path) == ["data.bin"]
    assert server.asked == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    assert server.sent == [200, 206, 206, 206]
    assert "closed after 100.0 kB of 300.0 kB" in caplog.text


def test_cut_off_and_taken_up_by_the_next_call(server, tmp_path):
    server.cuts = [100_000, 50_000]
    with pytest.raises(ConnectionError, match=r"closed after 100.0 kB of 300.0 kB.*100.0 kB are kept.*goes on from"):
        download(server, tmp_path, retries=0)
    assert names(tmp_path) == ["data.bin.part", "data.bin.part.json"]
    with pytest.raises(ConnectionError, match="150.0 kB are kept"):
        download(server, tmp_path, retries=0)
    assert download(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[1:] == ["bytes=100000-", "bytes=150000-"] and names(tmp_path) == ["data.bin"]


@pytest.mark.parametrize("length", [True, False])
def test_no_ranges_starts_anew(server, tmp_path, length):
    server.ranges, server.cuts = False, [100_000]
    with pytest.raises(ConnectionError):
        download(server, tmp_path, retries=0)
    server.length = length
    assert download(server, tmp_path).read_bytes() == CONTENT
    assert server.sent == [200, 200]


@pytest.mark.parametrize("change", ["etag", "content", "shift", "shorter", "url", "note", "damaged note"])
def test_part_of_another_file_starts_anew(server, tmp_path, change):
    server.cuts = [100_000]
    if change in ("content", "shift", "shorter"):
        server.etag = None
    with pytest.raises(ConnectionError):
        download(server, tmp_path, retries=0)
    note = tmp_path / "sub" / "data.bin.part.json"
    if change in ("etag", "content"):
        server.content = CONTENT[::-1] + (b"more" if change == "content" else b"")
        server.etag = '"two"' if change == "etag" else None
    elif change == "shorter":
        server.content = CONTENT[:50_000]
    elif change == "shift":
        server.shift = 10
    elif change == "url":
        note.write_text(json.dumps({**json.loads(note.read_text()), "url": "http://elsewhere/data.bin"}))
    elif change == "note":
        note.unlink()
    else:
        note.write_text('{"url": ')
    assert download(server, tmp_path).read_bytes() == server.content
    assert server.asked[-1] is None or server.sent == [200, 200]


def test_gives_up(server, tmp_path):
    server.cuts = [10_000, *[0] * 9]
    with pytest.raises(ConnectionError, match="10.0 kB are kept"):
        download(server, tmp_path, retries=2)
    assert len(server.asked) == 3  # the first that brought something, and two more
    # as long as something arrives it goes on
    server.cuts = [40_000] * 9
    assert download(server, tmp_path, retries=1).read_bytes() == CONTENT
    (tmp_path / "sub" / "data.bin").unlink()
    server.ranges, server.cuts, server.asked = False, [20_000] * 9, []
    with pytest.raises(ConnectionError, match="closed after 20.0 kB"):
        download(server, tmp_path, retries=2)
    assert len(server.asked) == 3


def test_busy_server(server, tmp_path):
    server.statuses = [503, 429]
    assert download(server, tmp_path).read_bytes() == CONTENT
    server.statuses = [503] * 9
    with pytest.raises(ConnectionError, match="503.*try later"):
        download(server, tmp_path, retries=1, overwrite=True)
    assert (tmp_path / "sub" / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "what"), [(404, "404.*no such file any more"), (403, "403.*login"), (400, "400"), (204, "204")]
)
def test_refused(server, tmp_path, status, what):
    server.statuses = [status]
    with pytest.raises(RuntimeError, match=f"{what}.*Look elsewhere"):
        download(server, tmp_path, advice="Look elsewhere.")
    assert names(tmp_path) == [] and len(server.asked) == 1


def test_web_page_instead_of_the_file(server, tmp_path):
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(RuntimeError, match="a web page instead"):
        download(server, tmp_path)
    assert names(tmp_path) == []


def test_no_network(tmp_path, server, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(ConnectionError, match="refused.*Check the network.*Look elsewhere"):
            resumable_download(f"http://127.0.0.1:{port}/x.bin", tmp_path / "x.bin", advice="Look elsewhere.")
    with pytest.raises(ConnectionError, match="no answer"):
        resumable_download("http://nowhere.invalid/x.bin", tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == [] and "again in" not in caplog.text


def test_silent_server(tmp_path, server):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ConnectionError, match="timed out|Timeout"):
            resumable_download(f"http://127.0.0.1:{silent.getsockname()[1]}/x", tmp_path / "x.bin", timeout=0.2)


def test_not_enough_space(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000))
    with pytest.raises(OSError, match=r"Not enough space.*download and unpack data.bin, 600.0 kB.*500.0 kB") as caught:
        download(server, tmp_path, copies=2)
    assert caught.value.errno == errno.ENOSPC and names(tmp_path) == []
    # what has arrived needs no more room
    server.cuts = [150_000]
    with pytest.raises(ConnectionError):
        download(server, tmp_path, retries=0)
    assert download(server, tmp_path, copies=2).read_bytes() == CONTENT


def test_disk_full_on_the_way(server, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 100_000:
                super().write(data[: 100_000 - self.tell()])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[resumable_download.__module__], "open", Full, raising=False)
        with pytest.raises(OSError, match="full after 100.0 kB of data.bin. Make room.*goes on from there") as caught:
            download(server, tmp_path)
    assert caught.value.errno == errno.ENOSPC and len(server.asked) == 1
    assert download(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[1:] == ["bytes=100000-"]


def test_check_before_the_name(server, tmp_path):
    seen = []

    def check(path):
        seen.append(path.name)
        check_checksum(path, "md5:" + "0" * 32, "Delete it.")

    got = hashlib.md5(CONTENT).hexdigest()
    with pytest.raises(HashCheckError, match=rf"data.bin.part has .*expected md5 0{{32}}, got {got}. Delete it."):
        download(server, tmp_path, check=check)
    assert names(tmp_path) == ["data.bin.part", "data.bin.part.json"]
    # the right checksum: the complete part is not downloaded again
    assert download(server, tmp_path, check=lambda p: check_checksum(p, got)).read_bytes() == CONTENT
    assert len(server.asked) == 1
    # what is there already is checked too, and left alone
    with pytest.raises(HashCheckError):
        download(server, tmp_path, check=check)
    assert seen == ["data.bin.part", "data.bin"] and names(tmp_path) == ["data.bin"]


def test_unknown_size_is_said(server, tmp_path, caplog):
    server.length = False
    assert download(server, tmp_path).read_bytes() == CONTENT
    assert "does not tell the size" in caplog.text


def test_arguments(tmp_path):
    for url in ("file:///etc/passwd", "ftp://host/x", "host/x.zip", "https://"):
        with pytest.raises(ValueError, match="https://"):
            resumable_download(url, tmp_path / "x")
    with pytest.raises(ValueError, match="retries"):
        resumable_download("http://127.0.0.1/x", tmp_path / "x", retries=-1)


def test_checksums(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    for kind in ("md5", "sha1", "sha256", "sha512"):
        digits = hashlib.new(kind, CONTENT).hexdigest()
        assert parse_checksum(digits) == parse_checksum(f"{kind.upper()}: {digits.upper()}".replace(" ", ""))
        assert parse_checksum(digits) == (kind, digits)
        check_checksum(path, digits.upper())
    for wrong in ("", "abc", "crc32:12345678", "md5:" + "0" * 40, "sha256:" + "g" * 64, 12345):
        with pytest.raises(ValueError, match="checksum must be"):
            parse_checksum(wrong)
