# SPDX-License-Identifier: Apache-2.0
"""From the files of a subject (or of a pair) to checked channel-first images in [0, 1] and their segmentations."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImage, MapTransform, Resized, ScaleIntensity
from monai.utils import ensure_tuple

from monai_deq.data.grid import check_same_grid, grid_of, source_of

__all__ = [
    "CheckLabeld",
    "CheckRegistrationImaged",
    "CheckSameGridd",
    "CheckedCompose",
    "DropSliceAxisd",
    "LoadRegistrationImaged",
    "ScaleToUnitRanged",
    "load_subject_transforms",
]

logger = logging.getLogger("monai_deq")


class LoadRegistrationImaged(MapTransform):
    """Load image files to channel-first float32 ``MetaTensor``, with one clear error for a file that cannot be read.

    MONAI's ``LoadImage`` with its nibabel reader does the reading.

    Args:
        keys: keys of the file names.
        allow_missing_keys: leave out keys that are absent or whose value is None. Defaults to False.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When a key has no file name.
        RuntimeError: When a file cannot be read, e.g. because its download was cut off.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.loader = LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True)
        # LoadImage would fall back on the other readers it finds, and ITK makes an image of half a file
        self.loader.readers = self.loader.readers[-1:]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            file = d[key]
            if file is None and self.allow_missing_keys:
                d.pop(key)
                continue
            if not isinstance(file, (str, Path)):
                raise ValueError(f"{key!r} must be the name of an image file, got {file!r}.")
            if not Path(file).expanduser().is_file():
                raise FileNotFoundError(f"{key!r}: the file {str(file)!r} does not exist.")
            try:
                d[key] = self.loader(str(file))
            except Exception as e:  # readers raise whatever their file format's library does: EOFError, zlib.error, ...
                reason = next(iter(str(e).strip().splitlines()), "")
                raise RuntimeError(
                    f"{key!r}: cannot read {str(file)!r} ({type(e).__name__}: {reason}). "
                    "The file is damaged, incomplete or no NIfTI image; download it again."
                ) from e
        return d


class DropSliceAxisd(MapTransform):
    """Drop the trailing axis of one voxel that 2-D slices have in NIfTI files: ``(C, H, W, 1)`` to ``(C, H, W)``.

    Anything else is left as it is. The 4x4 affine stays whole, so that a result can be written back where the slice
    lies: MONAI's ``SqueezeDim`` deletes the row and column of the third axis instead, which is singular for a slice
    that is not axial (a coronal one lies in x and z). MONAI's resizing scales the columns of a 4x4 affine correctly.

    Args:
        keys: keys of the images and segmentations.
        allow_missing_keys: leave out keys that are absent. Defaults to False.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            if image.ndim == 4 and image.shape[-1] == 1:
                d[key] = image.squeeze(-1)
                if isinstance(d[key], MetaTensor):
                    d[key].spatial_ndim = 2
        return d


class CheckRegistrationImaged(MapTransform):
    """Refuse images that cannot be registered; the message names the file.

    Args:
        keys: keys of the images, ``(1, *spatial)``.
        spatial_dims: number of spatial dimensions expected, 2 or 3.
        allow_missing_keys: leave out keys that are absent. Defaults to False.

    Raises:
        ValueError: When an image has another number of dimensions or several channels (a 4-D file), holds NaN or
            infinity, or has the same value everywhere.
    """

    def __init__(self, keys: KeysCollection, spatial_dims: int, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
        self.spatial_dims = spatial_dims

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image, name = d[key], source_of(d[key], str(key))
            _check_dims(image, name, self.spatial_dims)
            bad = int((~torch.isfinite(image)).sum())
            if bad:
                raise ValueError(
                    f"{name}: {bad} of {image.numel()} voxels are NaN or infinite; expected finite intensities. "
                    "Repair the image first."
                )
            low, high = float(image.min()), float(image.max())
            if low == high:
                what = "is zero everywhere" if low == 0 else f"has the value {low:g} everywhere"
                raise ValueError(
                    f"{name}: the image {what}; there is nothing to register. Check the file or its export."
                )
        return d


def _check_dims(image: torch.Tensor, name: str, spatial_dims: int) -> None:
    """Refuse anything but one channel and ``spatial_dims`` axes."""
    spatial = tuple(image.shape[1:])
    if image.shape[0] != 1:
        raise ValueError(
            f"{name}: expected one {spatial_dims}-D image, got a 4-D file or one of several channels: {image.shape[0]} "
            f"channels of {spatial}. Split it and give one image."
        )
    if len(spatial) != spatial_dims or 1 in spatial:
        hint = "Give one slice, stored as (H, W) or (H, W, 1)" if spatial_dims == 2 else "Give a volume"
        raise ValueError(
            f"{name}: expected a {spatial_dims}-D image, got one of size {spatial}. {hint}, or set spatial_dims to fit."
        )


class ScaleToUnitRanged(MapTransform):
    """Scale intensities linearly to [0, 1] where they are not there already, and say so in the log.

    Losses and networks expect [0, 1]. An image inside [0, 1] passes unchanged, whatever its largest value: the data
    sets come normalised. Any other is scaled from its own minimum and maximum by MONAI's ``ScaleIntensity``.

    Args:
        keys: keys of the images.
        allow_missing_keys: leave out keys that are absent. Defaults to False.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scaler = ScaleIntensity(minv=0.0, maxv=1.0)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            low, high = float(d[key].min()), float(d[key].max())
            if low < 0.0 or high > 1.0:
                name = source_of(d[key], str(key))
                logger.info("%s: intensities scaled linearly from [%g, %g] to [0, 1]", name, low, high)
                d[key] = self.scaler(d[key])
        return d


