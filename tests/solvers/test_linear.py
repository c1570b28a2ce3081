# SPDX-License-Identifier: Apache-2.0
"""Linear equations against NumPy's solution, in any shape and type."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deq.solvers import solve_linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_numpy(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(24) + 0.1 * torch.randn(24, 24, generator=generator)  # not symmetric
    matrix, target = matrix.to(dtype), torch.randn((1, 2, 3, 4), generator=generator).to(dtype)
    calls = []

    def func(v: torch.Tensor) -> torch.Tensor:
        calls.append(v)
        return (matrix @ v.flatten()).view(v.shape)

    found = solve_linear(func, target, max_steps=24, tolerance=1e-6)
    assert found.shape == target.shape and found.dtype == dtype
    expected = np.linalg.solve(matrix.double().numpy(), target.double().flatten().numpy())
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-3, atol=1e-4)
    # the best rest of a few evaluations falls with their number
    rests = []
    for steps in (1, 3, 6, 12):
        calls.clear()
        v = solve_linear(func, target, max_steps=steps, tolerance=0.0)
        assert len(calls) <= steps + 1
        rests.append(float((func(v) - target).norm()))
    assert rests == sorted(rests, reverse=True) and rests[-1] < 0.01 * float(target.norm())


def test_nothing_asked_for() -> None:
    assert not solve_linear(lambda v: 2 * v, torch.zeros(1, 2, 3)).any()
