# SPDX-License-Identifier: Apache-2.0
"""Supervision by corresponding points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from monai_deq.networks.blocks import OutsidePoints, check_outside, warp_points_by_ddf

__all__ = ["KeypointLoss", "KeypointSupervisedLoss"]


class KeypointLoss(nn.Module):
    """Mean squared distance between ``x + ddf(x)``, for the keypoints ``x`` of the fixed image, and the corresponding
    keypoints of the moving image, over the points of a pair, then over the pairs; in float32 with autocast off.

    Args:
        spacing: voxel size along each axis in mm, for a distance in squared mm. Defaults to ``None``: squared voxels.
        outside: for fixed keypoints, see :py:func:`monai_deq.networks.blocks.warp_points_by_ddf`. Defaults to
            ``"refuse"``.

    Raises:
        ValueError: When a spacing is not above zero, or ``outside`` is neither.
    """

    def __init__(self, spacing: Sequence[float] | None = None, outside: OutsidePoints = "refuse") -> None:
        super().__init__()
        check_outside(outside)
        self.outside = outside
        self.spacing = None if spacing is None else tuple(float(s) for s in spacing)
        if self.spacing is not None and not all(s > 0 for s in self.spacing):
            raise ValueError(f"spacing must be above zero along each axis, got {spacing}.")

    def forward(
        self,
        ddf: torch.Tensor,
        fixed_keypoints: torch.Tensor | Sequence[torch.Tensor],
        moving_keypoints: torch.Tensor | Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            ddf: ``(B, ndim, *spatial)``, voxels.
            fixed_keypoints: ``(B, N, ndim)``, or a list of ``(N, ndim)`` with as many points as each pair has; voxels
                of ``ddf``.
            moving_keypoints: the corresponding points of the moving image, row by row.

        Raises:
            ValueError: When shapes or numbers do not fit, a coordinate is not finite, or a fixed keypoint is refused.
        """
        ndim = ddf.ndim - 2
        if ndim not in (2, 3) or ddf.shape[1] != ndim:
            raise ValueError(f"ddf must have shape (B, 2, H, W) or (B, 3, D, H, W), got {tuple(ddf.shape)}.")
        if self.spacing is not None and len(self.spacing) != ndim:
            raise ValueError(f"spacing must give {ndim} numbers for this ddf, got {self.spacing}.")
        if not len(ddf) == len(fixed_keypoints) == len(moving_keypoints):
            raise ValueError(
                f"ddf, fixed_keypoints and moving_keypoints must be of as many pairs, got {len(ddf)}, "
                f"{len(fixed_keypoints)} and {len(moving_keypoints)}."
            )
        with torch.autocast(device_type=ddf.device.type, enabled=False):
            field = ddf.to(torch.promote_types(ddf.dtype, torch.float32))
            spacing = field.new_ones(ndim) if self.spacing is None else field.new_tensor(self.spacing)
            pairs = zip(field, fixed_keypoints, moving_keypoints, strict=True)
            return torch.stack([_mean_square(i, *pair, spacing, self.outside) for i, pair in enumerate(pairs)]).mean()


def _mean_square(
    item: int,
    field: torch.Tensor,
    fixed: torch.Tensor,
    moving: torch.Tensor,
    spacing: torch.Tensor,
    outside: OutsidePoints,
) -> torch.Tensor:
    """Mean squared distance of the points of one pair; ``field`` is ``(ndim, *spatial)``."""
    ndim = field.ndim - 1
    for name, points in (("fixed_keypoints", fixed), ("moving_keypoints", moving)):
        if points.ndim != 2 or points.shape[1] != ndim or len(points) == 0:
            raise ValueError(f"{name} of batch item {item}: expected shape (N, {ndim}), got {tuple(points.shape)}.")
        if not torch.isfinite(points).all():
            raise ValueError(f"{name} of batch item {item}: coordinates must be finite, got NaN or infinity.")
    if len(fixed) != len(moving):
        raise ValueError(f"batch item {item} has {len(fixed)} fixed keypoints, but {len(moving)} moving ones.")
    try:
        found = warp_points_by_ddf(fixed.to(field)[None], field[None], outside=outside)[0]
    except ValueError as e:
        raise ValueError(f"fixed_keypoints of batch item {item}: {e}") from e
    return ((found - moving.to(field)) * spacing).square().sum(dim=1).mean()


class KeypointSupervisedLoss(nn.Module):
    """A training loss with the distance of corresponding points added, at the displacement that the network has
    returned: ``loss(prediction, target) + weight * keypoint_loss(ddf, fixed_keypoints, moving_keypoints)``.

    Args:
        loss: loss of ``(prediction, target)``, e.g. :py:class:`monai_deq.losses.StatesLoss`.
        weight: weight of the distance; 0 leaves the points aside.
        spacing: see :py:class:`KeypointLoss`. Defaults to ``None``: squared voxels.
        fixed_key: key of the fixed keypoints in the target. Defaults to ``"fixed_keypoints"``.
        moving_key: key of the moving keypoints in the target. Defaults to ``"moving_keypoints"``.
        outside: see :py:class:`KeypointLoss`. Defaults to ``"refuse"``.

    Raises:
        ValueError: When ``weight`` is negative.
    """

    def __init__(
        self,
        loss: nn.Module,
        weight: float,
        spacing: Sequence[float] | None = None,
        fixed_key: str = "fixed_keypoints",
        moving_key: str = "moving_keypoints",
        outside: OutsidePoints = "refuse",
    ) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, got {weight}.")
        self.loss = loss
        self.weight = float(weight)
        self.keypoint_loss = KeypointLoss(spacing, outside)
        self.keys = (fixed_key, moving_key)
        #: keys of what the target must have beside the images
        self.target_keys = (*getattr(loss, "target_keys", ()), *(self.keys if weight else ()))

    def forward(self, prediction: Any, target: dict[str, Any]) -> torch.Tensor:
        """The loss, a scalar, of ``(warped, ddf, ...)`` and what ``loss`` wants with the keypoints, see
        :py:class:`KeypointLoss`.

        Raises:
            KeyError: When the target has no keypoints.
        """
        total: torch.Tensor = self.loss(prediction, target)
        if not self.weight:
            return total
        absent = [key for key in self.keys if key not in target]
        if absent:
            raise KeyError(f"KeypointSupervisedLoss finds no {absent} in the target, which has {sorted(target)}.")
        fixed, moving = (target[key] for key in self.keys)
        return total + self.weight * self.keypoint_loss(prediction[1], fixed, moving)
