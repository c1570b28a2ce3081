# SPDX-License-Identifier: Apache-2.0
"""The similarity inside a mask against NumPy brute force, alone and within the losses of registration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss

from monai_deq.losses import MaskedSimilarityLoss, RegistrationLoss, StatesLoss
from monai_deq.networks.blocks import warp_by_ddf

SIZES = [(6, 9), (4, 7, 5)]


def data(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    warped, fixed = torch.rand(2, 2, 1, *size, dtype=torch.float64, generator=generator)
    mask = (torch.rand(2, 1, *size, generator=generator) > 0.5).double() * 3  # any number above zero is inside
    mask[1, :, 2:] = 0  # a smaller one
    assert 0 < int((mask[1] > 0).sum()) < int((mask[0] > 0).sum())
    return warped, fixed, mask


def masked_lncc_by_hand(warped: np.ndarray, fixed: np.ndarray, mask: np.ndarray, window: int = 5) -> float:
    """Minus the mean squared local correlation of the voxels inside, each window from the whole image."""
    half, n = window // 2, window ** (warped.ndim - 2)
    means = []
    for a, b, inside in zip(warped[:, 0], fixed[:, 0], mask[:, 0] > 0, strict=True):
        a, b = np.pad(a, half), np.pad(b, half)
        values = []
        for corner in itertools.product(*(range(s) for s in inside.shape)):
            if not inside[corner]:
                continue
            box = tuple(slice(c, c + window) for c in corner)
            p, t = a[box].ravel(), b[box].ravel()
            cross = np.sum((p - p.sum() / n) * (t - t.sum() / n))
            p_var, t_var = (max(np.sum((v - v.sum() / n) ** 2), 1e-5) for v in (p, t))
            values.append(cross**2 / (p_var * t_var))
        means.append(np.mean(values))
    return -float(np.mean(means))


@pytest.mark.parametrize("size", SIZES)
def test_against_brute_force(size: tuple[int, ...]) -> None:
    warped, fixed, mask = data(size)
    expected = masked_lncc_by_hand(warped.numpy(), fixed.numpy(), mask.numpy())
    loss = MaskedSimilarityLoss(len(size))
    for m in (mask, mask > 0, mask.to(torch.uint8)):
        value = loss(warped, fixed, m)
        assert value.dtype == torch.float64 and value.shape == ()
        assert value.item() == pytest.approx(expected, rel=1e-9)
    assert loss(warped, warped, mask).item() == pytest.approx(-1.0, abs=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_a_mask_of_everything_is_no_mask(size: tuple[int, ...]) -> None:
    warped, fixed, _ = data(size)
    whole = LocalNormalizedCrossCorrelationLoss(len(size), kernel_size=5)(warped, fixed)
    value = MaskedSimilarityLoss(len(size))(warped, fixed, torch.ones_like(fixed))
    torch.testing.assert_close(value, whole)


@pytest.mark.parametrize("size", SIZES)
def test_only_what_is_inside_counts(size: tuple[int, ...]) -> None:
    warped, fixed, mask = data(size)
    loss = MaskedSimilarityLoss(len(size), torch.nn.MSELoss(reduction="none"))
    expected = np.mean([((w - f)[m > 0] ** 2).mean() for w, f, m in zip(*(t.numpy() for t in data(size)), strict=True)])
    assert loss(warped, fixed, mask).item() == pytest.approx(expected)
    loss(warped.requires_grad_(), fixed, mask).backward()
    assert bool((warped.grad[mask == 0] == 0).all()) and bool((warped.grad[mask > 0] != 0).all())
    beyond = warped.detach().where(mask > 0, float("nan"))
    assert loss(beyond, fixed, mask).item() == pytest.approx(expected)


@pytest.mark.parametrize("size", [(4, 5), (3, 4, 3)])
def test_gradient(size: tuple[int, ...]) -> None:
    warped, fixed, mask = data(size)
    loss = MaskedSimilarityLoss(len(size))
    assert torch.autograd.gradcheck(lambda w: loss(w, fixed, mask), warped.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_inside(dtype: torch.dtype, autocast: bool) -> None:
    warped, fixed, mask = data((6, 9))
    warped, fixed = warped.to(dtype), fixed.to(dtype)
    expected = MaskedSimilarityLoss(2)(warped.double(), fixed.double(), mask).item()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = MaskedSimilarityLoss(2)(warped, fixed, mask.to(dtype))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_bad_masks_are_refused() -> None:
    warped, fixed, mask = data((6, 9))
    loss = MaskedSimilarityLoss(2)
    for other in (mask[:1], mask[:, 0], mask[..., :-1]):
        with pytest.raises(ValueError, match=r"mask must have the shape of fixed, \(2, 1, 6, 9\), got \("):
            loss(warped, fixed, other)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"empty for batch item\(s\) \[1\]"):
        loss(warped, fixed, mask)
    with pytest.raises(ValueError, match='reduction="none"'):
        MaskedSimilarityLoss(2, torch.nn.MSELoss())(warped, fixed, mask + 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_within_the_sum_over_states(size: tuple[int, ...], use_checkpoint: bool) -> None:
    moving, fixed, mask = data(size)
    generator = torch.Generator().manual_seed(8)
    fields = [
        torch.randn(2, len(size), *size, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    ]
    one = RegistrationLoss(len(size), 0.2, similarity=MaskedSimilarityLoss(len(size)))
    loss = StatesLoss(one, 0.5, use_checkpoint=use_checkpoint, mask_key="lung")
    target = {"moving": moving, "fixed": fixed, "lung": mask}
    value = loss((warp_by_ddf(moving, fields[0]), fields[0], fields[1:]), target)

    def by_hand(ddf: torch.Tensor) -> float:
        warped = warp_by_ddf(moving, ddf).detach().numpy()
        return masked_lncc_by_hand(warped, fixed.numpy(), mask.numpy()) + 0.2 * DiffusionLoss()(ddf).item()

    assert value.item() == pytest.approx(sum(w * by_hand(f) for w, f in zip((1, 0.5, 0.5), fields, strict=True)))
    value.backward()
    assert all(bool(f.grad.abs().max() > 0) for f in fields)


def test_target_without_the_mask_is_refused() -> None:
    moving, fixed, mask = data((6, 9))
    ddf = torch.zeros(2, 2, 6, 9, dtype=torch.float64)
    prediction: Any = (moving, ddf, [])
    target = {"moving": moving, "fixed": fixed}
    masked = RegistrationLoss(2, similarity=MaskedSimilarityLoss(2))
    with pytest.raises(KeyError, match="no mask 'lung' in the target"):
        StatesLoss(masked, mask_key="lung")(prediction, target)
    # nothing is masked unasked
    plain = StatesLoss(RegistrationLoss(2))
    assert torch.equal(plain(prediction, {**target, "lung": mask}), plain(prediction, target))
