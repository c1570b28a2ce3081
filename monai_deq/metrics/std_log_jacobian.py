# SPDX-License-Identifier: Apache-2.0
"""Standard deviation of the logarithm of the Jacobian determinant, in the two forms that the literature reports."""

from __future__ import annotations

from typing import Literal

import torch
from monai.utils import MetricReduction

from monai_deq.metrics.jacobian import check_ddf, check_mask, jacobian_determinant, values_inside
from monai_deq.metrics.reduced_metric import ReducedIterationMetric

__all__ = ["StdLogJacobianForm", "StdLogJacobianMetric", "compute_std_log_jacobian"]

StdLogJacobianForm = Literal["paper", "learn2reg"]

# form: (voxels cropped from each side, offset added to |J| before the clip)
_FORMS: dict[str, tuple[int, float]] = {"paper": (0, 0.0), "learn2reg": (2, 3.0)}


def _look_up_form(form: str) -> tuple[int, float]:
    if form not in _FORMS:
        raise ValueError(f"form: expected one of {list(_FORMS)}, got {form!r}.")
    return _FORMS[form]


def compute_std_log_jacobian(
    ddf: torch.Tensor, mask: torch.Tensor | None = None, form: StdLogJacobianForm = "paper"
) -> torch.Tensor:
    """
    Population standard deviation of ``log |J|``; see :py:func:`monai_deq.metrics.jacobian_determinant`.

    The two forms are not comparable with each other: say which one a table shows.

    - ``"paper"``: ``log(clip(|J|, 1e-9, 1e9))`` over the whole grid, as the std(log|J|) of the DEQReg paper.
    - ``"learn2reg"``: ``log(clip(|J| + 3, 1e-9, 1e9))`` without the outer 2 voxels of each side, the SDlogJ of the
      Learn2Reg evaluation (Hering et al., IEEE TMI 2023).

    Args:
        ddf: displacement field, shape (B, 2, H, W) or (B, 3, D, H, W), voxel units; at least 2 voxels along each axis,
            5 for ``"learn2reg"``.
        mask: shape ``(B, 1, *spatial)``; only voxels greater than zero are counted. Defaults to None: the whole grid.
        form: ``"paper"`` or ``"learn2reg"``. Defaults to ``"paper"``.

    Returns:
        shape (B, 1); NaN where the mask is empty (for ``"learn2reg"``, empty after the crop).

    Raises:
        TypeError: when ``ddf`` or ``mask`` is not a tensor.
        ValueError: when ``form`` is unknown, ``ddf`` is not a finite field, or ``mask`` does not fit it.
    """
    crop, offset = _look_up_form(form)
    ddf = check_ddf(ddf, min_size=max(2, 2 * crop + 1))
    mask = check_mask(mask, ddf)
    jacobian = jacobian_determinant(ddf)
    if crop:
        inner = (slice(None), slice(None), *(slice(crop, -crop) for _ in range(ddf.shape[1])))
        jacobian = jacobian[inner]
        mask = None if mask is None else mask[inner]
    log_jacobian = (jacobian + offset).clamp(1e-9, 1e9).log()
    per_item = [
        torch.std(values, correction=0) if values.numel() else values.new_tensor(float("nan"))
        for values in values_inside(log_jacobian, mask)
    ]
    return torch.stack(per_item).unsqueeze(1)


class StdLogJacobianMetric(ReducedIterationMetric):
    """
    Cumulative form of :py:func:`compute_std_log_jacobian`: mean of the standard deviations over all fields seen.

    Call it as ``metric(y_pred=ddf, y=mask)``, ``y`` being optional; both batch-first tensors or lists of channel-first
    tensors.

    Args:
        form: ``"paper"`` or ``"learn2reg"``. Defaults to ``"paper"``.
        reduction: see :py:class:`monai_deq.metrics.ReducedIterationMetric`. Defaults to ``"mean"``.
        get_not_nans: whether ``aggregate`` also returns the number of fields counted. Defaults to False.

    Raises:
        ValueError: when ``form`` is unknown.
    """

    def __init__(
        self,
        form: StdLogJacobianForm = "paper",
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
    ) -> None:
        super().__init__(reduction=reduction, get_not_nans=get_not_nans)
        _look_up_form(form)
        self.form = form

    def _compute_tensor(  # type: ignore[override]
        self, y_pred: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        return compute_std_log_jacobian(y_pred, y, form=self.form)
