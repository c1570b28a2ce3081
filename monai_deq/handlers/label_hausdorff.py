# SPDX-License-Identifier: Apache-2.0
"""Ignite handler for the Hausdorff distance of warped labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from monai.utils import MetricReduction

from monai_deq.handlers.whole_output import WholeOutputMetricHandler
from monai_deq.metrics import LabelHausdorffMetric

__all__ = ["LabelHausdorff"]


class LabelHausdorff(WholeOutputMetricHandler):
    """
    Computes the Hausdorff distance of chosen labels between warped and fixed label maps, and reduces it over an epoch.

    Args:
        labels: the labels to score, without the background 0.
        spacing: see :py:class:`monai_deq.metrics.LabelHausdorffMetric`.
        percentile: e.g. 95 for HD95. Defaults to ``None``: the largest distance.
        reduction: see :py:class:`monai_deq.metrics.ReducedIterationMetric`. Defaults to ``"mean"``.
        output_transform: takes ``engine.state.output`` to the tuple ``(warped_label, fixed_label)``, tensors
            ``(B, 1, *spatial)`` or lists of tensors ``(1, *spatial)``. Defaults to identity.
        save_details: whether to keep the scores of every pair in ``engine.state.metric_details``. Defaults to True.
    """

    def __init__(
        self,
        labels: Sequence[int],
        spacing: float | Sequence[float] | None = None,
        percentile: float | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            metric_fn=LabelHausdorffMetric(labels, spacing=spacing, percentile=percentile, reduction=reduction),
            output_transform=output_transform,
            save_details=save_details,
        )

    def update(self, output: Any) -> None:
        """
        Score warped labels.

        Args:
            output: ``(warped_label, fixed_label)``.

        Raises:
            ValueError: when ``output`` is not a tuple of 2 elements.
        """
        if not isinstance(output, tuple) or len(output) != 2:
            raise ValueError(
                "output_transform: expected to return the tuple (warped_label, fixed_label), "
                f"got {type(output).__name__}."
            )
        self.metric_fn(*output)
