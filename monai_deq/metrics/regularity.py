# SPDX-License-Identifier: Apache-2.0
"""Regularity of displacement fields: Jacobian determinant, folded voxels, std(log |J|), non-diffeomorphic volume."""

from __future__ import annotations

from collections.abc import Callable
from math import factorial
from typing import Literal

import torch
from monai.utils import MetricReduction, convert_to_tensor

from monai_deq.metrics.base import ReducedIterationMetric, require_ddf
from monai_deq.networks.blocks import determinant, simplex_determinants

__all__ = ["FoldedVoxelsMetric", "NonDiffeomorphicVolumeMetric", "StdLogJacobianForm", "StdLogJacobianMetric"]
__all__ += ["compute_folded_voxels", "compute_non_diffeomorphic_volume", "compute_std_log_jacobian"]
__all__ += ["jacobian_determinant"]

StdLogJacobianForm = Literal["paper", "learn2reg"]

# form: (voxels cropped from each side, offset added to |J| before the clip)
_FORMS: dict[str, tuple[int, float]] = {"paper": (0, 0.0), "learn2reg": (2, 3.0)}


def _check_mask(mask: torch.Tensor | None, ddf: torch.Tensor) -> torch.Tensor | None:
    """The mask as booleans on the field's device."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: expected a torch.Tensor or None, got {type(mask).__name__}.")
    expected = (ddf.shape[0], 1, *ddf.shape[2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask: expected shape {expected} to fit the ddf, got {tuple(mask.shape)}.")
    return convert_to_tensor(mask, track_meta=False, device=ddf.device) > 0


def _reduce_inside(
    field: torch.Tensor, mask: torch.Tensor | None, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Item by item one number of the values of a scalar field inside the mask, NaN where there are none."""
    items = list(field.flatten(1)) if mask is None else [f[inside] for f, inside in zip(field, mask, strict=True)]
    return torch.stack([reduce(v) if v.numel() else v.new_tensor(float("nan")) for v in items]).unsqueeze(1)


def _check_form(form: str) -> None:
    if form not in _FORMS:
        raise ValueError(f"form: expected one of {list(_FORMS)}, got {form!r}.")


def _jacobian(ddf: torch.Tensor) -> torch.Tensor:
    """|J| of a checked field, shape ``(B, 1, *spatial)``."""
    axes = range(ddf.shape[1])
    rows = [torch.gradient(ddf[:, i], dim=tuple(axis + 1 for axis in axes)) for i in axes]
    return determinant([[rows[i][j] + 1 if i == j else rows[i][j] for j in axes] for i in axes]).unsqueeze(1)


def jacobian_determinant(ddf: torch.Tensor) -> torch.Tensor:
    r"""
    Determinant of the Jacobian of the map :math:`x \mapsto x + \mathrm{ddf}(x)`, in voxel units.

    :math:`|J| = \det(I + \partial\,\mathrm{ddf} / \partial x)` by central differences, one-sided at the border as
    ``numpy.gradient``: 1 where volume is kept, below 1 where the map contracts, zero or less where it folds.

    Args:
        ddf: displacement field, shape (B, 2, H, W) or (B, 3, D, H, W), voxel units; channel i displaces array axis i.
            ``ValueError`` unless it is finite and has at least 2 voxels along each axis.

    Returns:
        shape ``(B, 1, *spatial)``, float32, or float64 for a float64 field.
    """
    return _jacobian(require_ddf(ddf))


