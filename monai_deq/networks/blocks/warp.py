# SPDX-License-Identifier: Apache-2.0
"""Pull-back warping of images and label maps by a dense displacement field."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["DDFWarp", "check_ddf", "warp_by_ddf"]


@lru_cache(maxsize=4)
def _identity_grid(spatial_size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Voxel coordinates of a grid, ``(1, ndim, *spatial)``. MONAI's Warp rebuilds them on the CPU at every call."""
    axes = [torch.arange(n, device=device, dtype=dtype) for n in spatial_size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def check_ddf(image: torch.Tensor, ddf: torch.Tensor) -> None:
    """
    Check that a displacement field fits an image.

    Args:
        image: ``(B, C, *spatial)``.
        ddf: ``(B, ndim, *spatial)``.

    Raises:
        ValueError: When the image is not 2-D or 3-D, or when the field has not the expected shape.
    """
    ndim = image.ndim - 2
    if ndim not in (2, 3):
        raise ValueError(f"image must have shape (B, C, H, W[, D]), got {tuple(image.shape)}.")
    expected = (image.shape[0], ndim, *image.shape[2:])
    if tuple(ddf.shape) != expected:
        raise ValueError(
            f"ddf must have shape {expected} for an image of shape {tuple(image.shape)}, got {tuple(ddf.shape)}."
        )


def warp_by_ddf(image: torch.Tensor, ddf: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """
    Pull an image back through a displacement field: ``warped(x) = image(x + ddf(x))``.

    Same convention as :py:class:`monai.networks.blocks.Warp` with its defaults: voxel units, channel ``i`` displaces
    array axis ``i``, border padding, ``align_corners=True``. The sampling coordinates are computed in float32 also
    when the image or the field is in half precision (at high voxel indices half precision loses sub-voxel
    displacements), or in float64 where one of them is; the result has the image's dtype.

    Args:
        image: ``(B, C, *spatial)``, 2-D or 3-D; of an integer type with ``"nearest"`` only.
        ddf: ``(B, ndim, *spatial)`` in voxels.
        mode: ``"bilinear"`` (linear in 3-D too) or ``"nearest"``.

    Returns:
        The warped image, ``(B, C, *spatial)``.

    Raises:
        ValueError: When the shapes do not fit, or when an image of an integer type would be interpolated.
    """
    check_ddf(image, ddf)
    if mode != "nearest" and not image.is_floating_point():
        raise ValueError(f'an image of type {image.dtype} can be warped with mode="nearest" only, got {mode!r}.')
    dtype = torch.promote_types(torch.promote_types(image.dtype, ddf.dtype), torch.float32)
    spatial = tuple(image.shape[2:])
    with torch.autocast(device_type=image.device.type, enabled=False):
        coords = _identity_grid(spatial, ddf.device, dtype) + ddf.to(dtype)
        # normalise to [-1, 1] channel by channel, last axis first as grid_sample wants (x, y, z)
        grid = torch.stack(
            [coords[:, i] * (2.0 / max(spatial[i] - 1, 1)) - 1.0 for i in reversed(range(len(spatial)))], dim=-1
        )
        if len(spatial) == 2 and grid.requires_grad and grid.device.type == "cpu":
            # at NaN PyTorch's backward kernel for 2-D on the CPU reads out of bounds, and the process dies
            grid = torch.nan_to_num(grid, nan=-1.0, posinf=float("inf"), neginf=-float("inf"))
        out = F.grid_sample(image.to(dtype), grid, mode=mode, padding_mode="border", align_corners=True)
    return out.to(image.dtype)


class DDFWarp(nn.Module):
    """
    Module form of :py:func:`warp_by_ddf`.

    Args:
        mode: ``"bilinear"`` or ``"nearest"``. Defaults to ``"bilinear"``.
    """

    def __init__(self, mode: str = "bilinear") -> None:
        super().__init__()
        if mode not in ("bilinear", "nearest"):
            raise ValueError(f'mode must be "bilinear" or "nearest", got {mode!r}.')
        self.mode = mode

    def forward(self, image: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """Warp ``image`` ``(B, C, *spatial)`` by ``ddf`` ``(B, ndim, *spatial)``."""
        return warp_by_ddf(image, ddf, mode=self.mode)
