# SPDX-License-Identifier: Apache-2.0
"""Scans of smooth blobs that lie in the world, sampled on any grid and written to files, and grids of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation

#: RAS mm: places, widths and heights of the blobs, of a scan about 40 mm wide around the origin
_PLACES = np.array(
    [[0, 0, 0], [-9, 5, 3], [8, -6, 5], [4, 9, -7], [-6, -8, -6], [9, 6, 7], [-3, 2, 10], [2, -9, 1], [-10, -1, -3]],
    dtype=float,
)
_WIDTHS = np.array([9, 3.5, 4, 3.2, 3.8, 3, 3.4, 3, 3.6])
_HEIGHTS = np.array([60, 50, 70, 55, 65, 45, 60, 50, 40.0])


def blobs(points: np.ndarray) -> np.ndarray:
    """A smooth function of world points ``(..., 3)``, from 20 outside to about 150, unlike its mirror images."""
    apart = ((points[..., None, :] - _PLACES) ** 2).sum(axis=-1)
    return 20.0 + (np.exp(-apart / (2 * _WIDTHS**2)) * _HEIGHTS).sum(axis=-1)


def parts(points: np.ndarray) -> np.ndarray:
    """Label numbers of world points ``(..., 3)``: of the nearest blob where the function is high, else 0."""
    apart = np.sqrt(((points[..., None, :] - _PLACES) ** 2).sum(axis=-1)) / _WIDTHS
    return np.where(apart.min(axis=-1) < 1.5, apart.argmin(axis=-1) + 1, 0)


def bent(points: np.ndarray, size: float = 1.5) -> np.ndarray:
    """World points ``(..., 3)`` displaced smoothly by at most about ``size`` mm an axis."""
    x, y, z = np.moveaxis(points, -1, 0)
    return points + size * np.stack([np.sin(y / 7 + 1), np.cos(z / 8) * np.sin(x / 9), np.sin(x / 6 + y / 11)], axis=-1)


def world(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Places of the voxels of a grid, ``(*shape, 3)``, of two axes or three."""
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).astype(float)
    return voxels @ affine[:3, : len(shape)].T + affine[:3, 3]


def grid(
    shape: Sequence[int],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    axes: str = "RAS",
    turn: Sequence[float] = (0.0, 0.0, 0.0),
    centre: Sequence[float] = (0.0, 0.0, 0.0),
) -> np.ndarray:
    """Affine, voxel to RAS mm, of a grid whose middle is at ``centre``: axes in letters, turned about x, y, z in
    degrees.
    """
    columns = np.zeros((3, 3))
    for i, letter in enumerate(axes):
        row = next(row for row, both in enumerate(("RL", "AP", "SI")) if letter in both)
        columns[row, i] = 1.0 if letter in "RAS" else -1.0
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ columns * np.asarray(spacing)
    affine[:3, 3] = np.asarray(centre) - affine[:3, :3] @ ((np.array([*shape, 1, 1])[:3] - 1) / 2)
    return affine


def write(
    path: Path,
    affine: np.ndarray,
    shape: Sequence[int],
    of: Callable[[np.ndarray], np.ndarray] = blobs,
    dtype: type = np.float32,
) -> Path:
    """Sample a function of the world on a grid and write it as NIfTI; a shape of two numbers is a file of two axes."""
    nib.save(nib.Nifti1Image(of(world(affine, shape)).astype(dtype), affine), path)
    return path