def compute_folded_voxels(ddf: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Percentage of voxels with ``|J| <= 0``, see :py:func:`jacobian_determinant`; shape (B, 1), NaN for an empty mask.

    Args:
        ddf: displacement field, shape (B, 2, H, W) or (B, 3, D, H, W), voxel units; ``ValueError`` unless finite.
        mask: shape ``(B, 1, *spatial)``; only voxels greater than zero are counted. Defaults to None: the whole grid.
    """
    ddf = require_ddf(ddf)
    return _reduce_inside(
        _jacobian(ddf), _check_mask(mask, ddf), lambda v: 100.0 * torch.count_nonzero(v <= 0).to(v.dtype) / v.numel()
    )


def compute_std_log_jacobian(
    ddf: torch.Tensor, mask: torch.Tensor | None = None, form: StdLogJacobianForm = "paper"
) -> torch.Tensor:
    """
    Population standard deviation of ``log |J|``, see :py:func:`jacobian_determinant`, in one of two forms that are not
    comparable with each other; shape (B, 1), NaN where the mask, for ``"learn2reg"`` after the crop, is empty.

    - ``"paper"``: ``log(clip(|J|, 1e-9, 1e9))`` over the whole grid, as in the DEQReg paper.
    - ``"learn2reg"``: ``log(clip(|J| + 3, 1e-9, 1e9))`` without the outer 2 voxels of each side, the SDlogJ of the
      Learn2Reg evaluation (Hering et al., IEEE TMI 2023).

    Args:
        ddf, mask: see :py:func:`compute_folded_voxels`; 5 voxels or more an axis for ``"learn2reg"``.
        form: ``"paper"`` or ``"learn2reg"``.
    """
    _check_form(form)
    crop, offset = _FORMS[form]
    ddf = require_ddf(ddf, min_size=max(2, 2 * crop + 1))
    mask = _check_mask(mask, ddf)
    jacobian = _jacobian(ddf)
    if crop:
        inner = (slice(None), slice(None), *(slice(crop, -crop) for _ in range(ddf.shape[1])))
        jacobian = jacobian[inner]
        mask = None if mask is None else mask[inner]
    log_jacobian = (jacobian + offset).clamp(1e-9, 1e9).log()
    return _reduce_inside(log_jacobian, mask, lambda values: torch.std(values, correction=0))


def compute_non_diffeomorphic_volume(ddf: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Volume that the field turns inside out, in % of that of the mask (2-D: area); shape (B, 1), NaN for an empty mask.
    For the arguments see :py:func:`compute_folded_voxels`.

    Liu et al., "On Finite Difference Jacobian Computation in Deformable Image Registration", IJCV 2024. With the field
    linear inside the ten tetrahedra of a voxel, their determinants of finite differences (:math:`J^{\pm\pm\pm}, J_1^*,
    J_2^*`) are 6 times their signed volumes after deformation (2-D: four triangles, 2 times their areas). Each cube is
    divided in two ways, hence half:

    .. math:: \mathrm{NDV} = \frac{1}{2} \sum_x \sum_{k=1}^{10} \frac{\max(-|J_k(x)|, 0)}{6}

    It says how badly the field folds, sees the folds that central differences step over, and may exceed 100 %. Beyond
    the border the displacement goes on unchanged, as in the authors' program.
    """
    ddf = require_ddf(ddf)
    mask = _check_mask(mask, ddf)
    volume = torch.zeros_like(ddf[:, :1])
    for determinants in simplex_determinants(ddf):
        volume += (-determinants).clamp(min=0)[:, None]
    volume *= 0.5 / factorial(ddf.shape[1])
    return _reduce_inside(volume, mask, lambda values: 100.0 * values.mean())


class FoldedVoxelsMetric(ReducedIterationMetric):
    """Cumulative form of :py:func:`compute_folded_voxels`: ``metric(ddf)`` or ``metric(ddf, mask)``."""

    def compute_scores(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return compute_folded_voxels(y_pred, y)


class NonDiffeomorphicVolumeMetric(ReducedIterationMetric):
    """Cumulative form of :py:func:`compute_non_diffeomorphic_volume`: ``metric(ddf)`` or ``metric(ddf, mask)``."""

    def compute_scores(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return compute_non_diffeomorphic_volume(y_pred, y)


class StdLogJacobianMetric(ReducedIterationMetric):
    """Cumulative form of :py:func:`compute_std_log_jacobian`: ``metric(ddf)`` or ``metric(ddf, mask)``."""

    def __init__(
        self, form: StdLogJacobianForm = "paper", reduction: MetricReduction | str = "mean", get_not_nans: bool = False
    ) -> None:
        super().__init__(reduction, get_not_nans)
        _check_form(form)
        self.form = form

    def compute_scores(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return compute_std_log_jacobian(y_pred, y, self.form)
