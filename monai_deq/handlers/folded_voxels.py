# SPDX-License-Identifier: Apache-2.0
"""Ignite handler for the percentage of folded voxels."""

from __future__ import annotations

from collections.abc import Callable

from monai.utils import MetricReduction

from monai_deq.handlers.ddf_metric import DDFMetricHandler
from monai_deq.metrics import FoldedVoxelsMetric

__all__ = ["FoldedVoxels"]


class FoldedVoxels(DDFMetricHandler):
    """
    Computes the percentage of folded voxels of every displacement field and reduces it over an epoch.

    Args:
        reduction: see :py:class:`monai_deq.metrics.ReducedIterationMetric`. Defaults to ``"mean"``.
        output_transform: takes ``engine.state.output`` to a ddf tensor ``(B, ndim, *spatial)``, a list of ddf tensors
            ``(ndim, *spatial)``, or a tuple (ddf, mask) of either; see :py:class:`DDFMetricHandler`. Defaults to
            identity.
        save_details: whether to keep the score of every field in ``engine.state.metric_details``. Defaults to True.

    See also:
        :py:func:`monai_deq.metrics.compute_folded_voxels`
    """

    def __init__(
        self,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            metric_fn=FoldedVoxelsMetric(reduction=reduction),
            output_transform=output_transform,
            save_details=save_details,
        )
