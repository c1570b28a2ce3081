# SPDX-License-Identifier: Apache-2.0
"""Downloads from a server on this machine that misbehaves as asked, and archives unpacked whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import socket
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from monai.apps.utils import HashCheckError

import monai_deq.data.downloads as downloads
from monai_deq.data import PUBLIC_DATASETS, download_dataset, find_oasis

NOISE = np.random.default_rng(0).bytes(50_000)


class FileServer(ThreadingHTTPServer):
    """Serves ``content`` under any path.

    ``ranges``: whether it can go on with a file. ``cuts``: after how many bytes of the body it closes the connection,
    request by request. ``statuses``: what it says instead of serving. ``length``: whether it tells the size.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = b""
        self.ranges, self.length = True, True
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.asked: list[str | None] = []  # the Range of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        first, status = 0, 200
        if server.statuses:
            status = server.statuses.pop(0)
        elif asked and server.ranges:
            first, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206  # type: ignore[index]
            if first >= len(server.content):
                status = 416
        self.send_response(status)
        body = server.content[first:] if status in (200, 206) else b""
        cut = server.cuts.pop(0) if server.cuts and status in (200, 206) else len(body)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, format: str, *args: object) -> None:
        """Not a word."""


def tar_of(files, links=(), mode="w"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            file.addfile(info)
    return stream.getvalue()


def zip_of(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return stream.getvalue()


SLICES = tar_of(
    {
        "subjects.txt": b"OASIS_OAS1_0001_MR1\n",
        "OASIS_OAS1_0001_MR1/slice_norm.nii.gz": NOISE,
        "OASIS_OAS1_0001_MR1/slice_seg24.nii.gz": b"",
    }
)
FILES = {"NLST/NLST_dataset.json": b"{}", "NLST/imagesTr/a.nii.gz": NOISE}
NLST = zip_of(FILES)
SLICES_MD5, NLST_SHA = hashlib.md5(SLICES).hexdigest(), hashlib.sha256(NLST).hexdigest()
TAR, ZIP = "neurite-oasis.2d.v1.0.tar", "NLST2023.zip"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """The known addresses lead to this machine, where the archives are other ones."""
    monkeypatch.setenv("no_proxy", "*")
    with FileServer() as running:
        for name, archive, checksum in (
            ("neurite-oasis-2d", TAR, f"md5:{SLICES_MD5}"),
            ("learn2reg-nlst", ZIP, None),
        ):
            url = f"{running.url}/{archive}"
            monkeypatch.setitem(
                PUBLIC_DATASETS, name, dataclasses.replace(PUBLIC_DATASETS[name], url=url, checksum=checksum)
            )
        running.content = SLICES
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def download(name, folder, **more):
    return download_dataset(name, folder, **{"accept_terms": True, "progress": False, **more})


def slices(folder, **more):
    return download("neurite-oasis-2d", folder, **more)


def nlst(folder, archive=None, **more):
    """With an archive that is there already."""
    if archive is not None:
        folder.mkdir(exist_ok=True)
        (folder / ZIP).write_bytes(archive)
    return download("learn2reg-nlst", folder, **more)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_table():
    assert set(PUBLIC_DATASETS) == {"neurite-oasis", "neurite-oasis-2d", "learn2reg-nlst", "learn2reg-oasis"}
    for dataset in PUBLIC_DATASETS.values():
        assert dataset.url is None or dataset.url.startswith("https://") and dataset.url.endswith((".tar", ".zip"))
        assert dataset.checksum is None or re.fullmatch("md5:[0-9a-f]{32}", dataset.checksum)
        assert "https://" in dataset.terms and "Cite" in dataset.terms and dataset.page.startswith("https://")
    for name in ("neurite-oasis", "neurite-oasis-2d", "learn2reg-oasis"):
        assert "Data Use Agreement" in PUBLIC_DATASETS[name].terms


def test_download_unpack_and_read(server, tmp_path, capsys):
    folder = slices(tmp_path)
    assert folder == tmp_path / "neurite-oasis-2d"
    assert names(tmp_path) == ["neurite-oasis-2d", TAR]
    found = find_oasis(folder, 2)
    assert [s["subject"] for s in found.subjects] == ["OASIS_OAS1_0001_MR1"]
    assert Path(found.subjects[0]["image"]).read_bytes() == NOISE
    assert "oasis-brains.org" in capsys.readouterr().out
    # again: nothing is asked for, nothing is touched; a folder that is gone comes from the archive
    (folder / "mine").touch()
    assert slices(tmp_path) == folder and (folder / "mine").exists()
    folder.rename(tmp_path / "moved")
    slices(tmp_path)
    assert len(server.asked) == 1 and find_oasis(folder, 2).subjects
    # unless wanted
    (folder / "mine").touch()
    slices(tmp_path, overwrite=True, keep_archive=False)
    assert len(server.asked) == 2 and not (folder / "mine").exists()
    assert names(tmp_path) == ["moved", "neurite-oasis-2d"]


def test_progress(server, tmp_path, capfd):
    slices(tmp_path, progress=True)
    assert "100%" in capfd.readouterr().err


def test_terms_first(server, tmp_path, capsys):
    for accept in (False, "false", "true", 1):
        with pytest.raises(PermissionError, match="learn2reg-nlst.*accept_terms"):
            nlst(tmp_path, accept_terms=accept)
        assert "10.7937/TCIA.HMQ8-J677" in capsys.readouterr().out
    assert server.asked == [] and names(tmp_path) == []


def test_goes_on_where_it_was_cut_off(server, tmp_path):
    server.cuts = [20_000, 20_000]
    part, kept = tmp_path / f"{TAR}.part", [0]
    for _ in range(2):
        with pytest.raises(ConnectionError, match=r"Broken|broken") as caught:
            slices(tmp_path)
        kept.append(part.stat().st_size)
        assert re.search(rf"{kept[-1]} bytes are kept.*goes on from there.*Check the network.*--url", str(caught.value))
        assert names(tmp_path) == [part.name] and kept[-1] > kept[-2]
    slices(tmp_path)
    assert (tmp_path / TAR).read_bytes() == SLICES and names(tmp_path) == ["neurite-oasis-2d", TAR]
    assert server.asked == [None, f"bytes={kept[1]}-", f"bytes={kept[2]}-"]


def test_server_that_cannot_go_on(server, tmp_path):
    server.ranges, server.cuts = False, [20_000]
    with pytest.raises(ConnectionError):
        slices(tmp_path)
    slices(tmp_path)
    assert (tmp_path / TAR).read_bytes() == SLICES


def test_part_that_is_whole(server, tmp_path):
    """A run that ended before it had checked the file."""
    (tmp_path / f"{TAR}.part").write_bytes(SLICES)
    slices(tmp_path)
    assert server.asked == [f"bytes={len(SLICES)}-"] and names(tmp_path) == ["neurite-oasis-2d", TAR]


def test_part_of_another_file(server, tmp_path):
    part = tmp_path / f"{TAR}.part"
    part.write_bytes(b"other" * 1000)
    with pytest.raises(HashCheckError, match=rf"{TAR}.part has another checksum.*Delete .*part and"):
        slices(tmp_path)
    assert names(tmp_path) == [f"{TAR}.part"]
    part.unlink()
    assert find_oasis(slices(tmp_path), 2).subjects
    # nothing could tell without a checksum: from the start
    server.content = NLST
    (tmp_path / f"{ZIP}.part").write_bytes(NLST[:1000])
    nlst(tmp_path)
    assert server.asked[-1] is None and (tmp_path / ZIP).read_bytes() == NLST


def test_wrong_checksum(server, tmp_path):
    server.content = SLICES[:-1] + b"x"
    got = hashlib.md5(server.content).hexdigest()
    with pytest.raises(
        HashCheckError, match=rf"2d.v1.0.tar.part .*expected md5 {SLICES_MD5}, got {got}. Delete .*part"
    ):
        slices(tmp_path)
    assert names(tmp_path) == [f"{TAR}.part"]
    # by hand beside it: checked just so
    archive = tmp_path / TAR
    archive.write_bytes(server.content)
    with pytest.raises(HashCheckError, match=rf"{re.escape(str(archive))} has.*got {got}"):
        slices(tmp_path)
    assert archive.exists() and not (tmp_path / "neurite-oasis-2d").exists()
    # the user knows better
    assert find_oasis(slices(tmp_path, checksum=got), 2).subjects


@pytest.mark.parametrize("skip", [False, True])
def test_checksum_not_checked_is_said(server, tmp_path, caplog, skip):
    server.content = SLICES if skip else NLST
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        folder = slices(tmp_path, checksum="skip") if skip else nlst(tmp_path)
    assert f"not checked: {'as asked for' if skip else 'none is known'}" in caplog.text
    assert skip or names(folder) == ["NLST_dataset.json", "imagesTr"]


def test_given_checksum_where_none_is_known(tmp_path, caplog):
    with pytest.raises(HashCheckError, match="expected sha256 0"):
        nlst(tmp_path, NLST, checksum="0" * 64)
    nlst(tmp_path, checksum=f"SHA256:{NLST_SHA.upper()}")
    assert "not checked" not in caplog.text


@pytest.mark.parametrize("checksum", ["abc", "crc32:12345678", "md5:" + "0" * 40, "sha256:" + "g" * 64])
def test_checksum_that_is_none(tmp_path, checksum):
    with pytest.raises(ValueError, match="checksum must be"):
        nlst(tmp_path, checksum=checksum)


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256", "sha512"])
def test_kinds_of_checksums(tmp_path, kind):
    assert nlst(tmp_path, NLST, checksum=hashlib.new(kind, NLST).hexdigest()).is_dir()


def test_cut_off_without_size_and_checksum(server, tmp_path):
    # nothing tells that it is not all, but the archive itself
    server.content, server.length, server.cuts = NLST, False, [30_000]
    with pytest.raises(RuntimeError, match="NLST2023.zip.part is no zip or tar archive, or is damaged.*Delete"):
        nlst(tmp_path)
    assert names(tmp_path) == [f"{ZIP}.part"]


def test_web_page_instead_of_the_file(server, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(RuntimeError, match="no zip or tar archive"):
        nlst(tmp_path)


@pytest.mark.parametrize("status", [404, 403, 503, 204])
def test_refused(server, tmp_path, status):
    server.statuses = [status]
    page = re.escape(PUBLIC_DATASETS["learn2reg-nlst"].page)
    advice = rf"{page}.*--url.*browser.*{re.escape(str(tmp_path))}.NLST2023.zip"
    with pytest.raises(RuntimeError, match=f"the server (says {status}|sends nothing).*{advice}"):
        nlst(tmp_path)
    assert names(tmp_path) == []


def test_no_network(server, tmp_path, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.zip"
        with pytest.raises(ConnectionError, match="refused.*Check the network.*browser"):
            nlst(tmp_path, url=url)
        silent.listen()
        monkeypatch.setattr(downloads, "_TIMEOUT", 0.1)
        with pytest.raises(ConnectionError, match="timed out"):
            nlst(tmp_path, url=url)
    assert names(tmp_path) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "host/x.zip", "https://"])
def test_other_addresses(tmp_path, url):
    with pytest.raises(ValueError, match="url must begin with https://"):
        nlst(tmp_path, url=url)


def test_pooch_is_absent(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r'pooch: pip install "monai_deq\[download\]"'):
        slices(tmp_path)
    assert server.asked == [] and names(tmp_path) == []


def test_address_not_known(server, tmp_path):
    with pytest.raises(ValueError, match="address of learn2reg-oasis is not known.*--url.*learn2reg-oasis.zip"):
        download("learn2reg-oasis", tmp_path)
    server.content = zip_of({"OASIS_dataset.json": b"{}"})
    assert names(download("learn2reg-oasis", tmp_path, url=f"{server.url}/s/x/download")) == ["OASIS_dataset.json"]
    assert names(tmp_path) == ["learn2reg-oasis", "learn2reg-oasis.zip"]
    # the name of the archive says what it is
    server.content = tar_of({"OASIS_dataset.json": b"{}"})
    download("learn2reg-oasis", tmp_path / "b", url=f"{server.url}/%4fasis.tar?x=1.zip")
    assert names(tmp_path / "b") == ["Oasis.tar", "learn2reg-oasis"]
    # by hand, without an address
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "learn2reg-oasis.zip").write_bytes(zip_of({"x/OASIS_dataset.json": b"{}"}))
    assert names(download("learn2reg-oasis", tmp_path / "c")) == ["OASIS_dataset.json"]


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="Unknown data set 'oasis'.*neurite-oasis"):
        download("oasis", tmp_path)


