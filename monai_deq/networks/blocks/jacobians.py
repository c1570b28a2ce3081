# SPDX-License-Identifier: Apache-2.0
"""One-sided Jacobian determinants of a displacement field, and a field without folds next to one that has some."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import prod

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["determinant", "remove_folds", "simplex_determinants"]

#: rounds of local smoothing after which its reach grows by a voxel
_ROUNDS = 8
#: rounds after which the whole field shrinks, which ends at no displacement
_LAST = 160


def determinant(matrix: list[list[torch.Tensor]]) -> torch.Tensor:
    """Determinant of matrices of 2 or 3 rows, entry by entry."""
    if len(matrix) == 2:
        (a, b), (c, d) = matrix
        return a * d - b * c
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


@cache
def _simplices(spatial_dims: int) -> list[np.ndarray]:
    """
    The simplices of a voxel, each as the steps (rows) to the other vertices: one-sided differences along every axis (4
    triangles in 2-D, 8 corner tetrahedra in 3-D), and the central tetrahedra of the two divisions of a cube, J1*, J2*.
    """
    simplices = [np.diag(signs) for signs in product((1, -1), repeat=spatial_dims)]
    if spatial_dims == 3:
        face_diagonals = np.array([(1, 1, 0), (0, 1, 1), (1, 0, 1)])
        simplices += [-face_diagonals, face_diagonals]
    return simplices


def simplex_determinants(ddf: torch.Tensor) -> Iterator[torch.Tensor]:
    """The determinants of finite differences of Liu et al., "On Finite Difference Jacobian Computation in Deformable
    Image Registration", IJCV 2024, ten in 3-D and four in 2-D, ``(B, *spatial)`` each, positive where nothing folds: 1
    (the central ones in 3-D: 2) without a displacement ``(B, ndim, *spatial)``. Beyond the border it goes on unchanged.
    """
    ndim = ddf.shape[1]
    padded = F.pad(ddf, (1, 1) * ndim, mode="replicate")
    for steps in _simplices(ndim):
        edges = []
        for step in steps:
            window = (slice(1 + int(s), 1 + int(s) + size) for s, size in zip(step, ddf.shape[2:], strict=True))
            stretch = padded[(slice(None), slice(None), *window)] - ddf
            edges.append([stretch[:, i] + float(step[i]) for i in range(ndim)])
        # of the simplex at rest
        yield determinant(edges) * float(np.sign(np.linalg.det(steps)))


def _neighbours(nodes: torch.Tensor, size: tuple[int, ...], reach: int) -> torch.Tensor:
    """Flat numbers of the nodes at most so far along each axis, ``(N, n)``; beyond the border the one on it."""
    places = torch.stack(torch.unravel_index(nodes, size))
    offsets = torch.tensor(list(product(range(-reach, reach + 1), repeat=len(size))), device=nodes.device)
    around = places[:, :, None] + offsets.T[:, None]
    flat = torch.zeros_like(around[0])
    for axis, n in enumerate(size):
        flat = flat * n + around[axis].clamp(0, n - 1)
    return flat


def _folded(values: torch.Tensor, around: torch.Tensor, least: float) -> torch.Tensor:
    """Whether a determinant of nodes with these 3^ndim neighbours is too small, of displacements ``(ndim, N)``."""
    ndim = len(values)
    middle = around.shape[1] // 2
    here = values[:, around[:, middle]]
    low = torch.zeros_like(around[:, 0], dtype=torch.bool)
    for steps in _simplices(ndim):
        edges = []
        for step in steps:
            place = middle + int(sum(s * 3 ** (ndim - 1 - axis) for axis, s in enumerate(step)))
            stretch = values[:, around[:, place]] - here
            edges.append([stretch[i] + float(step[i]) for i in range(ndim)])
        at_rest = float(np.linalg.det(steps))
        low |= ~(determinant(edges) * float(np.sign(at_rest)) >= least * abs(at_rest))
    return low


@torch.no_grad()
def remove_folds(ddf: torch.Tensor, least: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """A field whose determinants (:py:func:`simplex_determinants`, of which those of central differences are means)
    are all at least a share ``least`` of what they are without a displacement. Where they are not, and next to it, the
    displacement is replaced by the mean of its neighbours, again and again, as far around as it takes.

    Args:
        ddf: ``(B, ndim, *spatial)``, voxels, finite, 2-D or 3-D. It is not changed.
        least: of the determinants. Defaults to 0.05.

    Returns:
        The field, and the number of voxels of each item that were changed, ``(B,)``.
    """
    size, ndim = tuple(ddf.shape[2:]), ddf.shape[1]
    low = torch.zeros((len(ddf), *size), dtype=torch.bool, device=ddf.device)
    for steps, values in zip(_simplices(ndim), simplex_determinants(ddf), strict=True):
        low |= ~(values >= least * abs(float(np.linalg.det(steps))))
    counts = torch.zeros(len(ddf), dtype=torch.long)
    if not bool(low.any()):
        return ddf, counts
    out = ddf.clone()
    for i in torch.nonzero(low.flatten(1).any(dim=1)).flatten().tolist():
        if not bool(torch.isfinite(ddf[i]).all()):
            continue
        values = out[i].reshape(ndim, prod(size))
        bad, touched = torch.nonzero(low[i].flatten()).flatten(), [torch.empty(0, dtype=torch.long, device=ddf.device)]
        rounds = 0
        while len(bad):
            rounds += 1
            if rounds > _LAST:
                values *= 0.9
                checked = torch.arange(values.shape[1], device=ddf.device)
            else:
                nodes = _neighbours(bad, size, 1 + rounds // _ROUNDS).unique()
                values[:, nodes] = values[:, _neighbours(nodes, size, 1)].mean(dim=2)
                touched.append(nodes)
                checked = _neighbours(nodes, size, 1).unique()
            bad = checked[_folded(values, _neighbours(checked, size, 1), least)]
        out[i] = values.view_as(out[i])
        counts[i] = values.shape[1] if rounds > _LAST else len(torch.cat(touched).unique())
    return out, counts
