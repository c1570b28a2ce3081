# SPDX-License-Identifier: Apache-2.0
"""What the drivers of an update share: state, map, and images and displacements at half and at twice the size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from monai_deq.networks.blocks import check_ddf

_LINEAR = {2: "bilinear", 3: "trilinear"}
_AVERAGE = {2: F.avg_pool2d, 3: F.avg_pool3d}


def hidden_channels(update: nn.Module) -> int:
    """Number of channels of an update's hidden state: its attribute ``hidden_channels``, or 0."""
    return int(getattr(update, "hidden_channels", 0))


def initial_state(fixed: torch.Tensor, ddf: torch.Tensor | None, hidden: int = 0) -> torch.Tensor:
    """The state an iteration starts from, ``(B, ndim + hidden, *spatial)``, in float32 at least: a displacement ``(B,
    ndim, *spatial)`` in voxels, or zero, and behind it the channels of the hidden state, zero.
    """
    dtype, ndim = torch.promote_types(fixed.dtype, torch.float32), fixed.ndim - 2
    if ddf is None:
        return fixed.new_zeros((fixed.shape[0], ndim + hidden, *fixed.shape[2:]), dtype=dtype)
    check_ddf(fixed, ddf)
    ddf = ddf.detach().to(device=fixed.device, dtype=dtype)
    return torch.cat([ddf, ddf.new_zeros((ddf.shape[0], hidden, *ddf.shape[2:]))], dim=1) if hidden else ddf


def state_map(
    update: nn.Module, moving: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map ``g(ddf) = ddf + f(moving, fixed, ddf)`` of pairs ``(B, 1, *spatial)`` (paper, Eq. 3 and 5); for an
    update with hidden state ``g(ddf, hidden) = (ddf + delta, hidden')``, the hidden state being further channels. Keeps
    the dtype. An update with a method ``at(moving, fixed, mask)`` does there what its steps share; a ``mask`` ``(B, 1,
    *spatial)`` is for such ones alone.
    """
    ndim = fixed.ndim - 2
    step = partial(update, moving, fixed)
    if hasattr(update, "at"):
        step = update.at(moving, fixed, mask)  # type: ignore[operator]

    def g(ddf: torch.Tensor) -> torch.Tensor:
        return ddf + step(ddf).to(ddf.dtype)

    def g_hidden(state: torch.Tensor) -> torch.Tensor:
        ddf, hidden = state[:, :ndim], state[:, ndim:]
        delta, hidden = step(ddf, hidden)
        return torch.cat([ddf + delta.to(ddf.dtype), hidden.to(ddf.dtype)], dim=1)

    return g_hidden if hidden_channels(update) else g


def checkpointed_map(func: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same map, keeping only its argument for the backward pass, where it is evaluated again."""

    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(func, x, use_reentrant=False) if torch.is_grad_enabled() else func(x)  # type: ignore[no-any-return]

    return call


def relaxed_map(func: Callable[[torch.Tensor], torch.Tensor], factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map ``x + factor * (g(x) - x)``, with the fixed points of ``g``."""
    return func if factor == 1 else lambda x: torch.lerp(x, func(x), factor)


def proximal_map(
    func: Callable[[torch.Tensor], torch.Tensor], weight: float, center: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map ``g(x) - weight * (x - center)``: a step less the gradient of the proximal term ``weight / 2 * |x -
    center|^2``, for the displacement ``(B, ndim, *spatial)``; a hidden part of the state is left as ``g`` has it.
    """
    ndim = center.shape[1]

    def call(x: torch.Tensor) -> torch.Tensor:
        out, pull = func(x), weight * (x[:, :ndim] - center.to(x.dtype))
        return out - pull if x.shape[1] == ndim else torch.cat([out[:, :ndim] - pull, out[:, ndim:]], dim=1)

    return call


def downsample(image: torch.Tensor) -> torch.Tensor:
    """Half the size, rounded up, of ``(B, C, *spatial)``: means of two voxels along each axis; a last odd voxel stands
    alone, and an axis of one voxel is left as it is.
    """
    window = [min(n, 2) for n in image.shape[2:]]
    return _AVERAGE[image.ndim - 2](image, window, ceil_mode=True, count_include_pad=False)


def _factors(ddf: torch.Tensor, fine: Sequence[int], coarse: Sequence[int]) -> torch.Tensor:
    """By how much the values of a displacement grow from a coarse to a fine grid, per component."""
    # an axis of one voxel was not halved
    factors = ddf.new_tensor([1 if n == m else 2 for n, m in zip(fine, coarse, strict=True)])
    return factors.view(1, -1, *[1] * (ddf.ndim - 2))


def downsample_ddf(ddf: torch.Tensor) -> torch.Tensor:
    """A displacement ``(B, ndim, *spatial)`` in voxels on the grid of half the size, in voxels of that grid."""
    coarse = downsample(ddf)
    return coarse / _factors(ddf, ddf.shape[2:], coarse.shape[2:])


def upsample_state(state: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A displacement, and a hidden state behind it, on the grid twice as fine, cropped to the spatial size given."""
    ndim = state.ndim - 2
    # without align_corners the finer voxels lie symmetrically in the coarse ones: displacements double, exactly
    fine = F.interpolate(state, scale_factor=2, mode=_LINEAR[ndim], align_corners=False)
    fine = fine[(..., *(slice(n) for n in size))]  # type: ignore[index]
    return torch.cat([_factors(fine, size, state.shape[2:]) * fine[:, :ndim], fine[:, ndim:]], dim=1)
