# SPDX-License-Identifier: Apache-2.0
"""Building blocks: warping, convolutions, backbones, updates."""

from __future__ import annotations

from .backbones import RegistrationCNN, RegistrationUNet
from .convolutions import ConvGRUCell, SmallVolumeConv3d, convolve, with_small_volumes
from .energy import EnergyUpdate
from .filters import box_sum, central_difference, gaussian_reach, gaussian_smooth, in_slabs
from .jacobians import DiffusionFoldLoss, determinant, remove_folds, simplex_determinants
from .similarities import FeatureLoss, LocalCorrelationLoss, standardised
from .updates import (
    GradientUpdate,
    RecurrentUpdate,
    RegistrationUpdate,
    UNetUpdate,
    VoxelMorphUpdate,
    similarity_gradient,
)
from .warping import (
    DDFWarp,
    OutsidePoints,
    check_ddf,
    check_outside,
    identity_grid,
    points_outside,
    sample_at,
    warp_by_ddf,
    warp_points_by_ddf,
)

__all__ = [
    "ConvGRUCell",
    "DDFWarp",
    "DiffusionFoldLoss",
    "EnergyUpdate",
    "FeatureLoss",
    "GradientUpdate",
    "LocalCorrelationLoss",
    "OutsidePoints",
    "RecurrentUpdate",
    "RegistrationCNN",
    "RegistrationUNet",
    "RegistrationUpdate",
    "SmallVolumeConv3d",
    "UNetUpdate",
    "VoxelMorphUpdate",
    "box_sum",
    "central_difference",
    "check_ddf",
    "check_outside",
    "convolve",
    "determinant",
    "gaussian_reach",
    "gaussian_smooth",
    "identity_grid",
    "in_slabs",
    "points_outside",
    "remove_folds",
    "sample_at",
    "similarity_gradient",
    "simplex_determinants",
    "standardised",
    "warp_by_ddf",
    "warp_points_by_ddf",
    "with_small_volumes",
]
