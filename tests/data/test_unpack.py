# SPDX-License-Identifier: Apache-2.0
"""Archives unpacked whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from monai_deq.data import check_archive, unpack_archive

NOISE = np.random.default_rng(0).bytes(20_000)
FILES = {"NLST/NLST_dataset.json": b"{}", "NLST/imagesTr/a.nii.gz": NOISE}


def write(path, files, links=()):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items():
                file.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            file.addfile(info)
    return path


def below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_one_folder_takes_the_place(tmp_path, name):
    archive = write(tmp_path / name, {**FILES, "__MACOSX/x": b"", ".hidden": b""})
    folder = unpack_archive(archive, tmp_path / "out" / "nlst", "*_dataset.json")
    assert below(folder) == {"NLST_dataset.json": b"{}", "imagesTr/a.nii.gz": NOISE}
    assert [p.name for p in folder.parent.iterdir()] == ["nlst"]
    mask = os.umask(0)
    os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_data_at_the_top(tmp_path):
    # one subject alone is not taken for the folder that holds the subjects
    archive = write(tmp_path / "a.tar", {"OASIS_OAS1_0001_MR1/orig.nii.gz": NOISE})
    folder = unpack_archive(archive, tmp_path / "oasis", "OASIS_OAS1_*_MR*/")
    assert below(folder) == {"OASIS_OAS1_0001_MR1/orig.nii.gz": NOISE}


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize("evil", ["../evil", "NLST/../../evil", "{}/evil"])
def test_members_that_leave(tmp_path, suffix, evil):
    archive = write(tmp_path / f"a{suffix}", {**FILES, evil.format(tmp_path): b"evil"})
    with pytest.raises(ValueError, match="a.(zip|tar) is not unpacked.*evil"):
        unpack_archive(archive, tmp_path / "deep" / "nlst", "*_dataset.json")
    assert list(tmp_path.rglob("evil")) == []
    assert list((tmp_path / "deep").iterdir()) == []


def test_links(tmp_path):
    archive = write(tmp_path / "a.tar", FILES, [("NLST/link", "/etc")])
    with pytest.raises(ValueError, match="link"):
        unpack_archive(archive, tmp_path / "nlst", "*_dataset.json")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_cut_off(tmp_path, name):
    archive = write(tmp_path / name, FILES)
    check_archive(archive)
    archive.write_bytes(archive.read_bytes()[:15_000])
    with pytest.raises(RuntimeError, match=f"{name}.*damaged.*Again."):
        check_archive(archive, "Again.")
    with pytest.raises(RuntimeError, match=f"{name}.*damaged.*Again."):
        unpack_archive(archive, tmp_path / "nlst", "*_dataset.json", advice="Again.")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_damaged_inside(tmp_path):
    # the list of the members is right: found when they are read
    archive = write(tmp_path / "a.zip", FILES)
    data = bytearray(archive.read_bytes())
    data[10_000] ^= 255
    archive.write_bytes(bytes(data))
    with pytest.raises(RuntimeError, match="cannot be unpacked.*Again."):
        unpack_archive(archive, tmp_path / "nlst", "*_dataset.json", advice="Again.")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_another_archive(tmp_path):
    archive = write(tmp_path / "a.zip", {"readme.txt": b"", "sub/x": b""})
    with pytest.raises(ValueError, match=r"expected \*_dataset.json, found readme.txt, sub"):
        unpack_archive(archive, tmp_path / "nlst", "*_dataset.json")
    empty = write(tmp_path / "b.zip", {})
    with pytest.raises(ValueError, match="found nothing"):
        unpack_archive(empty, tmp_path / "nlst", "*_dataset.json")
    (tmp_path / "c.zip").write_text("<html>")
    with pytest.raises(RuntimeError, match="no zip or tar archive"):
        unpack_archive(tmp_path / "c.zip", tmp_path / "nlst", "*_dataset.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.zip", "c.zip"]


def test_not_enough_space(tmp_path, monkeypatch):
    archive = write(tmp_path / "a.zip", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_001))
    with pytest.raises(OSError, match="Not enough space.*unpacked") as caught:
        unpack_archive(archive, tmp_path / "nlst", "*_dataset.json")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_002))
    unpack_archive(archive, tmp_path / "nlst", "*_dataset.json")


def test_existing_folder(tmp_path, monkeypatch):
    archive = write(tmp_path / "a.zip", FILES)
    folder = tmp_path / "nlst"
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(FileExistsError, match="nlst"):
        unpack_archive(archive, folder, "*_dataset.json")
    # an archive that is wrong, or a move that fails, leaves it too
    with pytest.raises(ValueError):
        unpack_archive(archive, folder, "OASIS*", overwrite=True)
    replace = os.replace

    def fail(source, target):
        if target == folder and not str(source).endswith(".old"):
            raise OSError("no")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(os, "replace", fail)
        unpack_archive(archive, folder, "*_dataset.json", overwrite=True)
    assert list(below(folder)) == ["mine"]
    unpack_archive(archive, folder, "*_dataset.json", overwrite=True)
    assert "mine" not in below(folder) and len(below(folder)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "nlst"]
