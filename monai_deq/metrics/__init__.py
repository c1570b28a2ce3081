# SPDX-License-Identifier: Apache-2.0
"""Metrics of registration: regularity of the field, agreement of the labels, and distance of the landmarks."""

from __future__ import annotations

from .base import ReducedIterationMetric
from .labels import LabelDiceMetric, LabelHausdorffMetric, compute_label_dice, compute_label_hausdorff
from .landmarks import (
    TargetRegistrationErrorForm,
    TargetRegistrationErrorMetric,
    compute_landmark_errors,
    compute_target_registration_error,
)
from .regularity import (
    FoldedVoxelsMetric,
    NonDiffeomorphicVolumeMetric,
    StdLogJacobianForm,
    StdLogJacobianMetric,
    compute_folded_voxels,
    compute_non_diffeomorphic_volume,
    compute_std_log_jacobian,
    jacobian_determinant,
)

__all__ = [
    "FoldedVoxelsMetric",
    "LabelDiceMetric",
    "LabelHausdorffMetric",
    "NonDiffeomorphicVolumeMetric",
    "ReducedIterationMetric",
    "StdLogJacobianForm",
    "StdLogJacobianMetric",
    "TargetRegistrationErrorForm",
    "TargetRegistrationErrorMetric",
    "compute_folded_voxels",
    "compute_label_dice",
    "compute_label_hausdorff",
    "compute_landmark_errors",
    "compute_non_diffeomorphic_volume",
    "compute_std_log_jacobian",
    "compute_target_registration_error",
    "jacobian_determinant",
]