class CheckLabeld(MapTransform):
    """Refuse segmentations that do not fit their image; the message names the file.

    Args:
        keys: keys of the segmentations, ``(1, *spatial)``.
        image_keys: keys of the images they belong to, one for each of ``keys``.
        allow_missing_keys: leave out segmentations that are absent. Defaults to False.

    Raises:
        ValueError: When a segmentation has another shape than its image, or values other than 0, 1, 2, ...
    """

    def __init__(self, keys: KeysCollection, image_keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_keys = ensure_tuple(image_keys)
        if len(self.image_keys) != len(self.keys):
            raise ValueError(f"image_keys must name one image for each of {self.keys}, got {self.image_keys}.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, image_key in self.key_iterator(d, self.image_keys):
            label, image = d[key], d[image_key]
            name, image_name = source_of(label, str(key)), source_of(image, str(image_key))
            got, expected = tuple(label.shape), tuple(image.shape)
            if got != expected:
                raise ValueError(
                    f"{name}: a segmentation must have the shape of its image, {expected} ({image_name}), got {got}. "
                    "Resample it by the nearest neighbour first."
                )
            # written so that NaN counts as wrong
            wrong = ~((label >= 0) & (label == label.round()))
            if wrong.any():
                example = float(label[wrong].flatten()[0])
                raise ValueError(
                    f"{name}: a segmentation must hold label numbers 0, 1, 2, ..., but {int(wrong.sum())} voxels have "
                    f"others, e.g. {example:g}. It may have been resampled by linear interpolation, or be a "
                    f"probability map."
                )
            a, b = grid_of(label), grid_of(image)
            if a is not None and b is not None and a.orientation != b.orientation:
                logger.warning(
                    "%s has orientation %s, its image %s has %s; they are taken to match voxel by voxel",
                    name,
                    a.orientation,
                    image_name,
                    b.orientation,
                )
        return d


class CheckSameGridd(MapTransform):
    """Refuse images of different size, spacing or orientation; log a warning where merely the origin differs.

    Args:
        keys: keys of the images, each compared with the first one. Defaults to ``("fixed", "moving")``.
        allow_missing_keys: leave out keys that are absent. Defaults to False.

    Raises:
        ValueError: When two images do not lie on one voxel grid; it names both files and both values.
    """

    def __init__(self, keys: KeysCollection = ("fixed", "moving"), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        keys = list(self.key_iterator(d))
        for key in keys[1:]:
            first = keys[0]
            check_same_grid(d[first], d[key], source_of(d[first], str(first)), source_of(d[key], str(key)))
        return d


class CheckedCompose(Compose):
    """MONAI's ``Compose`` for transforms that check their input: what is raised is the error of the check itself.

    ``Compose`` raises ``RuntimeError("applying transform <...>")`` in its place, and logs the whole item.
    Takes the arguments of ``Compose``.
    """

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


def resize_transforms(
    spatial_dims: int, spatial_size: Sequence[int] | None, images: Sequence[Hashable], labels: Sequence[Hashable] = ()
) -> list[MapTransform]:
    """Transforms that bring images and their segmentations to the size the network works at.

    Args:
        spatial_dims: 2 or 3.
        spatial_size: ``spatial_dims`` numbers of voxels; None: no transform at all.
        images: keys of the images, resized by linear interpolation, smoothed first where they shrink.
        labels: keys of the segmentations, resized by the nearest voxel; each may be absent. Defaults to none.

    Raises:
        ValueError: When ``spatial_size`` does not give so many numbers above 1.
    """
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
    """Transforms from ``{"image": file, "label": file or None}`` to checked channel-first ``MetaTensor``.

    Load, drop the slice axis of 2-D files, check, scale intensities to [0, 1] where needed, resize. Images are resized
    by linear interpolation between voxel centres, smoothed first where they shrink; segmentations by the nearest voxel.
    Affines follow. For a pair name ``("fixed", "moving")`` and ``("fixed_label", "moving_label")``, and let
    :py:class:`CheckSameGridd` come after.

    Args:
        spatial_dims: 2 or 3.
        spatial_size: size to resize to in voxels, ``spatial_dims`` numbers. Defaults to None: as in the files.
        image_keys: keys of the images. Defaults to ``("image",)``.
        label_keys: keys of their segmentations, in the same order; each may be absent or None in an item, then it is
            left out. Defaults to ``("label",)``.

    Returns:
        ``Compose`` whose images and segmentations are float32 ``(1, *spatial)``; other keys of an item pass.

    Raises:
        ValueError: When ``spatial_dims`` or ``spatial_size`` is wrong.
    """
    images, labels = ensure_tuple(image_keys), ensure_tuple(label_keys)
    transforms: list[MapTransform] = [
        LoadRegistrationImaged(images),
        LoadRegistrationImaged(labels, allow_missing_keys=True),
    ]
    if spatial_dims == 2:
        transforms.append(DropSliceAxisd((*images, *labels), allow_missing_keys=True))
    transforms += [
        CheckRegistrationImaged(images, spatial_dims),
        CheckLabeld(labels, images, allow_missing_keys=True),
        ScaleToUnitRanged(images),
    ]
    transforms += resize_transforms(spatial_dims, spatial_size, images, labels)
    return CheckedCompose(transforms, log_stats=False)
