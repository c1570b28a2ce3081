# SPDX-License-Identifier: Apache-2.0
"""The U-Net of VoxelMorph for any number of input channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from monai.networks.blocks import Convolution, UpSample
from monai.networks.layers import Conv, Pool

from monai_deq.networks.blocks.backbone import start_he_normal, start_small, start_without

__all__ = ["RegistrationUNet"]

_ACT = ("leakyrelu", {"negative_slope": 0.2, "inplace": True})


class RegistrationUNet(nn.Module):
    """
    U-Net in the configuration of VoxelMorph (Balakrishnan et al., TMI 2019), built from MONAI's layers.

    Same architecture as :py:class:`monai.networks.nets.VoxelMorphUNet` with
    ``channels=(16, 32, 32, 32, 32, 32, 32, 32)`` and ``final_conv_channels=(16, 16)``, which however refuses an odd
    number of input channels; an update of a displacement field in 3-D has five (paper, Sec. 3). 328,627 parameters
    with 5 input channels in 3-D. Weights start He-normal, as in the authors' Keras implementation of VoxelMorph.

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of input channels.
        out_channels: number of output channels. Defaults to ``spatial_dims`` (a displacement).
        encoder_channels: channels of the encoder from the full resolution down; the last is the bottleneck.
        decoder_channels: channels of the decoder from the bottleneck up, one for each encoder level but the last.
        final_channels: channels of the convolutions at full resolution before the last one.
        flow_std: standard deviation of the initial weights of the last convolution (its bias is zero), so that the
            first displacement is next to zero. Defaults to 1e-5.
        zero_inputs: input channels whose weights start at zero: those of the displacement in an iterated update.
            Defaults to none.

    Raises:
        ValueError: When the channels do not describe a U-Net.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 5,
        out_channels: int | None = None,
        encoder_channels: Sequence[int] = (16, 32, 32, 32, 32),
        decoder_channels: Sequence[int] = (32, 32, 32, 32),
        final_channels: Sequence[int] = (16, 16),
        flow_std: float = 1e-5,
        zero_inputs: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if len(encoder_channels) < 2 or len(decoder_channels) != len(encoder_channels) - 1:
            raise ValueError(
                "decoder_channels must have one entry fewer than encoder_channels (at least 2), "
                f"got {len(decoder_channels)} and {len(encoder_channels)}."
            )
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = spatial_dims if out_channels is None else out_channels
        #: every spatial size must be a multiple of this
        self.divisor = 2 ** (len(encoder_channels) - 1)

        def conv(inc: int, outc: int) -> nn.Module:
            return Convolution(spatial_dims, inc, outc, kernel_size=3, act=_ACT, norm=None, adn_ordering="A")

        ins = [in_channels, *encoder_channels[:-1]]
        self.encoder = nn.ModuleList([conv(i, o) for i, o in zip(ins, encoder_channels, strict=True)])
        self.down = Pool["MAX", spatial_dims](kernel_size=2)
        self.up = UpSample(spatial_dims, scale_factor=2, mode="nontrainable", interp_mode="nearest", align_corners=None)
        skips = list(encoder_channels[-2::-1])
        belows = [encoder_channels[-1], *decoder_channels[:-1]]
        self.decoder = nn.ModuleList([conv(b + s, o) for b, s, o in zip(belows, skips, decoder_channels, strict=True)])
        finals = [decoder_channels[-1], *final_channels]
        self.final = nn.Sequential(*[conv(i, o) for i, o in zip(finals[:-1], finals[1:], strict=True)])
        self.flow = Conv["CONV", spatial_dims](finals[-1], self.out_channels, kernel_size=3, padding=1)
        start_he_normal(self)
        start_small(self.flow, flow_std)
        start_without(self.first_conv, zero_inputs)

    @property
    def first_conv(self) -> nn.Module:
        """The convolution that sees the input."""
        return self.encoder[0].conv  # type: ignore[return-value,union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, in_channels, *spatial)``, each spatial size a multiple of ``self.divisor``.

        Returns:
            ``(B, out_channels, *spatial)``.

        Raises:
            ValueError: When the channels or a spatial size do not fit.
        """
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"expected an input of shape (B, {self.in_channels}, {self.spatial_dims} spatial sizes), "
                f"got {tuple(x.shape)}."
            )
        if any(n % self.divisor for n in x.shape[2:]):
            raise ValueError(f"spatial sizes must be multiples of {self.divisor}, got {tuple(x.shape[2:])}.")
        skips = []
        for i, layer in enumerate(self.encoder):
            if i:
                x = self.down(x)
            x = layer(x)
            skips.append(x)
        skips.pop()
        for layer in self.decoder:
            x = layer(torch.cat([self.up(x), skips.pop()], dim=1))
        return self.flow(self.final(x))
