# SPDX-License-Identifier: Apache-2.0
"""Losses of registration."""

from __future__ import annotations

from .equilibrium import EquilibriumLoss
from .features import FeatureLabelLoss
from .registration import MaskedSimilarityLoss, RegistrationLoss, StatesLoss
from .supervision import KeypointLoss, KeypointSupervisedLoss, LabelLoss, LabelSupervisedLoss

__all__ = [
    "EquilibriumLoss",
    "FeatureLabelLoss",
    "KeypointLoss",
    "KeypointSupervisedLoss",
    "LabelLoss",
    "LabelSupervisedLoss",
    "MaskedSimilarityLoss",
    "RegistrationLoss",
    "StatesLoss",
]
