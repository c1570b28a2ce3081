# SPDX-License-Identifier: Apache-2.0
"""Losses of features, by NumPy in float64, and what does not fit refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deq.losses import FeatureLabelLoss


def case(size: tuple[int, ...], seed: int = 0) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn((2, 4, *size), generator=generator).softmax(dim=1) for _ in range(2)]
    labels = [torch.randint(0, 4, (2, 1, *size), generator=generator).float() for _ in range(2)]
    return features, {"moving_label": labels[0], "fixed_label": labels[1]}


@pytest.mark.parametrize("size", [(9, 7), (5, 6, 4)])
def test_against_numpy(size: tuple[int, ...]) -> None:
    features, target = case(size)
    loss = FeatureLabelLoss()
    assert loss.target_keys == ("moving_label", "fixed_label")
    p = torch.cat(features).double().numpy()
    label = torch.cat([target["moving_label"], target["fixed_label"]]).numpy()[:, 0].astype(int)
    one_hot = np.moveaxis(np.eye(4)[label], -1, 1)
    axes = (0, *range(2, p.ndim))
    # of a batch: over all of its images at once
    dice = 2 * (p * one_hot).sum(axes) / (p.sum(axes) + one_hot.sum(axes))
    entropy = -np.log((p * one_hot).sum(1)).mean()
    assert float(loss(features, target)) == pytest.approx((1 - dice).mean() + 0.5 * entropy, rel=1e-4)


def test_right_features_cost_nothing_and_gradients_are_finite() -> None:
    _, target = case((8, 8))
    exact = [torch.nn.functional.one_hot(t[:, 0].long(), 4).movedim(-1, 1).float() for t in target.values()]
    exact = [part.requires_grad_() for part in exact]
    value = FeatureLabelLoss()(exact, target)
    value.backward()
    assert float(value.detach()) < 1e-4
    assert all(torch.isfinite(part.grad).all() for part in exact)  # type: ignore[arg-type]


def test_what_does_not_fit() -> None:
    features, target = case((9, 7))
    with pytest.raises(ValueError, match=r"labels must be 0 to 3 for 4 features, got 0 to 4"):
        FeatureLabelLoss()(features, {**target, "fixed_label": target["fixed_label"] + 1})
    with pytest.raises(ValueError, match=r"label maps must have shape \(4, 1, 9, 7\) in all, got \(3, 1, 9, 7\)"):
        FeatureLabelLoss()(features, {**target, "fixed_label": target["fixed_label"][:1]})
    with pytest.raises(KeyError, match="other"):
        FeatureLabelLoss(("moving_label", "other"))(features, target)
