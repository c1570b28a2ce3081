# SPDX-License-Identifier: Apache-2.0
"""Move keypoints of an item by the displacement in it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import Transform
from monai.transforms.transform import MapTransform
from monai.utils import TransformBackends, convert_to_tensor, ensure_tuple_rep

from monai_deq.networks.blocks import OutsidePoints, check_outside, warp_points_by_ddf

__all__ = ["WarpPointsByDDF", "WarpPointsByDDFD", "WarpPointsByDDFDict", "WarpPointsByDDFd"]


class WarpPointsByDDF(Transform):
    """
    Move points of the fixed image to where the field finds them in the moving image: ``points + ddf(points)``.

    A pull-back field, ``warped(x) = moving(x + ddf(x))``, moves FIXED points into the moving image, without any
    inverse; the warped image goes the other way, onto the fixed grid. Points of the moving image need the inverse map,
    which this is not. See :py:func:`monai_deq.networks.blocks.warp_points_by_ddf`.

    Args:
        outside: ``"refuse"`` points outside the grid of the field, or ``"clamp"``: they move by the displacement of
            the nearest border point, and their number is logged. Defaults to ``"refuse"``.

    Raises:
        ValueError: When ``outside`` is neither.
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, outside: OutsidePoints = "refuse") -> None:
        check_outside(outside)
        self.outside = outside

    def __call__(self, points: NdarrayOrTensor, ddf: NdarrayOrTensor) -> torch.Tensor:  # type: ignore[override]
        """
        Args:
            points: ``(N, ndim)``, voxels of the fixed image, coordinate ``i`` along array axis ``i``.
            ddf: ``(ndim, *spatial)`` in voxels.

        Returns:
            ``(N, ndim)``, voxels of the moving image; float32, or float64 where points or field are.

        Raises:
            ValueError: When the shapes do not fit, a point is not finite, or lies outside and is refused.
        """
        plain_points, plain_ddf = (convert_to_tensor(value, track_meta=False) for value in (points, ddf))
        return warp_points_by_ddf(plain_points[None], plain_ddf[None], outside=self.outside)[0]


class WarpPointsByDDFd(MapTransform):
    """
    Dictionary-based wrapper of :py:class:`WarpPointsByDDF`: move keypoints of the fixed image (not of the moving one)
    into the moving image.

    Args:
        keys: points ``(N, ndim)`` of the fixed image to move.
        ddf_key: displacement ``(ndim, *spatial)`` in voxels. Defaults to ``"ddf"``.
        output_keys: where the results go. Defaults to ``keys`` (in place).
        outside: see :py:class:`WarpPointsByDDF`. Defaults to ``"refuse"``.
        allow_missing_keys: leave a missing key out instead of raising.

    Raises:
        ValueError: When ``outside`` is unknown, or the numbers of keys and output keys differ.
        KeyError: When the item has no displacement, or not one of ``keys``.
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
        self.output_keys = ensure_tuple_rep(self.keys if output_keys is None else output_keys, len(self.keys))
        self.warp = WarpPointsByDDF(outside)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Move the points under ``keys``."""
        d = dict(data)
        if self.ddf_key not in d:
            raise KeyError(f"WarpPointsByDDFd needs the key {self.ddf_key!r}, the item has {sorted(map(str, d))}.")
        for key, out_key in self.key_iterator(d, self.output_keys):
            d[out_key] = self.warp(d[key], d[self.ddf_key])
        return d


WarpPointsByDDFD = WarpPointsByDDFDict = WarpPointsByDDFd
