# SPDX-License-Identifier: Apache-2.0
"""Engines for pairs of images."""

from __future__ import annotations

from .registration import PreparePairBatch, PreparePooledPairBatch, RegistrationEvaluator

__all__ = ["PreparePairBatch", "PreparePooledPairBatch", "RegistrationEvaluator"]
