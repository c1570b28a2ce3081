# SPDX-License-Identifier: Apache-2.0
"""From the files of a subject or a pair to what a network takes: checked channel-first tensors, images in [0, 1]."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import Compose, CopyItemsd, MapTransform, Resized
from monai.utils import ensure_tuple

from monai_deq.networks.blocks import OutsidePoints

from .fields import LoadDDFd, ResampleDDFd
from .images import (
    CheckLabeld,
    CheckRegistrationImaged,
    CheckSameGridd,
    CheckSameKeypointsd,
    DropSliceAxisd,
    LoadKeypointsd,
    LoadRegistrationImaged,
    ResizeKeypointsd,
    ScaleToUnitRanged,
    WindowToUnitRanged,
)

__all__ = ["CheckedCompose", "load_annotated_pair_transforms", "load_pair_transforms", "load_subject_transforms"]

_PAIR, _SCANS = ("fixed", "moving"), ("fixed_scan", "moving_scan")


class CheckedCompose(Compose):
    """MONAI's ``Compose``, which raises the error of a check itself, not ``RuntimeError("applying transform ...")``."""

    def __call__(self, input_: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # as Compose
        try:
            return super().__call__(input_, *args, **kwargs)
        except RuntimeError as e:
            error: BaseException = e
            while str(error).startswith("applying transform") and error.__cause__ is not None:
                error = error.__cause__
            if error is e:
                raise
            raise error from error.__cause__


def _read(spatial_dims: int, images: Sequence[Hashable], labels: Sequence[Hashable]) -> list[MapTransform]:
    """Read images and segmentations, each of which may be absent, and check the images."""
    return [
        LoadRegistrationImaged(images),
        LoadRegistrationImaged(labels, allow_missing_keys=True),
        *([DropSliceAxisd((*images, *labels), allow_missing_keys=True)] if spatial_dims == 2 else []),
        CheckRegistrationImaged(images, spatial_dims),
    ]


def _scale(images: Sequence[Hashable], window: Sequence[float] | None) -> MapTransform:
    return ScaleToUnitRanged(images) if window is None else WindowToUnitRanged(images, window)


def _resize(
    spatial_dims: int, spatial_size: Sequence[int] | None, images: Sequence[Hashable], labels: Sequence[Hashable] = ()
) -> list[MapTransform]:
    """Images by linear interpolation, smoothed first where they shrink, segmentations by the nearest voxel."""
    if spatial_size is None:
        return []
    size = tuple(spatial_size) if isinstance(spatial_size, Sequence) else (spatial_size,)
    if len(size) != spatial_dims or not all(isinstance(n, int) and n > 1 for n in size):
        raise ValueError(
            f"spatial_size must be {spatial_dims} numbers of voxels above 1 (spatial_dims={spatial_dims}), got "
            f"{spatial_size!r}."
        )
    linear = "bilinear" if spatial_dims == 2 else "trilinear"
    transforms: list[MapTransform] = [Resized(images, size, mode=linear, align_corners=False, anti_aliasing=True)]
    if labels:
        # "nearest" of torch rounds down, which shifts labels against the image; "nearest-exact" does not
        transforms.append(Resized(labels, size, mode="nearest-exact", allow_missing_keys=True))
    return transforms


def load_subject_transforms(
    spatial_dims: int,
    spatial_size: Sequence[int] | None = None,
    image_keys: KeysCollection = ("image",),
    label_keys: KeysCollection = ("label",),
) -> CheckedCompose:
    """
    Transforms from ``{"image": file, "label": file or None}`` to checked float32 ``MetaTensor`` ``(1, *spatial)``,
    intensities scaled to [0, 1] where needed. Images are resized by linear interpolation between voxel centres,
    smoothed first where they shrink; segmentations by the nearest voxel. Affines follow.

    Args:
        spatial_dims: 2 or 3.
        spatial_size: size to resize to in voxels, ``spatial_dims`` numbers. Defaults to None: as in the files.
        image_keys, label_keys: keys of the images, and of their segmentations, absent or None where there is none.
    """
    images, labels = ensure_tuple(image_keys), ensure_tuple(label_keys)
    transforms = [
        *_read(spatial_dims, images, labels),
        CheckLabeld(labels, images, allow_missing_keys=True),
        ScaleToUnitRanged(images),
        *_resize(spatial_dims, spatial_size, images, labels),
    ]
    return CheckedCompose(transforms, log_stats=False)


def load_pair_transforms(
    spatial_dims: int, spatial_size: Sequence[int] | None = None, window: Sequence[float] | None = None
) -> CheckedCompose:
    """
    Transforms from ``{"fixed": file, "moving": file}``, perhaps with ``"moving_label"`` and ``"initial_ddf"``, to what
    registers them: ``"fixed"`` and ``"moving"`` in [0, 1] at the network's size, as is the field to start from, and
    ``"fixed_scan"`` and ``"moving_scan"`` with their own intensities and size, which the field found is applied to.

    Args:
        spatial_dims: 2 or 3.
        spatial_size: size the network works at, ``spatial_dims`` numbers. Defaults to None: the scans' own.
        window: see :py:class:`WindowToUnitRanged`. Defaults to None: see :py:class:`ScaleToUnitRanged`.
    """
    label = ("moving_label",)
    transforms = [
        *_read(spatial_dims, _PAIR, label),
        CheckLabeld(label, ("moving",), allow_missing_keys=True),
        CheckSameGridd(_PAIR),
        CopyItemsd(_PAIR, names=_SCANS),
        LoadDDFd("initial_ddf", "fixed_scan", spatial_dims, allow_missing_keys=True),
        _scale(_PAIR, window),
        *_resize(spatial_dims, spatial_size, _PAIR),
        ResampleDDFd("fixed", "initial_ddf", allow_missing_keys=True),
    ]
    return CheckedCompose(transforms, log_stats=False)


def load_annotated_pair_transforms(
    spatial_dims: int = 3,
    spatial_size: Sequence[int] | None = None,
    window: Sequence[float] | None = (-1200.0, 400.0),
    keep_scans: bool = False,
    outside: OutsidePoints = "refuse",
) -> CheckedCompose:
    """
    Transforms from ``{"fixed": file, "moving": file}``, perhaps with ``"fixed_mask"``, ``"fixed_label"``,
    ``"fixed_keypoints"`` and the same of ``"moving"`` (see :py:func:`monai_deq.data.find_learn2reg`), to float32
    ``(1, *spatial)``, resized as by :py:func:`load_subject_transforms`, and keypoints ``(N, ndim)`` in voxels of them.

    Args:
        spatial_dims, spatial_size: see :py:func:`load_subject_transforms`.
        window: see :py:class:`WindowToUnitRanged`; None: see :py:class:`ScaleToUnitRanged`. Defaults to (-1200, 400),
            Hounsfield units that keep the contrast inside the lung.
        keep_scans: also give the scans as they are in the files, ``"fixed_scan"`` and ``"moving_scan"``, and leave
            masks, labels and keypoints on their grid, to judge there what a network finds.
        outside: keypoints outside their image, see :py:class:`LoadKeypointsd`.
    """
    labels = tuple(f"{image}_{kind}" for kind in ("mask", "label") for image in _PAIR)
    keypoints = tuple(f"{image}_keypoints" for image in _PAIR)
    transforms = [
        *_read(spatial_dims, _PAIR, labels),
        CheckLabeld(labels, _PAIR * 2, allow_missing_keys=True),
        CheckSameGridd(_PAIR),
        LoadKeypointsd(keypoints, _PAIR, outside, allow_missing_keys=True),
        CheckSameKeypointsd(keypoints, allow_missing_keys=True),
        *([CopyItemsd(_PAIR, names=_SCANS)] if keep_scans else []),
        _scale(_PAIR, window),
    ]
    resize = _resize(spatial_dims, spatial_size, _PAIR, () if keep_scans else labels)
    if spatial_size is not None and not keep_scans:
        transforms.append(ResizeKeypointsd(keypoints, _PAIR, spatial_size, allow_missing_keys=True))
    return CheckedCompose([*transforms, *resize], log_stats=False)
