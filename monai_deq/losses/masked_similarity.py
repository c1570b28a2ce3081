# SPDX-License-Identifier: Apache-2.0
"""Similarity of two images inside a mask."""

from __future__ import annotations

import torch
import torch.nn as nn
from monai.losses import LocalNormalizedCrossCorrelationLoss

__all__ = ["MaskedSimilarityLoss"]


class MaskedSimilarityLoss(nn.Module):
    """
    Mean of a similarity over the voxels inside a mask, e.g. over the lungs of a chest CT, in float32 with autocast off.
    Every image of a batch counts the same, whatever the size of its mask; with a mask of all voxels this is the mean
    over the image.

    The similarity of a voxel may look at its surroundings beyond the mask: the window of the local cross-correlation
    sees the border of the lung from inside.

    Args:
        spatial_dims: 2 or 3, for the default similarity. Defaults to 3.
        similarity: loss of ``(warped, fixed)`` that is not reduced (``reduction="none"``). Defaults to MONAI's local
            normalised cross-correlation with window 5.
    """

    def __init__(self, spatial_dims: int = 3, similarity: nn.Module | None = None) -> None:
        super().__init__()
        self.similarity = (
            LocalNormalizedCrossCorrelationLoss(spatial_dims=spatial_dims, kernel_size=5, reduction="none")
            if similarity is None
            else similarity
        )

    def forward(self, warped: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            warped: moving image on the grid of the fixed one, ``(B, 1, *spatial)``.
            fixed: ``(B, 1, *spatial)``.
            mask: ``(B, 1, *spatial)`` of the fixed image; inside where greater than zero.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: When the mask has another shape or is empty, or the similarity is reduced.
        """
        if mask.shape != fixed.shape:
            raise ValueError(f"mask must have the shape of fixed, {tuple(fixed.shape)}, got {tuple(mask.shape)}.")
        inside = (mask > 0).flatten(1)
        count = inside.sum(dim=1)
        if not (count > 0).all():
            empty = torch.nonzero(count == 0).flatten().tolist()
            raise ValueError(f"mask must hold a voxel of every image, it is empty for batch item(s) {empty}.")
        with torch.autocast(device_type=fixed.device.type, enabled=False):
            # float64 stays, for checks of gradients
            warped, fixed = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (warped, fixed))
            values = self.similarity(warped, fixed)
            if values.shape != fixed.shape:
                raise ValueError(
                    f"similarity must give a value for each voxel, shape {tuple(fixed.shape)}, got "
                    f'{tuple(values.shape)}; build it with reduction="none".'
                )
            # not a product: what is not finite outside must not come in
            return (values.flatten(1).where(inside, 0.0).sum(dim=1) / count).mean()
