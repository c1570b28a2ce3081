# SPDX-License-Identifier: Apache-2.0
"""From the files of a pair to what the network takes, with the scans as they are kept beside it."""

from __future__ import annotations

from collections.abc import Sequence

from monai.transforms import CopyItemsd

from monai_deq.transforms.intensity_window import WindowToUnitRanged
from monai_deq.transforms.load_ddf import LoadDDFd
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
from monai_deq.transforms.resample_ddf import ResampleDDFd

__all__ = ["load_pair_transforms"]


def load_pair_transforms(
    spatial_dims: int, spatial_size: Sequence[int] | None = None, window: Sequence[float] | None = None
) -> CheckedCompose:
    """
    Transforms from ``{"fixed": file, "moving": file}``, perhaps with ``"moving_label"`` and ``"initial_ddf"``, to
    checked channel-first images, and the field to start from on the network's grid.

    ``"fixed_scan"`` and ``"moving_scan"`` are the scans with their own intensities and size, to be used when the field
    is applied; ``"fixed"`` and ``"moving"`` are scaled to [0, 1] where needed and resized to ``spatial_size`` for the
    network.

    Args:
        spatial_dims: 2 or 3.
        spatial_size: size the network works at. Defaults to ``None``: the scans' own.
        window: lower and upper end of the intensities, see :py:class:`monai_deq.transforms.WindowToUnitRanged`.
            Defaults to ``None``: scaled from their own minimum and maximum where they are not in [0, 1].

    Raises:
        ValueError: When ``spatial_dims`` is not 2 or 3, ``spatial_size`` does not give so many numbers above 1, or the
            window is wrong.
    """
    images = ("fixed", "moving")
    label = ("moving_label",)
    everything = (*images, *label)
    transforms = [
        LoadRegistrationImaged(images),
        LoadRegistrationImaged(label, allow_missing_keys=True),
        *([DropSliceAxisd(everything, allow_missing_keys=True)] if spatial_dims == 2 else []),
        CheckRegistrationImaged(images, spatial_dims),
        CheckLabeld(label, ("moving",), allow_missing_keys=True),
        CheckSameGridd(images),
        CopyItemsd(images, names=["fixed_scan", "moving_scan"]),
        LoadDDFd("initial_ddf", "fixed_scan", spatial_dims, allow_missing_keys=True),
        ScaleToUnitRanged(images) if window is None else WindowToUnitRanged(images, window),
        *resize_transforms(spatial_dims, spatial_size, images),
        ResampleDDFd("fixed", "initial_ddf", allow_missing_keys=True),
    ]
    return CheckedCompose(transforms, log_stats=False)
