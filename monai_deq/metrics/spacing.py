# SPDX-License-Identifier: Apache-2.0
"""Voxel size in mm, as metrics of lengths take it."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["affine_spacing"]


def affine_spacing(affine: torch.Tensor, ndim: int) -> list[float]:
    """
    Voxel size along each array axis in mm. MONAI's ``pixdim`` of a 2-D image reads the upper left corner of a 4x4
    affine, which is wrong for a slice that does not lie in x and y; the length of the whole column is right for any.

    Args:
        affine: ``(4, 4)``, or ``(3, 3)`` of a 2-D image.
        ndim: number of array axes.
    """
    columns = np.asarray(affine, dtype=np.float64)[:-1, :ndim]
    return np.linalg.norm(columns, axis=0).tolist()
