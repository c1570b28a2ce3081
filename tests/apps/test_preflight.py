# SPDX-License-Identifier: Apache-2.0
"""``monai-deq check``: planted faults are found, each in its file, and a sound data set has none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_deq.apps import check_files, usable_parts
from monai_deq.cli import main
from monai_deq.data import find_learn2reg, find_oasis, write_sample_cohort, write_sample_lung_cohort


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_cohort(tmp_path_factory.mktemp("oasis") / "data", 24, (16, 16, 24), (40, 48))


@pytest.fixture(scope="module")
def sound_lungs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_lung_cohort(tmp_path_factory.mktemp("lung") / "data", (2, 1, 1), (24, 16, 32))


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


@pytest.fixture
def lungs(sound_lungs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_lungs, tmp_path / "lungs"))


def change(path: Path, how: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    image = nib.load(path)
    array = how(np.array(image.dataobj))
    nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)


def with_value(value: float, at: tuple[int, ...] = (20, 20, 0)) -> Callable[[np.ndarray], np.ndarray]:
    def how(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32)
        array[at] = value
        return array

    return how


def files(data: Path, number: int) -> tuple[Path, Path]:
    folder = data / f"OASIS_OAS1_90{number:02d}_MR1"
    return folder / "slice_norm.nii.gz", folder / "slice_seg24.nii.gz"


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_sound_data_have_no_finding(sound: Path, spatial_dims: int) -> None:
    assert check_files(sound, spatial_dims, workers=2, progress=False) == ([], 24)


def test_sound_pairs_have_no_finding(sound_lungs: Path) -> None:
    assert check_files(sound_lungs, workers=2, progress=False) == ([], 8)


def test_planted_faults_are_all_found(data: Path) -> None:
    def image(number: int) -> Path:
        return files(data, number)[0]

    def label(number: int) -> Path:
        return files(data, number)[1]

    content = image(1).read_bytes()
    image(1).write_bytes(content[: len(content) // 2])
    change(image(2), with_value(np.nan))
    change(image(3), np.zeros_like)
    change(image(4), with_value(1000.0))
    change(image(5), lambda a: a[:-2])
    change(label(5), lambda a: a[:-2])
    affine = nib.load(image(6)).affine @ np.diag([1.5, 1.0, 1.0, 1.0])
    change(image(6), np.asarray, affine)
    change(label(6), np.asarray, affine)
    change(label(7), with_value(2.5))
    change(label(8), with_value(-1))
    change(label(9), with_value(77))
    change(label(10), lambda a: a[:, :-3])
    shutil.copy(image(11), image(24))  # of the validation part to the test part
    image(12).unlink()
    change(image(13), lambda a: np.roll(a, 9, axis=1))
    label(14).unlink()
    change(image(15), lambda a: np.rot90(a, 2))
    expected = {
        (image(1), "unreadable", "error"),
        (image(2), "not finite", "error"),
        (image(3), "constant", "error"),
        (image(4), "wild voxel", "warning"),
        (image(5), "grid", "error"),
        (image(6), "grid", "error"),
        *((label(n), "label", "error") for n in (7, 8, 9, 10)),
        (image(24), "repeated", "error"),
        (image(12), "missing", "error"),
        *((image(n), "alignment", "warning") for n in (13, 15)),
        (f"{image(14)} (its segmentation)", "missing", "error"),
    }
    findings, scans = check_files(data, 2, workers=3, split_sizes=(10, 2, None), progress=False)
    assert {(f.file, f.kind, f.severity) for f in findings} == {(str(a), b, c) for a, b, c in expected}
    assert len(findings) == len(expected) and scans == 23
    said = {(f.file, f.kind): f.what for f in findings}
    assert said[str(image(24)), "repeated"] == f"the same voxels as {image(11)}; in test and validation"
    assert "1000" in said[str(image(4)), "wild voxel"]
    assert "size 38 x 48, not size 40 x 48" in said[str(image(5)), "grid"]
    assert "spacing" in said[str(image(6)), "grid"] and "size" not in said[str(image(6)), "grid"]
    assert "[77]" in said[str(label(9)), "label"] and "2.5" in said[str(label(7)), "label"]


def test_another_orientation_is_found(data: Path) -> None:
    for path in files(data, 3):
        affine = nib.load(path).affine.copy()
        affine[:, 0] *= -1
        change(path, np.asarray, affine)
    (finding,), _ = check_files(data, 2, progress=False)
    assert finding.kind == "grid" and finding.what.startswith("orientation")


def test_keypoints(lungs: Path) -> None:
    outside, short, lost = (lungs / "keypointsTr" / f"NLST_000{n}_0001.csv" for n in (1, 2, 3))
    lines = outside.read_text().splitlines()
    outside.write_text("\n".join(["1000,1,1", *lines[1:]]) + "\n")
    kept = short.read_text().splitlines()[:-1]
    short.write_text("\n".join(kept) + "\n")
    lost.unlink()
    findings, _ = check_files(lungs, progress=False)
    found = {f.file: f for f in findings}
    assert set(found) == {str(outside), str(short), str(lost)} and len(findings) == 3
    assert found[str(outside)].kind == found[str(short)].kind == "keypoints" and found[str(lost)].kind == "missing"
    assert f"has {len(kept) + 1} points and 'moving' has {len(kept)}" in found[str(short)].what
    assert "line 1" in found[str(outside)].what


def test_a_list_of_pairs_may_lie_in_any_space(data: Path) -> None:
    (a, a_label), (b, b_label), (c, _) = (files(data, n) for n in (1, 2, 3))
    change(b, lambda x: x[:-2])
    pairs = [{"fixed": str(a), "moving": str(b), "fixed_label": str(a_label), "moving_label": str(b_label)}]
    listed = data / "pairs.json"
    listed.write_text(json.dumps(pairs))
    assert check_files(listed, 2, progress=False) == ([], 2)
    shutil.copy(a, c)
    listed.write_text(json.dumps([*pairs, {"fixed": str(a), "moving": str(c)}, {"fixed": str(b), "moving": "no.nii"}]))
    findings, scans = check_files(listed, 2, progress=False)
    assert [(f.file, f.kind) for f in findings] == sorted([(str(c), "repeated"), (str(data / "no.nii"), "missing")])
    assert scans == 4


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["monai-deq", "check", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "findings.json"
    words = (data, "--spatial-dims", 2, "--workers", 2, "--json", written)
    assert run(monkeypatch, *words) == 0
    assert capsys.readouterr().out == "24 scans, 0 findings\n"
    assert json.loads(written.read_text())["findings"] == []
    image = files(data, 4)[0]
    change(image, with_value(np.inf))
    assert run(monkeypatch, *words) == 2 and "exists already" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--overwrite") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image) and lines[1].startswith("  error: not finite: 1 of 1920 voxels")
    assert lines[2:] == ["24 scans, 1 findings: 1 not finite"]
    content = json.loads(written.read_text())
    assert content["scans"] == 24 and content["counts"] == {"not finite": 1}
    assert {k: content["findings"][0][k] for k in ("file", "kind", "severity")} == {
        "file": str(image),
        "kind": "not finite",
        "severity": "error",
    }


@pytest.mark.parametrize("words", [("absent",), (".",), ("--workers", 0, "."), ("--spatial-dims", 4, ".")])
def test_bad_input(
    words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def _damage(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("check", ["stop", "skip", "off"])
def test_a_training_refuses_or_leaves_out(data: Path, check: str, caplog: pytest.LogCaptureFixture) -> None:
    found = find_oasis(data, 2)
    parts = found.split((16, 4, 4))
    assert usable_parts(found, parts) == parts  # sound
    image, label = files(data, 3)
    _damage(image)
    _damage(files(data, 18)[1])
    change(files(data, 5)[0], with_value(np.nan))
    shutil.copy(files(data, 22)[0], files(data, 7)[0])  # of a test subject; a subject in training has it too
    change(files(data, 9)[0], with_value(1e6))  # a warning
    if check == "stop":
        with pytest.raises(ValueError, match=rf"{found.root} has files.* and 3 more, see the log.*--check skip"):
            usable_parts(found, parts, "stop")
    else:
        left = usable_parts(found, parts, check)
        lost = {part: [s["subject"] for s in parts[part] if s not in left[part]] for part in parts}
        names = [f"OASIS_OAS1_90{n:02d}_MR1" for n in (3, 5, 7, 18)]
        skipped = {"training": names[:3], "validation": names[3:], "test": []}
        assert lost == (skipped if check == "skip" else {part: [] for part in parts})
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(logged) == (0 if check == "off" else 4)
    assert all(line.endswith("; left out") == (check == "skip") for line in logged)


def test_a_part_of_which_nothing_is_usable(lungs: Path) -> None:
    found = find_learn2reg(lungs)
    parts = found.split((2, 1, 1), require_keypoints=False)
    assert usable_parts(found, parts) == parts
    _damage(Path(parts["validation"][0]["moving"]))
    with pytest.raises(ValueError, match="none of the 1 of the validation part .* is usable: unreadable: "):
        usable_parts(found, parts, "skip")
    with pytest.raises(ValueError, match="check must be"):
        usable_parts(found, parts, "none")  # type: ignore[arg-type]
