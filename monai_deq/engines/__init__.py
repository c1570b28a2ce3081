# SPDX-License-Identifier: Apache-2.0
"""Engines for pairs of images."""

from __future__ import annotations

from .batches import PreparePairBatch, PreparePooledPairBatch
from .registration import RegistrationEvaluator, RegistrationTrainer
from .schedules import Schedule, nlst_schedule, oasis_schedule

__all__ = [
    "PreparePairBatch",
    "PreparePooledPairBatch",
    "RegistrationEvaluator",
    "RegistrationTrainer",
    "Schedule",
    "nlst_schedule",
    "oasis_schedule",
]
