# SPDX-License-Identifier: Apache-2.0
"""Metrics of registration: regularity of the field, agreement of the labels, and distance of the landmarks."""

from __future__ import annotations

from . import labels, landmarks, regularity
from .base import ReducedIterationMetric
from .labels import *  # noqa: F403
from .landmarks import *  # noqa: F403
from .regularity import *  # noqa: F403

__all__ = ["ReducedIterationMetric"]
__all__ += labels.__all__ + landmarks.__all__ + regularity.__all__
