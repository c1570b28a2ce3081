# SPDX-License-Identifier: Apache-2.0
"""Ignite side: metrics, training, checkpoints, results."""

from __future__ import annotations

from .checkpoints import TrainingCheckpoint, WeightsLoader
from .metrics import MetricHandler, regularity_metrics
from .results import OutputGuard, PairResultsSaver
from .training import EpochMeanLoss, GradientClipping, ListedOutput, SamplerEpochSetter, StatePoolUpdater

__all__ = [
    "EpochMeanLoss",
    "GradientClipping",
    "ListedOutput",
    "MetricHandler",
    "OutputGuard",
    "PairResultsSaver",
    "SamplerEpochSetter",
    "StatePoolUpdater",
    "TrainingCheckpoint",
    "WeightsLoader",
    "regularity_metrics",
]
