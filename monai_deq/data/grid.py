# SPDX-License-Identifier: Apache-2.0
"""Where the voxels of an image lie: size, spacing, orientation and origin, and whether two images share them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import product

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd

__all__ = ["Grid", "affine_of", "check_same_grid", "grid_distance", "grid_of", "same_grid", "source_of"]

logger = logging.getLogger("monai_deq")


@dataclass(frozen=True, eq=False)
class Grid:
    """The voxel grid of one image.

    Args:
        size: number of voxels along each array axis.
        spacing: voxel size along each array axis in mm.
        direction: direction cosines ``(3, ndim)``, column ``i`` is the world direction of array axis ``i``.
        origin: world position ``(3,)`` of the first voxel in mm.
    """

    size: tuple[int, ...]
    spacing: np.ndarray
    direction: np.ndarray
    origin: np.ndarray

    @property
    def orientation(self) -> str:
        """World direction of each array axis in letters, e.g. ``"LIA"``; a 2-D grid has two."""
        ndim = self.direction.shape[1]
        affine = np.eye(4)
        affine[:3, :3] = np.linalg.svd(self.direction)[0]  # any complement serves: only the first ndim letters are kept
        affine[:3, :ndim] = self.direction
        return "".join(nib.aff2axcodes(affine)[:ndim])


def source_of(image: torch.Tensor, name: str) -> str:
    """The file that an image was loaded from, else ``name``; for error messages and log lines."""
    file = image.meta.get("filename_or_obj") if isinstance(image, MetaTensor) else None
    return file if isinstance(file, str) else name


def grid_of(image: torch.Tensor) -> Grid | None:
    """The grid of an image ``(C, *spatial)``; None where the tensor carries no affine."""
    if not isinstance(image, MetaTensor):
        return None
    size, affine = tuple(image.shape[1:]), np.asarray(image.affine, dtype=np.float64)
    # whole columns: the axes of a slice need not be the first two of the world, as MONAI's pixdim takes them
    rows = affine.shape[0] - 1
    columns, origin = np.zeros((3, len(size))), np.zeros(3)
    columns[:rows], origin[:rows] = affine[:rows, : len(size)], affine[:rows, -1]
    spacing = np.linalg.norm(columns, axis=0)
    return Grid(size, spacing, columns / np.where(spacing > 0, spacing, 1.0), origin)


def affine_of(image: torch.Tensor) -> np.ndarray:
    """Voxel to RAS mm of an image ``(C, *spatial)``, ``(4, 4)``, float64; the identity where it carries none. Of a
    slice the third column is at right angles to the plane where it is not given.
    """
    if not isinstance(image, MetaTensor):
        return np.eye(4)
    affine = to_affine_nd(3, np.asarray(image.affine, dtype=np.float64))
    if image.ndim == 3 and abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / max(float(np.linalg.norm(normal)), 1e-12)
    return np.asarray(affine)


def grid_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far apart the voxels of two images ``(C, *spatial)`` lie at most, in voxels of the first; infinite where
    their sizes differ.
    """
    if a.shape[1:] != b.shape[1:]:
        return float("inf")
    first, second = affine_of(a), affine_of(b)
    corners = np.array([*product(*((0, n - 1) for n in a.shape[1:]))], dtype=float)
    apart = corners @ (first - second)[:3, : corners.shape[1]].T + (first - second)[:3, 3]
    return float(np.linalg.norm(apart, axis=1).max() / np.linalg.norm(first[:3, : corners.shape[1]], axis=0).min())


def same_grid(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the voxels of two images lie at the same places, to a thousandth of a voxel, as headers keep them."""
    return grid_distance(a, b) <= 1e-3


def check_same_grid(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    fixed_name: str,
    moving_name: str,
    what: str = "Fixed and moving image",
    warn: bool = True,
) -> None:
    """Refuse a pair that does not lie on one voxel grid; warn of another origin, which affine alignment may leave.

    Args:
        fixed: ``(C, *spatial)``, as ``moving``; size alone is compared where either tensor has no affine.
        moving: the moving image.
        fixed_name: how to call the fixed image in messages, e.g. its subject or file.
        moving_name: the same for the moving image.
        what: what the two are, for messages.
        warn: log a warning where merely the origin differs.

    Raises:
        ValueError: When size, spacing or orientation differ.
    """

    def refuse(part: str, of_fixed: object, of_moving: object) -> None:
        raise ValueError(
            f"{what} must share one voxel grid, but their {part} differs: "
            f"{fixed_name} has {of_fixed}, {moving_name} has {of_moving}. "
            "Resample one onto the other first (e.g. with monai.transforms.ResampleToMatch)."
        )

    if fixed.shape[1:] != moving.shape[1:]:
        refuse("size", tuple(fixed.shape[1:]), tuple(moving.shape[1:]))
    a, b = grid_of(fixed), grid_of(moving)
    if a is None or b is None:
        return
    # 1e-3 of a voxel per voxel: below what float32 headers and nibabel's quaternions keep apart over one image
    if not np.allclose(a.spacing, b.spacing, rtol=1e-3, atol=0.0):
        refuse("spacing (mm)", a.spacing.round(4).tolist(), b.spacing.round(4).tolist())
    if not np.allclose(a.direction, b.direction, rtol=0.0, atol=1e-3):
        if a.orientation != b.orientation:
            refuse("orientation", a.orientation, b.orientation)
        refuse("orientation (direction cosines)", a.direction.round(3).tolist(), b.direction.round(3).tolist())
    if warn and not np.allclose(a.origin, b.origin, rtol=0.0, atol=1e-3 * a.spacing.max()):
        places = fixed_name, a.origin.round(3).tolist(), moving_name, b.origin.round(3).tolist()
        logger.warning(f"{what} have another origin (%s at %s mm, %s at %s mm); they are taken voxel by voxel", *places)
