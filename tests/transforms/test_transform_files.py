# SPDX-License-Identifier: Apache-2.0
"""Transforms in files: displacement fields in voxels are read as they were written, others are refused."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_deq.data import save_nifti
from monai_deq.transforms import load_ddf


def make_ddf(size: tuple[int, ...] = (5, 7, 6), seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn((len(size), *size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(6, 8), (6, 8, 10)])
def test_reads_what_was_written(size: tuple[int, ...], tmp_path: Path) -> None:
    affine, ddf = np.diag([2.0, 1.5, 3.0, 1.0]), make_ddf(size)
    save_nifti(tmp_path / "ddf.nii.gz", ddf, affine, len(size))
    field = load_ddf(tmp_path / "ddf.nii.gz", len(size))
    torch.testing.assert_close(field.as_tensor(), ddf, rtol=0, atol=0)
    np.testing.assert_allclose(field.affine, affine)


def test_refuses(tmp_path: Path) -> None:
    affine, path = np.eye(4), tmp_path / "ddf.nii.gz"
    save_nifti(path, make_ddf((6, 8, 10)), affine, 3)
    with pytest.raises(FileNotFoundError, match="absent.nii.gz' does not exist"):
        load_ddf(tmp_path / "absent.nii.gz", 3)
    with pytest.raises(ValueError, match=r"ddf.nii.gz: expected a 2-D displacement field, got \(3, 6, 8, 10\)"):
        load_ddf(path, 2)
    save_nifti(tmp_path / "scan.nii.gz", torch.rand(1, 6, 8, 10), affine, 3)
    with pytest.raises(
        ValueError, match=r"scan.nii.gz: expected a displacement field.* \(H, W, D, 3\).* got shape \(6, 8, 10\)"
    ):
        load_ddf(tmp_path / "scan.nii.gz", 3)
    (tmp_path / "half.nii.gz").write_bytes(path.read_bytes()[:200])
    with pytest.raises(RuntimeError, match="cannot read the transform .*half.nii.gz"):
        load_ddf(tmp_path / "half.nii.gz", 3)
    array = np.zeros((6, 8, 10, 3), np.float32)
    array[1, 2, 3, 0] = np.nan
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "nan.nii.gz")
    with pytest.raises(ValueError, match="nan.nii.gz: the displacement field must be finite"):
        load_ddf(tmp_path / "nan.nii.gz", 3)
