# SPDX-License-Identifier: Apache-2.0
"""What every driver of an update does with it: check the pair, make the state, make the map."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from monai_deq.networks.blocks import check_ddf

__all__ = ["check_pair", "hidden_channels", "initial_state", "proximal", "recomputed", "relaxed", "state_map"]


def hidden_channels(update: nn.Module) -> int:
    """
    Number of channels of an update's hidden state: its attribute ``hidden_channels``, or 0.

    Args:
        update: the update.
    """
    return int(getattr(update, "hidden_channels", 0))


def check_pair(moving: torch.Tensor, fixed: torch.Tensor) -> None:
    """
    Check a batch of pairs.

    Args:
        moving: ``(B, 1, *spatial)``.
        fixed: ``(B, 1, *spatial)``.

    Raises:
        ValueError: When shape or type do not fit.
    """
    if moving.shape != fixed.shape or moving.ndim not in (4, 5) or moving.shape[1] != 1:
        raise ValueError(
            "moving and fixed must have the same shape (B, 1, H, W[, D]), "
            f"got {tuple(moving.shape)} and {tuple(fixed.shape)}."
        )
    if not (moving.is_floating_point() and fixed.is_floating_point()):
        raise ValueError(
            f"moving and fixed must have floating point intensities in [0, 1], got {moving.dtype} and {fixed.dtype}."
        )


def initial_state(fixed: torch.Tensor, ddf: torch.Tensor | None, hidden: int = 0) -> torch.Tensor:
    """
    The state an iteration starts from, in float32 at least: a displacement, given or zero, and behind it the channels
    of the hidden state, zero.

    Args:
        fixed: ``(B, 1, *spatial)``.
        ddf: ``(B, ndim, *spatial)`` in voxels, or ``None``.
        hidden: channels of the hidden state. Defaults to 0.

    Returns:
        ``(B, ndim + hidden, *spatial)``.

    Raises:
        ValueError: When the field does not fit the image.
    """
    dtype, ndim = torch.promote_types(fixed.dtype, torch.float32), fixed.ndim - 2
    if ddf is None:
        return fixed.new_zeros((fixed.shape[0], ndim + hidden, *fixed.shape[2:]), dtype=dtype)
    check_ddf(fixed, ddf)
    ddf = ddf.detach().to(device=fixed.device, dtype=dtype)
    return torch.cat([ddf, ddf.new_zeros((ddf.shape[0], hidden, *ddf.shape[2:]))], dim=1) if hidden else ddf


def state_map(update: nn.Module, moving: torch.Tensor, fixed: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The map ``g(ddf) = ddf + f(moving, fixed, ddf)`` of a pair (paper, Eq. 3 and 5), for an update with hidden state
    ``g(ddf, hidden) = (ddf + delta, hidden')`` with the hidden state as further channels.

    Args:
        update: ``f(moving, fixed, ddf) -> delta``, or with an attribute ``hidden_channels`` above zero
            ``f(moving, fixed, ddf, hidden) -> (delta, hidden')``.
        moving: ``(B, 1, *spatial)``.
        fixed: ``(B, 1, *spatial)``.

    Returns:
        Function of a state ``(B, ndim + hidden_channels, *spatial)`` that keeps its dtype.
    """
    ndim = fixed.ndim - 2

    def g(ddf: torch.Tensor) -> torch.Tensor:
        return ddf + update(moving, fixed, ddf).to(ddf.dtype)

    def g_hidden(state: torch.Tensor) -> torch.Tensor:
        ddf, hidden = state[:, :ndim], state[:, ndim:]
        delta, hidden = update(moving, fixed, ddf, hidden)
        return torch.cat([ddf + delta.to(ddf.dtype), hidden.to(ddf.dtype)], dim=1)

    return g_hidden if hidden_channels(update) else g


def recomputed(func: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The same map, of which nothing but the argument is kept for the backward pass: there it is evaluated again.

    Args:
        func: the map.
    """

    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(func, x, use_reentrant=False) if torch.is_grad_enabled() else func(x)  # type: ignore[no-any-return]

    return call


def relaxed(func: Callable[[torch.Tensor], torch.Tensor], factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The map ``x + factor * (g(x) - x)``, with the fixed points of ``g``.

    Args:
        func: the map ``g``.
        factor: in (0, 1].
    """
    return func if factor == 1 else lambda x: torch.lerp(x, func(x), factor)


def proximal(
    func: Callable[[torch.Tensor], torch.Tensor], weight: float, center: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The map ``g(x) - weight * (x - center)``: a step less the gradient of the proximal term
    ``weight / 2 * |x - center|^2``. A hidden part of the state is left as ``g`` has it.

    Args:
        func: the map ``g``.
        weight: in [0, 1).
        center: ``(B, ndim, *spatial)``, the displacement that the leading channels of a state are pulled to.
    """
    ndim = center.shape[1]

    def call(x: torch.Tensor) -> torch.Tensor:
        out, pull = func(x), weight * (x[:, :ndim] - center.to(x.dtype))
        return out - pull if x.shape[1] == ndim else torch.cat([out[:, :ndim] - pull, out[:, ndim:]], dim=1)

    return call
