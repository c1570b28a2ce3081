# SPDX-License-Identifier: Apache-2.0
"""Losses of registration."""

from __future__ import annotations

from .equilibrium import EquilibriumLoss
from .keypoint import KeypointLoss, KeypointSupervisedLoss
from .masked_similarity import MaskedSimilarityLoss
from .registration import RegistrationLoss, StatesLoss
from .state_weights import exponential_state_weights

__all__ = [
    "EquilibriumLoss",
    "KeypointLoss",
    "KeypointSupervisedLoss",
    "MaskedSimilarityLoss",
    "RegistrationLoss",
    "StatesLoss",
    "exponential_state_weights",
]
