# SPDX-License-Identifier: Apache-2.0
"""From files to what a network takes: images, segmentations and keypoints read, checked, scaled to [0, 1]."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, CopyItemsd, LoadImage, MapTransform, Resized, ScaleIntensity, ScaleIntensityRange
from monai.utils import ensure_tuple

from monai_deq.data import check_same_grid, grid_of, source_of
from monai_deq.networks.blocks import OutsidePoints, check_outside, points_outside

from .fields import LoadDDFd, ResampleDDFd, existing_file
from .warping import PerKeyd

__all__ = ["CheckLabeld", "CheckRegistrationImaged", "CheckSameGridd", "DropSliceAxisd", "LoadRegistrationImaged"]
__all__ += ["CheckSameKeypointsD", "CheckSameKeypointsDict", "CheckSameKeypointsd", "LoadKeypointsD"]
__all__ += ["LoadKeypointsDict", "LoadKeypointsd", "ResizeKeypointsD", "ResizeKeypointsDict", "ResizeKeypointsd"]
__all__ += ["ScaleToUnitRanged", "WindowToUnitRangeD", "WindowToUnitRangeDict", "WindowToUnitRanged"]
__all__ += ["load_keypoints", "resize_keypoints"]
__all__ += ["CheckedCompose", "load_annotated_pair_transforms", "load_pair_transforms", "load_subject_transforms"]

logger = logging.getLogger("monai_deq")

_PAIR, _SCANS = ("fixed", "moving"), ("fixed_scan", "moving_scan")


class _PerKeyOfImaged(PerKeyd):
    """Base where to each of ``keys`` belongs an image of the item, the one of that place in ``image_keys``."""

    def __init__(self, keys: KeysCollection, image_keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        images = ensure_tuple(image_keys)
        if len(images) != len(self.keys):
            raise ValueError(f"image_keys must name one image for each of {tuple(self.keys)}, got {images}.")
        self.beside = (images,)


class LoadRegistrationImaged(PerKeyd):
    """
    Load the image files under ``keys`` by nibabel to channel-first float32 ``MetaTensor``. With ``allow_missing_keys``
    those that are absent or None are left out. ``RuntimeError`` for a damaged file, such as half a download.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.loader = LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True)
        # LoadImage would fall back on the other readers it finds, and ITK makes an image of half a file
        self.loader.readers = self.loader.readers[-1:]

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        file = item[key]
        if file is None and self.allow_missing_keys:
            del item[key]
            return
        if not isinstance(file, (str, Path)):
            raise ValueError(f"{key!r} must be the name of an image file, got {file!r}.")
        existing_file(file, repr(key))
        try:
            item[key] = self.loader(str(file))
        except Exception as e:  # readers raise whatever their file format's library does: EOFError, zlib.error, ...
            reason = next(iter(str(e).strip().splitlines()), "")
            raise RuntimeError(
                f"{key!r}: cannot read {str(file)!r} ({type(e).__name__}: {reason}). "
                "The file is damaged, incomplete or no NIfTI image; download it again."
            ) from e


class DropSliceAxisd(PerKeyd):
    """
    Drop the trailing axis of one voxel that slices have in NIfTI files, ``(C, H, W, 1)`` to ``(C, H, W)``, of what is
    under ``keys``. The 4x4 affine stays whole: MONAI's ``SqueezeDim`` makes that of a coronal slice singular.
    """

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        if item[key].ndim == 4 and item[key].shape[-1] == 1:
            item[key] = item[key].squeeze(-1)
            if isinstance(item[key], MetaTensor):
                item[key].spatial_ndim = 2


