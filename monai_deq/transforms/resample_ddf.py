# SPDX-License-Identifier: Apache-2.0
"""Carry a displacement field to another grid of the same field of view."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.config import NdarrayOrTensor
from monai.transforms import Transform
from monai.transforms.transform import MapTransform
from monai.utils import TransformBackends, convert_to_tensor

from monai_deq.transforms.warp import on_grid_of

__all__ = ["ResampleDDF", "ResampleDDFD", "ResampleDDFDict", "ResampleDDFd"]


class ResampleDDF(Transform):
    """
    Resample a displacement field to another size, its values scaled with the voxels, so that it displaces the same
    points of the body by the same length. Linear interpolation; the grids cover the same field of view, as those of
    images that MONAI's ``Resize`` has resized.
    """

    backend = [TransformBackends.TORCH]

    def __call__(  # type: ignore[override]
        self, ddf: NdarrayOrTensor, spatial_size: Sequence[int]
    ) -> torch.Tensor:
        """
        Args:
            ddf: ``(ndim, *spatial)``, voxels of its own grid.
            spatial_size: size of the grid wanted.

        Returns:
            ``(ndim, *spatial_size)``, voxels of the grid wanted.

        Raises:
            ValueError: When the number of axes does not fit.
        """
        field = convert_to_tensor(ddf, track_meta=False)
        if not field.is_floating_point():
            field = field.to(torch.float32)
        old, new = tuple(field.shape[1:]), tuple(int(n) for n in spatial_size)
        if len(old) != len(new) or field.shape[0] != len(old) or len(old) not in (2, 3):
            raise ValueError(f"ddf must be (ndim, *spatial) with {len(new)} axes, got {tuple(field.shape)}.")
        if old == new:
            return field
        mode = "bilinear" if len(old) == 2 else "trilinear"
        # voxel borders, not centres, of the two grids coincide
        field = F.interpolate(field[None], size=new, mode=mode, align_corners=False)[0]
        scale = field.new_tensor([n / o for n, o in zip(new, old, strict=True)])
        return field * scale.view(-1, *[1] * len(new))


class ResampleDDFd(MapTransform):
    """
    Dictionary-based wrapper of :py:class:`ResampleDDF`: bring the field to the grid of an image of the item.

    Args:
        reference_key: image ``(C, *spatial)`` on the grid wanted; a MetaTensor gives the field its affine.
        ddf_key: the field. Defaults to ``"ddf"``.
        allow_missing_keys: leave an item without a field as it is. Defaults to ``False``.
    """

    backend = ResampleDDF.backend

    def __init__(self, reference_key: str, ddf_key: str = "ddf", allow_missing_keys: bool = False) -> None:
        super().__init__((ddf_key, reference_key), allow_missing_keys)
        self.reference_key = reference_key
        self.ddf_key = ddf_key
        self.resample = ResampleDDF()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample the field of the item."""
        d = dict(data)
        if self.allow_missing_keys and self.ddf_key not in d:
            return d
        for key in (self.ddf_key, self.reference_key):
            if key not in d:
                raise KeyError(f"ResampleDDFd needs the key {key!r}, the item has {sorted(map(str, d))}.")
        reference = d[self.reference_key]
        d[self.ddf_key] = on_grid_of(self.resample(d[self.ddf_key], reference.shape[1:]), reference)
        return d


ResampleDDFD = ResampleDDFDict = ResampleDDFd
