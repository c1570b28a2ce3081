# SPDX-License-Identifier: Apache-2.0
"""What the cumulative metrics share: reduction and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deq.metrics import FoldedVoxelsMetric


def test_no_score_at_all_is_not_zero() -> None:
    metric = FoldedVoxelsMetric(get_not_nans=True)
    metric(torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 4))  # empty masks
    for reduction in ("mean", "sum", "mean_batch", "sum_batch"):
        score, count = metric.aggregate(reduction)
        assert score.isnan().all()
        assert count.sum() == 0
    assert metric.aggregate("none")[0].isnan().all()


def test_items_without_a_score_are_left_out() -> None:
    ddf = torch.zeros(2, 2, 4, 4)
    ddf[:, 0] = -2 * torch.arange(4.0)[:, None]
    mask = torch.ones(2, 1, 4, 4)
    mask[1] = 0
    metric = FoldedVoxelsMetric()
    metric(ddf, mask)
    assert metric.aggregate().item() == 100.0
    metric.reset()
    with pytest.raises(ValueError, match="FoldedVoxelsMetric holds no scores"):
        metric.aggregate()


def test_what_monai_would_drop_in_silence_is_refused() -> None:
    metric = FoldedVoxelsMetric()
    ddf, mask = torch.zeros(2, 2, 4, 4), torch.ones(2, 1, 4, 4)
    with pytest.raises(TypeError, match="y: expected a torch.Tensor or a list of torch.Tensor, got ndarray"):
        metric(ddf, np.ones((2, 1, 4, 4)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="y: .* got NoneType, Tensor"):
        metric(list(ddf), [None, mask[1]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="y_pred: .* got NoneType"):
        metric(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="y: expected 2 items, one for each of y_pred, got 1"):
        metric(list(ddf), [mask[0]])
    with pytest.raises(TypeError, match="mask"):
        metric(ddf, mask=mask)
    with pytest.raises(ValueError, match="median"):
        FoldedVoxelsMetric(reduction="median")
    assert len(metric) == 0
