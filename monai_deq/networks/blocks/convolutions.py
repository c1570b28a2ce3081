# SPDX-License-Identifier: Apache-2.0
"""Convolutions of the networks: fast for one small volume too, their initial values, images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.layers import Conv

__all__ = [
    "ConvGRUCell",
    "SmallVolumeConv3d",
    "convolve",
    "init_flow_",
    "init_he_normal_",
    "init_zero_inputs_",
    "run_backbone",
    "with_small_volumes",
]

Module = TypeVar("Module", bound=nn.Module)

# PyTorch (2.13, ``ConvParams::use_mkldnn`` in aten/src/ATen/native/Convolution.cpp) gives a batch of one to oneDNN only
# above this number of channels x depth x height
_ONEDNN_ABOVE = 20480
# below, two halves cost more than they save
_WORTH_VOXELS = 1000


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, padding: Sequence[int] = (1, 1, 1)
) -> torch.Tensor:
    """Convolution of stride 1: :py:func:`torch.nn.functional.conv2d` or ``conv3d``.

    For one small volume on a CPU in float32 PyTorch takes a convolution of its own that is three to eight times slower
    than oneDNN's, which it takes for two of them. There two halves of the volume along its first axis, which overlap by
    the reach of the kernel, are convolved as a batch; the result is the same but for rounding.

    Args:
        x: ``(B, C, *spatial)``, 2-D or 3-D.
        weight: ``(C', C, *kernel)``.
        bias: ``(C',)``, or none. Defaults to ``None``.
        padding: zeros added at both ends of each spatial axis. Defaults to 1 on each of three axes.
    """
    if not _takes_halves(x, weight):
        conv: Any = F.conv2d if x.ndim == 4 else F.conv3d
        return conv(x, weight, bias, padding=tuple(padding))
    pad, kernel = padding[0], weight.shape[2]
    size = x.shape[2] + 2 * pad - kernel + 1
    half = (size + 1) // 2
    # of an odd number of slices the last one of the second half is no part of the result
    x = F.pad(x, (0, 0, 0, 0, pad, pad + 2 * half - size))
    reach = half + kernel - 1
    halves = F.conv3d(torch.cat([x[:, :, :reach], x[:, :, half:]]), weight, bias, padding=(0, *padding[1:]))
    return torch.cat([halves[:1], halves[1:, :, : size - half]], dim=2)


class SmallVolumeConv3d(nn.Conv3d):
    """:py:class:`torch.nn.Conv3d` that convolves one small volume as :py:func:`convolve` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``(B, C, *spatial)``."""
        padding = self.padding
        plain = self.stride == self.dilation == (1, 1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        if not plain or isinstance(padding, str):
            return super().forward(x)
        return convolve(x, self.weight, self.bias, padding)


def with_small_volumes(module: Module) -> Module:
    """Make every :py:class:`torch.nn.Conv3d` in a module, in place, a :py:class:`SmallVolumeConv3d` with the same
    parameters, under the same names and without drawing random numbers; return the module.
    """
    for parent in list(module.modules()):
        for name, conv in list(parent.named_children()):
            if type(conv) is nn.Conv3d:
                setattr(parent, name, _with_parameters_of(conv))
    return module


def _with_parameters_of(conv: nn.Conv3d) -> SmallVolumeConv3d:
    options = {n: getattr(conv, n) for n in ("stride", "padding", "dilation", "groups", "padding_mode")}
    sizes = conv.in_channels, conv.out_channels, conv.kernel_size
    # on the meta device: neither memory nor random numbers for weights that are replaced
    new = SmallVolumeConv3d(*sizes, bias=conv.bias is not None, device="meta", **options)  # type: ignore[arg-type]
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)


def _takes_halves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return bool(
        # a traced network is for images of all sizes
        not torch.jit.is_tracing()
        and x.ndim == 5
        and x.shape[0] == 1
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[1:4].numel() <= _ONEDNN_ABOVE
        and x.shape[2:].numel() >= _WORTH_VOXELS
        and x.shape[2] >= weight.shape[2]
        and weight.shape[2:].numel() > 1
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def init_he_normal_(module: nn.Module) -> None:
    """Start all convolutions of a module He-normal for LeakyReLU 0.2, with zero biases, as in the authors' Keras
    implementation of VoxelMorph. PyTorch's default would shrink what depends on the images by 0.4 a layer and leave
    training on a plateau.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(layer.weight, a=0.2)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def init_flow_(conv: nn.Module, std: float) -> None:
    """Start the convolution that gives the displacement from ``N(0, std)``, bias zero: first displacements are tiny."""
    nn.init.normal_(conv.weight, std=std)  # type: ignore[arg-type]
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


def init_zero_inputs_(conv: nn.Module, channels: Sequence[int]) -> None:
    """Start the weights of some input channels at zero. A displacement is many times larger than an intensity: its
    weights must not feed it back into itself before they are learned, or the iteration explodes early in training.

    Raises:
        ValueError: When there is no such channel.
    """
    count: int = conv.in_channels  # type: ignore[assignment]
    if any(not 0 <= c < count for c in channels):
        raise ValueError(f"zero_inputs must be channels from 0 to {count - 1}, got {list(channels)}.")
    with torch.no_grad():
        conv.weight[:, list(channels)] = 0  # type: ignore[index,operator]


def run_backbone(backbone: nn.Module, x: torch.Tensor, autocast_dtype: str | None = None) -> torch.Tensor:
    """Run a backbone on images of any size: the input is padded with zeros on the far side of each axis to a multiple
    of the backbone's ``divisor`` and the output is cropped back.

    Args:
        backbone: module ``(B, C, *spatial) -> (B, C', *spatial)``, with an attribute ``divisor`` unless it is 1.
        x: ``(B, C, *spatial)``.
        autocast_dtype: dtype of an autocast around the backbone; the output has that of ``x``. Defaults to ``None``:
            none.
    """
    size = x.shape[2:]
    divisor = int(getattr(backbone, "divisor", 1))
    pad = [(-n) % divisor for n in size]
    if any(pad):
        x = F.pad(x, [v for p in reversed(pad) for v in (0, p)])
    if autocast_dtype is None:
        out = backbone(x)
    else:
        with torch.autocast(x.device.type, dtype=getattr(torch, autocast_dtype)):
            out = backbone(x)
        out = out.to(x.dtype)
    return out[(..., *(slice(n) for n in size))] if any(pad) else out


class ConvGRUCell(nn.Module):
    """Gated recurrent unit with convolutions in place of matrix products (Ballas et al., ICLR 2016): ``z = sigmoid(W_z
    [x, h])``, ``r = sigmoid(W_r [x, h])``, ``h' = (1 - z) h + z tanh(W_h [x, r h])``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        hidden_channels: channels of the hidden state.
        kernel_size: width of the convolutions. Defaults to 3.

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
        """The hidden state ``(B, hidden_channels, *spatial)`` after an input ``(B, in_channels, *spatial)``, of its own
        dtype.
        """
        h = hidden.to(x.dtype)
        update, reset = torch.sigmoid(self.gates(torch.cat([x, h], dim=1))).chunk(2, dim=1)
        candidate = torch.tanh(self.candidate(torch.cat([x, reset * h], dim=1)))
        # the state itself is carried in its own precision
        return hidden + update.to(hidden.dtype) * (candidate.to(hidden.dtype) - hidden)
