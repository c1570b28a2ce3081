# SPDX-License-Identifier: Apache-2.0
"""load_ddf: what SaveRegistrationd wrote comes back; warm starts on the network's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_deq.transforms import LoadDDFd, SaveRegistrationd, load_ddf, load_pair_transforms

SIZES = [(6, 8), (6, 8, 10)]


def write_scan(path: Path, size: tuple[int, ...], affine: np.ndarray, seed: int = 0) -> str:
    array = np.random.default_rng(seed).random(size, dtype=np.float32)
    nib.save(nib.Nifti1Image(array[..., None] if len(size) == 2 else array, affine), path)
    return str(path)


def written_field(folder: Path, size: tuple[int, ...], affine: np.ndarray) -> tuple[str, torch.Tensor]:
    ddf = torch.randn((len(size), *size), generator=torch.Generator().manual_seed(3))
    item = {"warped": MetaTensor(torch.rand(1, *size), affine=affine), "ddf": MetaTensor(ddf, affine=affine)}
    item |= {"moving_subject": "m", "fixed_subject": "f", "reason": "tolerance"}
    item |= {"steps": 1, "evaluations": 1.0, "residual": 0.0, "relative_residual": 0.0, "converged": True}
    SaveRegistrationd(folder)(item)
    return str(folder / "m_to_f_ddf.nii.gz"), ddf


@pytest.mark.parametrize("size", SIZES)
def test_reads_what_was_written(size: tuple[int, ...], tmp_path: Path) -> None:
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    path, ddf = written_field(tmp_path, size, affine)
    field = load_ddf(path, len(size))
    torch.testing.assert_close(field.as_tensor(), ddf)
    np.testing.assert_allclose(field.affine, affine)


@pytest.mark.parametrize("size", SIZES)
def test_warm_start_on_the_networks_grid(size: tuple[int, ...], tmp_path: Path) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    scans = [write_scan(tmp_path / f"{n}.nii.gz", size, affine, seed) for seed, n in enumerate("ab")]
    path, ddf = written_field(tmp_path / "out", size, affine)
    pair: dict[str, Any] = {"fixed": scans[0], "moving": scans[1]}
    assert "initial_ddf" not in load_pair_transforms(len(size))(pair)
    item = load_pair_transforms(len(size))({**pair, "initial_ddf": path})
    torch.testing.assert_close(torch.as_tensor(item["initial_ddf"]), ddf)
    # at half the size: means over blocks of two voxels, in voxels twice as large
    half = [n // 2 for n in size]
    item = load_pair_transforms(len(size), half)({**pair, "initial_ddf": path})
    blocks = ddf.double().numpy().reshape(len(size), *[k for n in half for k in (n, 2)])
    expected = blocks.mean(axis=tuple(range(2, 2 * len(size) + 1, 2))) / 2
    assert item["initial_ddf"].shape == (len(size), *half) == (len(size), *item["fixed"].shape[1:])
    np.testing.assert_allclose(item["initial_ddf"], expected, atol=1e-6)


def test_refuses(tmp_path: Path) -> None:
    affine = np.eye(4)
    path, _ = written_field(tmp_path, (6, 8, 10), affine)
    with pytest.raises(FileNotFoundError, match="absent.nii.gz' does not exist"):
        load_ddf(tmp_path / "absent.nii.gz", 3)
    with pytest.raises(ValueError, match=r"expected a 2-D .* \(H, W, 1, 2\), got shape \(6, 8, 10, 3\)"):
        load_ddf(path, 2)
    scan = write_scan(tmp_path / "scan.nii.gz", (6, 8, 10), affine)
    with pytest.raises(ValueError, match=r"expected a 3-D displacement field"):
        load_ddf(scan, 3)
    (tmp_path / "half.nii.gz").write_bytes(Path(path).read_bytes()[:200])
    with pytest.raises(RuntimeError, match="cannot read the displacement field .*half.nii.gz"):
        load_ddf(tmp_path / "half.nii.gz", 3)
    array = np.zeros((6, 8, 10, 3), np.float32)
    array[1, 2, 3, 0] = np.nan
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "nan.nii.gz")
    with pytest.raises(ValueError, match="nan.nii.gz: the displacement field must be finite"):
        load_ddf(tmp_path / "nan.nii.gz", 3)
    for other in (torch.zeros(1, 6, 8, 12), MetaTensor(torch.zeros(1, 6, 8, 10), affine=np.diag([2.0, 1, 1, 1]))):
        with pytest.raises(ValueError, match="must lie on the grid of the fixed scan"):
            LoadDDFd("initial_ddf", "fixed", 3)({"initial_ddf": path, "fixed": other})
