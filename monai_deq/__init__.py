# SPDX-License-Identifier: Apache-2.0
"""Equilibrium registration for MONAI (DEQReg, MICCAI 2025)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "apps",
    "baselines",
    "bundle",
    "certificates",
    "data",
    "engines",
    "evaluation",
    "handlers",
    "inferers",
    "losses",
    "metrics",
    "networks",
    "solvers",
    "transforms",
    "utils",
    "visualize",
]


def __getattr__(name: str) -> Any:
    """The packages inside are imported when they are asked for: PyTorch and MONAI take seconds."""
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
