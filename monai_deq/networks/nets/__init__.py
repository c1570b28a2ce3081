# SPDX-License-Identifier: Apache-2.0
"""Registration networks."""

from __future__ import annotations

from .energy import EnergyRegistrationNet, energy_finish
from .equilibrium import DEQRegistrationNet, GradientSettings, RestSettings, coarse_to_fine, set_coarse_solver
from .features import FeatureUNet
from .interface import IteratedNet, RegistrationNet, check_pair
from .systems import gradirn_net, riir_net, unrolling_net, voxelmorph_net
from .unrolled import UnrolledRegistrationNet

__all__ = [
    "DEQRegistrationNet",
    "EnergyRegistrationNet",
    "FeatureUNet",
    "GradientSettings",
    "IteratedNet",
    "RegistrationNet",
    "RestSettings",
    "UnrolledRegistrationNet",
    "check_pair",
    "coarse_to_fine",
    "energy_finish",
    "gradirn_net",
    "riir_net",
    "set_coarse_solver",
    "unrolling_net",
    "voxelmorph_net",
]
