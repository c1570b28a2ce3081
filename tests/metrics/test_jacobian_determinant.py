# SPDX-License-Identifier: Apache-2.0
"""Jacobian determinant against closed forms and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_deq.metrics import jacobian_determinant

SHAPES = [(5, 8), (2, 3), (4, 7, 5), (2, 2, 3)]


def brute_force(ddf: np.ndarray) -> np.ndarray:
    """|J| of one field (ndim, *spatial) in float64 by np.gradient and np.linalg.det."""
    n = len(ddf)
    gradients = np.stack([np.stack(np.gradient(ddf[i].astype(np.float64), axis=tuple(range(n)))) for i in range(n)])
    return np.linalg.det(np.moveaxis(gradients, (0, 1), (-2, -1)) + np.eye(n))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ddf = torch.randn(2, len(shape), *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    jacobian = jacobian_determinant(ddf)
    assert jacobian.shape == (2, 1, *shape)
    assert jacobian.dtype == dtype
    expected = np.stack([brute_force(item) for item in ddf.numpy()])[:, None]
    np.testing.assert_allclose(jacobian.numpy(), expected, atol=1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("matrix", [[[1.2, 0.3], [-0.4, 0.7]], [[1.1, 0.2, -0.3], [0.4, 0.9, 0.1], [-0.2, 0.5, 1.3]]])
def test_affine_map_has_the_determinant_of_its_matrix_everywhere(matrix: list[list[float]]) -> None:
    n = len(matrix)
    grid = np.stack(np.meshgrid(*(np.arange(s) for s in (4, 6, 5)[:n]), indexing="ij")).astype(float)
    ddf = np.einsum("ij,j...->i...", np.array(matrix), grid) - grid
    jacobian = jacobian_determinant(torch.from_numpy(ddf)[None])
    np.testing.assert_allclose(jacobian.numpy(), np.linalg.det(matrix), rtol=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_error_falls_with_the_square_of_the_voxel_size(n: int) -> None:
    errors = []
    for size in (16, 32):
        x = np.stack(np.meshgrid(*[np.arange(size)] * n, indexing="ij")) / size
        # component i depends on axis i and the next one, so that every element of the matrix takes part
        ddf = size * 0.05 * np.stack([np.sin(2 * np.pi * x[i]) + np.cos(2 * np.pi * x[(i + 1) % n]) for i in range(n)])
        matrix = np.tile(np.eye(n), (*x.shape[1:], 1, 1))
        for i in range(n):
            matrix[..., i, i] += 0.1 * np.pi * np.cos(2 * np.pi * x[i])
            matrix[..., i, (i + 1) % n] -= 0.1 * np.pi * np.sin(2 * np.pi * x[(i + 1) % n])
        difference = jacobian_determinant(torch.from_numpy(ddf)[None])[0, 0].numpy() - np.linalg.det(matrix)
        same_points = difference[(slice(None, None, size // 16),) * n][(slice(1, -1),) * n]
        errors.append(np.abs(same_points).max())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)


def test_half_precision_is_computed_in_float32() -> None:
    ddf = torch.full((1, 2, 6, 6), 200.0).half()
    ddf[:, 0] += torch.arange(6).half()[:, None] / 8  # exact in half precision: slope 1/8
    jacobian = jacobian_determinant(ddf)
    assert jacobian.dtype == torch.float32
    torch.testing.assert_close(jacobian, torch.full((1, 1, 6, 6), 1.125))


def test_metadata_is_dropped() -> None:
    assert type(jacobian_determinant(MetaTensor(torch.zeros(1, 2, 4, 4)))) is torch.Tensor


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 8), r"expected shape .* got \(2, 8, 8\)"),
        ((1, 3, 8, 8), r"expected shape .* got \(1, 3, 8, 8\)"),
        ((1, 2, 8, 8, 8), r"expected shape .* got \(1, 2, 8, 8, 8\)"),
        ((0, 2, 8, 8), "B >= 1"),
        ((1, 3, 8, 8, 1), r"at least 2 voxels .* got spatial shape \(8, 8, 1\)"),
    ],
)
def test_wrong_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jacobian_determinant(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_field_that_is_not_finite_is_refused(value: float) -> None:
    ddf = torch.zeros(3, 2, 4, 4)
    ddf[1, 0, 2, 2] = value
    with pytest.raises(ValueError, match=r"batch item\(s\) \[1\]"):
        jacobian_determinant(ddf)


def test_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match="got ndarray"):
        jacobian_determinant(np.zeros((1, 2, 4, 4)))  # type: ignore[arg-type]