def test_full_disk(server, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 20_000:
                super().write(data[: 20_000 - self.tell()])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "open", Full, raising=False)
        with pytest.raises(OSError, match=f"disk of {tmp_path} is full. Make room") as caught:
            slices(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert find_oasis(slices(tmp_path), 2).subjects and server.asked == [None, "bytes=20000-"]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="full. Make room"):
        nlst(tmp_path / "b", NLST)
    assert names(tmp_path / "b") == [ZIP]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_one_folder_takes_the_place(tmp_path, kind):
    files = {**FILES, "__MACOSX/x": b"", ".hidden": b""}
    content = zip_of(files) if kind == "zip" else tar_of(files, mode="w:gz" if kind == "tar.gz" else "w")
    (tmp_path / f"x.{kind}").write_bytes(content)
    folder = nlst(tmp_path, url=f"https://nowhere.invalid/x.{kind}")
    assert below(folder) == {"NLST_dataset.json": b"{}", "imagesTr/a.nii.gz": NOISE}
    assert names(tmp_path) == ["learn2reg-nlst", f"x.{kind}"]
    mask = os.umask(0)
    os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    # cut off
    shutil.rmtree(folder)
    (tmp_path / f"x.{kind}").write_bytes(content[:30_000])
    with pytest.raises(RuntimeError, match=f"x.{kind} is no .*damaged.*Delete"):
        nlst(tmp_path, url=f"https://nowhere.invalid/x.{kind}")
    assert names(tmp_path) == [f"x.{kind}"]


