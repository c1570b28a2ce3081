# SPDX-License-Identifier: Apache-2.0
"""Intensities of pairs brought to [0, 1], whatever their units, hot voxels and signs."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scans import blobs, grid, world

from monai_deq.transforms import ScaleToUnitRanged, WindowToUnitRanged

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
