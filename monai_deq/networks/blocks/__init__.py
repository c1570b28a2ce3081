# SPDX-License-Identifier: Apache-2.0
"""Building blocks: warping, convolutions, backbones, updates."""

from __future__ import annotations

from .backbones import RegistrationCNN, RegistrationUNet
from .convolutions import ConvGRUCell, SmallVolumeConv3d, convolve, with_small_volumes
from .updates import (
    GradientUpdate,
    RecurrentUpdate,
    RegistrationUpdate,
    UNetUpdate,
    VoxelMorphUpdate,
    similarity_gradient,
)
from .warping import DDFWarp, OutsidePoints, check_ddf, check_outside, points_outside, warp_by_ddf, warp_points_by_ddf

__all__ = [
    "ConvGRUCell",
    "DDFWarp",
    "GradientUpdate",
    "OutsidePoints",
    "RecurrentUpdate",
    "RegistrationCNN",
    "RegistrationUNet",
    "RegistrationUpdate",
    "SmallVolumeConv3d",
    "UNetUpdate",
    "VoxelMorphUpdate",
    "check_ddf",
    "check_outside",
    "convolve",
    "points_outside",
    "similarity_gradient",
    "warp_by_ddf",
    "warp_points_by_ddf",
    "with_small_volumes",
]