@pytest.mark.parametrize("evil", ["../evil", "NLST/../../evil", "{}/evil"])
@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_members_that_leave(tmp_path, pack, evil):
    (tmp_path / "deep").mkdir()
    archive = tmp_path / "deep" / ("a.zip" if pack is zip_of else "a.tar")
    archive.write_bytes(pack({**FILES, evil.format(tmp_path): b"evil"}))
    with pytest.raises(ValueError, match="a.(zip|tar) is not unpacked.*evil"):
        nlst(tmp_path / "deep", url=f"https://nowhere.invalid/{archive.name}")
    assert list(tmp_path.rglob("evil")) == [] and names(tmp_path / "deep") == [archive.name]


def test_links(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(FILES, [("NLST/link", "/etc")]))
    with pytest.raises(ValueError, match="link"):
        nlst(tmp_path, url="https://nowhere.invalid/a.tar")
    assert names(tmp_path) == ["a.tar"]


def test_damaged_inside(tmp_path):
    # the list of the members is right: found when they are read
    data = bytearray(NLST)
    data[10_000] ^= 255
    with pytest.raises(RuntimeError, match="cannot be unpacked.*Delete"):
        nlst(tmp_path, bytes(data))
    assert names(tmp_path) == [ZIP]


def test_damaged_behind_the_last_member(tmp_path):
    # where tar does not look any more; a checksum of the whole is not known
    whole = gzip.compress(tar_of(FILES))
    for name, content in (("a.tar.gz", whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:]), ("b.tar.gz", whole[:-8])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RuntimeError, match=rf"{name} is no zip or tar archive, or is damaged"):
            nlst(tmp_path, url=f"https://nowhere.invalid/{name}")
    assert names(tmp_path) == ["a.tar.gz", "b.tar.gz"]


