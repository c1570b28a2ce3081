# SPDX-License-Identifier: Apache-2.0
"""Warp images and label maps of an item by the displacement in it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms.transform import MapTransform
from monai.utils import TransformBackends, convert_to_tensor, ensure_tuple_rep

from monai_deq.networks.blocks import warp_by_ddf

__all__ = ["WarpByDDFD", "WarpByDDFDict", "WarpByDDFd"]


class WarpByDDFd(MapTransform):
    """
    Pull images or label maps back through a displacement field of the item. The results live on the field's grid,
    which is the fixed image's.

    Args:
        keys: images ``(C, *spatial)`` to warp.
        ddf_key: displacement ``(ndim, *spatial)`` in voxels. Defaults to ``"ddf"``.
        output_keys: where the results go. Defaults to ``keys`` (in place).
        mode: ``"bilinear"``, or ``"nearest"`` for label maps; one, or one a key. Defaults to ``"bilinear"``.
        allow_missing_keys: leave a missing key out instead of raising.
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
        self.output_keys = ensure_tuple_rep(self.keys if output_keys is None else output_keys, len(self.keys))
        self.mode = ensure_tuple_rep(mode, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Warp the images under ``keys``."""
        d = dict(data)
        field = d[self.ddf_key]
        ddf = convert_to_tensor(field, track_meta=False)
        for key, out_key, mode in self.key_iterator(d, self.output_keys, self.mode):
            image = convert_to_tensor(d[key], track_meta=False)
            dtype = image.dtype
            # label numbers are exact in float32 up to 2^24
            work = image if image.is_floating_point() else image.to(torch.float32)
            warped = warp_by_ddf(work[None], ddf[None].to(work.device), mode=mode)[0].to(dtype)
            if isinstance(field, MetaTensor):
                warped = MetaTensor(warped, affine=field.affine.clone(), meta=dict(field.meta))
            d[out_key] = warped
        return d


WarpByDDFD = WarpByDDFDict = WarpByDDFd
