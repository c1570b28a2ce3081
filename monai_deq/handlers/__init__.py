# SPDX-License-Identifier: Apache-2.0
"""Ignite side: metrics, training, checkpoints, results."""

from __future__ import annotations

from . import checkpoints, metrics, results, training
from .checkpoints import *  # noqa: F403
from .metrics import *  # noqa: F403
from .results import *  # noqa: F403
from .training import *  # noqa: F403

__all__ = checkpoints.__all__ + metrics.__all__ + results.__all__ + training.__all__
