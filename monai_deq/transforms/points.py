# SPDX-License-Identifier: Apache-2.0
"""Keypoints: read, checked against their images, and taken along when these are resized."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from monai_deq.data import LPS, affine_of, existing_file, source_of
from monai_deq.networks.blocks import OutsidePoints, check_outside, points_outside

from .items import PerKeyOfImaged

__all__ = ["CheckSameKeypointsD", "CheckSameKeypointsDict", "CheckSameKeypointsd", "LoadKeypointsD"]
__all__ += ["LoadKeypointsDict", "LoadKeypointsd", "ResizeKeypointsD", "ResizeKeypointsDict", "ResizeKeypointsd"]
__all__ += ["load_keypoints", "read_world_points", "resize_keypoints"]

logger = logging.getLogger("monai_deq")


def _world_rows(path: Path) -> np.ndarray | None:
    """Points in LPS mm ``(N, 3)`` of a file that says so: ANTs' ``x,y,z`` header, Slicer's ``.fcsv``; else None."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return None
    slicer = path.suffix.lower() == ".fcsv"
    comments = [line for line in text.splitlines() if line.startswith("#")]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not slicer and (
        not lines or lines[0].replace(" ", "").replace('"', "").lower().split(",")[:3] != ["x", "y", "z"]
    ):
        return None
    start = 1 if slicer else 0
    try:
        rows = [
            [float(number) for number in line.split(",")[start : start + 3]] for line in lines[0 if slicer else 1 :]
        ]
        points = np.array(rows, dtype=float).reshape(len(rows), 3)
    except ValueError as e:
        raise ValueError(f"{path}: expected lines of x, y, z in mm; cannot read it ({e}).") from e
    if not points.size or not np.isfinite(points).all():
        raise ValueError(
            f"{path}: expected lines of x, y, z in mm, got {'NaN or infinity' if points.size else 'none'}."
        )
    # Slicer's files before version 5 are in RAS
    system = next((line.split("=")[1].strip() for line in comments if "CoordinateSystem" in line), "LPS")
    return points * [-1, -1, 1] if slicer and system in ("0", "RAS") else points


def read_world_points(
    path: str | Path, affine: np.ndarray | None = None, spatial_dims: int | None = None
) -> torch.Tensor:
    """
    Read points: ``.csv`` with a header ``x,y,z``, LPS mm, as ANTs has it; Slicer's ``.fcsv``; or as the Learn2Reg
    challenge has them, see :py:func:`load_keypoints`.

    Args:
        path: the file.
        affine: ``(4, 4)`` of the image whose voxels points without a header are. Defaults to ``None``: they are
            refused.
        spatial_dims: 2 or 3, of that image.

    Returns:
        ``(N, 3)``, float64, RAS mm.

    Raises:
        FileNotFoundError, ValueError: When there is no such file, or it holds none or anything else.
    """
    path = existing_file(path, "keypoints")
    rows = _world_rows(path)
    if rows is not None:
        return torch.from_numpy(rows * [-1.0, -1.0, 1.0])
    if affine is None or spatial_dims is None:
        raise ValueError(f"{path}: points without a header 'x,y,z' are voxels of an image: name it with --reference.")
    points = load_keypoints(path, spatial_dims).double()
    points = torch.cat([points, points.new_zeros(len(points), 3 - spatial_dims)], dim=1)
    matrix = torch.from_numpy(affine)
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def load_keypoints(path: str | Path, spatial_dims: int, affine: np.ndarray | None = None) -> torch.Tensor:
    """
    Read keypoints as the Learn2Reg challenge stores them: one point a line, its voxel coordinates in the order of the
    array axes, separated by commas, no header. The same line of two files is the same point of the body.

    Args:
        path: ``.csv`` file; ``FileNotFoundError`` without it, ``ValueError`` for anything but such lines, or none.
        spatial_dims: 2 or 3.
        affine: ``(4, 4)`` of their image, with which files in mm are read too, see :py:func:`read_world_points`.
            Defaults to ``None``: they are refused.

    Returns:
        ``(N, spatial_dims)``, float32, voxels; the first voxel's centre is 0.
    """
    path = existing_file(path, "keypoints")
    rows = None if affine is None else _world_rows(path)
    if rows is not None:
        inverse = np.linalg.inv(affine) @ LPS  # type: ignore[arg-type]
        voxels = rows @ inverse[:3, :3].T + inverse[:3, 3]
        return torch.from_numpy(voxels[:, :spatial_dims].astype(np.float32))
    expected = f"{path}: expected lines of {spatial_dims} voxel coordinates separated by commas, without a header"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, of an empty file
            points = np.loadtxt(path, delimiter=",", ndmin=2)
    except (ValueError, UnicodeDecodeError) as e:
        raise ValueError(f"{expected}; cannot read it ({e}).") from e
    if not points.size:
        raise ValueError(f"{expected}; the file is empty.")
    if points.shape[1] != spatial_dims:
        raise ValueError(f"{expected}; got {points.shape[1]} column(s).")
    if not np.isfinite(points).all():
        line = 1 + int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise ValueError(f"{expected}; point {line} has NaN or infinity.")
    return torch.from_numpy(points.astype(np.float32))


