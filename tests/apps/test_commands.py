# SPDX-License-Identifier: Apache-2.0
"""``monai-deq register``, ``apply`` and ``invert``: exit codes, one line of an error, and what is there at the end."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scans import bent, blobs, grid, parts, write

from monai_deq.cli import main

SHAPE = (22, 20, 18)
AFFINE = grid(SHAPE, (1.5, 1.6, 1.7), "LPS")
QUICK = ("--steps", "4,4", "--device", "cpu")


class Shell:
    """Runs the command in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *words: object) -> int:
        self.monkeypatch.setattr("sys.argv", ["monai-deq", *map(str, words)])
        self.capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        self.out, self.err = self.capsys.readouterr()
        return code

    def refused(self, *words: object) -> str:
        """The one line of an error."""
        assert self(*words) == 2, self.out
        lines = [line for line in self.err.splitlines() if not re.match(r"\d{4}-\d\d-\d\d .* - (INFO|WARNING)", line)]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    handlers = list(logging.root.handlers)
    yield Shell(monkeypatch, capsys)
    logging.root.handlers[:] = handlers


@pytest.fixture
def scans(tmp_path: Path) -> dict[str, Path]:
    made = {"fixed": write(tmp_path / "fixed.nii.gz", AFFINE, SHAPE)}
    for name, size in (("a", 1.0), ("b", 1.5)):
        made[name] = write(tmp_path / f"{name}.nii.gz", AFFINE, SHAPE, lambda p, s=size: blobs(bent(p, s)))
        made[f"{name}_seg"] = write(
            tmp_path / f"{name}_seg.nii.gz", AFFINE, SHAPE, lambda p, s=size: parts(bent(p, s)), np.int16
        )
    made["fixed_seg"] = write(tmp_path / "fixed_seg.nii.gz", AFFINE, SHAPE, parts, np.int16)
    return made


def test_many_moving_scans_with_labels(scans, shell, tmp_path):
    labels = ("--fixed-label", scans["fixed_seg"], "--moving-label", scans["a_seg"], "--moving-label", scans["b_seg"])
    out = tmp_path / "out"
    assert shell("register", scans["fixed"], scans["a"], scans["b"], "-o", out, *labels, *QUICK) == 0
    ends = ("warped.nii.gz", "warped_label.nii.gz", "transform.nii.gz", "record.json")
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{n}_to_fixed_{end}" for n in "ab" for end in ends)
    assert "a_to_fixed" in shell.out and "b_to_fixed" in shell.out and "Dice, mean over labels" in shell.out
    for given in (labels[:4], (*labels, "--moving-label", scans["a_seg"])):
        line = shell.refused("register", scans["fixed"], scans["a"], scans["b"], "-o", tmp_path / "no", *given, *QUICK)
        assert "--moving-label: expected one for each of 2 moving scans" in line
    line = shell.refused("register", scans["fixed"], scans["a"], scans["b"], "--moving-points", scans["a"])
    assert "--moving-points: expected one for each of 2" in line
    assert not (tmp_path / "no").exists()


def test_report_is_one_file(scans, shell, tmp_path):
    labels = ("--fixed-label", scans["fixed_seg"], "--moving-label", scans["a_seg"])
    out, words = tmp_path / "out", ("--report", "--save-ddf", "--affine", "rigid", "--transform-format", ".h5")
    assert shell("register", scans["fixed"], scans["a"], "-o", out, *labels, *words, *QUICK) == 0
    page = (out / "a_to_fixed_report.html").read_text(encoding="utf-8")
    assert "a_to_fixed_report.html" in shell.out
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert all(s.startswith(("data:", "#")) for s in sources), [s[:60] for s in sources]
    assert "data:image" in page and "<script src" not in page and "@import" not in page
    for word in ("a_to_fixed_transform.h5", "a_to_fixed_affine.tfm", "a_to_fixed_ddf.nii.gz", "monai-deq apply"):
        assert word in page, word
    # what is there is not written over, whichever it is
    for file in sorted(out.iterdir()):
        held = {other: other.read_bytes() for other in out.iterdir() if other != file}
        for other in held:
            other.unlink()
        line = shell.refused("register", scans["fixed"], scans["a"], "-o", out, *labels, *words, *QUICK)
        assert file.name in line and [*out.iterdir()] == [file]
        for other, content in held.items():
            other.write_bytes(content)
    assert shell("register", scans["fixed"], scans["a"], "-o", out, *labels, *words, *QUICK, "--overwrite") == 0


def test_lists_of_pairs(scans, shell, tmp_path):
    (tmp_path / "pairs.csv").write_text("fixed,moving,name\nfixed.nii.gz,a.nii.gz,first\nfixed.nii.gz,b.nii.gz,\n")
    assert shell("register", "--pairs", tmp_path / "pairs.csv", "-o", tmp_path / "out", *QUICK) == 0
    assert (tmp_path / "out" / "first_warped.nii.gz").exists() and (
        tmp_path / "out" / "b_to_fixed_record.json"
    ).exists()
    line = shell.refused("register", scans["fixed"], scans["a"], "--pairs", tmp_path / "pairs.csv")
    assert "--pairs" in line and "goes without other files" in line


