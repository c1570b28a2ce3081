# SPDX-License-Identifier: Apache-2.0
"""Losses."""

from __future__ import annotations

from .registration import RegistrationLoss, StatesLoss

__all__ = ["RegistrationLoss", "StatesLoss"]
