# SPDX-License-Identifier: Apache-2.0
"""Convolutional gated recurrent unit."""

from __future__ import annotations

import torch
import torch.nn as nn
from monai.networks.layers import Conv

from monai_deq.networks.blocks.convolution import with_small_volumes

__all__ = ["ConvGRUCell"]


class ConvGRUCell(nn.Module):
    """
    Gated recurrent unit with convolutions in place of matrix products (Ballas et al., ICLR 2016):
    ``z = sigmoid(W_z [x, h])``, ``r = sigmoid(W_r [x, h])``, ``h' = (1 - z) h + z tanh(W_h [x, r h])``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        hidden_channels: channels of the hidden state.
        kernel_size: odd width of the convolutions. Defaults to 3.

    Raises:
        ValueError: When ``kernel_size`` is even.
    """

    def __init__(self, spatial_dims: int, in_channels: int, hidden_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        conv, channels, pad = Conv["CONV", spatial_dims], in_channels + hidden_channels, kernel_size // 2
        self.hidden_channels = hidden_channels
        self.gates = conv(channels, 2 * hidden_channels, kernel_size, padding=pad)
        self.candidate = conv(channels, hidden_channels, kernel_size, padding=pad)
        with_small_volumes(self)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, in_channels, *spatial)``.
            hidden: ``(B, hidden_channels, *spatial)``.

        Returns:
            The next hidden state, ``(B, hidden_channels, *spatial)``, of the dtype of ``hidden``.
        """
        h = hidden.to(x.dtype)
        update, reset = torch.sigmoid(self.gates(torch.cat([x, h], dim=1))).chunk(2, dim=1)
        candidate = torch.tanh(self.candidate(torch.cat([x, reset * h], dim=1)))
        # the state itself is carried in its own precision
        return hidden + update.to(hidden.dtype) * (candidate.to(hidden.dtype) - hidden)
