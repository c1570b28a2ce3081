# SPDX-License-Identifier: Apache-2.0
"""Convolutions that are fast on a CPU for one small volume too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["SmallVolumeConv3d", "convolve", "with_small_volumes"]

Module = TypeVar("Module", bound=nn.Module)

# PyTorch (2.13, ``ConvParams::use_mkldnn`` in aten/src/ATen/native/Convolution.cpp) gives a batch of one to oneDNN only
# above this number of channels x depth x height
_ONEDNN_ABOVE = 20480
# below, two halves cost more than they save
_WORTH_VOXELS = 1000


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, padding: Sequence[int] = (1, 1, 1)
) -> torch.Tensor:
    """
    Convolution of stride 1: :py:func:`torch.nn.functional.conv2d` or ``conv3d``.

    For one small volume on a CPU in float32 PyTorch takes a convolution of its own that is three to eight times slower
    than oneDNN's, which it takes for two of them. There the volume is cut along its first axis into two halves, which
    overlap by the reach of the kernel, and these are convolved as a batch; the result is the same but for rounding.

    Args:
        x: ``(B, C, *spatial)``, 2-D or 3-D.
        weight: ``(C', C, *kernel)``.
        bias: ``(C',)``, or none. Defaults to ``None``.
        padding: zeros added at both ends of each spatial axis. Defaults to 1 on each of three axes.

    Returns:
        ``(B, C', *spatial)``, each axis changed by ``2 * padding - kernel + 1``.
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
        """
        Args:
            x: ``(B, C, *spatial)``.
        """
        padding = self.padding
        plain = self.stride == self.dilation == (1, 1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        if not plain or isinstance(padding, str):
            return super().forward(x)
        return convolve(x, self.weight, self.bias, padding)


def with_small_volumes(module: Module) -> Module:
    """
    Make every :py:class:`torch.nn.Conv3d` in a module a :py:class:`SmallVolumeConv3d` with the same parameters.

    Args:
        module: changed in place; the names of its parameters and the random numbers drawn stay as they are.

    Returns:
        The module.
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
