# SPDX-License-Identifier: Apache-2.0
"""Cumulative form of the Hausdorff distance of label maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from monai.utils import MetricReduction

from monai_deq.metrics.label_overlap import _check_labels, compute_label_hausdorff
from monai_deq.metrics.reduced_metric import ReducedIterationMetric
from monai_deq.metrics.spacing import affine_spacing

__all__ = ["LabelHausdorffMetric"]


class LabelHausdorffMetric(ReducedIterationMetric):
    """
    Cumulative form of :py:func:`compute_label_hausdorff`: mean over the labels of a pair, then over the pairs.

    Call it as ``metric(y_pred=warped_label, y=fixed_label)``; batch-first tensors or lists of channel-first tensors.

    Args:
        labels: the labels to score, without the background 0.
        spacing: size of a voxel in mm, one number or one per axis. Defaults to the spacing of the fixed labels where
            they are MetaTensors, else to 1 mm.
        percentile: e.g. 95 for HD95. Defaults to ``None``: the largest distance.
        reduction: see :py:class:`monai_deq.metrics.ReducedIterationMetric`. Defaults to ``"mean"``.
        get_not_nans: whether ``aggregate`` also returns the number of scores that are not NaN. Defaults to ``False``.

    Raises:
        ValueError: When ``labels`` is empty, or holds 0 or a label twice.
    """

    def __init__(
        self,
        labels: Sequence[int],
        spacing: float | Sequence[float] | None = None,
        percentile: float | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
    ) -> None:
        super().__init__(reduction=reduction, get_not_nans=get_not_nans)
        self.labels = _check_labels(labels)
        self.spacing = spacing
        self.percentile = percentile

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        if y is None:
            raise ValueError("y: expected the fixed labels, got None. Call metric(y_pred=warped_label, y=fixed_label).")
        if self.spacing is not None or not isinstance(y, MetaTensor):
            return compute_label_hausdorff(y_pred, y, self.labels, self.spacing, self.percentile)
        # a batch that a data loader has collated carries one affine an item
        affines = y.affine if y.affine.ndim == 3 else y.affine.expand(len(y), -1, -1)
        scores = [
            compute_label_hausdorff(
                y_pred[i : i + 1], y[i : i + 1], self.labels, affine_spacing(affine, y.ndim - 2), self.percentile
            )
            for i, affine in enumerate(affines)
        ]
        return torch.cat(scores)
