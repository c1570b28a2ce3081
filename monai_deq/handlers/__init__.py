# SPDX-License-Identifier: Apache-2.0
"""Ignite side: metrics, training, checkpoints, pictures, results."""

from __future__ import annotations

from . import checkpoints, metrics, pictures, results, summaries, training
from .checkpoints import *  # noqa: F403
from .metrics import *  # noqa: F403
from .pictures import *  # noqa: F403
from .results import *  # noqa: F403
from .summaries import *  # noqa: F403
from .training import *  # noqa: F403

__all__ = checkpoints.__all__ + metrics.__all__ + pictures.__all__ + results.__all__ + summaries.__all__
__all__ += training.__all__
