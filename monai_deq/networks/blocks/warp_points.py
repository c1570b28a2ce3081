# SPDX-License-Identifier: Apache-2.0
"""Points moved by a dense displacement field."""

from __future__ import annotations

import logging
from itertools import product
from typing import Literal

import torch

__all__ = ["OutsidePoints", "check_outside", "points_outside", "warp_points_by_ddf"]

logger = logging.getLogger("monai_deq")

OutsidePoints = Literal["refuse", "clamp"]


def check_outside(outside: str) -> None:
    """Refuse anything but the two ways to treat points outside the grid."""
    if outside not in ("refuse", "clamp"):
        raise ValueError(f"outside: expected 'refuse' or 'clamp', got {outside!r}.")


def points_outside(points: torch.Tensor, spatial_size: tuple[int, ...]) -> torch.Tensor:
    """
    Which points lie outside the voxels of a grid, that is, more than half a voxel beyond the outermost voxel centres.

    Args:
        points: ``(..., ndim)`` in voxels.
        spatial_size: number of voxels along each axis.

    Returns:
        booleans ``(...)``.
    """
    size = points.new_tensor(spatial_size)
    return ((points < -0.5) | (points > size - 0.5)).any(dim=-1)


def warp_points_by_ddf(points: torch.Tensor, ddf: torch.Tensor, outside: OutsidePoints = "refuse") -> torch.Tensor:
    """
    Move points of the fixed image to where the field finds them in the moving image: ``points + ddf(points)``.

    This is the direction that belongs to the field, and no inverse is involved: a pull-back field, ``warped(x) =
    moving(x + ddf(x))``, says for each point ``x`` of the FIXED image where to look in the moving one, so that points
    go the other way round than the intensities do. Points of the moving image cannot be moved by it; that needs the
    inverse of the map (or the registration of the pair the other way round).

    The displacement is interpolated linearly between voxel centres; in the outer half of the outermost voxels it is
    that of the border, as in :py:func:`warp_by_ddf`. Differentiable in points and field.

    Args:
        points: ``(B, N, ndim)``, voxels of the fixed image, coordinate ``i`` along array axis ``i``; the first voxel's
            centre is 0.
        ddf: ``(B, ndim, *spatial)`` in voxels, 2-D or 3-D.
        outside: points outside the voxels of the grid, where there is no displacement, are an error with
            ``"refuse"``; with ``"clamp"`` they move by the displacement of the nearest border point, and their number
            is logged. Defaults to ``"refuse"``.

    Returns:
        ``(B, N, ndim)``, voxels of the moving image; float32, or float64 where points or field are.

    Raises:
        ValueError: When the shapes do not fit, a point is not finite, or lies outside and is refused.
    """
    check_outside(outside)
    spatial = tuple(ddf.shape[2:])
    ndim = len(spatial)
    if ndim not in (2, 3) or ddf.shape[1] != ndim:
        raise ValueError(f"ddf must have shape (B, 2, H, W) or (B, 3, D, H, W), got {tuple(ddf.shape)}.")
    if points.ndim != 3 or points.shape[0] != ddf.shape[0] or points.shape[2] != ndim:
        raise ValueError(
            f"points must have shape ({ddf.shape[0]}, N, {ndim}) for a ddf of shape {tuple(ddf.shape)}, got "
            f"{tuple(points.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(points.dtype, ddf.dtype), torch.float32)
    points = points.to(device=ddf.device, dtype=dtype)
    if not torch.isfinite(points).all():
        raise ValueError("points must be finite, got NaN or infinity.")
    beyond = points_outside(points, spatial)
    if beyond.any():
        example = [round(value, 4) for value in points[beyond][0].tolist()]
        what = f"{int(beyond.sum())} of {beyond.numel()} points lie outside the grid of size {spatial}, e.g. {example}"
        if outside == "refuse":
            raise ValueError(
                f"{what}. Check that they are voxel coordinates of this image in the order of its axes, or choose "
                "outside='clamp'."
            )
        logger.warning("%s: they move by the displacement at the border", what)

    last = points.new_tensor([n - 1 for n in spatial])
    inside = torch.minimum(points.clamp(min=0), last)
    lower = torch.minimum(inside.detach().floor(), (last - 1).clamp(min=0))
    fraction = inside - lower
    values = ddf.flatten(2)
    displacement = torch.zeros_like(points)
    for corner in product((0, 1), repeat=ndim):
        index = torch.zeros_like(lower[..., 0], dtype=torch.long)
        weight = torch.ones_like(points[..., 0])
        for axis, step in enumerate(corner):
            # along an axis of one voxel the upper neighbour has no weight
            position = (lower[..., axis].long() + step).clamp(max=spatial[axis] - 1)
            index = index * spatial[axis] + position
            weight = weight * (fraction[..., axis] if step else 1 - fraction[..., axis])
        at_corner = values.gather(2, index[:, None].expand(-1, ndim, -1)).to(dtype)
        displacement = displacement + weight[..., None] * at_corner.transpose(1, 2)
    return points + displacement
