# SPDX-License-Identifier: Apache-2.0
"""Networks and their building blocks."""

from __future__ import annotations

from . import blocks, nets
from .checkpoints import load_checkpoint, load_weights, save_checkpoint
from .compilation import compile_backbones, on_device
from .records import NetworkRecord, build_component, describe, load_network, read_record

__all__ = [
    "NetworkRecord",
    "blocks",
    "build_component",
    "compile_backbones",
    "describe",
    "load_checkpoint",
    "load_network",
    "load_weights",
    "nets",
    "on_device",
    "read_record",
    "save_checkpoint",
]
