# SPDX-License-Identifier: Apache-2.0
"""The update of RIIR: a recurrent network that is told the gradient of the similarity."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.layers import Conv

from monai_deq.networks.blocks.backbone import (
    backbone_autocast_dtype,
    run_backbone,
    start_he_normal,
    start_small,
    start_without,
)
from monai_deq.networks.blocks.conv_gru import ConvGRUCell
from monai_deq.networks.blocks.convolution import with_small_volumes
from monai_deq.networks.blocks.similarity_gradient import similarity_gradient
from monai_deq.networks.blocks.unet import RegistrationUNet

__all__ = ["RecurrentUpdate"]


class RecurrentUpdate(nn.Module):
    """
    Update in the manner of RIIR (Zhang et al., "Recurrent Inference Machine for Medical Image Registration"): input
    ``[ddf, N * grad_ddf D, moving o ddf, fixed]``, two convolutional gated recurrent units. In training the gradient is
    differentiated through.

    **This is a reconstruction.** The sizes of the hidden states are not published. Ours takes the U-Net of VoxelMorph
    (:py:class:`RegistrationUNet`) with its two last hidden layers, at full resolution, made recurrent: two
    :py:class:`ConvGRUCell` with ``hidden_size`` channels each before the convolution that gives the displacement.

    The update has a hidden state: ``forward`` takes it and returns the next one beside the displacement, and
    ``hidden_channels`` tells the networks and solvers how many channels it has. It starts at zero.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        similarity: ``D``, loss of ``(warped, fixed)``, a mean over the batch: any differentiable one of
            :py:mod:`monai.losses`. Defaults to the mean squared error.
        hidden_size: channels of each of the two hidden states. Defaults to 16.
        flow_std: standard deviation of the initial weights of the last convolution. Defaults to 1e-5.
        autocast_dtype: run the layers under autocast with this dtype, e.g. ``"bfloat16"``; displacement and hidden
            state stay float32. Defaults to ``None``.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        similarity: nn.Module | None = None,
        hidden_size: int = 16,
        flow_std: float = 1e-5,
        autocast_dtype: str | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}.")
        self.spatial_dims = spatial_dims
        self.similarity = nn.MSELoss() if similarity is None else similarity
        self.autocast_dtype = backbone_autocast_dtype(autocast_dtype)
        self.hidden_channels = 2 * hidden_size
        self.unet = RegistrationUNet(spatial_dims, 2 * spatial_dims + 2, out_channels=hidden_size, final_channels=())
        self.first = ConvGRUCell(spatial_dims, hidden_size, hidden_size)
        self.second = ConvGRUCell(spatial_dims, hidden_size, hidden_size)
        self.flow = Conv["CONV", spatial_dims](hidden_size, spatial_dims, kernel_size=3, padding=1)
        with_small_volumes(self)
        start_he_normal(self.unet)  # its last layer too: it gives features here
        start_small(self.flow, flow_std)
        start_without(self.unet.first_conv, range(spatial_dims))

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            moving: ``(B, 1, *spatial)``, intensities in [0, 1].
            fixed: ``(B, 1, *spatial)``, intensities in [0, 1].
            ddf: ``(B, ndim, *spatial)``, voxels.
            hidden: ``(B, hidden_channels, *spatial)``, zero at the start.

        Returns:
            The change of the displacement ``(B, ndim, *spatial)`` in voxels, and the next hidden state.

        Raises:
            ValueError: When the hidden state does not fit.
        """
        expected = (ddf.shape[0], self.hidden_channels, *ddf.shape[2:])
        if tuple(hidden.shape) != expected:
            raise ValueError(f"hidden must have shape {expected}, got {tuple(hidden.shape)}.")
        gradient, warped = similarity_gradient(self.similarity, moving, fixed, ddf)
        x = torch.cat([t.to(fixed.dtype) for t in (ddf, gradient, warped, fixed)], dim=1)
        features = F.leaky_relu(run_backbone(self.unet, x, self.autocast_dtype), 0.2)
        first, second = hidden.chunk(2, dim=1)
        enabled = torch.is_autocast_enabled(x.device.type) if self.autocast_dtype is None else True
        with torch.autocast(x.device.type, dtype=self.autocast_dtype, enabled=enabled):
            first = self.first(features, first)
            second = self.second(first, second)
            delta = self.flow(second)
        return delta.to(ddf.dtype), torch.cat([first, second], dim=1)
