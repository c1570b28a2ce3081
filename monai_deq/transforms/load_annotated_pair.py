# SPDX-License-Identifier: Apache-2.0
"""From the files of a pair to checked images in [0, 1] with their masks, labels and keypoints."""

from __future__ import annotations

from collections.abc import Sequence

from monai.transforms import CopyItemsd, MapTransform

from monai_deq.networks.blocks import OutsidePoints
from monai_deq.transforms.intensity_window import WindowToUnitRanged
from monai_deq.transforms.load_keypoints import CheckSameKeypointsd, LoadKeypointsd, ResizeKeypointsd
from monai_deq.transforms.load_subject import (
    CheckedCompose,
    CheckLabeld,
    CheckRegistrationImaged,
    CheckSameGridd,
    DropSliceAxisd,
    LoadRegistrationImaged,
    ScaleToUnitRanged,
    resize_transforms,
)

__all__ = ["load_annotated_pair_transforms"]


def load_annotated_pair_transforms(
    spatial_dims: int = 3,
    spatial_size: Sequence[int] | None = None,
    window: Sequence[float] | None = (-1200.0, 400.0),
    keep_scans: bool = False,
    outside: OutsidePoints = "refuse",
) -> CheckedCompose:
    """
    Transforms from ``{"fixed": file, "moving": file}``, perhaps with ``"fixed_mask"``, ``"fixed_label"``,
    ``"fixed_keypoints"`` and the same of ``"moving"``, as :py:func:`monai_deq.data.find_learn2reg` gives them, to
    checked tensors.

    Images, masks and labels become float32 ``MetaTensor`` ``(1, *spatial)``, keypoints ``(N, ndim)`` float32 voxel
    coordinates. Images are resized by linear interpolation between voxel centres, smoothed first where they shrink,
    masks and labels by the nearest voxel; affines follow, and keypoints too, so that a length in mm stays what it is.
    Pairs with another number of keypoints do not fit into one batch of tensors: use a batch size of 1.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        spatial_size: size to resize to in voxels, ``spatial_dims`` numbers. Defaults to None: as in the files.
        window: lower and upper end of the intensities, clipped there and scaled to [0, 1]; None for images in other
            units: scaled from their own minimum and maximum where they are not in [0, 1]. Defaults to
            (-1200, 400), Hounsfield units that keep the contrast inside the lung.
        keep_scans: also give the scans as they are in the files, ``"fixed_scan"`` and ``"moving_scan"``, and leave
            masks, labels and keypoints on their grid: to judge at full size what a network finds at ``spatial_size``
            (see :py:class:`monai_deq.transforms.ResampleDDFd`). Defaults to False.
        outside: keypoints outside their image: ``"refuse"`` or ``"clamp"``, see
            :py:class:`monai_deq.transforms.LoadKeypointsd`. Defaults to ``"refuse"``.

    Raises:
        ValueError: When an argument is wrong.
    """
    images = ("fixed", "moving")
    labels = tuple(f"{image}_{kind}" for kind in ("mask", "label") for image in images)
    keypoints = tuple(f"{image}_keypoints" for image in images)
    transforms: list[MapTransform] = [
        LoadRegistrationImaged(images),
        LoadRegistrationImaged(labels, allow_missing_keys=True),
    ]
    if spatial_dims == 2:
        transforms.append(DropSliceAxisd((*images, *labels), allow_missing_keys=True))
    transforms += [
        CheckRegistrationImaged(images, spatial_dims),
        CheckLabeld(labels, images * 2, allow_missing_keys=True),
        CheckSameGridd(images),
        LoadKeypointsd(keypoints, images, outside, allow_missing_keys=True),
        CheckSameKeypointsd(keypoints, allow_missing_keys=True),
    ]
    if keep_scans:
        transforms.append(CopyItemsd(images, names=["fixed_scan", "moving_scan"]))
    transforms.append(ScaleToUnitRanged(images) if window is None else WindowToUnitRanged(images, window))
    resize = resize_transforms(spatial_dims, spatial_size, images, () if keep_scans else labels)
    if spatial_size is not None and not keep_scans:
        transforms.append(ResizeKeypointsd(keypoints, images, spatial_size, allow_missing_keys=True))
    return CheckedCompose(transforms + resize, log_stats=False)
