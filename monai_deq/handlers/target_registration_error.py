# SPDX-License-Identifier: Apache-2.0
"""Ignite handler for the target registration error of landmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from monai.utils import MetricReduction

from monai_deq.handlers.whole_output import WholeOutputMetricHandler
from monai_deq.metrics import TargetRegistrationErrorForm, TargetRegistrationErrorMetric
from monai_deq.networks.blocks import OutsidePoints

__all__ = ["TargetRegistrationError"]


class TargetRegistrationError(WholeOutputMetricHandler):
    """
    Computes the target registration error of landmarks in mm and reduces it over an epoch.

    Args:
        spacing: voxel size in mm, one number or one per axis. Defaults to None: that of the reference image, or of the
            field where it is a MetaTensor.
        percentile: percentile over the landmarks of a pair. Defaults to None: their mean.
        pair_percentile: percentile over the pairs; 70 is Learn2Reg's TRE30. Defaults to None: ``reduction``.
        outside: fixed points outside the grid: ``"refuse"`` or ``"clamp"``. Defaults to ``"refuse"``.
        form: ``"linear"`` or ``"learn2reg"``, see :py:func:`monai_deq.metrics.compute_landmark_errors`. Defaults to
            ``"linear"``.
        reduction: see :py:class:`monai_deq.metrics.ReducedIterationMetric`. Defaults to ``"mean"``.
        output_transform: takes ``engine.state.output`` to the tuple ``(ddf, fixed_points, moving_points)`` or
            ``(ddf, fixed_points, moving_points, reference)``, whose elements are batch-first tensors or lists of
            tensors without the batch axis: displacement fields ``(ndim, *spatial)``, landmarks (N, ndim) in voxels, and
            images ``(C, *spatial)`` on the field's grid whose affine tells the voxel size. Defaults to identity.
        save_details: whether to keep the error of every pair in ``engine.state.metric_details``. Defaults to True.

    See also:
        :py:func:`monai_deq.metrics.compute_target_registration_error`
    """

    def __init__(
        self,
        spacing: float | Sequence[float] | None = None,
        percentile: float | None = None,
        pair_percentile: float | None = None,
        outside: OutsidePoints = "refuse",
        form: TargetRegistrationErrorForm = "linear",
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            metric_fn=TargetRegistrationErrorMetric(
                spacing=spacing,
                percentile=percentile,
                pair_percentile=pair_percentile,
                outside=outside,
                form=form,
                reduction=reduction,
            ),
            output_transform=output_transform,
            save_details=save_details,
        )

    def update(self, output: Any) -> None:
        """
        Score displacement fields.

        Args:
            output: ``(ddf, fixed_points, moving_points)`` or ``(ddf, fixed_points, moving_points, reference)``.

        Raises:
            ValueError: when ``output`` is not a tuple of 3 or 4 elements.
        """
        if not isinstance(output, tuple) or len(output) not in (3, 4):
            came = f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__
            raise ValueError(
                "output_transform: expected to return the tuple (ddf, fixed_points, moving_points) or "
                f"(ddf, fixed_points, moving_points, reference), got {came}."
            )
        ddf, fixed, moving, *reference = output
        self.metric_fn(ddf, fixed, moving_points=moving, reference=reference[0] if reference else None)
