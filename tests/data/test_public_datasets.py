# SPDX-License-Identifier: Apache-2.0
"""The data sets that can be downloaded, from a server on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from monai.apps.utils import HashCheckError

from monai_deq.data import PUBLIC_DATASETS, download_dataset, find_oasis, parse_checksum

ROOT = Path(__file__).resolve().parents[2]
NOISE = np.random.default_rng(0).bytes(50_000)


def tar_of(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
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
NLST = zip_of({"NLST/NLST_dataset.json": b"{}", "NLST/imagesTr/NLST_0001_0000.nii.gz": NOISE})


@pytest.fixture
def served(server, monkeypatch, no_waiting):
    """The known addresses lead to this machine, where the archives are other ones."""
    for name, content, checksum in (
        ("neurite-oasis-2d", SLICES, f"md5:{hashlib.md5(SLICES).hexdigest()}"),
        ("learn2reg-nlst", NLST, None),
    ):
        archive = PUBLIC_DATASETS[name].archive
        here = dataclasses.replace(PUBLIC_DATASETS[name], url=f"{server.url}/{archive}", checksum=checksum)
        monkeypatch.setitem(PUBLIC_DATASETS, name, here)
        server.content = content
    return server


def download(name, folder, **more):
    return download_dataset(name, folder, **{"accept_terms": True, "progress": False, **more})


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_table():
    assert set(PUBLIC_DATASETS) == {"neurite-oasis", "neurite-oasis-2d", "learn2reg-nlst", "learn2reg-oasis"}
    for dataset in PUBLIC_DATASETS.values():
        assert dataset.url is None or dataset.url.startswith("https://") and dataset.url.endswith(dataset.archive)
        assert dataset.checksum is None or parse_checksum(dataset.checksum)[0] == "md5"
        assert "https://" in dataset.terms and "Cite" in dataset.terms and dataset.page.startswith("https://")
    for name in ("neurite-oasis", "neurite-oasis-2d", "learn2reg-oasis"):
        assert "Data Use Agreement" in PUBLIC_DATASETS[name].terms


def test_download_unpack_and_read(served, tmp_path, capsys):
    served.content = SLICES
    folder = download("neurite-oasis-2d", tmp_path)
    assert folder == tmp_path / "neurite-oasis-2d"
    assert names(tmp_path) == ["neurite-oasis-2d", "neurite-oasis.2d.v1.0.tar"]
    found = find_oasis(folder, 2)
    assert [s["subject"] for s in found.subjects] == ["OASIS_OAS1_0001_MR1"]
    assert Path(found.subjects[0]["image"]).read_bytes() == NOISE
    assert "oasis-brains.org" in capsys.readouterr().out
    # again: nothing is asked for, nothing is touched; a folder that is gone comes from the archive
    (folder / "mine").touch()
    assert download("neurite-oasis-2d", tmp_path) == folder and (folder / "mine").exists()
    folder.rename(tmp_path / "moved")
    download("neurite-oasis-2d", tmp_path)
    assert len(served.asked) == 1 and find_oasis(folder, 2).subjects
    # unless wanted
    (folder / "mine").touch()
    download("neurite-oasis-2d", tmp_path, overwrite="true", keep_archive="false")
    assert len(served.asked) == 2 and not (folder / "mine").exists()
    assert names(tmp_path) == ["moved", "neurite-oasis-2d"]


def test_terms_first(served, tmp_path, capsys):
    for accept in (False, "false"):
        with pytest.raises(PermissionError, match="learn2reg-nlst.*accept_terms"):
            download("learn2reg-nlst", tmp_path, accept_terms=accept)
        assert "10.7937/TCIA.HMQ8-J677" in capsys.readouterr().out
    with pytest.raises(ValueError, match="accept_terms must be true or false"):
        download("learn2reg-nlst", tmp_path, accept_terms="yes please")
    assert served.asked == [] and names(tmp_path) == []


def test_interrupted(served, tmp_path):
    served.content, served.cuts = SLICES, [20_000]
    with pytest.raises(ConnectionError, match="20.0 kB are kept"):
        download("neurite-oasis-2d", tmp_path, retries=0)
    assert names(tmp_path) == ["neurite-oasis.2d.v1.0.tar.part", "neurite-oasis.2d.v1.0.tar.part.json"]
    assert find_oasis(download("neurite-oasis-2d", tmp_path), 2).subjects
    assert served.asked == [None, "bytes=20000-"]


def test_wrong_checksum(served, tmp_path):
    served.content = SLICES[:-1] + b"x"
    got, expected = hashlib.md5(served.content).hexdigest(), hashlib.md5(SLICES).hexdigest()
    with pytest.raises(HashCheckError, match=rf"2d.v1.0.tar.part .*expected md5 {expected}, got {got}. Delete .*part"):
        download("neurite-oasis-2d", tmp_path)
    assert names(tmp_path) == ["neurite-oasis.2d.v1.0.tar.part", "neurite-oasis.2d.v1.0.tar.part.json"]
    # by hand beside it: checked just so
    archive = tmp_path / "neurite-oasis.2d.v1.0.tar"
    archive.write_bytes(served.content)
    with pytest.raises(HashCheckError, match=rf"{re.escape(str(archive))} has.*got {got}"):
        download("neurite-oasis-2d", tmp_path)
    assert archive.exists() and not (tmp_path / "neurite-oasis-2d").exists()
    # the user knows better
    assert find_oasis(download("neurite-oasis-2d", tmp_path, checksum=got), 2).subjects


@pytest.mark.parametrize("skip", [False, True])
def test_checksum_not_checked_is_said(served, tmp_path, caplog, skip):
    name, served.content = ("neurite-oasis-2d", SLICES) if skip else ("learn2reg-nlst", NLST)
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        folder = download(name, tmp_path, checksum="skip" if skip else None)
    assert f"not checked: {'as asked for' if skip else 'none is known'}" in caplog.text
    assert skip or names(folder) == ["NLST_dataset.json", "imagesTr"]


def test_given_checksum_where_none_is_known(served, tmp_path, caplog):
    with pytest.raises(HashCheckError, match="expected sha256 0"):
        download("learn2reg-nlst", tmp_path, checksum="0" * 64)
    download("learn2reg-nlst", tmp_path, checksum=f"sha256:{hashlib.sha256(NLST).hexdigest()}")
    assert "not checked" not in caplog.text
    with pytest.raises(ValueError, match="checksum must be"):
        download("learn2reg-nlst", tmp_path / "other", checksum="12")


def test_cut_off_without_size_and_checksum(served, tmp_path):
    # nothing tells that it is not all, but the archive itself
    served.length, served.cuts = False, [30_000]
    with pytest.raises(RuntimeError, match="NLST2023.zip.part is no zip or tar archive, or is damaged.*Delete"):
        download("learn2reg-nlst", tmp_path)
    assert names(tmp_path) == ["NLST2023.zip.part", "NLST2023.zip.part.json"]


def test_not_found(served, tmp_path):
    served.statuses = [404]
    page = re.escape(PUBLIC_DATASETS["learn2reg-nlst"].page)
    with pytest.raises(RuntimeError, match=rf"404.*{page}.*--url.*browser.*{re.escape(str(tmp_path))}.NLST2023.zip"):
        download("learn2reg-nlst", tmp_path)


def test_address_not_known(served, tmp_path):
    with pytest.raises(ValueError, match="address of learn2reg-oasis is not known.*--url.*learn2reg-oasis.zip"):
        download("learn2reg-oasis", tmp_path)
    served.content = zip_of({"OASIS_dataset.json": b"{}"})
    assert names(download("learn2reg-oasis", tmp_path, url=f"{served.url}/s/x/download")) == ["OASIS_dataset.json"]
    assert names(tmp_path) == ["learn2reg-oasis", "learn2reg-oasis.zip"]
    # the name of the archive says what it is
    served.content = tar_of({"OASIS_dataset.json": b"{}"})
    archive = download("learn2reg-oasis", tmp_path / "b", url=f"{served.url}/%4fasis.tar?x=1.zip", unpack=False)
    assert archive == tmp_path / "b" / "Oasis.tar" and names(tmp_path / "b") == ["Oasis.tar"]
    # by hand, without an address
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "learn2reg-oasis.zip").write_bytes(zip_of({"x/OASIS_dataset.json": b"{}"}))
    assert names(download("learn2reg-oasis", tmp_path / "c")) == ["OASIS_dataset.json"]


def test_refusals(served, tmp_path):
    with pytest.raises(ValueError, match="Unknown data set 'oasis'.*neurite-oasis"):
        download("oasis", tmp_path)
    (tmp_path / "learn2reg-nlst").mkdir()
    with pytest.raises(FileExistsError, match=r"learn2reg-nlst is there already.*no \*_dataset.json"):
        download("learn2reg-nlst", tmp_path)
    served.content = zip_of({"NLST/NLST_dataset.json": b"{}", "../evil": b""})
    with pytest.raises(ValueError, match="not unpacked.*evil"):
        download("learn2reg-nlst", tmp_path / "sub")
    assert names(tmp_path / "sub") == ["NLST2023.zip"] and not (tmp_path / "evil").exists()
    assert len(served.asked) == 1


def run(*arguments, cwd):
    command = [sys.executable, "-W", "ignore", "-m", "monai_deq.data", "download", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_command(server, tmp_path):
    server.content = NLST
    arguments = ["learn2reg-nlst", "data", "--url", f"{server.url}/NLST2023.zip", "--checksum"]
    refused = run(*arguments, "md5:" + "0" * 32, "--accept_terms", "true", cwd=tmp_path)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"HashCheckError: data/NLST2023.zip.part has another checksum: expected md5 {'0' * 32}" in refused.stderr
    done = run(*arguments, f"md5:{hashlib.md5(NLST).hexdigest()}", "--accept_terms", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "TCIA" in done.stdout and "--dataset_dir data/learn2reg-nlst" in done.stderr
    assert (tmp_path / "data" / "learn2reg-nlst" / "imagesTr" / "NLST_0001_0000.nii.gz").read_bytes() == NOISE
    assert len(server.asked) == 1
