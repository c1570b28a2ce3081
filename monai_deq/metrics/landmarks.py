# SPDX-License-Identifier: Apache-2.0
"""Target registration error (TRE): how far corresponding landmarks lie apart after registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.utils import MetricReduction, convert_to_tensor
from scipy import ndimage

from monai_deq.metrics.base import ReducedIterationMetric, check_spacing, image_spacing, require_ddf
from monai_deq.networks.blocks import OutsidePoints, check_outside, warp_points_by_ddf

__all__ = ["TargetRegistrationErrorForm", "TargetRegistrationErrorMetric"]
__all__ += ["compute_landmark_errors", "compute_target_registration_error"]

TargetRegistrationErrorForm = Literal["linear", "learn2reg"]


def _check_form(form: str) -> None:
    if form not in ("linear", "learn2reg"):
        raise ValueError(f"form: expected 'linear' or 'learn2reg', got {form!r}.")


def _check_percentile(name: str, percentile: float | None) -> None:
    if percentile is not None and not 0 <= percentile <= 100:
        raise ValueError(f"{name}: expected None or a number from 0 to 100, got {percentile!r}.")


def _check_points(name: str, points: Any, expected: tuple[int, ...] | None = None) -> torch.Tensor:
    if not isinstance(points, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(points).__name__}.")
    plain: torch.Tensor = convert_to_tensor(points, track_meta=False)
    if expected is not None and tuple(plain.shape) != expected:
        raise ValueError(
            f"{name}: expected shape {expected}, one point for each of the fixed image in the same order, got "
            f"{tuple(plain.shape)}."
        )
    if not torch.isfinite(plain).all():
        raise ValueError(f"{name}: expected finite coordinates, got NaN or infinity.")
    return plain.double()


def _warp_by_splines(points: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
    """Points ``(B, N, ndim)`` moved by the cubic spline through the displacements, which is zero beyond the voxels."""
    moved = [
        item + np.stack([ndimage.map_coordinates(channel, item.T, output=np.float64) for channel in field], axis=-1)
        for item, field in zip(points.cpu().numpy(), ddf.detach().cpu().numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(moved)).to(ddf.device)


def compute_landmark_errors(
    ddf: torch.Tensor,
    fixed_points: torch.Tensor,
    moving_points: torch.Tensor,
    spacing: float | Sequence[float] | torch.Tensor,
    outside: OutsidePoints = "refuse",
    form: TargetRegistrationErrorForm = "linear",
) -> torch.Tensor:
    r"""
    Distance in mm of each landmark of the moving image from where the field takes the same landmark of the fixed one.

    .. math:: e_n = \left\lVert s \odot \left(p_n + \mathrm{ddf}(p_n) - q_n\right) \right\rVert_2

    with fixed points :math:`p_n`, moving points :math:`q_n` and the voxel size :math:`s`. The pull-back field moves
    FIXED points into the moving image, see :py:func:`monai_deq.networks.blocks.warp_points_by_ddf`.

    Args:
        ddf: displacement field, shape (B, 2, H, W) or (B, 3, D, H, W), voxel units.
        fixed_points: landmarks of the fixed image, shape (B, N, ndim), voxel units, coordinate i along array axis i.
        moving_points: the same landmarks in the moving image, same shape and order; they may lie outside the grid.
        spacing: voxel size of the moving image in mm: one number, one per axis, or shape (B, ndim).
        outside: ``"refuse"`` fixed points outside the grid, or ``"clamp"``: they move by the displacement of the
            nearest border point (``"learn2reg"``: not at all), and their number is logged.
        form: ``"linear"``, as the image is warped, or ``"learn2reg"``, by cubic splines and zero beyond the outermost
            voxel centres, as the program of the challenge has it (Hering et al., IEEE TMI 2023). They differ by the
            roughness of the field: say which one a table shows.

    Returns:
        errors in mm, shape (B, N), float64; ``ValueError`` for fields and points that are not finite.
    """
    _check_form(form)
    ddf = require_ddf(ddf)
    fixed_points = _check_points("fixed_points", fixed_points)
    moving_points = _check_points("moving_points", moving_points, tuple(fixed_points.shape)).to(ddf.device)
    voxel_size = check_spacing(spacing, ddf.shape[0], ddf.shape[1]).to(ddf.device)
    found = warp_points_by_ddf(fixed_points, ddf, outside=outside)  # checks the points for both forms
    if form == "learn2reg":
        found = _warp_by_splines(fixed_points, ddf)
    return torch.linalg.vector_norm((found - moving_points) * voxel_size[:, None], dim=-1)


def compute_target_registration_error(
    ddf: torch.Tensor,
    fixed_points: torch.Tensor,
    moving_points: torch.Tensor,
    spacing: float | Sequence[float] | torch.Tensor,
    percentile: float | None = None,
    outside: OutsidePoints = "refuse",
    form: TargetRegistrationErrorForm = "linear",
) -> torch.Tensor:
    """
    Mean, or the ``percentile`` of 0 to 100, interpolated linearly, of the landmark errors of each pair in mm, shape
    (B, 1), float64; NaN without landmarks. See :py:func:`compute_landmark_errors`.
    """
    _check_percentile("percentile", percentile)
    errors = compute_landmark_errors(ddf, fixed_points, moving_points, spacing, outside, form)
    if percentile is None or not errors.shape[1]:
        return errors.mean(dim=1, keepdim=True)
    return errors.quantile(percentile / 100, dim=1, keepdim=True)


class TargetRegistrationErrorMetric(ReducedIterationMetric):
    """
    Cumulative form of :py:func:`compute_target_registration_error`: mean over the landmarks of a pair, then over the
    pairs. ``metric(ddf, fixed_points, moving_points[, reference])``, reference an image on the field's grid; in lists,
    pairs may differ in the number of landmarks. A field None is no displacement: the error before registration.

    Args:
        spacing: voxel size in mm, one number or one per axis. Defaults to None: that of the reference, or of the field,
            a MetaTensor.
        percentile: percentile over the landmarks of a pair. Defaults to None: their mean.
        pair_percentile: percentile over the pairs, in place of ``reduction``; 70 is Learn2Reg's robustness (TRE30,
            Hering et al., IEEE TMI 2023): 30 % of the pairs have a larger mean error.
        outside, form: see :py:func:`compute_landmark_errors`.
        reduction, get_not_nans: see :py:class:`ReducedIterationMetric`.
    """

    def __init__(
        self,
        spacing: float | Sequence[float] | None = None,
        percentile: float | None = None,
        pair_percentile: float | None = None,
        outside: OutsidePoints = "refuse",
        form: TargetRegistrationErrorForm = "linear",
        reduction: MetricReduction | str = "mean",
        get_not_nans: bool = False,
    ) -> None:
        super().__init__(reduction, get_not_nans)
        _check_percentile("percentile", percentile)
        _check_percentile("pair_percentile", pair_percentile)
        check_outside(outside)
        _check_form(form)
        self.spacing, self.outside, self.form = spacing, outside, form
        self.percentile, self.pair_percentile = percentile, pair_percentile

    def compute_scores(
        self,
        y_pred: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        moving_points: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if y is None or moving_points is None:
            raise ValueError(
                f"{'y' if y is None else 'moving_points'}: expected landmarks, got None. Call metric(y_pred=ddf, "
                "y=fixed_points, moving_points=moving_points)."
            )
        if y_pred is None:
            if reference is None:
                raise ValueError("reference: expected an image where y_pred is None, whose grid the landmarks lie on.")
            size = reference.shape[2:]
            y_pred = torch.zeros(len(reference), len(size), *size, device=reference.device)
        spacing = image_spacing(y_pred if reference is None else reference) if self.spacing is None else self.spacing
        if spacing is None:
            raise ValueError(
                "spacing: the field carries no affine that tells the voxel size. Give the metric a spacing in mm (1 "
                "for errors in voxels), or the call a reference image on the field's grid that is a MetaTensor."
            )
        return compute_target_registration_error(
            y_pred, y, moving_points, spacing, self.percentile, self.outside, self.form
        )

    def aggregate(
        self, reduction: MetricReduction | str | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As :py:meth:`ReducedIterationMetric.aggregate`; by ``pair_percentile`` unless a ``reduction`` is given."""
        scores = None if self.pair_percentile is None or reduction is not None else self.get_buffer()
        if scores is None or self.pair_percentile is None:
            return super().aggregate(reduction)
        reduced = scores.flatten().nanquantile(self.pair_percentile / 100)
        return (reduced, (~scores.isnan()).sum().to(scores)) if self.get_not_nans else reduced
