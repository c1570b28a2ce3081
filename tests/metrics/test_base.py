# SPDX-License-Identifier: Apache-2.0
"""What the cumulative metrics share: reduction, refusals, several processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deq.metrics import FoldedVoxelsMetric, LabelDiceMetric, base


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
    with pytest.raises(ValueError, match="y: expected 2 items, as in y_pred, got 1"):
        metric(list(ddf), [mask[0]])
    with pytest.raises(TypeError, match="mask"):
        metric(ddf, mask=mask)
    with pytest.raises(ValueError, match="median"):
        FoldedVoxelsMetric(reduction="median")
    assert len(metric) == 0


@pytest.mark.parametrize("own", [1, 0])
def test_each_process_has_the_scores_of_all_in_their_order(monkeypatch: pytest.MonkeyPatch, own: int) -> None:
    # what the other process sends: two batches; this one comes first, and may have scored nothing
    others = [torch.tensor([[0.5, 1.0], [float("nan"), 0.0]]), torch.tensor([[0.25, 0.25]])]
    monkeypatch.setattr(base, "gather_items", lambda items: [*items, *others])
    metric = LabelDiceMetric([1, 2], get_not_nans=True)
    if own:
        labels = torch.tensor([1, 2, 1, 0]).view(1, 1, 2, 2)
        metric(labels, labels)
    scores = metric.get_buffer()
    torch.testing.assert_close(scores, torch.cat([torch.ones(own, 2), *others]), equal_nan=True)
    assert len(metric) == 3 + own
    score, count = metric.aggregate()
    assert score.item() == pytest.approx((own + 0.75 + 0 + 0.25) / (3 + own)) and count.item() == 3 + own


def test_scores_may_be_kept_by_hand() -> None:
    metric = FoldedVoxelsMetric()
    metric.append(torch.tensor([3.0]))
    metric.extend(torch.tensor([[6.0], [0.0]]))
    assert metric.get_buffer().tolist() == [[3.0], [6.0], [0.0]] and metric.aggregate().item() == 3
    metric.reset()
    assert metric.get_buffer() is None
