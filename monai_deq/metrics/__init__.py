# SPDX-License-Identifier: Apache-2.0
"""Metrics of registration: regularity of the field, agreement of the labels, and distance of the landmarks."""

from __future__ import annotations

from .folded_voxels import FoldedVoxelsMetric, compute_folded_voxels
from .jacobian import jacobian_determinant
from .label_hausdorff import LabelHausdorffMetric
from .label_overlap import LabelDiceMetric, compute_label_dice, compute_label_hausdorff
from .non_diffeomorphic_volume import NonDiffeomorphicVolumeMetric, compute_non_diffeomorphic_volume
from .reduced_metric import ReducedIterationMetric
from .std_log_jacobian import StdLogJacobianForm, StdLogJacobianMetric, compute_std_log_jacobian
from .target_registration_error import (
    TargetRegistrationErrorForm,
    TargetRegistrationErrorMetric,
    compute_landmark_errors,
    compute_target_registration_error,
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
