# SPDX-License-Identifier: Apache-2.0
"""Inferers."""

from __future__ import annotations

from .fixed_point import FixedPointInferer

__all__ = ["FixedPointInferer"]
