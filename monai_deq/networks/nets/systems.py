# SPDX-License-Identifier: Apache-2.0
"""The learned systems that the paper compares with, as networks by name."""

from __future__ import annotations

import torch.nn as nn

from monai_deq.networks.blocks import GradientUpdate, RecurrentUpdate, RegistrationCNN, UNetUpdate, VoxelMorphUpdate
from monai_deq.networks.nets.unrolled import UnrolledRegistrationNet

__all__ = ["gradirn_net", "riir_net", "unrolling_net", "voxelmorph_net"]


def voxelmorph_net(
    spatial_dims: int = 3, integration_steps: int = 0, autocast_dtype: str | None = None
) -> UnrolledRegistrationNet:
    """VoxelMorph: one step of :py:class:`monai_deq.networks.blocks.VoxelMorphUpdate`, which has the arguments."""
    update = VoxelMorphUpdate(spatial_dims, integration_steps, autocast_dtype=autocast_dtype)
    return UnrolledRegistrationNet(update, steps=1)


def unrolling_net(
    spatial_dims: int = 3, steps: int = 3, num_levels: int = 3, autocast_dtype: str | None = None
) -> UnrolledRegistrationNet:
    """Unrolling: GraDIRN without the similarity gradient, with weights for each level; arguments as
    :py:func:`gradirn_net`.
    """
    channels, zero_inputs = 2 + spatial_dims, range(2, 2 + spatial_dims)
    updates = [
        UNetUpdate(spatial_dims, RegistrationCNN(spatial_dims, channels, zero_inputs=zero_inputs), autocast_dtype)
        for _ in range(num_levels)
    ]
    return UnrolledRegistrationNet(updates, steps=[steps] * num_levels)


def gradirn_net(
    spatial_dims: int = 3,
    steps: int = 3,
    num_levels: int = 3,
    similarity: nn.Module | None = None,
    autocast_dtype: str | None = None,
) -> UnrolledRegistrationNet:
    """GraDIRN: steps of :py:class:`monai_deq.networks.blocks.GradientUpdate`, with weights for each level.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        steps: on each level. Defaults to 3.
        num_levels: number of levels, each half the size of the next. Defaults to 3.
        similarity: whose gradient the steps are told. Defaults to the mean squared error.
        autocast_dtype: see :py:class:`monai_deq.networks.blocks.RegistrationUpdate`. Defaults to ``None``.
    """
    updates = [GradientUpdate(spatial_dims, similarity, autocast_dtype=autocast_dtype) for _ in range(num_levels)]
    return UnrolledRegistrationNet(updates, steps=[steps] * num_levels)


def riir_net(
    spatial_dims: int = 3, steps: int = 6, similarity: nn.Module | None = None, autocast_dtype: str | None = None
) -> UnrolledRegistrationNet:
    """RIIR, a reconstruction: ``steps`` of :py:class:`monai_deq.networks.blocks.RecurrentUpdate` at one size, all
    supervised; the other arguments as :py:func:`gradirn_net`.
    """
    update = RecurrentUpdate(spatial_dims, similarity, autocast_dtype=autocast_dtype)
    return UnrolledRegistrationNet(update, steps=steps, all_states=True)
