# SPDX-License-Identifier: Apache-2.0
"""Intensities brought to [0, 1]: by percentiles, by a window, and what is refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

import monai_deq.transforms as transforms
from monai_deq.transforms import ScaleToUnitRanged, WindowToUnitRanged


def test_percentiles_of_an_image(caplog: pytest.LogCaptureFixture) -> None:
    # of 2001 voxels the 0.1th percentile is the third, 2; of the 1998 above it the 99th the 1978th, 1980
    image = torch.arange(2001.0)
    image[-1] = 1e6  # one bright voxel does not matter
    inside = torch.rand(1, 20, 5)
    item = {"a": image[torch.randperm(2001)].reshape(1, 3, 23, 29), "b": inside}
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        out = ScaleToUnitRanged(("a", "b"), "range")(item)
    expected = ((item["a"] - 2) / (2 * (1980 - 2))).clamp(0, 1)
    torch.testing.assert_close(out["a"], expected)
    assert out["range"]["a"] == [2, 2 + 2 * 1978] and "from [2, 3958] to [0, 1]" in caplog.text
    # the other one goes with it, as one rule is for both
    assert float(out["b"].max()) < 0.6 and set(out["range"]) == {"a", "b"}
    assert float(item["a"].max()) == 1e6


def test_images_inside_the_unit_range_pass() -> None:
    item = {"a": torch.rand(1, 4, 5, 6) / 3, "b": torch.rand(1, 4, 5, 6)}
    out = ScaleToUnitRanged(("a", "b"), "range")(item)
    assert out["a"] is item["a"] and out["b"] is item["b"] and out["range"] == {"a": [0, 1], "b": [0, 1]}


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
