# SPDX-License-Identifier: Apache-2.0
"""Ignite side: metrics, checkpoints, results."""

from __future__ import annotations

from .checkpoints import TrainingCheckpoint, WeightsLoader
from .epoch_loss import EpochMeanLoss
from .folded_voxels import FoldedVoxels
from .gradient_clipping import GradientClipping
from .label_dice import LabelDice
from .label_hausdorff import LabelHausdorff
from .listed_output import ListedOutput
from .non_diffeomorphic_volume import NonDiffeomorphicVolume
from .output_guard import OutputGuard
from .pair_results import PairResultsSaver
from .set_epoch import SamplerEpochSetter
from .state_pool_updater import StatePoolUpdater
from .std_log_jacobian import StdLogJacobian
from .target_registration_error import TargetRegistrationError

__all__ = [
    "EpochMeanLoss",
    "FoldedVoxels",
    "GradientClipping",
    "LabelDice",
    "LabelHausdorff",
    "ListedOutput",
    "NonDiffeomorphicVolume",
    "OutputGuard",
    "PairResultsSaver",
    "SamplerEpochSetter",
    "StatePoolUpdater",
    "StdLogJacobian",
    "TargetRegistrationError",
    "TrainingCheckpoint",
    "WeightsLoader",
]
