# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all, nothing is overwritten unasked, and JSON has no NaN."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monai_deq.utils import (
    check_writable,
    expand_user,
    json_ready,
    lock_folder,
    read_json,
    refuse_existing,
    replace_file,
    unlock_folder,
    write_json,
)


@pytest.mark.parametrize("existing", [False, True])
def test_writes_or_replaces(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "a" / "b" / "result.json"
    if existing:
        path.parent.mkdir(parents=True)
        path.write_text("old")
    with replace_file(path) as temporary:
        assert temporary.parent.parent == path.parent  # one file system: the move is atomic
        assert temporary.name == path.name  # whatever a writer makes of names and endings
        temporary.write_text("new")
        assert (path.read_text() if existing else path.exists()) == ("old" if existing else False)
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["result.json"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path: Path, existing: bool, error: type[BaseException]) -> None:
    path = tmp_path / "result.json"
    if existing:
        path.write_text("old")
        path.chmod(0o640)
    with pytest.raises(error, match="half way"), replace_file(path) as temporary:
        temporary.write_text("half")
        raise error("half way")
    assert os.listdir(tmp_path) == (["result.json"] if existing else [])
    if existing:
        assert path.read_text() == "old" and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with pytest.raises(OSError), replace_file(tmp_path / "result") as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["result"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_are_those_of_open(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with replace_file(tmp_path / "ours") as temporary:
            temporary.write_text("x")
        (tmp_path / "theirs").write_text("x")
        assert os.umask(mask) == mask  # left as it was
    finally:
        os.umask(before)
    for name in ("ours", "theirs"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


_KILLED = """
import os, signal, sys
from monai_deq.utils import replace_file
files = [replace_file(name) for name in sys.argv[1:]]
for file in files:
    file.__enter__().write_text("half")
os.kill(os.getpid(), signal.SIGKILL)
"""
_OFTEN = """
import sys
from monai_deq.utils import write_json
for n in range(300):
    write_json(sys.argv[1], n)
"""


def test_what_killed_processes_have_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path, other = tmp_path / "a [1].txt", tmp_path / "b.txt"
    process = subprocess.run([sys.executable, "-c", _KILLED, path, other])
    assert process.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 2
    with replace_file(path) as outer:
        outer.write_text("outer")
        write_json(path, "inner")  # what is being written stays
    assert path.read_text() == "outer"
    assert os.listdir(tmp_path) == ["a [1].txt"]
    subprocess.run([sys.executable, "-c", _KILLED, path, other])
    with replace_file(path) as third:
        third.write_text("third")
        check_writable(tmp_path)
    assert path.read_text() == "third" and os.listdir(tmp_path) == ["a [1].txt"]


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "result"
    processes = [subprocess.Popen([sys.executable, "-c", _OFTEN, path]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert os.listdir(tmp_path) == ["result"] and path.read_text() == "299\n"


def test_refuse_existing(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    refuse_existing(paths, "")
    paths[1].write_text("x")
    with pytest.raises(FileExistsError, match=r"/b exists already and is not overwritten\. Use another folder\."):
        refuse_existing(paths, "Use another folder.")
    paths[2].write_text("x")
    with pytest.raises(FileExistsError, match=r"/b and 1 more exists? already"):
        refuse_existing(map(str, paths), "")


@pytest.mark.parametrize("name", ["", "new", "new/er/still"])
def test_folders_that_can_be_written_to(tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").write_text("x")
    for folder in (tmp_path / name, str(tmp_path / name)):
        check_writable(folder)
        assert os.listdir(tmp_path) == ["precious"]  # nothing is left of it
    (tmp_path / "new").mkdir()
    check_writable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["new", "precious"] and os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize("below", ["", "/a", "/a/b"])
@pytest.mark.parametrize("kind", ["file", "dangling link", "device"])
def test_a_file_in_the_way_of_a_folder(tmp_path: Path, kind: str, below: str) -> None:
    file = Path("/dev/null") if kind == "device" else tmp_path / "out"
    if kind == "file":
        file.write_text("precious")
    elif kind == "dangling link":
        file.symlink_to(tmp_path / "gone" / "for" / "good")
    words = f"cannot write to the folder {file}{below}: {file} is there and is no folder. Make it writable, or"
    with pytest.raises((FileExistsError, NotADirectoryError), match=re.escape(words)) as error:
        check_writable(f"{file}{below}")
    assert "\n" not in str(error.value)
    assert kind == "device" or os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("folder", "reason"), [("/proc/out", "No such file or directory"), ("{tmp}/" + 300 * "n", "File name too long")]
)
def test_folders_that_no_system_makes(tmp_path: Path, folder: str, reason: str) -> None:
    folder = folder.format(tmp=tmp_path)
    with pytest.raises(OSError, match=f"cannot write to the folder {folder}: {reason}. Make it writable"):
        check_writable(folder)


@pytest.mark.parametrize("where", ["mkdir", "open", "write"])
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, PermissionError), (errno.EROFS, OSError), (errno.ENOSPC, OSError)]
)
def test_what_a_system_refuses(
    tmp_path: Path, where: str, number: int, kind: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number), str(tmp_path))

    class Full(io.BytesIO):
        write = refuse

    if where == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse if where == "open" else lambda dir: Full())
    with pytest.raises(kind, match=f"folder {tmp_path}: {os.strerror(number)}. Make it writable, or name") as error:
        check_writable(tmp_path)
    assert type(error.value) is kind and os.listdir(tmp_path) == []


def test_json_of_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    content = {
        1: [np.float32(0.5), float("nan"), -float("inf")],
        "tensor": torch.tensor([[1.5, float("nan")]]),
        "path": tmp_path,
        "rest": (True, None, np.int64(3), "text"),
    }
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "1": [0.5, None, None],
        "tensor": [[1.5, None]],
        "path": str(tmp_path),
        "rest": [True, None, 3, "text"],
    }
    with pytest.raises(TypeError, match="JSON knows no object"):
        json_ready({"a": [object()]})


@pytest.mark.parametrize("direct", [True, False])
def test_a_full_disk_is_said(tmp_path: Path, direct: bool) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = rf"the disk is full: {file} needs more than the 0.0 MB.*as it was. Make"
    with pytest.raises(OSError, match=words) as error, replace_file(file) as temporary:
        temporary.write_text("half")
        try:
            fail()
        except OSError as e:
            if direct:
                raise
            raise RuntimeError("enforce fail: unexpected pos 64 vs 0") from e
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["a.txt"] and file.read_text() == "before"


def test_errors_that_go_round_in_a_circle(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="second"), replace_file(tmp_path / "a.txt"):
        first, second = ValueError("first"), ValueError("second")
        first.__cause__, second.__cause__ = second, first
        raise second


def test_folders_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    lock_folder(tmp_path, "training")
    assert f"{tmp_path} has no locks" in caplog.text and "one training at a time" in caplog.text
    unlock_folder(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{]", b"[" * 100_000, b"\xff\xfe"])
def test_json_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON \("):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")  # as Windows writes it
    assert read_json(tmp_path / "a.json") == [1]


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_user("~/a") == Path("/somewhere/a") and expand_user("b") == Path("b")
    assert expand_user("~there-is-no-such-user/a") == Path("~there-is-no-such-user/a")
