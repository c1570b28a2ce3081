# SPDX-License-Identifier: Apache-2.0
"""Supervision by corresponding points and by label maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from monai.losses import DiceLoss
from torch.utils.checkpoint import checkpoint

from monai_deq.networks.blocks import OutsidePoints, check_outside, warp_by_ddf, warp_points_by_ddf

__all__ = ["KeypointLoss", "KeypointSupervisedLoss", "LabelLoss", "LabelSupervisedLoss"]


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


class LabelLoss(nn.Module):
    """MONAI's Dice loss of label maps, the moving one warped label by label with linear interpolation: the mean over
    the labels that both maps of a pair hold, then over the pairs; in float32 with autocast off. Eight labels at a time
    are in memory, and are warped again in the backward pass.

    Args:
        labels: the labels, without the background.

    Raises:
        ValueError: When there is none.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        super().__init__()
        self.labels = [int(label) for label in labels]
        if not self.labels:
            raise ValueError("labels must name at least one label.")
        self.dice = DiceLoss(reduction="none")

    def forward(self, ddf: torch.Tensor, fixed_label: torch.Tensor, moving_label: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            ddf: ``(B, ndim, *spatial)``, voxels.
            fixed_label: label numbers, ``(B, 1, *spatial)``.
            moving_label: label numbers, ``(B, 1, *spatial)``.

        Raises:
            ValueError: When shapes do not fit, or a pair shares no label.
        """
        expected = (len(ddf), 1, *ddf.shape[2:])
        for name, label in (("fixed_label", fixed_label), ("moving_label", moving_label)):
            if tuple(label.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(label.shape)}.")
        with torch.autocast(device_type=ddf.device.type, enabled=False):
            field = ddf.to(torch.promote_types(ddf.dtype, torch.float32))
            losses, shared = list[torch.Tensor](), list[torch.Tensor]()
            for part in torch.tensor(self.labels, device=ddf.device).split(8):
                numbers = part.view(1, -1, *[1] * (ddf.ndim - 2))
                fixed, moving = fixed_label == numbers, moving_label == numbers
                losses.append(checkpoint(self._losses, field, fixed, moving, use_reentrant=False))
                shared.append(fixed.flatten(2).any(dim=2) & moving.flatten(2).any(dim=2))
            both = torch.cat(shared, dim=1)
            count = both.sum(dim=1)
            if not (count > 0).all():
                without = torch.nonzero(count == 0).flatten().tolist()
                raise ValueError(f"the label maps of batch item(s) {without} share none of the labels {self.labels}.")
            return (torch.cat(losses, dim=1).where(both, 0.0).sum(dim=1) / count).mean()

    def _losses(self, ddf: torch.Tensor, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """The loss of each label of each pair, ``(B, L)``."""
        warped = warp_by_ddf(moving.to(ddf), ddf)
        return self.dice(warped, fixed.to(ddf)).flatten(1)  # type: ignore[no-any-return]


class _SupervisedLoss(nn.Module):
    """A training loss and, at the displacement that the network has returned, one of what annotations say of it."""

    def __init__(self, loss: nn.Module, weight: float, term: nn.Module, fixed_key: str, moving_key: str) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, got {weight}.")
        self.loss = loss
        self.weight = float(weight)
        self.term = term
        self.keys = (fixed_key, moving_key)
        #: keys of what the target must have beside the images
        self.target_keys = (*getattr(loss, "target_keys", ()), *(self.keys if weight else ()))

    def forward(self, prediction: Any, target: dict[str, Any]) -> torch.Tensor:
        """The loss, a scalar, of ``(warped, ddf, ...)`` and what ``loss`` wants with the annotations.

        Raises:
            KeyError: When the target does not have them.
        """
        total: torch.Tensor = self.loss(prediction, target)
        if not self.weight:
            return total
        absent = [key for key in self.keys if key not in target]
        if absent:
            raise KeyError(f"{type(self).__name__} finds no {absent} in the target, which has {sorted(target)}.")
        fixed, moving = (target[key] for key in self.keys)
        return total + self.weight * self.term(prediction[1], fixed, moving)  # type: ignore[no-any-return]


class KeypointSupervisedLoss(_SupervisedLoss):
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
        super().__init__(loss, weight, KeypointLoss(spacing, outside), fixed_key, moving_key)


class LabelSupervisedLoss(_SupervisedLoss):
    """A training loss with the Dice loss of the label maps added, at the displacement that the network has returned:
    ``loss(prediction, target) + weight * label_loss(ddf, fixed_label, moving_label)``. Labels are of use in training
    alone, as in VoxelMorph (Balakrishnan et al., IEEE TMI 2019, Eq. 10).

    Args:
        loss: loss of ``(prediction, target)``, e.g. :py:class:`monai_deq.losses.StatesLoss`.
        weight: weight of the Dice loss; 0 leaves the labels aside.
        labels: see :py:class:`LabelLoss`.
        fixed_key: key of the fixed label maps in the target. Defaults to ``"fixed_label"``.
        moving_key: key of the moving label maps in the target. Defaults to ``"moving_label"``.

    Raises:
        ValueError: When ``weight`` is negative, or there is no label.
    """

    def __init__(
        self,
        loss: nn.Module,
        weight: float,
        labels: Sequence[int],
        fixed_key: str = "fixed_label",
        moving_key: str = "moving_label",
    ) -> None:
        super().__init__(loss, weight, LabelLoss(labels), fixed_key, moving_key)
