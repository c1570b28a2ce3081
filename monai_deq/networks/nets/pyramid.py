# SPDX-License-Identifier: Apache-2.0
"""Images and displacements at half and at twice the size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["coarser", "coarser_ddf", "finer"]

_LINEAR = {2: "bilinear", 3: "trilinear"}
_AVERAGE = {2: F.avg_pool2d, 3: F.avg_pool3d}


def coarser(image: torch.Tensor) -> torch.Tensor:
    """
    Half the size, rounded up: means of two voxels along each axis; a last odd voxel stands alone, and an axis of one
    voxel is left as it is.

    Args:
        image: ``(B, C, *spatial)``.
    """
    window = [min(n, 2) for n in image.shape[2:]]
    return _AVERAGE[image.ndim - 2](image, window, ceil_mode=True, count_include_pad=False)


def _factors(ddf: torch.Tensor, fine: Sequence[int], coarse: Sequence[int]) -> torch.Tensor:
    """By how much the values of a displacement grow from a coarse to a fine grid, per component."""
    # an axis of one voxel was not halved
    factors = ddf.new_tensor([1 if n == m else 2 for n, m in zip(fine, coarse, strict=True)])
    return factors.view(1, -1, *[1] * (ddf.ndim - 2))


def coarser_ddf(ddf: torch.Tensor) -> torch.Tensor:
    """
    A displacement on the grid of half the size, in voxels of that grid.

    Args:
        ddf: ``(B, ndim, *spatial)`` in voxels.
    """
    coarse = coarser(ddf)
    return coarse / _factors(ddf, ddf.shape[2:], coarse.shape[2:])


def finer(state: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """
    A displacement, and a hidden state behind it, on the grid twice as fine.

    Args:
        state: ``(B, ndim + hidden, *spatial)``, the displacement in voxels.
        size: spatial size of the finer grid, to which the result is cropped.
    """
    ndim = state.ndim - 2
    # without align_corners the finer voxels lie symmetrically in the coarse ones: displacements double, exactly
    fine = F.interpolate(state, scale_factor=2, mode=_LINEAR[ndim], align_corners=False)
    fine = fine[(..., *(slice(n) for n in size))]  # type: ignore[index]
    return torch.cat([_factors(fine, size, state.shape[2:]) * fine[:, :ndim], fine[:, ndim:]], dim=1)
