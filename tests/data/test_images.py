# SPDX-License-Identifier: Apache-2.0
"""Image files: what is read, what is refused, and which numbers are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_deq.data import read_image, save_nifti


def truncated(folder: Path, name: str = "cut.nii.gz") -> str:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((12, 10, 8)), np.eye(4)), folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    return str(folder / name)


@pytest.mark.parametrize("make", [truncated, lambda folder: truncated(folder, "cut.nii")])
def test_damaged_files(tmp_path: Path, make: Callable[[Path], str]) -> None:
    file = make(tmp_path)
    with pytest.raises(RuntimeError, match="download it again") as caught:
        read_image(file, "fixed")
    assert str(caught.value).startswith(f"fixed: cannot read {file!r}")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"moving: the file .*absent.nii.gz' does not exist"):
        read_image(tmp_path / "absent.nii.gz", "moving")


def test_folder_without_a_series(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    with pytest.raises(ValueError, match=rf"fixed: the folder '{tmp_path}' holds no DICOM series"):
        read_image(tmp_path, "fixed")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.rand(1, 4, 5, 3, dtype=torch.float64), "<f8"),
        (torch.rand(3, 4, 5, 3).half(), "<f4"),
        (torch.rand(1, 4, 5, 3).bfloat16(), "<f4"),
        (np.random.default_rng(0).random((1, 4, 5, 3)).astype(np.float16), "<f4"),
        (torch.arange(60).reshape(1, 4, 5, 3), "<i4"),
        (torch.arange(60).reshape(1, 4, 5, 3) > 30, "|u1"),
        (torch.arange(60, dtype=torch.int16).reshape(1, 4, 5, 3), "<i2"),
    ],
)
def test_number_types(tmp_path: Path, image: Any, expected: str) -> None:
    save_nifti(tmp_path / "x.nii.gz", image, None, 3)
    back = nib.load(tmp_path / "x.nii.gz")
    assert back.get_data_dtype() == expected
    values = np.asarray(image.double() if isinstance(image, torch.Tensor) else image)
    expected_values = values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)
    np.testing.assert_array_equal(np.asarray(back.dataobj), expected_values)


def test_affine_of_a_plane(tmp_path: Path) -> None:
    save_nifti(tmp_path / "x.nii", np.zeros((1, 4, 5), np.float32), np.diag([2.0, 3.0, 1.0]), 2)
    back = nib.load(tmp_path / "x.nii")
    assert back.shape == (4, 5, 1)
    np.testing.assert_array_equal(back.affine, np.diag([2.0, 3.0, 1.0, 1.0]))


def test_other_shapes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"channel-first 3-D image.*\(1, 4, 5\)"):
        save_nifti(tmp_path / "x.nii", np.zeros((1, 4, 5)), None, 3)
    assert not list(tmp_path.iterdir())
