# SPDX-License-Identifier: Apache-2.0
"""Networks and their building blocks."""

from __future__ import annotations

from . import blocks, nets
from .compile import compile_backbones, is_compiled
from .memory_format import fast_memory_format
from .normalization import normalize_convolutions
from .utils import load_checkpoint, load_weights, trained_with

__all__ = [
    "blocks",
    "compile_backbones",
    "fast_memory_format",
    "is_compiled",
    "load_checkpoint",
    "load_weights",
    "nets",
    "normalize_convolutions",
    "trained_with",
]
