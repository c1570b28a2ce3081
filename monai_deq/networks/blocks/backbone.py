# SPDX-License-Identifier: Apache-2.0
"""What the updates share: the start of a backbone's weights, and its call on images of any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["backbone_autocast_dtype", "run_backbone", "start_he_normal", "start_small", "start_without"]


def backbone_autocast_dtype(name: str | None) -> torch.dtype | None:
    """
    The dtype of an ``autocast_dtype`` argument.

    Args:
        name: ``None``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: When it is none of these.
    """
    if name not in (None, "bfloat16", "float16"):
        raise ValueError(f'autocast_dtype must be None, "bfloat16" or "float16", got {name!r}.')
    return None if name is None else getattr(torch, name)


def start_he_normal(module: nn.Module) -> None:
    """
    Start all convolutions of a module He-normal for LeakyReLU 0.2, with zero biases, as in the authors' Keras
    implementation of VoxelMorph. PyTorch's default would shrink what depends on the images by 0.4 a layer and leave
    training on a plateau.

    Args:
        module: changed in place.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(layer.weight, a=0.2)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def start_small(conv: nn.Module, std: float) -> None:
    """
    Start the convolution that gives the displacement from ``N(0, std)`` with zero bias: first displacements are next
    to zero.

    Args:
        conv: changed in place.
        std: standard deviation of the weights.
    """
    nn.init.normal_(conv.weight, std=std)  # type: ignore[arg-type]
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


def start_without(conv: nn.Module, channels: Sequence[int]) -> None:
    """
    Start the weights of some input channels at zero. A displacement is many times larger than an intensity: started at
    zero, its weights cannot feed it back into itself before they are learned; otherwise the iteration explodes early
    in training.

    Args:
        conv: first convolution of a backbone, changed in place.
        channels: the input channels.

    Raises:
        ValueError: When there is no such channel.
    """
    count: int = conv.in_channels  # type: ignore[assignment]
    if any(not 0 <= c < count for c in channels):
        raise ValueError(f"zero_inputs must be channels from 0 to {count - 1}, got {list(channels)}.")
    with torch.no_grad():
        conv.weight[:, list(channels)] = 0  # type: ignore[index,operator]


def run_backbone(backbone: nn.Module, x: torch.Tensor, autocast_dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    Run a backbone on images of any size: the input is padded with zeros on the far side of each axis to a multiple of
    the backbone's ``divisor`` and the output is cropped back.

    Args:
        backbone: module ``(B, C, *spatial) -> (B, C', *spatial)``. An attribute ``divisor`` (default 1) tells of which
            number the spatial sizes must be multiples.
        x: ``(B, C, *spatial)``.
        autocast_dtype: run the backbone under autocast with this dtype; the output has the dtype of ``x``.

    Returns:
        ``(B, C', *spatial)``.
    """
    size = x.shape[2:]
    divisor = int(getattr(backbone, "divisor", 1))
    pad = [(-n) % divisor for n in size]
    if any(pad):
        x = F.pad(x, [v for p in reversed(pad) for v in (0, p)])
    if autocast_dtype is None:
        out = backbone(x)
    else:
        with torch.autocast(x.device.type, dtype=autocast_dtype):
            out = backbone(x)
        out = out.to(x.dtype)
    return out[(..., *(slice(n) for n in size))] if any(pad) else out
