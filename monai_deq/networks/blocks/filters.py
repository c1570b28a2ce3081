# SPDX-License-Identifier: Apache-2.0
"""Sums over windows, Gaussian smoothing and central differences, axis by axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, exp

import torch

__all__ = ["box_sum", "central_difference", "gaussian_reach", "gaussian_smooth", "in_slabs"]

#: numbers of a slab: the copies that a step makes of it stay small
_SLAB = 2**22


def _convolve(x: torch.Tensor, axis: int, weights: Sequence[float]) -> torch.Tensor:
    """Correlation with symmetric weights along an axis, from the middle outwards, zero beyond the border."""
    n, out = x.shape[axis], x * weights[0]
    for j, weight in enumerate(weights[1:], start=1):
        if j < n:
            out.narrow(axis, j, n - j).add_(x.narrow(axis, 0, n - j), alpha=weight)
            out.narrow(axis, 0, n - j).add_(x.narrow(axis, j, n - j), alpha=weight)
    return out


def in_slabs(
    func: Callable[..., tuple[torch.Tensor, ...]], tensors: Sequence[torch.Tensor], halo: int = 0
) -> tuple[torch.Tensor, ...]:
    """A function of tensors ``(B, C, *spatial)`` with results of the same spatial size, on a CPU without gradients on
    one slab along the first spatial axis after the other, so that what it needs in between stays small and in the
    cache. A result depends on its surroundings as far as ``halo``; a tensor with a batch of one is for all items.
    """
    depth = tensors[0].shape[2]
    slab = max(_SLAB // max(tensors[0][:, :, 0].numel(), 1), 2 * halo, 1)
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if tensors[0].device.type != "cpu" or slab >= depth or gradients:
        return func(*tensors)
    results: list[torch.Tensor] = []
    for lo in range(0, depth, slab):
        below, above = max(lo - halo, 0), min(lo + slab + halo, depth)
        n = min(slab, depth - lo)
        parts = [part.narrow(2, lo - below, n) for part in func(*(t.narrow(2, below, above - below) for t in tensors))]
        if not results:
            results = [p.new_empty((*p.shape[:2], depth, *p.shape[3:])) for p in parts]
        for result, part in zip(results, parts, strict=True):
            result.narrow(2, lo, n).copy_(part)
    return tuple(results)


def box_sum(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Sums over windows of ``2 * radius + 1`` voxels an axis, ``(B, C, *spatial)``, zero beyond the border."""

    def func(part: torch.Tensor) -> tuple[torch.Tensor]:
        for axis in range(2, part.ndim):
            part = _convolve(part, axis, [1.0] * (radius + 1))
        return (part,)

    return in_slabs(func, [x], radius)[0]


def gaussian_reach(sigma: float) -> int:
    """How far :py:func:`gaussian_smooth` looks, in voxels."""
    return ceil(3 * sigma)


def gaussian_smooth(x: torch.Tensor, sigma: float | Sequence[float]) -> torch.Tensor:
    """Gaussian smoothing of ``(B, C, *spatial)``, zero beyond the border; ``sigma`` in voxels, one or one an axis."""
    sigmas = list(sigma) if isinstance(sigma, Sequence) else [sigma] * (x.ndim - 2)

    def func(part: torch.Tensor) -> tuple[torch.Tensor]:
        for axis, s in enumerate(sigmas, start=2):
            if s > 0:
                half = [exp(-0.5 * (j / s) ** 2) for j in range(gaussian_reach(s) + 1)]
                part = _convolve(part, axis, [w / (2 * sum(half) - 1) for w in half])
        return (part,)

    return in_slabs(func, [x], gaussian_reach(sigmas[0]))[0]


def central_difference(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Derivative along a spatial axis of ``(B, C, *spatial)`` per voxel, one-sided at the border; zero along an axis
    of one voxel.
    """
    dim = axis + 2
    n, out = x.shape[dim], torch.zeros_like(x)
    if n > 1:
        # torch.gradient takes three times as long
        out.narrow(dim, 0, 1).copy_(x.narrow(dim, 1, 1) - x.narrow(dim, 0, 1))
        out.narrow(dim, n - 1, 1).copy_(x.narrow(dim, n - 1, 1) - x.narrow(dim, n - 2, 1))
    if n > 2:
        out.narrow(dim, 1, n - 2).add_(x.narrow(dim, 2, n - 2)).sub_(x.narrow(dim, 0, n - 2)).mul_(0.5)
    return out
