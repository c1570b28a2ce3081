# SPDX-License-Identifier: Apache-2.0
"""One-sided Jacobian determinants of a displacement field, and a field without folds next to one that has some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from math import prod

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["DiffusionFoldLoss", "determinant", "remove_folds", "simplex_determinants"]

#: share of the way to the mean of the neighbours in a round: the less, the less is changed in the end
_SHARE = 0.25
#: rounds of local smoothing after which its reach grows by a voxel
_ROUNDS = 8
#: rounds after which the whole field shrinks, which ends at no displacement
_LAST = 160


def determinant(matrix: Sequence[Sequence[torch.Tensor] | torch.Tensor]) -> torch.Tensor:
    """Determinant of matrices of 2 or 3 rows, entry by entry."""
    if len(matrix) == 2:
        (a, b), (c, d) = matrix
        return a * d - b * c
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


@cache
def _simplices(spatial_dims: int) -> list[tuple[list[tuple[int, ...]], float]]:
    """
    The simplices of a voxel, each as the steps to the other vertices and their determinant: one-sided differences along
    every axis (4 triangles in 2-D, 8 corner tetrahedra in 3-D), and the central tetrahedra of the two divisions of a
    cube, J1*, J2*.
    """
    simplices = [np.diag(signs) for signs in product((1, -1), repeat=spatial_dims)]
    if spatial_dims == 3:
        face_diagonals = np.array([(1, 1, 0), (0, 1, 1), (1, 0, 1)])
        simplices += [-face_diagonals, face_diagonals]
    return [([tuple(map(int, row)) for row in steps], float(np.linalg.det(steps))) for steps in simplices]


def _determinants(
    spatial_dims: int, stretch: Callable[[tuple[int, ...]], torch.Tensor]
) -> Iterator[tuple[torch.Tensor, float]]:
    """The determinant of each simplex, and what it is without a displacement; ``stretch`` says by how much the
    displacement changes from a voxel to the one a step away, components first.
    """
    for steps, at_rest in _simplices(spatial_dims):
        edges = [[part + s for part, s in zip(stretch(step), map(float, step), strict=True)] for step in steps]
        yield determinant(edges) * float(np.sign(at_rest)), abs(at_rest)


def _dense_determinants(ddf: torch.Tensor) -> Iterator[tuple[torch.Tensor, float]]:
    """The determinants at all voxels, ``(B, *spatial)`` each, and what they are without a displacement."""
    ndim = ddf.shape[1]
    padded = F.pad(ddf, (1, 1) * ndim, mode="replicate")

    def stretch(step: tuple[int, ...]) -> torch.Tensor:
        window = (slice(1 + s, 1 + s + size) for s, size in zip(step, ddf.shape[2:], strict=True))
        return (padded[(slice(None), slice(None), *window)] - ddf).movedim(1, 0)

    return _determinants(ndim, stretch)


def simplex_determinants(ddf: torch.Tensor) -> Iterator[torch.Tensor]:
    """The determinants of finite differences of Liu et al., "On Finite Difference Jacobian Computation in Deformable
    Image Registration", IJCV 2024, ten in 3-D and four in 2-D, ``(B, *spatial)`` each, positive where nothing folds: 1
    (the central ones in 3-D: 2) without a displacement ``(B, ndim, *spatial)``. Beyond the border it goes on unchanged.
    """
    return (values for values, _ in _dense_determinants(ddf))


class DiffusionFoldLoss(nn.Module):
    """The diffusion energy, as :py:class:`EnergyUpdate` has it, and what keeps a field from folding: the mean, over
    voxels and simplices, of the squares of what the determinants of :py:func:`simplex_determinants` lack. As
    ``smoothness`` of an :py:class:`EnergyUpdate` the equilibrium itself has next to no folds, and none need be removed.

    Args:
        weight: of the folds beside the diffusion. Defaults to 250: 100 beside the similarity where the smoothness
            counts 0.4, chosen for brains.
        least: share of its value at rest below which a determinant lacks something. Defaults to 0.2.

    Raises:
        ValueError: When ``weight`` is negative or ``least`` not in (0, 1].
    """

    def __init__(self, weight: float = 250.0, least: float = 0.2) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, got {weight}.")
        if not 0 < least <= 1:
            raise ValueError(f"least must be in (0, 1], got {least}.")
        self.weight, self.least = float(weight), float(least)

    def forward(self, ddf: torch.Tensor) -> torch.Tensor:
        """The loss of displacements ``(B, ndim, *spatial)`` in voxels, a scalar."""
        voxels, lacking = ddf[:, 0].numel(), list[torch.Tensor]()
        steps = torch.stack([ddf.diff(dim=axis).square().sum() for axis in range(2, ddf.ndim)]).sum() / ddf.shape[1]
        for values, at_rest in _dense_determinants(ddf):
            lacking.append((self.least - values / at_rest).clamp_min(0).square().sum())
        return (steps + self.weight * torch.stack(lacking).mean()) / voxels


class _Nodes:
    """The nodes of a grid by their flat numbers, and those around them; beyond the border the one on it."""

    def __init__(self, size: tuple[int, ...], device: torch.device) -> None:
        self.size = size
        self.marked = torch.zeros(prod(size), dtype=torch.bool, device=device)

    def _moved(self, nodes: torch.Tensor, step: Sequence[int]) -> torch.Tensor:
        flat, rest = torch.zeros_like(nodes), nodes
        stride = prod(self.size)
        for n, s in zip(self.size, step, strict=True):
            stride //= n
            flat += ((rest // stride) + int(s)).clamp_(0, n - 1).mul_(stride)
            rest = rest % stride
        return flat

    def around(self, nodes: torch.Tensor, reach: int) -> torch.Tensor:
        """The nodes at most so far along each axis from one of these, each once."""
        for step in product(range(-reach, reach + 1), repeat=len(self.size)):
            self.marked[self._moved(nodes, step)] = True
        found = torch.nonzero(self.marked).flatten()
        self.marked[found] = False
        return found

    def smoothed(self, values: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """Values ``(ndim, V)`` of nodes, moved towards the mean over each and its neighbours, ``(ndim, N)``."""
        steps = list(product((-1, 0, 1), repeat=len(self.size)))
        total = torch.zeros_like(values[:, nodes])
        for step in steps:
            total += values[:, self._moved(nodes, step)]
        return torch.lerp(values[:, nodes], total / len(steps), _SHARE)

    def low(self, values: torch.Tensor, nodes: torch.Tensor, least: float) -> torch.Tensor:
        """Those of the nodes where a determinant of a displacement ``(ndim, V)`` is too small."""
        here, low = values[:, nodes], torch.zeros_like(nodes, dtype=torch.bool)
        # each step belongs to several simplices
        stretch = cache(lambda step: values[:, self._moved(nodes, step)] - here)
        for found, at_rest in _determinants(len(values), stretch):
            low |= ~(found >= least * at_rest)
        return nodes[low]


@torch.no_grad()
def remove_folds(ddf: torch.Tensor, least: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """A field whose determinants (:py:func:`simplex_determinants`, of which those of central differences are means)
    are all at least a share ``least`` of what they are without a displacement. Where they are not, and next to it, the
    displacement moves towards the mean of its neighbours, again and again, as far around as it takes.

    Args:
        ddf: ``(B, ndim, *spatial)``, voxels, finite, 2-D or 3-D. It is not changed.
        least: of the determinants. Defaults to 0.01.

    Returns:
        The field, and the number of voxels of each item that were changed, ``(B,)``.
    """
    size, ndim = tuple(ddf.shape[2:]), ddf.shape[1]
    low = torch.zeros((len(ddf), *size), dtype=torch.bool, device=ddf.device)
    for found, at_rest in _dense_determinants(ddf):
        low |= ~(found >= least * at_rest)
    counts = torch.zeros(len(ddf), dtype=torch.long)
    if not bool(low.any()):
        return ddf, counts
    out, grid = ddf.clone(memory_format=torch.contiguous_format), _Nodes(size, ddf.device)
    for i in torch.nonzero(low.flatten(1).any(dim=1)).flatten().tolist():
        if not bool(torch.isfinite(ddf[i]).all()):
            continue
        values, bad, rounds = out[i].view(ndim, -1), torch.nonzero(low[i].flatten()).flatten(), 0
        while len(bad):
            rounds += 1
            if rounds > _LAST:
                values *= 0.9
                checked = torch.arange(values.shape[1], device=ddf.device)
            else:
                nodes = grid.around(bad, 1 + rounds // _ROUNDS)
                values[:, nodes] = grid.smoothed(values, nodes)
                checked = grid.around(nodes, 1)
            bad = grid.low(values, checked, least)
        counts[i] = int((out[i] != ddf[i]).any(dim=0).sum())
    return out, counts