def test_another_archive(tmp_path):
    with pytest.raises(ValueError, match=r"expected \*_dataset.json, found readme.txt, sub"):
        nlst(tmp_path, zip_of({"readme.txt": b"", "sub/x": b""}))
    with pytest.raises(ValueError, match="found nothing"):
        nlst(tmp_path, zip_of({}))
    # one subject alone is not taken for the folder that holds the subjects
    (tmp_path / TAR).write_bytes(tar_of({"OASIS_OAS1_0001_MR1/orig.nii.gz": NOISE}))
    assert below(slices(tmp_path, checksum="skip")) == {"OASIS_OAS1_0001_MR1/orig.nii.gz": NOISE}
    assert names(tmp_path) == [ZIP, "neurite-oasis-2d", TAR]


def test_existing_folder(server, tmp_path, monkeypatch):
    folder = tmp_path / "learn2reg-nlst"
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(FileExistsError, match=r"learn2reg-nlst is there already.*no \*_dataset.json"):
        nlst(tmp_path)
    # an archive that is wrong, or a move that fails, leaves it too
    server.content = zip_of({"x": b""})
    with pytest.raises(ValueError):
        nlst(tmp_path, overwrite=True)
    server.content, replace = NLST, os.replace

    def fail(source, target):
        if target == folder and source.name != "old":
            raise OSError("no")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(os, "replace", fail)
        nlst(tmp_path, overwrite=True)
    assert list(below(folder)) == ["mine"]
    nlst(tmp_path, overwrite=True)
    assert len(below(folder)) == 2 and names(tmp_path) == [ZIP, "learn2reg-nlst"]