class CheckRegistrationImaged(PerKeyd):
    """
    Refuse (``ValueError``, which names the file) images under ``keys`` that cannot be registered: of other than
    ``spatial_dims`` (2 or 3) axes, of several channels, with NaN or infinity, or with one value everywhere.
    """

    def __init__(self, keys: KeysCollection, spatial_dims: int, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
        self.spatial_dims = spatial_dims

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        image, dims = item[key], self.spatial_dims
        name, spatial = source_of(image, str(key)), tuple(image.shape[1:])
        if image.shape[0] != 1:
            raise ValueError(
                f"{name}: expected one {dims}-D image, got a 4-D file or one of several channels: {image.shape[0]} "
                f"channels of {spatial}. Split it and give one image."
            )
        if len(spatial) != dims or 1 in spatial:
            hint = "Give one slice, stored as (H, W) or (H, W, 1)" if dims == 2 else "Give a volume"
            raise ValueError(
                f"{name}: expected a {dims}-D image, got one of size {spatial}. {hint}, or set spatial_dims to fit."
            )
        if bad := int((~torch.isfinite(image)).sum()):
            raise ValueError(
                f"{name}: {bad} of {image.numel()} voxels are NaN or infinite; expected finite intensities. "
                "Repair the image first."
            )
        low = float(image.min())
        if low == float(image.max()):
            what = "is zero everywhere" if low == 0 else f"has the value {low:g} everywhere"
            raise ValueError(f"{name}: the image {what}; there is nothing to register. Check the file or its export.")


class CheckLabeld(_PerKeyOfImaged):
    """
    Refuse (``ValueError``, which names the file) segmentations ``(1, *spatial)`` under ``keys`` with another shape than
    their image, of ``image_keys`` in the same order, or values other than 0, 1, 2, ...
    """

    def treat(self, item: dict[Hashable, Any], key: Hashable, image_key: Hashable) -> None:
        label, image = item[key], item[image_key]
        name, image_name = source_of(label, str(key)), source_of(image, str(image_key))
        if label.shape != image.shape:
            raise ValueError(
                f"{name}: a segmentation must have the shape of its image, {tuple(image.shape)} ({image_name}), "
                f"got {tuple(label.shape)}. Resample it by the nearest neighbour first."
            )
        wrong = ~((label >= 0) & (label == label.round()))  # so that NaN counts as wrong
        if wrong.any():
            raise ValueError(
                f"{name}: a segmentation must hold label numbers 0, 1, 2, ..., but {int(wrong.sum())} voxels have "
                f"others, e.g. {float(label[wrong].flatten()[0]):g}. It may have been resampled by linear "
                "interpolation, or be a probability map."
            )
        a, b = grid_of(label), grid_of(image)
        if a is not None and b is not None and a.orientation != b.orientation:
            message = "%s has orientation %s, its image %s has %s; they are taken to match voxel by voxel"
            logger.warning(message, name, a.orientation, image_name, b.orientation)


class CheckSameGridd(MapTransform):
    """
    Refuse (``ValueError``, which names both files and values) images of other size, spacing or orientation than the
    first; log a warning where merely the origin differs.
    """

    def __init__(self, keys: KeysCollection = ("fixed", "moving"), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        images = [(d[key], source_of(d[key], str(key))) for key in self.key_iterator(d)]
        for image, name in images[1:]:
            check_same_grid(images[0][0], image, images[0][1], name)
        return d


class ScaleToUnitRanged(PerKeyd):
    """
    Scale intensities of the images under ``keys`` linearly from their own minimum and maximum to [0, 1], and say so in
    the log. An image inside [0, 1] passes unchanged, whatever its largest value.
    """

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        low, high = float(item[key].min()), float(item[key].max())
        if low < 0.0 or high > 1.0:
            name = source_of(item[key], str(key))
            logger.info("%s: intensities scaled linearly from [%g, %g] to [0, 1]", name, low, high)
            item[key] = ScaleIntensity(minv=0.0, maxv=1.0)(item[key])


class WindowToUnitRanged(PerKeyd):
    """
    Clip intensities of the images under ``keys`` to a window, e.g. ``(-1200, 400)`` Hounsfield units, and scale it
    linearly to [0, 1]. ``ValueError`` for an image outside of the window, or scaled to [0, 1] already.
    """

    def __init__(self, keys: KeysCollection, window: Sequence[float], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(window) != 2 or not window[0] < window[1]:
            raise ValueError(f"window must be its lower and its upper end, got {window!r}.")
        self.low, self.high = (float(end) for end in window)
        self.scaler = ScaleIntensityRange(self.low, self.high, b_min=0.0, b_max=1.0, clip=True)

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        low, high = float(item[key].min()), float(item[key].max())
        name, window = source_of(item[key], str(key)), f"[{self.low:g}, {self.high:g}]"
        if high <= self.low or low >= self.high:
            raise ValueError(
                f"{name}: no intensity is inside the window {window}, they go from {low:g} to {high:g}. Give a window "
                "that fits the image."
            )
        if low >= 0 and high <= 1 < self.high - self.low:
            raise ValueError(
                f"{name}: the intensities, from {low:g} to {high:g}, are scaled to [0, 1] already; the window {window} "
                "would flatten them. Give no window."
            )
        item[key] = self.scaler(item[key])


def load_keypoints(path: str | Path, spatial_dims: int) -> torch.Tensor:
    """
    Read keypoints as the Learn2Reg challenge stores them: one point a line, its voxel coordinates in the order of the
    array axes, separated by commas, no header. The same line of two files is the same point of the body.

    Args:
        path: ``.csv`` file; ``FileNotFoundError`` without it, ``ValueError`` for anything but such lines, or none.
        spatial_dims: 2 or 3.

    Returns:
        ``(N, spatial_dims)``, float32, voxels; the first voxel's centre is 0.
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
    The same points ``(..., ndim)``, in voxels, on the grid of the image after MONAI's ``Resize`` from ``old_size`` to
    ``new_size``, where voxel borders, not centres, coincide.
    """
    scale = points.new_tensor(new_size) / points.new_tensor(old_size)
    return (points + 0.5) * scale - 0.5


class LoadKeypointsd(_PerKeyOfImaged):
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
        item[key] = points = load_keypoints(file, len(spatial))
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


class ResizeKeypointsd(_PerKeyOfImaged):
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


CheckSameKeypointsD = CheckSameKeypointsDict = CheckSameKeypointsd
LoadKeypointsD = LoadKeypointsDict = LoadKeypointsd
ResizeKeypointsD = ResizeKeypointsDict = ResizeKeypointsd
WindowToUnitRangeD = WindowToUnitRangeDict = WindowToUnitRanged
