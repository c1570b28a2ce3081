# SPDX-License-Identifier: Apache-2.0
"""The networks inside the updates: the U-Net of VoxelMorph and the plain CNN of GraDIRN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.blocks import Convolution, UpSample
from monai.networks.layers import Conv, Pool
from torch.utils.checkpoint import checkpoint

from monai_deq.networks.blocks.convolutions import (
    convolve,
    init_flow_,
    init_he_normal_,
    init_zero_inputs_,
    with_small_volumes,
)

__all__ = ["RegistrationCNN", "RegistrationUNet"]

_ACT = ("leakyrelu", {"negative_slope": 0.2, "inplace": True})


def _convolutions(spatial_dims: int, ins: Sequence[int], outs: Sequence[int]) -> list[nn.Module]:
    """Convolutions of width 3 with their activations."""
    options: dict[str, Any] = {"kernel_size": 3, "act": _ACT, "norm": None, "adn_ordering": "A"}
    return [Convolution(spatial_dims, i, o, **options) for i, o in zip(ins, outs, strict=True)]


def _init(backbone: RegistrationUNet | RegistrationCNN, flow_std: float, zero_inputs: Sequence[int]) -> None:
    with_small_volumes(backbone)
    init_he_normal_(backbone)
    init_flow_(backbone.flow, flow_std)
    init_zero_inputs_(backbone.first_conv, zero_inputs)


class RegistrationUNet(nn.Module):
    """U-Net in the configuration of VoxelMorph (Balakrishnan et al., TMI 2019), built from MONAI's layers.

    Same architecture as :py:class:`monai.networks.nets.VoxelMorphUNet` with ``channels=(16, 32, 32, 32, 32, 32, 32,
    32)`` and ``final_conv_channels=(16, 16)``, which however refuses an odd number of input channels; an update of a
    displacement field in 3-D has five (paper, Sec. 3), and 328,627 parameters. Weights start He-normal, as in the
    authors' Keras implementation.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        in_channels: number of input channels. Defaults to 5.
        out_channels: number of output channels. Defaults to ``spatial_dims`` (a displacement).
        encoder_channels: channels of the encoder from the full resolution down; the last is the bottleneck.
        decoder_channels: channels of the decoder from the bottleneck up, one for each encoder level but the last.
        final_channels: channels of the convolutions at full resolution before the last one.
        flow_std: standard deviation of the initial weights of the last convolution, without bias. Defaults to 1e-5.
        zero_inputs: input channels whose weights start at zero: the displacement of an iterated update. Defaults to
            none.
        checkpoint_parts: keep only the input for the backward pass, and compute the layers again there, those at full
            resolution in so many parts along the last axis: the more, the less memory and the more time, with the same
            result. Defaults to 0: nothing is computed again.

    Raises:
        ValueError: When the channels do not describe a U-Net, or another argument is out of its range.
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
        checkpoint_parts: int = 0,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if len(encoder_channels) < 2 or len(decoder_channels) != len(encoder_channels) - 1:
            raise ValueError(
                "decoder_channels must have one entry fewer than encoder_channels (at least 2), "
                f"got {len(decoder_channels)} and {len(encoder_channels)}."
            )
        if int(checkpoint_parts) != checkpoint_parts or checkpoint_parts < 0:
            raise ValueError(f"checkpoint_parts must be a whole number, not negative, got {checkpoint_parts}.")
        self.checkpoint_parts = int(checkpoint_parts)
        self.encoder_channels, self.decoder_channels = tuple(encoder_channels), tuple(decoder_channels)
        self.final_channels = tuple(final_channels)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = spatial_dims if out_channels is None else out_channels
        #: every spatial size must be a multiple of this
        self.divisor = 2 ** (len(encoder_channels) - 1)

        ins = [in_channels, *encoder_channels[:-1]]
        self.encoder = nn.ModuleList(_convolutions(spatial_dims, ins, encoder_channels))
        self.down = Pool["MAX", spatial_dims](kernel_size=2)
        self.up = UpSample(spatial_dims, scale_factor=2, mode="nontrainable", interp_mode="nearest", align_corners=None)
        skips = list(encoder_channels[-2::-1])
        belows = [encoder_channels[-1], *decoder_channels[:-1]]
        ins = [below + skip for below, skip in zip(belows, skips, strict=True)]
        self.decoder = nn.ModuleList(_convolutions(spatial_dims, ins, decoder_channels))
        finals = [decoder_channels[-1], *final_channels]
        self.final = nn.Sequential(*_convolutions(spatial_dims, finals[:-1], finals[1:]))
        self.flow = Conv["CONV", spatial_dims](finals[-1], self.out_channels, kernel_size=3, padding=1)
        _init(self, flow_std, zero_inputs)

    @property
    def first_conv(self) -> nn.Module:
        """The convolution that sees the input."""
        return self.encoder[0].conv  # type: ignore[return-value,union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, in_channels, *spatial)``, each size a multiple of ``self.divisor``, to ``(B, out_channels,
        *spatial)``.

        Raises:
            ValueError: When the channels or a spatial size do not fit.
        """
        _check_input(x, self.spatial_dims, self.in_channels)
        if any(n % self.divisor for n in x.shape[2:]):
            raise ValueError(f"spatial sizes must be multiples of {self.divisor}, got {tuple(x.shape[2:])}.")
        if self.checkpoint_parts and torch.is_grad_enabled():
            return self._forward_in_parts(x)
        skip = self.encoder[0](x)
        return self.flow(self.final(self._join(-1, self.up(self._below(self.down(skip))), skip)))

    def _below(self, x: torch.Tensor) -> torch.Tensor:
        """The levels below the full resolution: from what goes down into them to what comes up."""
        skips = []
        for i, layer in enumerate(self.encoder[1:]):
            x = layer(self.down(x) if i else x)
            skips.append(x)
        skips.pop()
        for i in range(len(self.decoder) - 1):
            x = self._join(i, self.up(x), skips.pop())
        return x

    def _join(self, i: int, below: torch.Tensor, skip: torch.Tensor, cut: tuple[bool, bool] = (False, False)) -> Any:
        """A decoder layer: the convolution of ``[below, skip]`` as the sum of two, without a copy of both in one
        tensor.
        """
        layer: Any = self.decoder[i]
        weight, n = layer.conv.weight, below.shape[1]
        x = _convolve(below, weight[:, :n], layer.conv.bias, cut)
        # in place: without a third tensor of the size of the result
        return layer.adn(x.add_(_convolve(skip, weight[:, n:], None, cut)))

    def _forward_in_parts(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-1]
        parts = min(self.checkpoint_parts, n // 2)
        # at even places: there the pooling can be cut
        ends = [2 * (n // 2 * i // parts) for i in range(parts + 1)]
        bounds = list(zip(ends[:-1], ends[1:], strict=True))
        down = torch.cat([checkpoint(self._down_part, x, *b, use_reentrant=False) for b in bounds], dim=-1)
        below = checkpoint(self._below, down, use_reentrant=False)
        out = [checkpoint(self._full_resolution_part, x, below, *b, use_reentrant=False) for b in bounds]
        return torch.cat(out, dim=-1)

    def _down_part(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What goes down to half the resolution between two places of the last axis."""
        n = x.shape[-1]
        low, high = max(start - 1, 0), min(stop + 1, n)
        return self.down(_layer(self.encoder[0], x[..., low:high], (low > 0, high < n)))  # type: ignore[no-any-return]

    def _full_resolution_part(self, x: torch.Tensor, below: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The displacement between two places of the last axis, from the input and what comes up from below."""
        n, reach = x.shape[-1], 3 + len(self.final)
        low, high = max(start - reach, 0), min(stop + reach, n)
        cut = (low > 0, high < n)
        skip = _layer(self.encoder[0], x[..., low:high], cut)
        # each convolution takes a voxel off at each end that is not the image's
        low, high = low + cut[0], high - cut[1]
        up = self.up(below[..., low // 2 : (high + 1) // 2])[..., low % 2 : low % 2 + high - low]
        x = self._join(-1, up, skip, cut)
        for layer in self.final:
            x = _layer(layer, x, cut)
        x = _convolve(x, self.flow.weight, self.flow.bias, cut)
        low += cut[0] * (2 + len(self.final))
        return x[..., start - low : stop - low]


def _layer(layer: Any, x: torch.Tensor, cut: tuple[bool, bool]) -> torch.Tensor:
    """A layer of the U-Net, convolution and activation, on a part of an image; see :py:func:`_convolve`."""
    return layer.adn(_convolve(x, layer.conv.weight, layer.conv.bias, cut))  # type: ignore[no-any-return]


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cut: tuple[bool, bool] = (False, False)
) -> torch.Tensor:
    """Convolution of width 3 with zeros around the image; at a cut end of the last axis it loses a voxel."""
    ndim = x.ndim - 2
    if not any(cut):
        return convolve(x, weight, bias, (1,) * ndim)
    x = F.pad(x, (int(not cut[0]), int(not cut[1]))) if not all(cut) else x
    return convolve(x, weight, bias, (1,) * (ndim - 1) + (0,))


class RegistrationCNN(nn.Module):
    """Convolutions of width three at one resolution with LeakyReLU 0.2 between them, the network inside each step of
    GraDIRN (Qiu et al., "Embedding Gradient-based Optimization in Image Registration Networks", MICCAI 2022); by
    default five, 89,987 parameters with 5 input channels in 3-D. Weights start He-normal, the last convolution next to
    zero.

    Args:
        spatial_dims: 2 or 3. Defaults to 3.
        in_channels: number of input channels. Defaults to 5.
        out_channels: number of output channels. Defaults to ``spatial_dims`` (a displacement).
        channels: channels of the convolutions before the last one. Defaults to four times 32.
        flow_std: see :py:class:`RegistrationUNet`. Defaults to 1e-5.
        zero_inputs: see :py:class:`RegistrationUNet`. Defaults to none.

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
        self.out_channels = spatial_dims if out_channels is None else out_channels
        self.channels = tuple(channels)
        widths = [in_channels, *channels]
        self.layers = nn.Sequential(*_convolutions(spatial_dims, widths[:-1], widths[1:]))
        self.flow = Conv["CONV", spatial_dims](widths[-1], self.out_channels, kernel_size=3, padding=1)
        _init(self, flow_std, zero_inputs)

    @property
    def first_conv(self) -> nn.Module:
        """The convolution that sees the input."""
        return self.layers[0].conv  # type: ignore[return-value,union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, in_channels, *spatial)`` to ``(B, out_channels, *spatial)``; a ``ValueError`` when the shape does
        not fit.
        """
        _check_input(x, self.spatial_dims, self.in_channels)
        return self.flow(self.layers(x))


def _check_input(x: torch.Tensor, spatial_dims: int, channels: int) -> None:
    if x.ndim != spatial_dims + 2 or x.shape[1] != channels:
        raise ValueError(
            f"expected an input of shape (B, {channels}, {spatial_dims} spatial sizes), got {tuple(x.shape)}."
        )
