# SPDX-License-Identifier: Apache-2.0
"""WindowToUnitRanged: values, and the images that a window does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

import monai_deq.transforms as transforms
from monai_deq.transforms import WindowToUnitRanged


def test_clips_and_scales_all_images_alike() -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    fixed = MetaTensor(torch.tensor([[[[-3024.0, -1000, -600]], [[-200, 0, 3000]]]]), affine=affine)
    moving = torch.tensor([[[[-900.0, -800, -700]], [[-600, -500, -400]]]])
    out = WindowToUnitRanged(("fixed", "moving"), (-1000, 0))({"fixed": fixed, "moving": moving})
    np.testing.assert_allclose(out["fixed"].flatten(), [0, 0, 0.4, 0.8, 1, 1], atol=1e-6)
    np.testing.assert_allclose(out["moving"].flatten(), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], atol=1e-6)
    np.testing.assert_allclose(out["fixed"].affine, affine)
    assert float(fixed.min()) == -3024


def test_refuses() -> None:
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
