# SPDX-License-Identifier: Apache-2.0
"""Fields to start from lie on the grid of the fixed scan; fields are carried from grid to grid."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Resize

import monai_deq.transforms as transforms
from monai_deq.data import save_nifti
from monai_deq.transforms import LoadDDFd, ResampleDDF, ResampleDDFd, WarpByDDFd


def test_field_on_another_grid_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ddf.nii.gz"
    save_nifti(path, torch.rand(3, 6, 8, 10), np.eye(4), 3)
    for other in (torch.zeros(1, 6, 8, 12), MetaTensor(torch.zeros(1, 6, 8, 10), affine=np.diag([2.0, 1, 1, 1]))):
        with pytest.raises(ValueError, match="must lie on the grid of the fixed scan"):
            LoadDDFd("initial_ddf", "fixed", 3)({"initial_ddf": path, "fixed": other})


# old size, new size: twice, half, other factors on each axis, the longer way round on one axis
GRIDS = [
    ((8, 12), (16, 24)),
    ((16, 12), (8, 6)),
    ((10, 9), (25, 6)),
    ((6, 8, 10), (12, 16, 20)),
    ((12, 8, 10), (6, 4, 5)),
    ((8, 9, 6), (16, 6, 9)),
]
LENGTH = (40.0, 60.0, 50.0)  # of the field of view in mm


def centres(size: tuple[int, ...]) -> np.ndarray:
    """Positions of the voxel centres in mm, (ndim, *size); the field of view begins at 0 with a voxel's border."""
    axes = [(np.arange(n) + 0.5) * (length / n) for n, length in zip(size, LENGTH, strict=False)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def linear_displacement(position: np.ndarray) -> np.ndarray:
    """Displacement in mm at positions in mm, with every axis acting on every other."""
    ndim = len(position)
    matrix = np.array([[0.1, -0.05, 0.02], [0.04, -0.08, 0.03], [-0.06, 0.01, 0.07]])[:ndim, :ndim]
    offset = np.array([1.0, -2.0, 0.5])[:ndim]
    return np.einsum("ij,j...->i...", matrix, position) + offset.reshape(-1, *[1] * ndim)


def in_voxels(displacement: np.ndarray, size: tuple[int, ...]) -> torch.Tensor:
    spacing = [length / n for n, length in zip(size, LENGTH, strict=False)]
    return torch.from_numpy(displacement / np.reshape(spacing, (-1, *[1] * len(size))))


def inside(field: torch.Tensor, margin: int) -> torch.Tensor:
    return field[(slice(None), *[slice(margin, n - margin) for n in field.shape[1:]])]


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_displacement_in_mm_stays(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    ddf = in_voxels(linear_displacement(centres(old)), old)
    out = ResampleDDF()(ddf, new)
    assert tuple(out.shape) == (len(new), *new)
    expected = in_voxels(linear_displacement(centres(new)), new)
    # at the border, between the outermost centres and the edge, values are held
    for axis, (o, n) in enumerate(zip(old, new, strict=True), start=1):
        margin = -(-n // o)
        out, expected = (f.narrow(axis, margin, n - 2 * margin) for f in (out, expected))
    assert out.numel() > 20
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("old", "new"), [GRIDS[0], GRIDS[3]])
def test_there_and_back_again(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    ddf = in_voxels(linear_displacement(centres(old)), old)
    back = ResampleDDF()(ResampleDDF()(ddf, new), old)
    torch.testing.assert_close(inside(back, 1), inside(ddf, 1))
    constant = torch.full((len(old), *old), 1.25)
    torch.testing.assert_close(ResampleDDF()(ResampleDDF()(constant, new), old), constant)


def smooth_image(size: tuple[int, ...]) -> torch.Tensor:
    position = centres(size)
    waves = [np.sin(2 * np.pi * p / length + i) for i, (p, length) in enumerate(zip(position, LENGTH, strict=False))]
    return torch.from_numpy(np.sum(waves, axis=0)[None])


@pytest.mark.parametrize("size", [(32, 48), (32, 36, 40)])
def test_agrees_with_the_resizing_of_images(size: tuple[int, ...]) -> None:
    """Warping the full-size image by the field of the small one is resizing the image that the small field warped."""
    small = tuple(n // 2 for n in size)
    mode = "bilinear" if len(size) == 2 else "trilinear"
    ddf = in_voxels(linear_displacement(centres(small)), small)
    moving = smooth_image(size)
    warp = WarpByDDFd("moving")
    moving_small = Resize(small, mode=mode, align_corners=False)(moving).as_tensor().double()
    warped_small = warp({"moving": moving_small, "ddf": ddf})["moving"]
    warped = warp({"moving": moving, "ddf": ResampleDDF()(ddf, size)})["moving"]
    up = Resize(size, mode=mode, align_corners=False)(warped_small).as_tensor().double()
    # every linear interpolation of a sine wave of n voxels errs by up to (2 pi / n)^2 / 8
    bound = 2 * sum((2 * np.pi / n) ** 2 / 8 for n in small)
    # the displacement stays below 8 voxels: off the border nothing looks outside the image
    off_the_border = inside(warped - up, 8).abs()
    assert off_the_border.numel() and float(off_the_border.max()) < bound
    unscaled = warp({"moving": moving, "ddf": ResampleDDF()(ddf, size) / 2})["moving"]
    assert float(inside(unscaled - up, 8).abs().max()) > 3 * bound


def test_resampling_to_the_same_size_and_number_types() -> None:
    ddf = torch.rand(2, 5, 6)
    torch.testing.assert_close(ResampleDDF()(ddf, (5, 6)), ddf)
    whole = np.full((2, 4, 4), 3)
    out = ResampleDDF()(whole, (6, 8))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0], torch.full((6, 8), 4.5))
    torch.testing.assert_close(out[1], torch.full((6, 8), 6.0))


@pytest.mark.parametrize(("old", "new"), [((4, 6), (8, 9)), ((4, 6, 5), (6, 6, 10)), ((4, 6), (4, 6))])
def test_dictionary_form_takes_the_grid_of_the_reference(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    affine = torch.tensor([[0, 0, 2, 5], [1.5, 0, 0, -3], [0, -0.7, 0, 8], [0, 0, 0, 1]], dtype=torch.float64)
    scan = MetaTensor(torch.zeros(1, *new), affine=affine, meta={"filename_or_obj": "fixed.nii.gz"})
    constant = torch.ones(len(old), *old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = ResampleDDFd("scan", "u")({"scan": scan, "u": MetaTensor(constant, affine=torch.eye(4))})
    assert tuple(out["u"].shape[1:]) == new and out["u"].spatial_ndim == len(new)
    for channel, n, o in zip(out["u"].as_tensor(), new, old, strict=True):
        torch.testing.assert_close(channel, torch.full(new, n / o))
    torch.testing.assert_close(out["u"].affine, affine)
    assert out["u"].meta["filename_or_obj"] == "fixed.nii.gz"
    plain = ResampleDDFd("scan", "u")({"scan": scan.as_tensor(), "u": constant})
    assert not isinstance(plain["u"], MetaTensor)


def test_resampling_errors() -> None:
    for shape, size in [((2, 4, 4), (4, 4, 4)), ((3, 4, 4), (8, 8)), ((1, 4), (8,))]:
        with pytest.raises(ValueError, match="ddf must be"):
            ResampleDDF()(torch.zeros(shape), size)
    with pytest.raises(KeyError, match="'scan'"):
        ResampleDDFd("scan")({"ddf": torch.zeros(2, 4, 4)})
    with pytest.raises(KeyError, match="'ddf'"):
        ResampleDDFd("scan")({"scan": torch.zeros(1, 4, 4)})
    assert transforms.ResampleDDFD is transforms.ResampleDDFd is transforms.ResampleDDFDict
