# SPDX-License-Identifier: Apache-2.0
"""Equilibrium registration for MONAI (DEQReg, MICCAI 2025)."""

from __future__ import annotations

from . import (
    baselines,
    certificates,
    data,
    engines,
    handlers,
    inferers,
    losses,
    metrics,
    networks,
    solvers,
    transforms,
    utils,
)

__version__ = "0.1.0"

__all__ = [
    "baselines",
    "certificates",
    "data",
    "engines",
    "handlers",
    "inferers",
    "losses",
    "metrics",
    "networks",
    "solvers",
    "transforms",
    "utils",
]
