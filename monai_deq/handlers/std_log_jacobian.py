# SPDX-License-Identifier: Apache-2.0
"""Ignite handler for the standard deviation of the log Jacobian determinant."""

from __future__ import annotations

from collections.abc import Callable

from monai.utils import MetricReduction

from monai_deq.handlers.ddf_metric import DDFMetricHandler
from monai_deq.metrics import StdLogJacobianForm, StdLogJacobianMetric

__all__ = ["StdLogJacobian"]


class StdLogJacobian(DDFMetricHandler):
    """
    Computes the standard deviation of the log Jacobian determinant of every displacement field and reduces it over an
    epoch.

    Args:
        form: ``"paper"`` or ``"learn2reg"``. Defaults to ``"paper"``.
        reduction: see :py:class:`monai_deq.metrics.ReducedIterationMetric`. Defaults to ``"mean"``.
        output_transform: takes ``engine.state.output`` to a ddf tensor ``(B, ndim, *spatial)``, a list of ddf tensors
            ``(ndim, *spatial)``, or a tuple (ddf, mask) of either; see :py:class:`DDFMetricHandler`. Defaults to
            identity.
        save_details: whether to keep the score of every field in ``engine.state.metric_details``. Defaults to True.

    See also:
        :py:func:`monai_deq.metrics.compute_std_log_jacobian`
    """

    def __init__(
        self,
        form: StdLogJacobianForm = "paper",
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            metric_fn=StdLogJacobianMetric(form=form, reduction=reduction),
            output_transform=output_transform,
            save_details=save_details,
        )
