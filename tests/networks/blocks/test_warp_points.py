# SPDX-License-Identifier: Apache-2.0
"""warp_points_by_ddf against SciPy, closed forms and the warp of images."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_deq.networks.blocks import points_outside, warp_by_ddf, warp_points_by_ddf

SIZES = [(9, 7), (5, 8, 6)]


def draw(size: tuple[int, ...], batch: int = 2, number: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Points all over the voxels of the grid, its outer half voxels included, and a rough field; float64."""
    generator = torch.Generator().manual_seed(5)
    unit = torch.rand(batch, number, len(size), generator=generator, dtype=torch.float64)
    ddf = 3 * torch.randn(batch, len(size), *size, generator=generator, dtype=torch.float64)
    return unit * torch.tensor(size) - 0.5, ddf


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_scipy(size: tuple[int, ...]) -> None:
    points, ddf = draw(size)
    expected = np.stack(
        [
            p + np.stack([ndimage.map_coordinates(channel, p.T, order=1, mode="nearest") for channel in d], axis=1)
            for p, d in zip(points.numpy(), ddf.numpy(), strict=True)
        ]
    )
    np.testing.assert_allclose(warp_points_by_ddf(points, ddf), expected, rtol=0, atol=1e-12)
    single = warp_points_by_ddf(points.float(), ddf.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_affine_fields_are_followed_exactly(size: tuple[int, ...]) -> None:
    ndim = len(size)
    points = draw(size)[0].clamp(min=0).minimum(torch.tensor(size, dtype=torch.float64) - 1)
    matrix = torch.randn(ndim, ndim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij"))
    ddf = torch.einsum("ij,j...->i...", matrix, grid) + 0.25
    moved = warp_points_by_ddf(points, ddf.expand(2, *ddf.shape))
    torch.testing.assert_close(moved, points + points @ matrix.T + 0.25)


def test_fixed_points_go_where_the_warped_intensities_come_from() -> None:
    moving = torch.zeros(1, 1, 6, 7)
    moving[0, 0, 4, 2] = 1  # a bright landmark
    ddf = torch.zeros(1, 2, 6, 7)
    ddf[:, 0], ddf[:, 1] = 3, -1
    fixed = warp_by_ddf(moving, ddf)[0, 0].round().nonzero().float()  # where it is seen on the fixed grid
    torch.testing.assert_close(fixed, torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(warp_points_by_ddf(fixed[None], ddf), torch.tensor([[[4.0, 2.0]]]))


def test_whole_voxels_in_half_precision_and_integers() -> None:
    ddf = torch.zeros(1, 2, 300, 3, dtype=torch.float16)
    ddf[:, 0] = 0.0625  # lost if the coordinate 299 were added in half precision
    moved = warp_points_by_ddf(torch.tensor([[[299, 1]]]), ddf)
    torch.testing.assert_close(moved, torch.tensor([[[299.0625, 1.0]]]), rtol=0, atol=1e-4)


def test_axis_of_one_voxel_and_no_points() -> None:
    ddf = torch.arange(8.0).reshape(1, 2, 4, 1)
    moved = warp_points_by_ddf(torch.tensor([[[1.5, 0.0], [3.0, 0.4]]]), ddf)
    torch.testing.assert_close(moved, torch.tensor([[[3.0, 5.5], [6.0, 7.4]]]))
    assert warp_points_by_ddf(torch.zeros(1, 0, 2), ddf).shape == (1, 0, 2)


@pytest.mark.parametrize("size", SIZES)
def test_gradients(size: tuple[int, ...]) -> None:
    points, ddf = draw(size, number=3)
    points = points.clamp(min=0.1).minimum(torch.tensor(size) - 1.1)
    assert torch.autograd.gradcheck(warp_points_by_ddf, (points.requires_grad_(), ddf.requires_grad_()))


def test_points_outside_are_refused_or_clamped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    ddf = torch.arange(12.0).reshape(1, 1, 3, 4).repeat(1, 2, 1, 1)
    points = torch.tensor([[[1.0, 2.0], [-2.0, 1.0], [2.4, 3.4], [5.0, 9.0]]])
    assert points_outside(points, (3, 4)).tolist() == [[False, True, False, True]]
    with pytest.raises(ValueError, match=r"2 of 4 points lie outside .* size \(3, 4\), e.g. \[-2.0, 1.0\]"):
        warp_points_by_ddf(points, ddf)
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        moved = warp_points_by_ddf(points, ddf, outside="clamp")
    assert "2 of 4 points lie outside" in caplog.text
    displacement = torch.tensor([6.0, 1, 11, 11])[:, None]  # of the voxels (1, 2), (0, 1), (2, 3), (2, 3)
    torch.testing.assert_close(moved, points + displacement)
    caplog.clear()
    warp_points_by_ddf(points[:, ::2], ddf, outside="clamp")
    assert not caplog.records


@pytest.mark.parametrize(
    ("points", "ddf", "outside", "message"),
    [
        (torch.zeros(1, 4, 3), torch.zeros(1, 2, 5, 5), "refuse", r"points must have shape \(1, N, 2\)"),
        (torch.zeros(2, 4, 2), torch.zeros(1, 2, 5, 5), "refuse", r"points must have shape \(1, N, 2\)"),
        (torch.zeros(4, 2), torch.zeros(1, 2, 5, 5), "refuse", r"got \(4, 2\)"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 3, 5, 5), "refuse", "ddf must have shape"),
        (torch.full((1, 4, 2), float("nan")), torch.zeros(1, 2, 5, 5), "clamp", "points must be finite"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 2, 5, 5), "zeros", "outside: expected 'refuse' or 'clamp', got 'zeros'"),
    ],
)
def test_bad_input_is_refused(points, ddf, outside, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warp_points_by_ddf(points, ddf, outside=outside)
