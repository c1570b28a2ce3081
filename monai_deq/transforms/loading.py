# SPDX-License-Identifier: Apache-2.0
"""From files to what a network takes: images, segmentations and keypoints read, checked, scaled to [0, 1]."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import CopyItemsd, MapTransform, Resize, Resized
from monai.utils import ensure_tuple

from monai_deq.data import affine_of, check_same_grid, grid_distance, grid_of, read_image, same_grid, source_of
from monai_deq.networks.blocks import OutsidePoints, points_outside

from .alignment import AffineKind, AlignAffined, InitialTransformd, foreground_overlap
from .fields import LoadDDFd
from .geometry import ComposeDDFd, ResampleByDDFd, compose_ddf, pull_image, smooth_for
from .intensities import ScaleToUnitRanged, WindowToUnitRanged
from .items import CheckedCompose, PerKeyd, PerKeyOfImaged, on_grid_of
from .points import CheckSameKeypointsd, LoadKeypointsd, ResizeKeypointsd
from .summaries import SummarizeRegistrationd

__all__ = ["CheckLabeld", "CheckRegistrationImaged", "CheckSameGridd", "CheckedCompose", "DropSliceAxisd"]
__all__ += ["LoadRegistrationImaged", "MatchGridd", "ResizeFixedd", "finish_pair_transforms"]
__all__ += ["load_annotated_pair_transforms", "load_pair_transforms", "load_subject_transforms"]

logger = logging.getLogger("monai_deq")

_PAIR, _SCANS = ("fixed", "moving"), ("fixed_scan", "moving_scan")
#: voxels that a segmentation may lie beside its image, and share of what is labelled that may lie outside of it
_LABEL_OFF, _LABEL_OUTSIDE = 0.1, 0.01
#: longest to shortest edge of a voxel that a method takes as it is, and voxels that it works on at most (4 GB)
_NEARLY, _MOST_VOXELS = 1.5, 1e7
#: overlap of the foreground below which scans are hardly aligned
_LITTLE_OVERLAP = 0.8


class LoadRegistrationImaged(PerKeyd):
    """
    Load the image files under ``keys`` to channel-first ``MetaTensor``, float32, or with ``label`` whole numbers
    exactly; see :py:func:`monai_deq.data.read_image`, errors too. With ``allow_missing_keys`` those that are absent or
    None are left out.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, label: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label = label

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        file = item[key]
        if file is None and self.allow_missing_keys:
            del item[key]
            return
        if not isinstance(file, (str, Path)):
            raise ValueError(f"{key!r} must be the name of an image file, got {file!r}.")
        item[key] = read_image(file, repr(key), self.label)


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


