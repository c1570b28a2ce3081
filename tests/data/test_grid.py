# SPDX-License-Identifier: Apache-2.0
"""Voxel grids of volumes and of slices that lie anywhere in space."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_deq.data import check_same_grid, grid_of, source_of

# a coronal slice: the two axes of the array lie in world x and z
CORONAL = np.array([[-2.0, 0, 0, 80], [0, 0, 1, -0.5], [0, -3.0, 0, 96], [0, 0, 0, 1]])


def image(size, affine=None):
    return MetaTensor(torch.rand(1, *size), affine=np.eye(4) if affine is None else affine)


def test_grid_of_a_coronal_slice_and_of_a_volume():
    grid = grid_of(image((5, 7), CORONAL))
    assert grid.size == (5, 7) and grid.orientation == "LI"
    np.testing.assert_allclose(grid.spacing, [2, 3])
    np.testing.assert_allclose(grid.origin, [80, -0.5, 96])
    volume = grid_of(image((5, 7, 3), CORONAL))
    assert volume.orientation == "LIA"
    np.testing.assert_allclose(volume.spacing, [2, 3, 1])
    flat = grid_of(image((5, 7), np.diag([1.5, 2.5, 1.0])))  # a 3x3 affine, as 2-D readers give
    np.testing.assert_allclose(flat.spacing, [1.5, 2.5])
    assert flat.orientation == "RA"
    assert grid_of(torch.rand(1, 5, 7)) is None


def test_source_of():
    named = image((4, 4))
    named.meta["filename_or_obj"] = "a/b.nii.gz"
    assert source_of(named, "fixed") == "a/b.nii.gz"
    assert source_of(torch.rand(1, 4, 4), "fixed") == "fixed"


@pytest.mark.parametrize("size", [(5, 7), (5, 7, 3)])
def test_same_grid(size, caplog):
    check_same_grid(image(size, CORONAL), image(size, CORONAL), "A", "B")
    check_same_grid(torch.rand(1, *size), image(size), "A", "B")  # nothing to compare but the size
    assert not caplog.records
    moved = CORONAL.copy()
    moved[0, 3] += 4.0
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        check_same_grid(image(size, CORONAL), image(size, moved), "A", "B")
    assert "80.0" in caplog.text and "84.0" in caplog.text


@pytest.mark.parametrize("size", [(5, 7), (5, 7, 3)])
def test_other_grid(size):
    other_spacing, flipped, turned = CORONAL.copy(), CORONAL.copy(), CORONAL.copy()
    other_spacing[2, 1] = -3.1
    flipped[0, 0] = 2.0
    c, s = np.cos(0.1), np.sin(0.1)
    turned[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ turned[:3, :3]
    with pytest.raises(ValueError, match=r"spacing.*A has \[2.0, 3.0.*B has \[2.0, 3.1.*Resample"):
        check_same_grid(image(size, CORONAL), image(size, other_spacing), "A", "B")
    with pytest.raises(ValueError, match="orientation differs: A has LI.*B has RI"):
        check_same_grid(image(size, CORONAL), image(size, flipped), "A", "B")
    with pytest.raises(ValueError, match="direction cosines"):
        check_same_grid(image(size, CORONAL), image(size, turned), "A", "B")
    bigger = (6, *size[1:])
    with pytest.raises(ValueError, match=r"size differs: A has \(5, 7.*B has \(6, 7"):
        check_same_grid(image(size), image(bigger), "A", "B")
