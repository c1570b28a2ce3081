# SPDX-License-Identifier: Apache-2.0
"""Keypoints: read, checked against their image and the other set of a pair, carried to another image size."""

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

from monai_deq.data import source_of
from monai_deq.networks.blocks import OutsidePoints, check_outside, points_outside

from .images import existing_file, one_image_each

__all__ = ["CheckSameKeypointsD", "CheckSameKeypointsDict", "CheckSameKeypointsd", "load_keypoints", "resize_keypoints"]
__all__ += ["LoadKeypointsD", "LoadKeypointsDict", "LoadKeypointsd"]
__all__ += ["ResizeKeypointsD", "ResizeKeypointsDict", "ResizeKeypointsd"]

logger = logging.getLogger("monai_deq")


def load_keypoints(path: str | Path, spatial_dims: int) -> torch.Tensor:
    """
    Read keypoints as the Learn2Reg challenge stores them: one point a line, its voxel coordinates in the order of the
    array axes, separated by commas, no header. The same line of two files is the same point of the body.

    Args:
        path: ``.csv`` file.
        spatial_dims: 2 or 3.

    Returns:
        ``(N, spatial_dims)``, float32, voxels; the first voxel's centre is 0.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it holds anything but such lines, or none.
    """
    path = existing_file(path, "keypoints")
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
    The same points on the grid of the image after MONAI's ``Resize``, where voxel borders, not centres, coincide.

    Args:
        points: ``(..., ndim)`` in voxels of the old grid.
        old_size, new_size: number of voxels along each axis before and after.

    Returns:
        ``(..., ndim)`` in voxels of the new grid.
    """
    scale = points.new_tensor(new_size) / points.new_tensor(old_size)
    return (points + 0.5) * scale - 0.5


class LoadKeypointsd(MapTransform):
    """
    Dictionary-based wrapper of :py:func:`load_keypoints`, with a check that the points lie in their image.

    Args:
        keys, allow_missing_keys: of the file names, and of the points ``(N, ndim)``; see MONAI's ``MapTransform``.
        image_keys: keys of the images ``(C, *spatial)`` they belong to, one for each of ``keys``.
        outside: points outside the voxels of the image are an error with ``"refuse"``; with ``"clamp"`` they are kept
            as they are, for a metric that clamps, and their number is logged. Defaults to ``"refuse"``.

    Raises:
        ValueError: When an argument is wrong, a file holds no points, or a point lies outside and is refused.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_keys: KeysCollection,
        outside: OutsidePoints = "refuse",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_outside(outside)
        self.image_keys = one_image_each(self.keys, image_keys)
        self.outside = outside

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, image_key in self.key_iterator(d, self.image_keys):
            file, image = d[key], d[image_key]
            spatial = tuple(image.shape[1:])
            points = load_keypoints(file, len(spatial))
            beyond = points_outside(points, spatial)
            if beyond.any():
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
            d[key] = points
        return d


class CheckSameKeypointsd(MapTransform):
    """
    Refuse sets of keypoints that cannot correspond point by point.

    Args:
        keys, allow_missing_keys: of the points ``(N, ndim)``, each compared with the first. Defaults to
            ``("fixed_keypoints", "moving_keypoints")``.

    Raises:
        ValueError: When two sets differ in the number of points.
    """

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


class ResizeKeypointsd(MapTransform):
    """
    Dictionary-based wrapper of :py:func:`resize_keypoints`. Let it come before the images are resized.

    Args:
        keys, allow_missing_keys: of the points ``(N, ndim)``; see MONAI's ``MapTransform``.
        image_keys: keys of the images ``(C, *spatial)`` they belong to, still at their old size, one for each.
        spatial_size: size that the images will have.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_keys: KeysCollection,
        spatial_size: Sequence[int],
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_keys = one_image_each(self.keys, image_keys)
        self.spatial_size = tuple(spatial_size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, image_key in self.key_iterator(d, self.image_keys):
            d[key] = resize_keypoints(d[key], d[image_key].shape[1:], self.spatial_size)
        return d


CheckSameKeypointsD = CheckSameKeypointsDict = CheckSameKeypointsd
LoadKeypointsD = LoadKeypointsDict = LoadKeypointsd
ResizeKeypointsD = ResizeKeypointsDict = ResizeKeypointsd