class CheckLabeld(PerKeyOfImaged):
    """
    Refuse (``ValueError``, which names the file) segmentations ``(1, *spatial)`` under ``keys`` with values other than
    0, 1, 2, ..., or on another grid than their image, of ``image_keys`` in the same order, by more than a tenth of a
    voxel. With ``resample`` such a one is pulled onto that grid by its own affine, each voxel from the nearest, and
    refused where more than a hundredth of what is labelled lies outside of the image.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_keys: KeysCollection,
        allow_missing_keys: bool = False,
        resample: bool = False,
    ) -> None:
        super().__init__(keys, image_keys, allow_missing_keys)
        self.resample = resample

    def treat(self, item: dict[Hashable, Any], key: Hashable, image_key: Hashable) -> None:
        label, image = item[key], item[image_key]
        name, image_name = source_of(label, str(key)), source_of(image, str(image_key))
        if label.ndim != image.ndim or len(label) != 1:
            raise ValueError(
                f"{name}: a segmentation must have the shape of its image, {tuple(image.shape)} ({image_name}), "
                f"got {tuple(label.shape)}."
            )
        wrong = ~(label >= 0)  # NaN is wrong
        if label.is_floating_point():
            wrong |= (label != label.round()) | (label >= 2.0**63)
        if wrong.any():
            raise ValueError(
                f"{name}: a segmentation must hold label numbers 0, 1, 2, ..., but {int(wrong.sum())} voxels have "
                f"others, e.g. {float(label[wrong].flatten()[0]):g}. It may have been resampled by linear "
                "interpolation, or be a probability map."
            )
        if grid_distance(image, label) <= _LABEL_OFF:
            return
        if not self.resample:
            check_same_grid(image, label, image_name, name, "An image and its segmentation", warn=False)
            raise ValueError(
                f"An image and its segmentation must share one voxel grid, but {name} lies up to "
                f"{grid_distance(image, label):.3g} voxels away from {image_name}. Resample it by the nearest "
                "neighbour, or correct its header."
            )
        points = (label > 0)[0].nonzero().T.to(torch.float64)
        if label.ndim == 3:
            points = torch.cat([points, torch.zeros_like(points[:1])])
        matrix = torch.from_numpy(np.linalg.solve(affine_of(image), affine_of(label)))
        inside = (matrix[:3, :3] @ points + matrix[:3, 3:])[: image.ndim - 1].T
        outside = int(points_outside(inside, tuple(image.shape[1:])).sum())
        if outside > _LABEL_OUTSIDE * max(points.shape[1], 1):
            raise ValueError(
                f"{name}: {outside} of {points.shape[1]} labelled voxels lie outside of the image {image_name} by "
                "their own header. Give the segmentation of this image, or correct its header."
            )
        logger.info("%s: resampled onto the grid of %s, each voxel from the nearest", name, image_name)
        item[key] = pull_image(label, image, mode="nearest")


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


class ResizeLabeld(PerKeyd):
    """Resize segmentations ``(C, *spatial)`` by the nearest voxel, exactly, whatever their numbers; affines follow."""

    def __init__(self, keys: KeysCollection, spatial_size: Sequence[int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_size = tuple(spatial_size)

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        label, old = item[key], tuple(item[key].shape[1:])
        plain = label.as_subclass(torch.Tensor)
        for axis, (n, size) in enumerate(zip(old, self.spatial_size, strict=True), start=1):
            inside = ((torch.arange(size).double() + 0.5) * (n / size)).long()  # the voxel that the centre lies in
            plain = plain.index_select(axis, inside.clamp(max=n - 1))
        item[key] = _placed(plain, affine_of(label) @ resize_affine(old, self.spatial_size), label)


def resize_affine(old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Voxels of an image of another size over the same field of view to voxels of the old one, ``(4, 4)``."""
    affine = np.eye(4)
    for axis, (n, size) in enumerate(zip(old, new, strict=True)):
        affine[axis, axis], affine[axis, 3] = n / size, 0.5 * (n / size - 1)
    return affine


def _read(spatial_dims: int, images: Sequence[Hashable], labels: Sequence[Hashable]) -> list[MapTransform]:
    """Read images and segmentations, each of which may be absent, and check the images."""
    return [
        LoadRegistrationImaged(images),
        LoadRegistrationImaged(labels, allow_missing_keys=True, label=True),
        *([DropSliceAxisd((*images, *labels), allow_missing_keys=True)] if spatial_dims == 2 else []),
        CheckRegistrationImaged(images, spatial_dims),
    ]


def _scale(images: Sequence[Hashable], window: Sequence[float] | None, range_key: str | None = None) -> MapTransform:
    return ScaleToUnitRanged(images, range_key) if window is None else WindowToUnitRanged(images, window, range_key)


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
        transforms.append(ResizeLabeld(labels, size, allow_missing_keys=True))
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


def isotropic_size(image: torch.Tensor) -> list[int]:
    """
    Size of a grid over the field of view of an image ``(C, *spatial)`` whose voxels are as long as wide, and as many;
    but its own size where they nearly are, and never more than ten million voxels.
    """
    size = np.array(image.shape[1:])
    spacing = np.linalg.norm(affine_of(image)[:3, : len(size)], axis=0)
    voxels = float(size.prod())
    if spacing.max() <= _NEARLY * spacing.min() and voxels <= _MOST_VOXELS:
        return size.tolist()  # type: ignore[no-any-return]
    edge = spacing.prod() ** (1 / len(size)) * max(voxels / _MOST_VOXELS, 1.0) ** (1 / len(size))
    return [max(int(n), 2) for n in np.round(size * spacing / edge)]


