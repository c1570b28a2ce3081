# SPDX-License-Identifier: Apache-2.0
"""Percentage of folded voxels against a known fold and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deq.metrics import FoldedVoxelsMetric, compute_folded_voxels


def strip_fold(shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """The map runs backwards from start to stop along the first axis: |J| is -1 between, 0 at both, 1 elsewhere."""
    displacement = -2.0 * (torch.arange(shape[0]).clamp(start, stop) - start)
    ddf = torch.zeros(1, len(shape), *shape)
    ddf[:, 0] = displacement.reshape(-1, *[1] * (len(shape) - 1))
    return ddf


def brute_force(ddf: np.ndarray, mask: np.ndarray) -> float:
    n = len(ddf)
    gradients = np.stack([np.stack(np.gradient(ddf[i].astype(np.float64))) for i in range(n)])
    jacobian = np.linalg.det(np.moveaxis(gradients, (0, 1), (-2, -1)) + np.eye(n))
    return 100.0 * np.mean(jacobian[mask] <= 0)


@pytest.mark.parametrize("shape", [(11, 4), (11, 3, 5)])
def test_known_fold_counts_its_border(shape: tuple[int, ...]) -> None:
    ddf = torch.cat([strip_fold(shape, 3, 6), torch.zeros(1, len(shape), *shape)])
    torch.testing.assert_close(compute_folded_voxels(ddf), torch.tensor([[100.0 * 4 / 11], [0.0]]))


def test_mask_restricts_the_count() -> None:
    ddf = strip_fold((11, 4), 3, 6).expand(3, -1, -1, -1)
    mask = torch.zeros(3, 1, 11, 4)
    mask[0, :, 5:10, 1:3] = 7  # rows 5, 6 of 5 rows fold
    mask[1, :, :2] = 1
    folded = compute_folded_voxels(ddf, mask)
    torch.testing.assert_close(folded, torch.tensor([[40.0], [0.0], [float("nan")]]), equal_nan=True)


@pytest.mark.parametrize("shape", [(9, 6), (5, 7, 4)])
def test_agrees_with_numpy(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    ddf = torch.randn(2, len(shape), *shape, generator=generator)
    mask = torch.rand(2, 1, *shape, generator=generator) > 0.4
    expected = [brute_force(d, m) for d, m in zip(ddf.numpy(), mask[:, 0].numpy(), strict=True)]
    np.testing.assert_allclose(compute_folded_voxels(ddf, mask)[:, 0].numpy(), expected, rtol=1e-6)
    assert 0 < expected[0] < 100


@pytest.mark.parametrize("shape", [(1, 11, 4), (2, 2, 11, 4), (2, 1, 4, 11)])
def test_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 1, 11, 4\)"):
        compute_folded_voxels(torch.zeros(2, 2, 11, 4), torch.ones(shape))


def test_metric_averages_over_calls_in_either_form() -> None:
    folded, flat = strip_fold((10, 4), 3, 6), torch.zeros(1, 2, 10, 4)
    mask = torch.zeros(1, 10, 4)
    mask[:, 6:] = 1  # row 6 of 4 rows folds
    metric = FoldedVoxelsMetric(get_not_nans=True)
    torch.testing.assert_close(metric(y_pred=torch.cat([folded, flat])), torch.tensor([[40.0], [0.0]]))
    metric(y_pred=[folded[0], flat[0]], y=[mask, mask])
    metric(y_pred=[folded[0]])
    score, count = metric.aggregate()
    assert score.item() == pytest.approx((40 + 0 + 25 + 0 + 40) / 5)
    assert count.item() == 5
