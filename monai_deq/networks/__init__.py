# SPDX-License-Identifier: Apache-2.0
"""Networks and their building blocks."""

from __future__ import annotations

from . import blocks, nets
from .utils import load_checkpoint, load_weights, trained_with

__all__ = ["blocks", "load_checkpoint", "load_weights", "nets", "trained_with"]
