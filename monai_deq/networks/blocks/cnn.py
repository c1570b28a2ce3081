# SPDX-License-Identifier: Apache-2.0
"""The plain convolutional network of GraDIRN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from monai.networks.blocks import Convolution
from monai.networks.layers import Conv

from monai_deq.networks.blocks.backbone import start_he_normal, start_small, start_without
from monai_deq.networks.blocks.convolution import with_small_volumes

__all__ = ["RegistrationCNN"]


class RegistrationCNN(nn.Module):
    """
    Convolutions at one resolution with LeakyReLU 0.2 between them, the network inside each step of GraDIRN (Qiu et
    al., "Embedding Gradient-based Optimization in Image Registration Networks", MICCAI 2022). With its defaults five
    convolutions of width three, 89,987 parameters with 5 input channels in 3-D. Weights start He-normal, the last
    convolution next to zero.

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of input channels.
        out_channels: number of output channels. Defaults to ``spatial_dims`` (a displacement).
        channels: channels of the convolutions before the last one.
        flow_std: standard deviation of the initial weights of the last convolution. Defaults to 1e-5.
        zero_inputs: input channels whose weights start at zero: those of the displacement in an iterated update.
            Defaults to none.

    Raises:
        ValueError: When ``spatial_dims`` is neither 2 nor 3, or ``channels`` is empty.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 5,
        out_channels: int | None = None,
        channels: Sequence[int] = (32, 32, 32, 32),
        flow_std: float = 1e-5,
        zero_inputs: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if not channels:
            raise ValueError("channels must have at least one entry, got none.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        widths = [in_channels, *channels]
        act = ("leakyrelu", {"negative_slope": 0.2, "inplace": True})
        self.layers = nn.Sequential(
            *[
                Convolution(spatial_dims, i, o, kernel_size=3, act=act, norm=None, adn_ordering="A")
                for i, o in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.flow = Conv["CONV", spatial_dims](
            widths[-1], spatial_dims if out_channels is None else out_channels, kernel_size=3, padding=1
        )
        with_small_volumes(self)
        start_he_normal(self)
        start_small(self.flow, flow_std)
        start_without(self.first_conv, zero_inputs)

    @property
    def first_conv(self) -> nn.Module:
        """The convolution that sees the input."""
        return self.layers[0].conv  # type: ignore[return-value,union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, in_channels, *spatial)``.

        Returns:
            ``(B, out_channels, *spatial)``.

        Raises:
            ValueError: When the shape does not fit.
        """
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"expected an input of shape (B, {self.in_channels}, {self.spatial_dims} spatial sizes), "
                f"got {tuple(x.shape)}."
            )
        return self.flow(self.layers(x))
