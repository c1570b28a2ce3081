# SPDX-License-Identifier: Apache-2.0
"""Jacobian determinant of a dense displacement field, and the checks that every metric of a field shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.utils import convert_to_tensor

__all__ = ["check_ddf", "check_mask", "determinant", "jacobian_determinant", "values_inside"]


def check_ddf(ddf: torch.Tensor, min_size: int = 2) -> torch.Tensor:
    """
    Check a displacement field at the door of a metric.

    Args:
        ddf: displacement field, shape (B, 2, H, W) or (B, 3, D, H, W), voxel units.
        min_size: the least number of voxels along each spatial axis. Defaults to 2.

    Returns:
        the field as a plain tensor without metadata, in float32, or in float64 if it came so.

    Raises:
        TypeError: when ``ddf`` is not a tensor.
        ValueError: when its shape is not that of a field, an axis is too short, or a value is not finite.
    """
    if not isinstance(ddf, torch.Tensor):
        raise TypeError(f"ddf: expected a torch.Tensor, got {type(ddf).__name__}.")
    if ddf.ndim not in (4, 5) or ddf.shape[1] != ddf.ndim - 2 or ddf.shape[0] == 0:
        raise ValueError(f"ddf: expected shape (B, 2, H, W) or (B, 3, D, H, W) with B >= 1, got {tuple(ddf.shape)}.")
    if min(ddf.shape[2:]) < min_size:
        raise ValueError(
            f"ddf: expected at least {min_size} voxels along every spatial axis, got spatial shape "
            f"{tuple(ddf.shape[2:])}. Drop an axis of length 1 together with its channel."
        )
    field: torch.Tensor = convert_to_tensor(ddf, track_meta=False)
    if field.dtype != torch.float64:
        field = field.float()
    finite = torch.isfinite(field).flatten(1).all(dim=1)
    if not finite.all():
        # compared with zero, NaN is not folded: a field that diverged would pass for a perfect one
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"ddf: expected finite displacements, got NaN or infinity in batch item(s) {bad}.")
    return field


def check_mask(mask: torch.Tensor | None, ddf: torch.Tensor) -> torch.Tensor | None:
    """
    Check a mask against the field that it goes with.

    Args:
        mask: shape ``(B, 1, *spatial)``, inside where greater than zero; or None for the whole grid.
        ddf: displacement field, shape ``(B, ndim, *spatial)``.

    Returns:
        boolean mask on the field's device, shape ``(B, 1, *spatial)``, or None.

    Raises:
        TypeError: when ``mask`` is neither None nor a tensor.
        ValueError: when its shape does not fit ``ddf``.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: expected a torch.Tensor or None, got {type(mask).__name__}.")
    expected = (ddf.shape[0], 1, *ddf.shape[2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask: expected shape {expected} to fit the ddf, got {tuple(mask.shape)}.")
    inside: torch.Tensor = convert_to_tensor(mask, track_meta=False, device=ddf.device)
    return inside > 0


def values_inside(field: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """
    The values of a scalar field inside the mask, item by item.

    Args:
        field: shape ``(B, 1, *spatial)``.
        mask: boolean, shape ``(B, 1, *spatial)``, or None for all values.

    Returns:
        one flat tensor per batch item, empty where the item's mask is empty.
    """
    if mask is None:
        return list(field.flatten(1))
    return [item[inside] for item, inside in zip(field, mask, strict=True)]


def determinant(matrix: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """
    Determinant of a 2x2 or 3x3 matrix whose elements are whole fields, in closed form.

    ``torch.linalg.det`` wants the matrix in the last two axes, a second copy of all its elements.

    Args:
        matrix: rows of equally shaped tensors.

    Returns:
        tensor of the elements' shape.
    """
    if len(matrix) == 2:
        (a, b), (c, d) = matrix
        return a * d - b * c
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def jacobian_determinant(ddf: torch.Tensor) -> torch.Tensor:
    r"""
    Determinant of the Jacobian of the map :math:`x \mapsto x + \mathrm{ddf}(x)`, in voxel units.

    :math:`|J| = \det(I + \partial\,\mathrm{ddf} / \partial x)` by central differences; one-sided differences at the
    border, as ``numpy.gradient``, so that the result covers the whole grid and a mask lines up with it. 1 where
    volume is kept, below 1 where the map contracts, zero or less where it folds.

    Args:
        ddf: displacement field, shape (B, 2, H, W) or (B, 3, D, H, W), voxel units; channel i displaces array axis i.

    Returns:
        shape ``(B, 1, *spatial)``, float32, or float64 for a float64 field.

    Raises:
        TypeError: when ``ddf`` is not a tensor.
        ValueError: when ``ddf`` is not a finite field of at least 2 voxels along each axis.
    """
    ddf = check_ddf(ddf)
    spatial_dims = ddf.shape[1]
    axes = tuple(range(1, spatial_dims + 1))
    matrix = [list(torch.gradient(ddf[:, i], dim=axes)) for i in range(spatial_dims)]
    for i in range(spatial_dims):
        matrix[i][i] = matrix[i][i] + 1
    return determinant(matrix).unsqueeze(1)
