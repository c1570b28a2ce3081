# SPDX-License-Identifier: Apache-2.0
"""Refused runs as a user sees them: the reason is the last line, and nothing has been written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from shell import BUNDLES, configs, error_of, run_bundle_in_shell


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"moving": "absent.nii.gz"}, "pair: the file moving 'absent.nii.gz' does not exist."),
        ({"toleranc": 0.1}, "has no setting toleranc (is it tolerance?)."),
        ({"tolerance": -1}, "tolerance must not be negative, got -1."),
        ({"overwrite": "perhaps"}, "overwrite must be true or false, got 'perhaps'."),
        ({"ckpt_path": "weights/model.pt"}, "weights/model.pt is not a readable checkpoint"),
        ({"moving": "text.nii.gz", "num_workers": 1}, "'moving': cannot read 'text.nii.gz'"),
        (
            {"output_dir": "a.nii.gz/new"},
            "cannot write to the folder a.nii.gz/new: a.nii.gz is there and is no",
        ),
        ({"output_dir": "there"}, "b_to_a_warped.nii.gz exists already and is not overwritten. Replace it with --over"),
    ],
)
def test_last_line(changes: dict[str, object], reason: str, brain_cohort: Path, tmp_path: Path) -> None:
    for name, subject in (("a", 9001), ("b", 9002)):
        image = brain_cohort / f"OASIS_OAS1_{subject}_MR1" / "slice_norm.nii.gz"
        shutil.copy(image, tmp_path / f"{name}.nii.gz")
    (tmp_path / "text.nii.gz").write_text("no image")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.pt").write_bytes(b"no weights")
    trained = BUNDLES / "oasis" / "models" / "slices"
    shutil.copy(trained / "model.json", tmp_path / "weights" / "model.json")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "b_to_a_warped.nii.gz").write_text("old")
    settings = {"fixed": "a.nii.gz", "moving": "b.nii.gz", "ckpt_path": trained / "model.pt", "output_dir": "new"}
    files = configs("oasis", "inference", "slices.json")
    result = run_bundle_in_shell("inference", files, tmp_path, **{**settings, **changes})
    assert reason in error_of(result) and result.returncode == 1
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["b_to_a_warped.nii.gz"]
    assert not [p for p in (tmp_path / "new").glob("*")]
