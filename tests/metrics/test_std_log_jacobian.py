# SPDX-License-Identifier: Apache-2.0
"""Both forms of std(log |J|) against closed forms, NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_deq.metrics import StdLogJacobianMetric, compute_std_log_jacobian

FORMS = ["paper", "learn2reg"]


def paper_form(ddf: np.ndarray, mask: np.ndarray) -> float:
    n = len(ddf)
    gradients = np.stack([np.stack(np.gradient(ddf[i].astype(np.float64))) for i in range(n)])
    jacobian = np.linalg.det(np.moveaxis(gradients, (0, 1), (-2, -1)) + np.eye(n))
    return np.log(np.clip(jacobian, 1e-9, 1e9))[mask].std()


def learn2reg_form(ddf: np.ndarray, mask: np.ndarray) -> float:
    """As the challenge has it: correlation with (-0.5, 0, 0.5), zeros outside, then the outer 2 voxels dropped."""
    n = len(ddf)
    matrix = np.empty((*ddf.shape[1:], n, n))
    for component in range(n):
        for axis in range(n):
            matrix[..., component, axis] = ndimage.correlate1d(
                ddf[component].astype(np.float64), [-0.5, 0, 0.5], axis=axis, mode="constant", cval=0.0
            ) + (component == axis)
    inner = (slice(2, -2),) * n
    return np.log(np.clip(np.linalg.det(matrix)[inner] + 3, 1e-9, 1e9))[mask[inner]].std()


@pytest.mark.parametrize("shape", [(9, 12), (7, 10, 6)])
@pytest.mark.parametrize(("form", "reference"), [("paper", paper_form), ("learn2reg", learn2reg_form)])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_an_independent_form(shape, form, reference, masked) -> None:
    generator = torch.Generator().manual_seed(2)
    # strong enough for folds, which the clip catches
    ddf = torch.randn(2, len(shape), *shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, *shape, generator=generator) > (0.4 if masked else -1)
    result = compute_std_log_jacobian(ddf, mask if masked else None, form=form)
    assert result.shape == (2, 1)
    expected = [reference(d, m) for d, m in zip(ddf.numpy(), mask[:, 0].numpy(), strict=True)]
    np.testing.assert_allclose(result[:, 0].numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [2, 3])
def test_affine_map_has_no_spread(form, n: int) -> None:
    x = torch.stack(torch.meshgrid(*[torch.arange(7.0)] * n, indexing="ij"))
    ddf = torch.stack([0.3 * x, -0.2 * x.flip(0)])
    torch.testing.assert_close(compute_std_log_jacobian(ddf, form=form), torch.zeros(2, 1), atol=1e-5, rtol=0)


def test_two_halves_of_known_volume_change() -> None:
    x = torch.arange(12.0)
    ddf = torch.zeros(1, 2, 12, 8)
    ddf[:, 0] = torch.where(x < 6, x, 6 + 3 * (x - 6))[:, None]  # |J| is 2 below, 4 above the middle
    mask = torch.zeros(1, 1, 12, 8)
    mask[:, :, [3, 9], 2:-2] = 1
    torch.testing.assert_close(compute_std_log_jacobian(ddf, mask), torch.tensor([[np.log(4 / 2) / 2]]).float())
    torch.testing.assert_close(
        compute_std_log_jacobian(ddf, mask, form="learn2reg"), torch.tensor([[np.log(7 / 5) / 2]]).float()
    )


def test_empty_masks_give_nan() -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[1, :, 1] = 1  # all of it within the border that learn2reg drops
    assert compute_std_log_jacobian(torch.zeros(2, 2, 8, 8), mask).isnan().flatten().tolist() == [True, False]
    assert compute_std_log_jacobian(torch.zeros(2, 2, 8, 8), mask, form="learn2reg").isnan().all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"form: expected one of \['paper', 'learn2reg'\], got 'L2R'"):
        compute_std_log_jacobian(torch.zeros(1, 2, 8, 8), form="L2R")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form: expected one of"):
        StdLogJacobianMetric(form="L2R")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least 5 voxels .* got spatial shape \(8, 4\)"):
        compute_std_log_jacobian(torch.zeros(1, 2, 8, 4), form="learn2reg")


@pytest.mark.parametrize("form", FORMS)
def test_metric_averages_over_items(form) -> None:
    ddf = torch.randn(3, 2, 8, 9, generator=torch.Generator().manual_seed(3))
    metric = StdLogJacobianMetric(form=form)
    metric(y_pred=ddf[:1])
    metric(y_pred=list(ddf[1:]))
    torch.testing.assert_close(metric.aggregate(), compute_std_log_jacobian(ddf, form=form).mean(dim=0))
