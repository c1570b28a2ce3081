# SPDX-License-Identifier: Apache-2.0
"""Images and segmentations to be registered: read, checked, scaled to [0, 1]."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImage, MapTransform, ScaleIntensity, ScaleIntensityRange
from monai.utils import ensure_tuple

from monai_deq.data import check_same_grid, grid_of, source_of

__all__ = ["CheckLabeld", "CheckRegistrationImaged", "CheckSameGridd", "DropSliceAxisd", "LoadRegistrationImaged"]
__all__ += ["ScaleToUnitRanged", "WindowToUnitRangeD", "WindowToUnitRangeDict", "WindowToUnitRanged"]

logger = logging.getLogger("monai_deq")


def existing_file(path: str | Path, name: str) -> Path:
    """The path, its ``~`` resolved; ``FileNotFoundError``, in which it is called ``name``, where there is no file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{name}: the file {str(path)!r} does not exist.")
    return path


def one_image_each(keys: Sequence[Hashable], image_keys: KeysCollection) -> tuple[Hashable, ...]:
    """Keys of the images that what is under ``keys`` belongs to; ``ValueError`` unless there are as many."""
    images = ensure_tuple(image_keys)
    if len(images) != len(keys):
        raise ValueError(f"image_keys must name one image for each of {tuple(keys)}, got {images}.")
    return images


class LoadRegistrationImaged(MapTransform):
    """
    Load image files by nibabel to channel-first float32 ``MetaTensor``.

    Args:
        keys: keys of the file names.
        allow_missing_keys: leave out keys that are absent or whose value is None. Defaults to False.

    Raises:
        FileNotFoundError, RuntimeError: When there is no such file, or it cannot be read: its download was cut off.
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
            existing_file(file, repr(key))
            try:
                d[key] = self.loader(str(file))
            except Exception as e:  # readers raise whatever their file format's library does: EOFError, zlib.error, ...
                reason = next(iter(str(e).strip().splitlines()), "")
                raise RuntimeError(
                    f"{key!r}: cannot read {str(file)!r} ({type(e).__name__}: {reason}). "
                    "The file is damaged, incomplete or no NIfTI image; download it again."
                ) from e
        return d


class _PerImaged(MapTransform):
    """Base of what treats images one by one; ``apply`` is given an image and the name of its file, else its key."""

    def apply(self, image: torch.Tensor, name: str) -> torch.Tensor:
        raise NotImplementedError

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.apply(d[key], source_of(d[key], str(key)))
        return d


class DropSliceAxisd(_PerImaged):
    """
    Drop the trailing axis of one voxel that slices have in NIfTI files, ``(C, H, W, 1)`` to ``(C, H, W)``, of what is
    under ``keys``. The 4x4 affine stays whole: MONAI's ``SqueezeDim`` makes that of a coronal slice singular.
    """

    def apply(self, image: torch.Tensor, name: str) -> torch.Tensor:
        if image.ndim != 4 or image.shape[-1] != 1:
            return image
        image = image.squeeze(-1)
        if isinstance(image, MetaTensor):
            image.spatial_ndim = 2
        return image


class CheckRegistrationImaged(_PerImaged):
    """
    Refuse images that cannot be registered; the message names the file.

    Args:
        keys, allow_missing_keys: of the images, ``(1, *spatial)``; see MONAI's ``MapTransform``.
        spatial_dims: number of spatial dimensions expected, 2 or 3.

    Raises:
        ValueError: When an image has other dimensions or several channels, NaN or infinity, or one value everywhere.
    """

    def __init__(self, keys: KeysCollection, spatial_dims: int, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
        self.spatial_dims = spatial_dims

    def apply(self, image: torch.Tensor, name: str) -> torch.Tensor:
        dims, spatial = self.spatial_dims, tuple(image.shape[1:])
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
        return image


class CheckLabeld(MapTransform):
    """
    Refuse segmentations that do not fit their image; the message names the file.

    Args:
        keys, allow_missing_keys: of the segmentations, ``(1, *spatial)``; see MONAI's ``MapTransform``.
        image_keys: keys of the images they belong to, one for each of ``keys``.

    Raises:
        ValueError: When a segmentation has another shape than its image, or values other than 0, 1, 2, ...
    """

    def __init__(self, keys: KeysCollection, image_keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_keys = one_image_each(self.keys, image_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, image_key in self.key_iterator(d, self.image_keys):
            label, image = d[key], d[image_key]
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
        return d


class CheckSameGridd(MapTransform):
    """
    Refuse images of different size, spacing or orientation; log a warning where merely the origin differs.

    Args:
        keys, allow_missing_keys: of the images, each compared with the first. Defaults to ``("fixed", "moving")``.

    Raises:
        ValueError: When two images do not lie on one voxel grid; it names both files and both values.
    """

    def __init__(self, keys: KeysCollection = ("fixed", "moving"), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        images = [(d[key], source_of(d[key], str(key))) for key in self.key_iterator(d)]
        for image, name in images[1:]:
            check_same_grid(images[0][0], image, images[0][1], name)
        return d


class ScaleToUnitRanged(_PerImaged):
    """
    Scale intensities of the images under ``keys`` linearly from their own minimum and maximum to [0, 1], and say so in
    the log. An image inside [0, 1] passes unchanged, whatever its largest value.
    """

    def apply(self, image: torch.Tensor, name: str) -> torch.Tensor:
        low, high = float(image.min()), float(image.max())
        if low < 0.0 or high > 1.0:
            logger.info("%s: intensities scaled linearly from [%g, %g] to [0, 1]", name, low, high)
            image = ScaleIntensity(minv=0.0, maxv=1.0)(image)  # type: ignore[assignment]
        return image


class WindowToUnitRanged(_PerImaged):
    """
    Clip intensities to a window and scale the window linearly to [0, 1], the same for all images.

    Args:
        keys, allow_missing_keys: of the images; see MONAI's ``MapTransform``.
        window: lower and upper end, e.g. Hounsfield units of CT.

    Raises:
        ValueError: When an image lies outside of the window, or has been scaled to [0, 1] already.
    """

    def __init__(self, keys: KeysCollection, window: Sequence[float], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(window) != 2 or not window[0] < window[1]:
            raise ValueError(f"window must be its lower and its upper end, got {window!r}.")
        self.low, self.high = (float(end) for end in window)
        self.scaler = ScaleIntensityRange(self.low, self.high, b_min=0.0, b_max=1.0, clip=True)

    def apply(self, image: torch.Tensor, name: str) -> torch.Tensor:
        low, high, window = float(image.min()), float(image.max()), f"[{self.low:g}, {self.high:g}]"
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
        return self.scaler(image)  # type: ignore[return-value]


WindowToUnitRangeD = WindowToUnitRangeDict = WindowToUnitRanged
