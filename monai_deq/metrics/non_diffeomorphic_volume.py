# SPDX-License-Identifier: Apache-2.0
"""Non-diffeomorphic volume (NDV) of a displacement field; non-diffeomorphic area (NDA) in 2-D.

Liu et al., "On Finite Difference Jacobian Computation in Deformable Image Registration", IJCV 2024.
"""

from __future__ import annotations

from itertools import product
from math import factorial

import numpy as np
import torch
import torch.nn.functional as F

from monai_deq.metrics.jacobian import check_ddf, check_mask, determinant, values_inside
from monai_deq.metrics.reduced_metric import ReducedIterationMetric

__all__ = ["NonDiffeomorphicVolumeMetric", "compute_non_diffeomorphic_volume"]


def _simplices(spatial_dims: int) -> list[np.ndarray]:
    """
    The simplices that a voxel answers for, each as the steps (rows) from the voxel to the other vertices.

    A step of +1 or -1 along every axis gives the one-sided differences: 4 triangles in 2-D, 8 corner tetrahedra in 3-D.
    A cube divides into 4 corner tetrahedra and a central one, in two ways; the two central tetrahedra are J1*, J2*.
    """
    simplices = [np.diag(signs) for signs in product((1, -1), repeat=spatial_dims)]
    if spatial_dims == 3:
        face_diagonals = np.array([(1, 1, 0), (0, 1, 1), (1, 0, 1)])
        simplices += [-face_diagonals, face_diagonals]
    return simplices


def compute_non_diffeomorphic_volume(ddf: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Volume that the field turns inside out, in % of the volume of the mask (2-D: area).

    Taking the field as linear between the voxels of a tetrahedron, the determinant of its finite differences is 6
    times its signed volume after deformation. The volumes below zero of the ten tetrahedra of a voxel (determinants
    :math:`J^{\pm\pm\pm}, J_1^*, J_2^*`) are summed. Each cube is divided in two ways, each of which fills it, hence
    half:

    .. math:: \mathrm{NDV} = \frac{1}{2} \sum_x \sum_{k=1}^{10} \frac{\max(-|J_k(x)|, 0)}{6}

    In 2-D, the four triangles :math:`J^{\pm\pm}` and 2 in place of 6. Unlike the share of folded voxels it says how
    badly the field folds, and it sees the folds that central differences step over. It may exceed 100 %.

    Beyond the border the displacement goes on unchanged, as in the authors' program.

    Args:
        ddf: displacement field, shape (B, 2, H, W) or (B, 3, D, H, W), voxel units.
        mask: shape ``(B, 1, *spatial)``; only voxels greater than zero are counted. Defaults to None: the whole grid.

    Returns:
        percentages, shape (B, 1); NaN where the mask is empty.

    Raises:
        TypeError: when ``ddf`` or ``mask`` is not a tensor.
        ValueError: when ``ddf`` is not a finite field, or ``mask`` does not fit it.
    """
    ddf = check_ddf(ddf)
    mask = check_mask(mask, ddf)
    spatial_dims = ddf.shape[1]
    padded = F.pad(ddf, (1, 1) * spatial_dims, mode="replicate")

    volume = torch.zeros_like(ddf[:, :1])
    for steps in _simplices(spatial_dims):
        edges = []
        for step in steps:
            window = (slice(1 + int(s), 1 + int(s) + size) for s, size in zip(step, ddf.shape[2:], strict=True))
            stretch = padded[(slice(None), slice(None), *window)] - ddf
            edges.append([stretch[:, i : i + 1] + float(step[i]) for i in range(spatial_dims)])
        orientation = float(np.sign(np.linalg.det(steps)))  # of the simplex at rest
        volume += (-orientation * determinant(edges)).clamp(min=0)
    volume *= 0.5 / factorial(spatial_dims)

    return torch.stack([100.0 * values.mean() for values in values_inside(volume, mask)]).unsqueeze(1)


class NonDiffeomorphicVolumeMetric(ReducedIterationMetric):
    """
    Cumulative form of :py:func:`compute_non_diffeomorphic_volume`: mean percentage over all fields seen.

    Call it as ``metric(y_pred=ddf, y=mask)``, ``y`` being optional; both batch-first tensors or lists of channel-first
    tensors.

    Args:
        reduction: see :py:class:`monai_deq.metrics.ReducedIterationMetric`. Defaults to ``"mean"``.
        get_not_nans: whether ``aggregate`` also returns the number of fields counted. Defaults to False.
    """

    def _compute_tensor(  # type: ignore[override]
        self, y_pred: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        return compute_non_diffeomorphic_volume(y_pred, y)
