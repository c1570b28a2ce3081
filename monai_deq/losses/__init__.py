# SPDX-License-Identifier: Apache-2.0
"""Losses of registration."""

from __future__ import annotations

from .equilibrium import EquilibriumLoss
from .keypoint import KeypointLoss, KeypointSupervisedLoss
from .registration import MaskedSimilarityLoss, RegistrationLoss, StatesLoss

__all__ = [
    "EquilibriumLoss",
    "KeypointLoss",
    "KeypointSupervisedLoss",
    "MaskedSimilarityLoss",
    "RegistrationLoss",
    "StatesLoss",
]
