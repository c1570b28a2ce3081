# SPDX-License-Identifier: Apache-2.0
"""Intensities brought to [0, 1]: by percentiles, by a window, and what is refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scans import blobs, grid, world

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


SHAPE = (20, 18, 16)


def scan() -> torch.Tensor:
    """Air that is 0 and tissue of some hundred, as most scans are."""
    values = blobs(world(grid(SHAPE, (2.6, 2.6, 2.6)), SHAPE)) - 20
    return torch.from_numpy(np.where(values > 2, values, 0)[None].astype(np.float32))


def scaled(image: torch.Tensor) -> torch.Tensor:
    return ScaleToUnitRanged("image")({"image": image})["image"]


def test_percentiles_of_numpy():
    image = scan()
    values = image.numpy().ravel()
    low = np.percentile(values, 0.1, method="lower")
    high = np.percentile(values[values > low], 99, method="lower")
    expected = np.clip((image.numpy() - low) / (high - low) / 2, 0, 1)
    np.testing.assert_allclose(scaled(image), expected, atol=1e-6)
    assert 0.4 < float(scaled(image).max()) < 1


@pytest.mark.parametrize("factor, offset", [(500, 0), (1, -1024), (3, 1e4), (1e30, 0)])
def test_other_units_make_no_difference(factor, offset):
    image = scan()
    np.testing.assert_allclose(scaled(image * factor + offset), scaled(image), atol=2e-4)


@pytest.mark.parametrize("hot", [1e4, 1e30, -1e4, -1e30])
def test_one_hot_voxel_makes_no_difference_to_the_others(hot):
    image = scan()
    spoiled = image.clone()
    spoiled[0, 10, 9, 8] = hot
    expected, found = scaled(image), scaled(spoiled)
    assert float(found[0, 10, 9, 8]) == (1.0 if hot > 0 else 0.0)
    found[0, 10, 9, 8] = expected[0, 10, 9, 8]
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_inverted_scan():
    """Nearly all voxels have the largest value: it stays the largest, and what differs still differs."""
    image = 1000 - scan()
    found = scaled(image)
    assert float(found.min()) >= 0 and float(found.max()) <= 1 and torch.isfinite(found).all()
    order = np.argsort(image.numpy().ravel(), kind="stable")
    assert (np.diff(found.numpy().ravel()[order]) >= -1e-6).all()
    assert float(found.std()) > 0.02


@pytest.mark.parametrize("low, high", [(5.0, 100.0), (-3.0, 0.0), (0.0, 7.0)])
def test_two_values(low, high):
    for share in (0.0002, 0.5, 0.9998):
        image = torch.full((1, *SHAPE), low)
        image.view(-1)[: round(share * image.numel())] = high
        found = scaled(image)
        assert torch.isfinite(found).all()
        assert float(found.view(-1)[0]) > float(found.view(-1)[-1]) == 0.0


def test_a_pair_is_treated_alike(caplog):
    inside = scan() / 300
    outside = scan() * 2
    same = ScaleToUnitRanged(("fixed", "moving"), "range")({"fixed": inside, "moving": inside / 2})
    assert torch.equal(same["fixed"], inside) and torch.equal(same["moving"], inside / 2)
    assert same["range"] == {"fixed": [0.0, 1.0], "moving": [0.0, 1.0]}
    named = MetaTensor(outside, meta={"filename_or_obj": "m.nii.gz"})
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        both = ScaleToUnitRanged(("fixed", "moving"), "range")({"fixed": inside, "moving": named})
    np.testing.assert_allclose(both["fixed"], scaled(outside), atol=1e-5)  # of one scan in two units
    np.testing.assert_allclose(both["moving"], scaled(outside), atol=1e-5)
    assert both["fixed"].max() > inside.max() and "m.nii.gz: intensities scaled linearly from [0, " in caplog.text
    for key, image in (("fixed", inside), ("moving", outside)):
        low, high = both["range"][key]
        expected = ((image - low) / (high - low)).clamp(0, 1)
        np.testing.assert_allclose(both[key], expected, atol=1e-6)


def test_window():
    image = scan() * 20 - 1000
    found = WindowToUnitRanged("image", (-800, 400))({"image": image})["image"]
    np.testing.assert_allclose(found, np.clip((image.numpy() + 800) / 1200, 0, 1), atol=1e-6)
    for bad in ((400, -800), (1, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match="lower and its upper end"):
            WindowToUnitRanged("image", bad)
    with pytest.raises(ValueError, match="no intensity is inside the window"):
        WindowToUnitRanged("image", (5000, 6000))({"image": image})
    with pytest.raises(ValueError, match="scaled to .0, 1. already"):
        WindowToUnitRanged("image", (-800, 400))({"image": scan() / 300})