def test_exit_codes(scans, shell, tmp_path):
    out = tmp_path / "out"
    words = ("register", scans["fixed"], scans["a"], "-o", out, *QUICK, "--overwrite")
    assert shell(*words) == 0
    assert shell(*words, "--require-converged") == 3
    assert "1 of 1 pairs did not come to rest" in shell.err and "Traceback" not in shell.err
    assert (out / "a_to_fixed_warped.nii.gz").exists()
    assert shell(*words, "--require-converged", "--tolerance", "100") == 0
    assert "fixed scan and a moving one" in shell.refused("register")
    assert "fixed scan and a moving one" in shell.refused("register", scans["fixed"])
    assert "absent.nii" in shell.refused("register", scans["fixed"], tmp_path / "absent.nii")
    assert "whole numbers" in shell.refused(*words, "--steps", "a,b")
    assert "brain, lung" in shell.refused(*words, "--preset", "liver")
    assert "'rigid' or 'affine'" in shell.refused(*words, "--affine", "similarity")
    assert ".nrrd" in shell.refused(*words, "--transform-format", ".png")
    assert "weights" in shell.refused(*words, "--weights", tmp_path / "weights.pt")
    assert "device" in shell.refused(*words, "--device", "nothing").lower()
    assert shell("register", "--nothing") == 2 and "--nothing" in shell.err
    with pytest.raises(FileNotFoundError, match="absent.nii"):
        shell("register", scans["fixed"], tmp_path / "absent.nii", "--debug")


@pytest.mark.parametrize("steps", ["0", "-1", "4,0", "1,2,3,4,5,6,7,8"])
def test_steps_that_are_none(steps, scans, shell, tmp_path):
    code = shell("register", scans["fixed"], scans["a"], "-o", tmp_path / "out", "--steps", steps, "--device", "cpu")
    if code:
        assert "Traceback" not in shell.err and "steps" in shell.err
    else:  # as many sizes as there are
        assert len(steps) > 4


def test_folder_that_cannot_be_written(scans, shell, tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError("it was solved")

    monkeypatch.setattr("monai_deq.apps.registration.FixedPointSolverd.__call__", refuse)
    line = shell.refused("register", scans["fixed"], scans["a"], "-o", scans["b"] / "out", *QUICK)
    assert "b.nii.gz is there and is no folder" in line


def test_apply_and_invert(scans, shell, tmp_path):
    out = tmp_path / "out"
    assert shell("register", scans["fixed"], scans["a"], "-o", out, *QUICK) == 0
    transform = out / "a_to_fixed_transform.nii.gz"
    again, back = tmp_path / "again.nii.gz", tmp_path / "back.nii.gz"
    assert shell("apply", scans["a"], "-t", transform, "-o", again, "-r", scans["fixed"]) == 0
    assert shell.out.strip() == f"wrote {again}"
    warped = nib.load(out / "a_to_fixed_warped.nii.gz").get_fdata()
    np.testing.assert_allclose(nib.load(again).get_fdata(), warped, atol=1e-3)
    assert str(again) in shell.refused("apply", scans["a"], "-t", transform, "-o", again)
    assert shell("apply", scans["a"], "-t", transform, "-o", again, "--overwrite") == 0
    assert shell("invert", "-t", transform, "-o", back, "-r", scans["a"]) == 0
    assert shell("apply", scans["a"], "-t", back, "-t", transform, "-o", tmp_path / "same.nii.gz") == 0
    inner = (slice(4, -4),) * 3
    first, second = (nib.load(p).get_fdata()[inner] for p in (scans["a"], tmp_path / "same.nii.gz"))
    np.testing.assert_allclose(first, second, atol=0.05 * np.ptp(first))
    assert shell("apply", scans["a_seg"], "-t", transform, "-o", tmp_path / "seg.nii.gz", "--label") == 0
    assert set(np.unique(nib.load(tmp_path / "seg.nii.gz").dataobj)) <= {*range(10)}
    (tmp_path / "points.csv").write_text("x,y,z\n1,2,3\n")
    assert shell("apply", tmp_path / "points.csv", "-t", transform, "-o", tmp_path / "moved.csv") == 0
    assert (tmp_path / "moved.csv").read_text().startswith("x,y,z\n")
    assert "a.nii.gz" in shell.refused("apply", scans["b"], "-t", scans["a"], "-o", tmp_path / "no.nii.gz")
    assert "displacement field" in shell.refused("invert", "-t", transform, "-o", tmp_path / "no.tfm")
    assert shell("apply", scans["a"], "-o", again) == 2  # without a transform
    assert not (tmp_path / "no.nii.gz").exists()