class ResizeFixedd(PerKeyd):
    """
    Bring the fixed scan to the grid that a method works on.

    Args:
        keys: of the images ``(1, *spatial)``.
        spatial_size: its size; or ``"isotropic"``: see :py:func:`isotropic_size`; None: as it is.
        orientation: world direction of each axis, as of :py:class:`monai_deq.data.Grid`. Defaults to None: as it is.
    """

    def __init__(
        self, keys: KeysCollection, spatial_size: Sequence[int] | str | None, orientation: str | None = None
    ) -> None:
        super().__init__(keys)
        if isinstance(spatial_size, str) and spatial_size != "isotropic":
            raise ValueError(f"spatial_size must be numbers of voxels or 'isotropic', got {spatial_size!r}.")
        self.spatial_size, self.orientation = spatial_size, orientation

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        image = item[key] if self.orientation is None else _turned(item[key], self.orientation)
        if self.spatial_size is not None:
            isotropic = isinstance(self.spatial_size, str)
            size = isotropic_size(image) if isotropic else [int(n) for n in self.spatial_size]
            image = image if size == list(image.shape[1:]) else _resized(image, size)
        item[key] = image


def _placed(image: torch.Tensor, affine: np.ndarray, source: torch.Tensor) -> MetaTensor:
    """The image ``(C, *spatial)`` with an affine, and all else that is known of the one it was made from."""
    plain = image.as_subclass(torch.Tensor)
    meta = dict(source.meta) if isinstance(source, MetaTensor) else {}
    meta.pop("affine", None)
    return MetaTensor(plain, affine=torch.from_numpy(affine), meta=meta, spatial_ndim=plain.ndim - 1)


def _turned(image: torch.Tensor, orientation: str) -> torch.Tensor:
    """The image with its axes in another order and direction; as it is, which is logged, where they are others."""
    grid = grid_of(image)
    if grid is None or grid.orientation == orientation:
        return image
    ways = {letter: i for i, pair in enumerate(("LR", "PA", "IS")) for letter in pair}
    own, wanted = ([ways[letter] for letter in letters] for letters in (grid.orientation, orientation))
    if sorted(own) != sorted(wanted):
        words = "%s: oriented %s, while the weights were trained on %s; it is registered as it is"
        logger.warning(words, source_of(image, "fixed"), grid.orientation, orientation)
        return image
    order = [own.index(way) for way in wanted]
    flips = [i for i, axis in enumerate(order) if grid.orientation[axis] != orientation[i]]
    plain = image.as_subclass(torch.Tensor).permute(0, *(axis + 1 for axis in order)).flip([i + 1 for i in flips])
    turn = np.eye(4)
    for i, axis in enumerate(order):
        turn[:3, i] = 0.0
        turn[axis, i] = -1.0 if i in flips else 1.0
    for i in flips:
        turn[order[i], 3] = image.shape[order[i] + 1] - 1
    return _placed(plain.contiguous(), affine_of(image) @ turn, image)


