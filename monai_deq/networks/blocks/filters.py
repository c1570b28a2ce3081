# SPDX-License-Identifier: Apache-2.0
"""Sums over windows, Gaussian smoothing and central differences, axis by axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, exp

import torch

__all__ = ["box_sum", "central_difference", "gaussian_smooth"]

#: numbers of a slab: with its copies it stays in the cache of a processor
_SLAB = 2**20


def _window_sum(x: torch.Tensor, axis: int, radius: int) -> torch.Tensor:
    """Sums of ``2 * radius + 1`` neighbours along an axis, zero beyond the border, by doubling the window."""
    shape = list(x.shape)
    shape[axis] = radius
    zeros = x.new_zeros(shape)
    x = torch.cat([zeros, x, zeros], dim=axis)
    size, width, start = x.shape[axis], 2 * radius + 1, 0
    out, reach = None, 1
    while width:
        # x holds the sums of `reach` neighbours: those windows that make up the width are its binary digits
        if width & reach:
            part = x.narrow(axis, start, size - 2 * radius)
            out = part if out is None else out + part
            start, width = start + reach, width - reach
        if width:
            n = x.shape[axis] - reach
            x, reach = x.narrow(axis, 0, n) + x.narrow(axis, reach, n), 2 * reach
    assert out is not None  # a window has an odd width
    return out


def _convolve(x: torch.Tensor, axis: int, weights: Sequence[float]) -> torch.Tensor:
    """Correlation with symmetric weights along an axis, from the middle outwards, zero beyond the border."""
    n, out = x.shape[axis], x * weights[0]
    for j, weight in enumerate(weights[1:], start=1):
        if j < n:
            out.narrow(axis, j, n - j).add_(x.narrow(axis, 0, n - j), alpha=weight)
            out.narrow(axis, 0, n - j).add_(x.narrow(axis, j, n - j), alpha=weight)
    return out


def _each_axis(
    x: torch.Tensor, filters: Sequence[tuple[Callable[[torch.Tensor, int], torch.Tensor], int]]
) -> torch.Tensor:
    """A filter along each axis, given with its reach; on a CPU without gradients slab by slab, which is faster."""
    (first, reach), rest = filters[0], list(enumerate((f for f, _ in filters[1:]), start=3))

    def run(part: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        part = first(part, 2)
        part = part if part.shape[2] == hi - lo else part.narrow(2, lo, hi - lo)
        for axis, func in rest:
            part = func(part, axis)
        return part

    depth = x.shape[2]
    slab = max(_SLAB // max(x[:1, :1, :1].numel(), 1), 1)
    if x.device.type != "cpu" or slab >= depth or (torch.is_grad_enabled() and x.requires_grad):
        return run(x, 0, depth)
    out = torch.empty_like(x)
    for channels, target in ((c, t) for a, b in zip(x, out, strict=True) for c, t in zip(a, b, strict=True)):
        for lo in range(0, depth, slab):
            hi = min(lo + slab, depth)
            below, above = max(lo - reach, 0), min(hi + reach, depth)
            target[lo:hi] = run(channels[None, None, below:above], lo - below, hi - below)[0, 0]
    return out


def box_sum(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Sums over windows of ``2 * radius + 1`` voxels an axis, ``(B, C, *spatial)``, zero beyond the border."""
    return _each_axis(x, [(lambda t, axis: _window_sum(t, axis, radius), radius)] * (x.ndim - 2))


def gaussian_smooth(x: torch.Tensor, sigma: float | Sequence[float]) -> torch.Tensor:
    """Gaussian smoothing of ``(B, C, *spatial)``, zero beyond the border; ``sigma`` in voxels, one or one an axis."""
    sigmas = list(sigma) if isinstance(sigma, Sequence) else [sigma] * (x.ndim - 2)
    filters: list[tuple[Callable[[torch.Tensor, int], torch.Tensor], int]] = []
    for s in sigmas:
        reach = ceil(3 * s)
        half = [1.0] if s == 0 else [exp(-0.5 * (j / s) ** 2) for j in range(reach + 1)]
        total = 2 * sum(half) - half[0]
        weights = [w / total for w in half]
        filters.append((lambda t, axis, w=weights: _convolve(t, axis, w), reach))  # type: ignore[misc]
    return _each_axis(x, filters)


def central_difference(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Derivative along a spatial axis of ``(B, C, *spatial)`` per voxel, one-sided at the border; zero along an axis
    of one voxel.
    """
    dim = axis + 2
    return torch.gradient(x, dim=dim)[0] if x.shape[dim] > 1 else torch.zeros_like(x)
