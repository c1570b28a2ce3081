# SPDX-License-Identifier: Apache-2.0
"""Displacement fields of an item: read and resampled."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.config import NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor

from monai_deq.data import check_same_grid, source_of

from .items import PerKeyd, on_grid_of, require_keys
from .transform_files import load_ddf

__all__ = ["LoadDDFD", "LoadDDFDict", "LoadDDFd"]
__all__ += ["ResampleDDF", "ResampleDDFD", "ResampleDDFDict", "ResampleDDFd"]


class LoadDDFd(PerKeyd):
    """
    Dictionary-based wrapper of :py:func:`load_ddf`, from the file name under ``ddf_key``, if any with
    ``allow_missing_keys``. Raises ``ValueError`` when the field lies on another grid than the image ``(C, *spatial)``
    under ``reference_key``.
    """

    def __init__(self, ddf_key: str, reference_key: str, spatial_dims: int, allow_missing_keys: bool = False) -> None:
        super().__init__((ddf_key,), allow_missing_keys)
        self.reference_key, self.spatial_dims = reference_key, spatial_dims

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        reference, file = item[self.reference_key], item[key]
        item[key] = load_ddf(file, self.spatial_dims)
        try:
            names = source_of(reference, self.reference_key), str(file)
            check_same_grid(reference, item[key], *names, what="Fixed scan and field")
        except ValueError as e:
            raise ValueError(
                f"{file}: the displacement field to start from must lie on the grid of the fixed scan. {e}"
            ) from e


class ResampleDDF(Transform):
    """
    Resample a displacement field linearly to another size of the same field of view, as MONAI's ``Resize`` does with
    images, its values scaled with the voxels: it displaces the same points of the body by the same length.
    """

    backend = [TransformBackends.TORCH]

    def __call__(self, ddf: NdarrayOrTensor, spatial_size: Sequence[int]) -> torch.Tensor:  # type: ignore[override]
        """The field ``(ndim, *spatial)``, voxels of its own grid, as ``(ndim, *spatial_size)``, voxels of that grid."""
        field = convert_to_tensor(ddf, track_meta=False)
        if not field.is_floating_point():
            field = field.to(torch.float32)
        old, new = tuple(field.shape[1:]), tuple(int(n) for n in spatial_size)
        if len(old) != len(new) or field.shape[0] != len(old) or len(old) not in (2, 3):
            raise ValueError(f"ddf must be (ndim, *spatial) with {len(new)} axes, got {tuple(field.shape)}.")
        if old == new:
            return field
        # voxel borders, not centres, of the two grids coincide
        mode = "bilinear" if len(old) == 2 else "trilinear"
        field = F.interpolate(field[None], size=new, mode=mode, align_corners=False)[0]
        scale = field.new_tensor([n / o for n, o in zip(new, old, strict=True)])
        return field * scale.view(-1, *[1] * len(new))


class ResampleDDFd(MapTransform):
    """
    Dictionary-based wrapper of :py:class:`ResampleDDF`: bring the field, if any with ``allow_missing_keys``, to the
    grid of the image ``(C, *spatial)`` under ``reference_key``; a MetaTensor gives it its affine.
    """

    backend = ResampleDDF.backend

    def __init__(self, reference_key: str, ddf_key: str = "ddf", allow_missing_keys: bool = False) -> None:
        super().__init__((ddf_key, reference_key), allow_missing_keys)
        self.reference_key, self.ddf_key = reference_key, ddf_key
        self.resample = ResampleDDF()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.allow_missing_keys and self.ddf_key not in d:
            return d
        require_keys(d, (self.ddf_key, self.reference_key), "ResampleDDFd")
        reference = d[self.reference_key]
        d[self.ddf_key] = on_grid_of(self.resample(d[self.ddf_key], reference.shape[1:]), reference)
        return d


LoadDDFD = LoadDDFDict = LoadDDFd
ResampleDDFD = ResampleDDFDict = ResampleDDFd
