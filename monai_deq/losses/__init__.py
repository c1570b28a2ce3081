# SPDX-License-Identifier: Apache-2.0
"""Losses of registration."""

from __future__ import annotations

from .equilibrium import EquilibriumLoss
from .registration import RegistrationLoss, StatesLoss
from .state_weights import exponential_state_weights

__all__ = ["EquilibriumLoss", "RegistrationLoss", "StatesLoss", "exponential_state_weights"]
