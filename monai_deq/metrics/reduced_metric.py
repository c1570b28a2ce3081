# SPDX-License-Identifier: Apache-2.0
"""What the cumulative metrics of this package share: the checks of MONAI's calling forms and the reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.config import TensorOrList
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction, convert_to_tensor, look_up_option

from monai_deq.utils import gather_items, process_count

__all__ = ["ReducedIterationMetric"]


class ReducedIterationMetric(CumulativeIterationMetric):
    """
    Base of the cumulative metrics: gathers (B, C) scores, NaN where there is none, and reduces them.

    It differs from MONAI's own metrics where those would report a number that nothing supports: when every score is
    NaN the reduction is NaN (MONAI gives 0), lists of different length are refused (MONAI stops at the shorter),
    and so is a ``y`` that is not a tensor (MONAI drops it). Of several processes each gets the scores of all, in the
    order of the processes, and one that has scored nothing does not keep the others waiting for ever.

    A subclass implements ``_compute_tensor``.

    Args:
        reduction: one of :py:class:`monai.utils.MetricReduction`; NaN scores are left out. ``"mean"`` averages over
            channels, then over items. Defaults to ``"mean"``.
        get_not_nans: whether ``aggregate`` returns ``(score, number of scores that are not NaN)``. Defaults to False.
    """

    def __init__(self, reduction: MetricReduction | str = MetricReduction.MEAN, get_not_nans: bool = False) -> None:
        super().__init__()
        self.reduction = look_up_option(reduction, MetricReduction)
        self.get_not_nans = get_not_nans

    def __call__(
        self, y_pred: TensorOrList, y: TensorOrList | None = None, **kwargs: Any
    ) -> torch.Tensor | Sequence[torch.Tensor | Sequence[torch.Tensor]]:
        """
        Compute the scores of a batch and keep them.

        Args:
            y_pred: batch-first tensor, or a list of channel-first tensors.
            y: the same, or None for a metric that does without.
            kwargs: passed on to the computation.

        Returns:
            scores, shape (B, C).

        Raises:
            TypeError: when ``y_pred`` or ``y`` is neither a tensor nor a list of tensors.
            ValueError: when they do not hold the same number of items.
        """
        for name, value in (("y_pred", y_pred), ("y", y)):
            items = value if isinstance(value, (list, tuple)) else [value]
            if not (name == "y" and value is None) and not all(isinstance(item, torch.Tensor) for item in items):
                kinds = sorted({type(item).__name__ for item in items})
                raise TypeError(f"{name}: expected a torch.Tensor or a list of torch.Tensor, got {', '.join(kinds)}.")
        if y is not None and len(y) != len(y_pred):
            raise ValueError(f"y: expected {len(y_pred)} items, one for each of y_pred, got {len(y)}.")
        return super().__call__(y_pred=y_pred, y=y, **kwargs)

    def _sync(self) -> None:
        if process_count() == 1:
            super()._sync()
        elif not self._synced:
            own = [convert_to_tensor(torch.stack(scores), track_meta=False) for scores in self._buffers or ()]
            parts = [part for part in gather_items([[scores.cpu() for scores in own]]) if part]
            if parts:
                device = own[0].device if own else "cpu"
                self._synced_tensors = [torch.cat(scores).to(device) for scores in zip(*parts, strict=True)]
            self._synced = True

    def aggregate(
        self, reduction: MetricReduction | str | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Reduce the scores kept so far.

        Args:
            reduction: one of :py:class:`monai.utils.MetricReduction`. Defaults to ``self.reduction``.

        Returns:
            the reduced score, or ``(score, not_nans)`` with ``get_not_nans``.

        Raises:
            ValueError: when there is no score yet.
        """
        scores = self.get_buffer()
        if not isinstance(scores, torch.Tensor):
            raise ValueError(f"{self.__class__.__name__} holds no scores: call it on a batch before aggregate().")
        reduced, not_nans = do_metric_reduction(scores, reduction or self.reduction)
        reduced = torch.where(not_nans > 0, reduced, torch.full_like(reduced, float("nan")))
        return (reduced, not_nans) if self.get_not_nans else reduced
