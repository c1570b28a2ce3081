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

__all__ = ["WarpByDDFD", "WarpByDDFDict", "WarpByDDFd", "on_grid_of"]


def on_grid_of(image: torch.Tensor, reference: Any) -> torch.Tensor:
    """
    Give an image the affine and the other meta data of the reference on whose grid it lives.

    Args:
        image: ``(C, *spatial)``.
        reference: image or field ``(C, *spatial)``; the image is returned as it is when this is no ``MetaTensor``.
    """
    if not isinstance(reference, MetaTensor):
        return image
    # MetaTensor copies what it is given; of a slice it would count the channel as a spatial axis
    return MetaTensor(image, meta=dict(reference.meta), spatial_ndim=image.ndim - 1)


class WarpByDDFd(MapTransform):
    """
    Pull images or label maps back through a displacement field of the item. The results live on the field's grid,
    which is the fixed image's.

    Args:
        keys: images ``(C, *spatial)`` to warp.
        ddf_key: displacement ``(ndim, *spatial)`` in voxels. Defaults to ``"ddf"``.
        output_keys: where the results go. Defaults to ``keys`` (in place).
        mode: ``"bilinear"``, or ``"nearest"`` for label maps; one, or one a key. Defaults to ``"bilinear"``. With
            ``"nearest"`` the number type stays; with ``"bilinear"`` an image of whole numbers becomes float32.
        allow_missing_keys: leave a missing key out instead of raising.

    Raises:
        ValueError: When a mode is unknown, or the numbers of keys, output keys and modes differ.
        KeyError: When the item has no displacement, or not one of ``keys``.
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
        if not set(self.mode) <= {"bilinear", "nearest"}:
            raise ValueError(f'mode must be "bilinear" or "nearest", got {mode!r}.')

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Warp the images under ``keys``."""
        d = dict(data)
        if self.ddf_key not in d:
            raise KeyError(f"WarpByDDFd needs the key {self.ddf_key!r}, the item has {sorted(map(str, d))}.")
        field = d[self.ddf_key]
        ddf = convert_to_tensor(field, track_meta=False)
        for key, out_key, mode in self.key_iterator(d, self.output_keys, self.mode):
            image = convert_to_tensor(d[key], track_meta=False)
            # label numbers are exact in float32 up to 2^24
            work = image if image.is_floating_point() else image.to(torch.float32)
            warped = warp_by_ddf(work[None], ddf[None].to(work.device), mode=mode)[0]
            if mode == "nearest":
                warped = warped.to(image.dtype)
            d[out_key] = on_grid_of(warped, field)
        return d


WarpByDDFD = WarpByDDFDict = WarpByDDFd
