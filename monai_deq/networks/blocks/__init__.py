# SPDX-License-Identifier: Apache-2.0
"""Building blocks: warp, backbones, updates."""

from __future__ import annotations

from .cnn import RegistrationCNN
from .conv_gru import ConvGRUCell
from .convolution import SmallVolumeConv3d, convolve, with_small_volumes
from .gradient_update import GradientUpdate
from .recurrent_update import RecurrentUpdate
from .similarity_gradient import similarity_gradient
from .unet import RegistrationUNet
from .unet_update import UNetUpdate
from .voxelmorph_update import VoxelMorphUpdate
from .warp import DDFWarp, check_ddf, warp_by_ddf
from .warp_points import OutsidePoints, check_outside, points_outside, warp_points_by_ddf

__all__ = [
    "ConvGRUCell",
    "DDFWarp",
    "GradientUpdate",
    "OutsidePoints",
    "RecurrentUpdate",
    "RegistrationCNN",
    "RegistrationUNet",
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