def _resized(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The image by linear interpolation between voxel centres, smoothed first where it shrinks."""
    linear = "bilinear" if len(size) == 2 else "trilinear"
    resized = Resize(size, mode=linear, align_corners=False, anti_aliasing=True)(image)
    return _placed(resized, affine_of(image) @ resize_affine(image.shape[1:], size), image)


def _along(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the axes of two images of one field of view are the same ones."""
    turned = np.linalg.solve(affine_of(b), affine_of(a))[:3, :3]
    return bool(np.allclose(turned, np.diag(np.diag(turned)), atol=1e-3) and (np.diag(turned) > 0).all())


class MatchGridd(MapTransform):
    """
    Bring the moving scan, and mask and ``"initial_ddf"`` of the fixed one, to the grid of the fixed image that a method
    works on: from where affines and the item's ``"initial_transform"`` place it in the world, smoothed first where it
    shrinks; with such a transform ``"moving_before"`` is the scan without it. How far the scans overlap then is kept
    under ``"overlap"``, and warned of where it is little.
    """

    def __init__(self) -> None:
        super().__init__((*_PAIR, *_SCANS))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        fixed, moving, fixed_scan, moving_scan = (d[key] for key in self.keys)
        chain = d.get("initial_transform") or []
        if not chain and same_grid(fixed_scan, moving_scan) and _along(fixed, fixed_scan):
            same = moving.shape == fixed.shape
            d["moving"] = moving if same else _resized(moving, fixed.shape[1:])
        else:
            d["moving"] = pull_image(smooth_for(moving, fixed, chain), fixed, chain)
            if chain:
                d["moving_before"] = pull_image(smooth_for(moving, fixed), fixed)
        if "fixed_mask" in d and not same_grid(d["fixed_mask"], fixed):
            d["fixed_mask"] = pull_image(d["fixed_mask"], fixed, mode="nearest")
        if "initial_ddf" in d and not same_grid(fixed_scan, fixed):
            d["initial_ddf"] = compose_ddf([on_grid_of(d["initial_ddf"], fixed_scan)], fixed)
        d["overlap"] = overlap = foreground_overlap(fixed, d["moving"])
        if overlap < _LITTLE_OVERLAP:
            names = source_of(moving_scan, "moving"), source_of(fixed_scan, "fixed")
            logger.warning(
                "%s and %s overlap by %.0f %% only (Dice of their foreground): they seem not to be aligned; align them "
                "first, by --affine rigid or an initial transform",
                *(*names, 100 * overlap),
            )
        return d


def load_pair_transforms(
    spatial_dims: int,
    spatial_size: Sequence[int] | str | None = None,
    window: Sequence[float] | None = None,
    affine: AffineKind | None = None,
    orientation: str | None = None,
) -> CheckedCompose:
    """
    Transforms from ``{"fixed": file, "moving": file}`` in any space to what registers them: ``"fixed"`` and
    ``"moving"`` in [0, 1] on the grid that a method works on, and ``"fixed_scan"`` and ``"moving_scan"`` as they are in
    the files, which what is found is applied to. The item may also have ``"fixed_label"``, ``"moving_label"``,
    ``"fixed_mask"``, ``"fixed_keypoints"``, ``"moving_keypoints"``, ``"initial_transform"`` (see
    :py:class:`InitialTransformd`), and ``"initial_ddf"``, a displacement field on the grid of the fixed scan for the
    solver to start from.

    Args:
        spatial_dims: 2 or 3.
        spatial_size: size of that grid, ``spatial_dims`` numbers, or ``"isotropic"``: see :py:func:`isotropic_size`.
            Defaults to None: the fixed scan's own.
        window: see :py:class:`WindowToUnitRanged`. Defaults to None: see :py:class:`ScaleToUnitRanged`.
        affine: ``"rigid"`` or ``"affine"``: align the scans first, see :py:func:`align_affine`. Defaults to None.
        orientation: of that grid, see :py:class:`ResizeFixedd`. Defaults to None: the fixed scan's own.
    """
    labels, keypoints = ("fixed_label", "moving_label", "fixed_mask"), ("fixed_keypoints", "moving_keypoints")
    if spatial_size != "isotropic":
        _resize(spatial_dims, spatial_size, _PAIR)  # type: ignore[arg-type]  # refuses what is no size
    transforms = [
        *_read(spatial_dims, _PAIR, labels),
        CheckLabeld(labels, ("fixed", "moving", "fixed"), allow_missing_keys=True, resample=True),
        LoadKeypointsd(keypoints, _PAIR, allow_missing_keys=True),
        CheckSameKeypointsd(keypoints, allow_missing_keys=True),
        CopyItemsd(_PAIR, names=_SCANS),
        LoadDDFd("initial_ddf", "fixed_scan", spatial_dims, allow_missing_keys=True),
        _scale(_PAIR, window, "intensities"),
        InitialTransformd(),
        *([AlignAffined(affine)] if affine else []),
        ResizeFixedd(("fixed",), spatial_size, orientation),
        MatchGridd(),
    ]
    return CheckedCompose(transforms, log_stats=False)


def finish_pair_transforms(savers: Sequence[Callable[[Any], Any]] = ()) -> CheckedCompose:
    """
    Transforms from what :py:func:`load_pair_transforms` gives and the solver's ``"ddf"`` and ``"warped"`` on its grid
    to ``"ddf"``, ``"warped_scan"`` and ``"warped_label"`` on the grid of the fixed scan, and ``"summary"``.

    Args:
        savers: what comes behind, such as :py:class:`SaveRegistrationd`. Defaults to nothing.
    """
    warp = ResampleByDDFd(
        ("moving_scan", "moving_label"),
        output_keys=("warped_scan", "warped_label"),
        mode=("bilinear", "nearest"),
        allow_missing_keys=True,
    )
    return CheckedCompose([ComposeDDFd(), warp, SummarizeRegistrationd(), *savers], log_stats=False)


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
