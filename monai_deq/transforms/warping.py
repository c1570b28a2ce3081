# SPDX-License-Identifier: Apache-2.0
"""Images, label maps and keypoints of an item warped by the displacement in it, and what all transforms share."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import Transform
from monai.utils import TransformBackends, convert_to_tensor, ensure_tuple_rep

from monai_deq.networks.blocks import OutsidePoints, check_outside, warp_by_ddf, warp_points_by_ddf

from .items import PerKeyd, on_grid_of, require_keys

__all__ = ["WarpByDDFD", "WarpByDDFDict", "WarpByDDFd"]
__all__ += ["WarpPointsByDDF", "WarpPointsByDDFD", "WarpPointsByDDFDict", "WarpPointsByDDFd"]


class WarpByDDFd(PerKeyd):
    """
    Pull images or label maps back through a displacement field of the item, voxel by voxel of one grid, whatever
    affines say; for others see :py:class:`ResampleByDDFd`. The results lie on the field's grid.

    Args:
        keys, allow_missing_keys: of the images ``(C, *spatial)``; see MONAI's ``MapTransform``.
        ddf_key: displacement ``(ndim, *spatial)`` in voxels.
        output_keys: where the results go. Defaults to ``keys`` (in place).
        mode: ``"bilinear"`` (whole numbers become float32), or ``"nearest"`` for label maps (numbers and their type
            stay); one, or one a key.
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        keys: KeysCollection,
        ddf_key: str = "ddf",
        output_keys: KeysCollection | None = None,
        mode: str | tuple[str, ...] = "bilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ddf_key = ddf_key
        modes = ensure_tuple_rep(mode, len(self.keys))
        self.beside = (ensure_tuple_rep(self.keys if output_keys is None else output_keys, len(self.keys)), modes)
        if not set(modes) <= {"bilinear", "nearest"}:
            raise ValueError(f'mode must be "bilinear" or "nearest", got {mode!r}.')

    def treat(self, item: dict[Hashable, Any], key: Hashable, output_key: Hashable, mode: str) -> None:
        require_keys(item, (self.ddf_key,), type(self).__name__)
        ddf, image = (convert_to_tensor(item[k], track_meta=False) for k in (self.ddf_key, key))
        if mode != "nearest" and not image.is_floating_point():
            image = image.to(torch.float32)
        warped = warp_by_ddf(image[None], ddf[None].to(image.device), mode=mode)[0]
        item[output_key] = on_grid_of(warped, item[self.ddf_key], item[key])


class WarpPointsByDDF(Transform):
    """
    Move points of the fixed image to where the field finds them in the moving image: ``points + ddf(points)``, see
    :py:func:`monai_deq.networks.blocks.warp_points_by_ddf`.

    Args:
        outside: ``"refuse"`` points outside the grid of the field, or ``"clamp"``: they move by the displacement of
            the nearest border point, and their number is logged.
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, outside: OutsidePoints = "refuse") -> None:
        check_outside(outside)
        self.outside = outside

    def __call__(self, points: NdarrayOrTensor, ddf: NdarrayOrTensor) -> torch.Tensor:  # type: ignore[override]
        """
        Args:
            points: ``(N, ndim)``, finite, voxels of the fixed image, coordinate ``i`` along array axis ``i``.
            ddf: ``(ndim, *spatial)`` in voxels.

        Returns:
            ``(N, ndim)``, voxels of the moving image; float32, or float64 where points or field are.
        """
        plain_points, plain_ddf = (convert_to_tensor(value, track_meta=False) for value in (points, ddf))
        return warp_points_by_ddf(plain_points[None], plain_ddf[None], outside=self.outside)[0]


class WarpPointsByDDFd(PerKeyd):
    """
    Dictionary-based wrapper of :py:class:`WarpPointsByDDF`, for the points ``(N, ndim)`` under ``keys``; for the other
    arguments see :py:class:`WarpByDDFd`.
    """

    backend = WarpPointsByDDF.backend

    def __init__(
        self,
        keys: KeysCollection,
        ddf_key: str = "ddf",
        output_keys: KeysCollection | None = None,
        outside: OutsidePoints = "refuse",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ddf_key = ddf_key
        self.beside = (ensure_tuple_rep(self.keys if output_keys is None else output_keys, len(self.keys)),)
        self.warp = WarpPointsByDDF(outside)

    def treat(self, item: dict[Hashable, Any], key: Hashable, output_key: Hashable) -> None:
        require_keys(item, (self.ddf_key,), "WarpPointsByDDFd")
        item[output_key] = self.warp(item[key], item[self.ddf_key])


WarpByDDFD = WarpByDDFDict = WarpByDDFd
WarpPointsByDDFD = WarpPointsByDDFDict = WarpPointsByDDFd
