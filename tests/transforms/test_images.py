# SPDX-License-Identifier: Apache-2.0
"""Images one by one: what is read, scaled or refused. Whole items are tested with what loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

import monai_deq.transforms as transforms
from monai_deq.transforms import (
    CheckLabeld,
    CheckRegistrationImaged,
    CheckSameGridd,
    DropSliceAxisd,
    LoadRegistrationImaged,
    ScaleToUnitRanged,
    WindowToUnitRanged,
)


def truncated(folder: Path, name: str = "cut.nii.gz") -> str:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((12, 10, 8)), np.eye(4)), folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    return str(folder / name)


def no_nifti(folder: Path) -> str:
    (folder / "page.nii.gz").write_text("<html>404</html>")
    return str(folder / "page.nii.gz")


@pytest.mark.parametrize("make", [truncated, lambda folder: truncated(folder, "cut.nii"), no_nifti])
def test_damaged_files(tmp_path: Path, make: Callable[[Path], str]) -> None:
    file = make(tmp_path)
    with pytest.raises(RuntimeError, match="download it again") as caught:
        LoadRegistrationImaged("image")({"image": file})
    assert file in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.nii.gz"):
        LoadRegistrationImaged("image")({"image": str(tmp_path / "absent.nii.gz")})
    with pytest.raises(ValueError, match="'image' must be the name"):
        LoadRegistrationImaged("image")({"image": None})
    with pytest.raises(KeyError):
        LoadRegistrationImaged("image")({})


def test_single_transforms() -> None:
    image = torch.rand(1, 4, 5, 6)
    assert DropSliceAxisd("image")({"image": image})["image"] is image
    assert DropSliceAxisd("image")({"image": image[..., :1]})["image"].shape == (1, 4, 5)
    assert ScaleToUnitRanged("image")({"image": image})["image"] is image
    CheckRegistrationImaged("image", 3)({"image": image})
    with pytest.raises(ValueError, match="^image: "):  # the key where no file is known
        CheckRegistrationImaged("image", 2)({"image": image})
    with pytest.raises(ValueError, match="one image for each"):
        CheckLabeld(("a", "b"), "image")
    assert CheckSameGridd(allow_missing_keys=True)({}) == {}


def test_window_clips_and_scales_all_images_alike() -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    fixed = MetaTensor(torch.tensor([[[[-3024.0, -1000, -600]], [[-200, 0, 3000]]]]), affine=affine)
    moving = torch.tensor([[[[-900.0, -800, -700]], [[-600, -500, -400]]]])
    out = WindowToUnitRanged(("fixed", "moving"), (-1000, 0))({"fixed": fixed, "moving": moving})
    np.testing.assert_allclose(out["fixed"].flatten(), [0, 0, 0.4, 0.8, 1, 1], atol=1e-6)
    np.testing.assert_allclose(out["moving"].flatten(), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], atol=1e-6)
    np.testing.assert_allclose(out["fixed"].affine, affine)
    assert float(fixed.min()) == -3024


def test_window_refuses() -> None:
    image = MetaTensor(torch.linspace(0, 1, 8).reshape(1, 2, 4), meta={"filename_or_obj": "scan.nii.gz"})
    with pytest.raises(ValueError, match=r"scan.nii.gz: .* from 0 to 1, are scaled to \[0, 1\] already"):
        WindowToUnitRanged("image", (-1200, 400))({"image": image})
    assert torch.equal(WindowToUnitRanged("image", (0, 1))({"image": image})["image"].as_tensor(), image.as_tensor())
    with pytest.raises(ValueError, match=r"^image: no intensity is inside the window \[2, 5\], they go from 0 to 1"):
        WindowToUnitRanged("image", (2, 5))({"image": image.as_tensor()})
    for window in ((400, -1200), (0, 0), (1,), (0, float("nan"))):
        with pytest.raises(ValueError, match="window must be its lower and its upper end"):
            WindowToUnitRanged("image", window)
    with pytest.raises(KeyError):
        WindowToUnitRanged("image", (0, 1))({})
    assert transforms.WindowToUnitRangeD is WindowToUnitRanged is transforms.WindowToUnitRangeDict
