# SPDX-License-Identifier: Apache-2.0
"""Registration networks."""

from __future__ import annotations

from .equilibrium import (
    DEQRegistrationNet,
    GradientSettings,
    RestSettings,
    coarse_to_fine,
    set_coarse_solver,
)
from .interface import IteratedNet, RegistrationNet
from .systems import gradirn, riir, unrolling, voxelmorph
from .unrolled import UnrolledRegistrationNet

__all__ = [
    "DEQRegistrationNet",
    "GradientSettings",
    "IteratedNet",
    "RegistrationNet",
    "RestSettings",
    "UnrolledRegistrationNet",
    "coarse_to_fine",
    "gradirn",
    "riir",
    "set_coarse_solver",
    "unrolling",
    "voxelmorph",
]