def resize_keypoints(points: torch.Tensor, old_size: Sequence[int], new_size: Sequence[int]) -> torch.Tensor:
    """
    The same points ``(..., ndim)``, in voxels, on the grid of the image after MONAI's ``Resize`` from ``old_size`` to
    ``new_size``, where voxel borders, not centres, coincide.
    """
    scale = points.new_tensor(new_size) / points.new_tensor(old_size)
    return (points + 0.5) * scale - 0.5


class LoadKeypointsd(PerKeyOfImaged):
    """
    Dictionary-based wrapper of :py:func:`load_keypoints`, with a check that the points lie in their image.

    Args:
        keys, allow_missing_keys: of the file names, and of the points ``(N, ndim)``; see MONAI's ``MapTransform``.
        image_keys: keys of the images ``(C, *spatial)`` they belong to, one for each of ``keys``.
        outside: ``"refuse"`` points outside the image, or ``"clamp"``: they are kept, for a metric that clamps, and
            their number is logged.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_keys: KeysCollection,
        outside: OutsidePoints = "refuse",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, image_keys, allow_missing_keys)
        check_outside(outside)
        self.outside = outside

    def treat(self, item: dict[Hashable, Any], key: Hashable, image_key: Hashable) -> None:
        file, image = item[key], item[image_key]
        spatial = tuple(image.shape[1:])
        item[key] = points = load_keypoints(file, len(spatial), affine_of(image))
        beyond = points_outside(points, spatial)
        if not beyond.any():
            return
        line = 1 + int(beyond.nonzero()[0])
        message = (
            f"{file}: {int(beyond.sum())} of {len(points)} keypoints lie outside the image of size {spatial} "
            f"({source_of(image, str(image_key))}), e.g. line {line}: "
            f"{[round(value, 4) for value in points[line - 1].tolist()]}"
        )
        if self.outside == "refuse":
            raise ValueError(
                f"{message}. They must be voxel coordinates in the order of the image's axes; remove the "
                "points from both files of the pair, or choose outside='clamp'."
            )
        logger.warning("%s; they are kept", message)


class CheckSameKeypointsd(MapTransform):
    """Refuse (``ValueError``) sets of keypoints ``(N, ndim)`` of other length than the first: they must correspond."""

    def __init__(
        self, keys: KeysCollection = ("fixed_keypoints", "moving_keypoints"), allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        first, *others = list(self.key_iterator(d)) or [None]
        for key in others:
            if d[key].shape != d[first].shape:
                names = " and ".join(str(d[name]) for name in ("fixed_subject", "moving_subject") if name in d)
                raise ValueError(
                    f"Keypoints must correspond line by line, but {first!r} has {len(d[first])} points and {key!r} has "
                    f"{len(d[key])}{f' ({names})' if names else ''}. Take both files from the same release of the data."
                )
        return d


class ResizeKeypointsd(PerKeyOfImaged):
    """
    Dictionary-based wrapper of :py:func:`resize_keypoints`, to the ``spatial_size`` that their images will have; let it
    come before these, ``(C, *spatial)`` under ``image_keys``, one for each of ``keys``, are resized.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_keys: KeysCollection,
        spatial_size: Sequence[int],
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, image_keys, allow_missing_keys)
        self.spatial_size = tuple(spatial_size)

    def treat(self, item: dict[Hashable, Any], key: Hashable, image_key: Hashable) -> None:
        item[key] = resize_keypoints(item[key], item[image_key].shape[1:], self.spatial_size)


CheckSameKeypointsD = CheckSameKeypointsDict = CheckSameKeypointsd
LoadKeypointsD = LoadKeypointsDict = LoadKeypointsd
ResizeKeypointsD = ResizeKeypointsDict = ResizeKeypointsd
