# SPDX-License-Identifier: Apache-2.0
"""Share of folded voxels: where the Jacobian determinant of a displacement field is zero or less."""

from __future__ import annotations

import torch

from monai_deq.metrics.jacobian import check_ddf, check_mask, jacobian_determinant, values_inside
from monai_deq.metrics.reduced_metric import ReducedIterationMetric

__all__ = ["FoldedVoxelsMetric", "compute_folded_voxels"]


def compute_folded_voxels(ddf: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Percentage of voxels with ``|J| <= 0``; see :py:func:`monai_deq.metrics.jacobian_determinant`.

    Args:
        ddf: displacement field, shape (B, 2, H, W) or (B, 3, D, H, W), voxel units.
        mask: shape ``(B, 1, *spatial)``; only voxels greater than zero are counted. Defaults to None: the whole grid.

    Returns:
        percentages, shape (B, 1); NaN where the mask is empty.

    Raises:
        TypeError: when ``ddf`` or ``mask`` is not a tensor.
        ValueError: when ``ddf`` is not a finite field, or ``mask`` does not fit it.
    """
    ddf = check_ddf(ddf)
    mask = check_mask(mask, ddf)
    per_item = [
        100.0 * torch.count_nonzero(values <= 0).to(values.dtype) / values.numel()
        for values in values_inside(jacobian_determinant(ddf), mask)
    ]
    return torch.stack(per_item).unsqueeze(1)


class FoldedVoxelsMetric(ReducedIterationMetric):
    """
    Cumulative form of :py:func:`compute_folded_voxels`: mean percentage of folded voxels over all fields seen.

    Call it as ``metric(y_pred=ddf, y=mask)``, ``y`` being optional; both batch-first tensors or lists of channel-first
    tensors.

    Args:
        reduction: see :py:class:`monai_deq.metrics.ReducedIterationMetric`. Defaults to ``"mean"``.
        get_not_nans: whether ``aggregate`` also returns the number of fields counted. Defaults to False.
    """

    def _compute_tensor(  # type: ignore[override]
        self, y_pred: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        return compute_folded_voxels(y_pred, y)
