# SPDX-License-Identifier: Apache-2.0
"""Spectral radii of known matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from monai_deq.certificates import spectral_radius


def rotation(radius: float, angle: float) -> np.ndarray:
    return radius * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def linear_map(matrices: list[np.ndarray], offset: float = 0.0) -> Callable[[torch.Tensor], torch.Tensor]:
    a = torch.from_numpy(np.stack(matrices))

    def g(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bij,bjn->bin", a.to(x.dtype), x) + offset

    return g


def test_spectral_radius_of_complex_pairs_and_of_each_item() -> None:
    # a Rayleigh quotient gives radius * cos(angle), 0 for the first
    matrices = [rotation(0.9, math.pi / 2), rotation(1.3, 2.0), rotation(0.25, 0.0)]
    radius = spectral_radius(linear_map(matrices), torch.zeros(3, 2, 5))
    torch.testing.assert_close(radius, torch.tensor([0.9, 1.3, 0.25], dtype=torch.float64), atol=1e-6, rtol=0)


def test_spectral_radius_of_random_matrices() -> None:
    matrices = [np.random.default_rng(seed).standard_normal((12, 12)) / 4 for seed in range(8)]
    expected = [np.abs(np.linalg.eigvals(m)).max() for m in matrices]
    # the norm swings as a complex pair turns: many iterations even it out
    radius = spectral_radius(linear_map(matrices), torch.zeros(8, 12, 1, dtype=torch.float64), 4000)
    np.testing.assert_allclose(radius, expected, rtol=2e-3)


def test_spectral_radius_of_a_matrix_far_from_normal() -> None:
    matrix = np.array([[0.5, 50.0], [0.0, 0.4]])
    assert np.linalg.norm(matrix, 2) > 50
    radius = spectral_radius(linear_map([matrix]), torch.zeros(1, 2, 3), 200)
    assert float(radius) == pytest.approx(0.5, rel=1e-3)


def test_spectral_radius_at_a_state_of_a_nonlinear_map() -> None:
    x = torch.tensor([[[0.3]], [[1.1]]], dtype=torch.float64)
    np.testing.assert_allclose(spectral_radius(torch.cos, x), np.abs(np.sin(x[:, 0, 0])), rtol=1e-9)
    assert spectral_radius(lambda x: 0.0 * x, x).tolist() == [0, 0]
    assert spectral_radius(lambda x: x * torch.tensor([math.nan, 2.0]).view(2, 1, 1), x)[0].isnan()
    assert spectral_radius(lambda x: torch.ones_like(x), x).tolist() == [0, 0]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="under no_grad, not inference_mode"):
        spectral_radius(torch.cos, x)
    with pytest.raises(ValueError, match="iterations must be at least 2"):
        spectral_radius(torch.cos, x, 1)
