# SPDX-License-Identifier: Apache-2.0
"""Images, label maps and points moved by a dense displacement field (pull-back)."""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from itertools import product
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = [
    "DDFWarp",
    "OutsidePoints",
    "check_ddf",
    "check_outside",
    "identity_grid",
    "points_outside",
    "sample_at",
    "warp_by_ddf",
    "warp_points_by_ddf",
]

logger = logging.getLogger("monai_deq")

OutsidePoints = Literal["refuse", "clamp"]

#: whole numbers up to this are exact in float32
_EXACT = 2**24


@lru_cache(maxsize=4)
def identity_grid(spatial_size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Voxel coordinates of a grid, ``(1, ndim, *spatial)``. MONAI's Warp rebuilds them on the CPU at every call."""
    axes = [torch.arange(n, device=device, dtype=dtype) for n in spatial_size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def check_ddf(image: torch.Tensor, ddf: torch.Tensor) -> None:
    """Check that a field ``(B, ndim, *spatial)`` fits a 2-D or 3-D image ``(B, C, *spatial)``; or else a
    ``ValueError``.
    """
    ndim = image.ndim - 2
    if ndim not in (2, 3):
        raise ValueError(f"image must have shape (B, C, H, W[, D]), got {tuple(image.shape)}.")
    expected = (image.shape[0], ndim, *image.shape[2:])
    if tuple(ddf.shape) != expected:
        raise ValueError(
            f"ddf must have shape {expected} for an image of shape {tuple(image.shape)}, got {tuple(ddf.shape)}."
        )


def _sample(image: torch.Tensor, grid: torch.Tensor, mode: str) -> torch.Tensor:
    """``grid_sample`` as in :py:func:`warp_by_ddf`. On a CPU PyTorch gives each item of a batch to one thread: without
    gradients a single volume is sampled in parts, as a batch.
    """
    sample = partial(F.grid_sample, mode=mode, padding_mode="border", align_corners=True)
    depth, parts = grid.shape[1], torch.get_num_threads()
    alone = image.shape[0] == 1 and image.ndim == 5 and image.device.type == "cpu" and parts > 1
    if not alone or depth < parts or (torch.is_grad_enabled() and (image.requires_grad or grid.requires_grad)):
        return sample(image, grid)
    each = depth // parts
    whole = grid[0, : each * parts].unflatten(0, (parts, each))
    out = sample(image.expand(parts, -1, -1, -1, -1), whole).transpose(0, 1).flatten(1, 2)[None]
    rest = grid[:, each * parts :]
    return out if not rest.shape[1] else torch.cat([out, sample(image, rest)], dim=2)


def sample_at(image: torch.Tensor, coordinates: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Values of an image at positions in its voxels, as ``grid_sample`` with ``align_corners=True`` and border padding.
    Positions are in float32 at least (in half precision high voxel indices lose sub-voxel displacements).

    Args:
        image: ``(B, C, *spatial)``, 2-D or 3-D; of an integer type with ``"nearest"`` only, whose numbers stay exact.
        coordinates: ``(B, ndim, *out)`` in voxels, coordinate ``i`` along array axis ``i``; ``out`` has as many axes.
        mode: ``"bilinear"`` (linear in 3-D too) or ``"nearest"``. Defaults to ``"bilinear"``.

    Returns:
        ``(B, C, *out)`` of the image's dtype.

    Raises:
        ValueError: When an image of an integer type would be interpolated.
    """
    if not image.is_floating_point():
        if mode != "nearest":
            raise ValueError(f'an image of type {image.dtype} can be warped with mode="nearest" only, got {mode!r}.')
        low, high = (int(x) for x in image.aminmax()) if image.dtype != torch.bool and image.numel() else (0, 1)
        if max(-low, high) > _EXACT:  # the numbers are exchanged for their places in a list
            numbers, places = image.unique(return_inverse=True)
            return numbers[sample_at(places.to(torch.float64), coordinates, mode).long()]
    spatial = tuple(image.shape[2:])
    dtype = torch.promote_types(torch.promote_types(image.dtype, coordinates.dtype), torch.float32)
    with torch.autocast(device_type=image.device.type, enabled=False):
        coords = coordinates.to(dtype)
        # normalise to [-1, 1] channel by channel, last axis first as grid_sample wants (x, y, z)
        grid = torch.stack(
            [coords[:, i] * (2.0 / max(spatial[i] - 1, 1)) - 1.0 for i in reversed(range(len(spatial)))], dim=-1
        )
        if len(spatial) == 2 and grid.requires_grad and grid.device.type == "cpu":
            # at NaN PyTorch's backward kernel for 2-D on the CPU reads out of bounds, and the process dies
            grid = torch.nan_to_num(grid, nan=-1.0, posinf=float("inf"), neginf=-float("inf"))
        out = _sample(image.to(dtype), grid, mode)
    return out.to(image.dtype)


def warp_by_ddf(image: torch.Tensor, ddf: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Pull an image back through a displacement field: ``warped(x) = image(x + ddf(x))``.

    Same convention as :py:class:`monai.networks.blocks.Warp` with its defaults: voxel units, channel ``i`` displaces
    array axis ``i``; sampled as by :py:func:`sample_at`. The result has the image's shape and dtype.

    Args:
        image: ``(B, C, *spatial)``, 2-D or 3-D; of an integer type with ``"nearest"`` only.
        ddf: ``(B, ndim, *spatial)`` in voxels.
        mode: ``"bilinear"`` (linear in 3-D too) or ``"nearest"``. Defaults to ``"bilinear"``.

    Raises:
        ValueError: When the shapes do not fit, or when an image of an integer type would be interpolated.
    """
    check_ddf(image, ddf)
    dtype = torch.promote_types(torch.promote_types(image.dtype, ddf.dtype), torch.float32)
    with torch.autocast(device_type=image.device.type, enabled=False):
        # a grid that torch.export traces is a part of its graph, which others must not be given
        grid_of = identity_grid.__wrapped__ if torch.compiler.is_compiling() else identity_grid
        coordinates = grid_of(tuple(image.shape[2:]), ddf.device, dtype) + ddf.to(dtype)
    return sample_at(image, coordinates, mode)


class DDFWarp(nn.Module):
    """Module form of :py:func:`warp_by_ddf`, ``mode`` being ``"bilinear"`` (default) or ``"nearest"``."""

    def __init__(self, mode: str = "bilinear") -> None:
        super().__init__()
        if mode not in ("bilinear", "nearest"):
            raise ValueError(f'mode must be "bilinear" or "nearest", got {mode!r}.')
        self.mode = mode

    def forward(self, image: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """Warp ``image`` ``(B, C, *spatial)`` by ``ddf`` ``(B, ndim, *spatial)``."""
        return warp_by_ddf(image, ddf, mode=self.mode)


def check_outside(outside: str) -> None:
    """Refuse anything but the two ways to treat points outside the grid."""
    if outside not in ("refuse", "clamp"):
        raise ValueError(f"outside: expected 'refuse' or 'clamp', got {outside!r}.")


def points_outside(points: torch.Tensor, spatial_size: tuple[int, ...]) -> torch.Tensor:
    """Which points ``(..., ndim)`` in voxels lie outside the voxels of a grid, more than half a voxel beyond the
    outermost centres; booleans ``(...)``.
    """
    size = points.new_tensor(spatial_size)
    return ((points < -0.5) | (points > size - 0.5)).any(dim=-1)


def warp_points_by_ddf(points: torch.Tensor, ddf: torch.Tensor, outside: OutsidePoints = "refuse") -> torch.Tensor:
    """Move points of the fixed image to where the field finds them in the moving image: ``points + ddf(points)``.

    A pull-back field, ``warped(x) = moving(x + ddf(x))``, says for each point ``x`` of the FIXED image where to look in
    the moving one: points go the other way round than intensities do, without an inverse. Points of the moving image
    need the inverse of the map (or the registration of the pair the other way round).

    The displacement is interpolated linearly between voxel centres, in the outer half of the outermost voxels that of
    the border, as in :py:func:`warp_by_ddf`. Differentiable in points and field.

    Args:
        points: ``(B, N, ndim)``, voxels of the fixed image, coordinate ``i`` along axis ``i``; the first centre is 0.
        ddf: ``(B, ndim, *spatial)`` in voxels, 2-D or 3-D.
        outside: points outside the voxels of the grid are an error with ``"refuse"``; with ``"clamp"`` they move by the
            displacement of the nearest border point, and their number is logged. Defaults to ``"refuse"``.

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
