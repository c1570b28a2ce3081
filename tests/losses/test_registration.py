# SPDX-License-Identifier: Apache-2.0
"""The loss against NumPy brute force, with and without a mask, its precision, and its sum over states."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss
from nets import deq_net, tiny_update

from monai_deq.losses import MaskedSimilarityLoss, RegistrationLoss, StatesLoss
from monai_deq.networks.blocks import warp_by_ddf

SIZES = [(6, 7), (4, 5, 6)]
MASKED_SIZES = [(6, 9), (4, 7, 5)]


def data(size: tuple[int, ...], batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    warped, fixed = torch.rand(2, batch, 1, *size, dtype=torch.float64, generator=generator)
    ddf = 3 * torch.randn(batch, len(size), *size, dtype=torch.float64, generator=generator)
    return warped, fixed, ddf


def lncc_by_hand(warped: np.ndarray, fixed: np.ndarray, mask: np.ndarray | None = None, window: int = 5) -> float:
    """
    Minus the mean squared local correlation, of the voxels inside where there is a mask; zero padding, variances of at
    least 1e-5 (sums over the window).
    """
    half, n = window // 2, window ** (warped.ndim - 2)
    means = []
    for i, (a, b) in enumerate(zip(warped[:, 0], fixed[:, 0], strict=True)):
        inside = np.ones(a.shape, dtype=bool) if mask is None else mask[i, 0] > 0
        a, b = np.pad(a, half), np.pad(b, half)
        values = []
        for corner in zip(*np.nonzero(inside), strict=True):
            box = tuple(slice(c, c + window) for c in corner)
            p, t = a[box].ravel(), b[box].ravel()
            cross = np.sum((p - p.sum() / n) * (t - t.sum() / n))
            p_var, t_var = (max(np.sum((v - v.sum() / n) ** 2), 1e-5) for v in (p, t))
            values.append(cross**2 / (p_var * t_var))
        means.append(np.mean(values))
    return -float(np.mean(means))


def diffusion_by_hand(ddf: np.ndarray) -> float:
    """Mean over items, components and inner voxels of the squared norm of the gradient, central differences."""
    inner = itertools.product(*(range(1, s - 1) for s in ddf.shape[2:]))
    steps = np.eye(ddf.ndim - 2, dtype=int)
    values = []
    for voxel in inner:
        for u in ddf.reshape(-1, *ddf.shape[2:]):
            slopes = [(u[tuple(voxel + s)] - u[tuple(voxel - s)]) / 2 for s in steps]
            values.append(np.sum(np.square(slopes)))
    return float(np.mean(values))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_against_brute_force(size: tuple[int, ...], weight: float) -> None:
    warped, fixed, ddf = data(size)
    fixed[:, :, :2] = 0.25  # windows without variance
    expected = lncc_by_hand(warped.numpy(), fixed.numpy()) + weight * diffusion_by_hand(ddf.numpy())
    loss = RegistrationLoss(len(size), weight)(warped, fixed, ddf)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_best_value(size: tuple[int, ...]) -> None:
    warped, _, ddf = data(size)
    loss = RegistrationLoss(len(size), weight=1.0)
    # an affine change of intensities correlates perfectly away from the zero padding; a translation is smooth
    assert loss(warped, warped, torch.ones_like(ddf)).item() == pytest.approx(-1.0, abs=1e-9)


def test_defaults_are_the_papers() -> None:
    loss = RegistrationLoss()
    assert loss.weight == 0.1
    warped, fixed, ddf = data((4, 5, 6))
    expected = lncc_by_hand(warped.numpy(), fixed.numpy()) + 0.1 * diffusion_by_hand(ddf.numpy())
    assert loss(warped, fixed, ddf).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_inside(size: tuple[int, ...], dtype: torch.dtype, autocast: bool) -> None:
    warped, fixed, ddf = (t.to(dtype) for t in data(size))
    # the same rounded numbers in full precision
    expected = RegistrationLoss(len(size))(warped.double(), fixed.double(), ddf.double())
    warped.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = RegistrationLoss(len(size))(warped, fixed, ddf)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert warped.grad is not None and bool(warped.grad.isfinite().all())


def test_own_terms() -> None:
    class Mean(torch.nn.Module):
        def forward(self, ddf: torch.Tensor) -> torch.Tensor:
            return ddf.mean()

    warped, fixed, ddf = data((6, 7))
    loss = RegistrationLoss(2, 0.3, similarity=torch.nn.MSELoss(), smoothness=Mean())
    expected = np.mean((warped.numpy() - fixed.numpy()) ** 2) + 0.3 * ddf.numpy().mean()
    assert loss(warped, fixed, ddf).item() == pytest.approx(expected)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="weight must not be negative, got -0.1"):
        RegistrationLoss(weight=-0.1)
    for gamma in (-0.5, [0.1, -0.2]):
        with pytest.raises(ValueError, match="gamma must not be negative"):
            StatesLoss(RegistrationLoss(), gamma=gamma)
    with pytest.raises(ValueError, match="gamma must be numbers or \"exponential\", got 'linear'"):
        StatesLoss(RegistrationLoss(), gamma="linear")
    prediction, target = states_problem((6, 7))
    with pytest.raises(ValueError, match="gamma has 2 weights for 3 intermediate states"):
        StatesLoss(RegistrationLoss(2), gamma=[0.1, 0.2])(prediction, target)
    with pytest.raises(ValueError, match="got 2 parts: is the network in eval mode"):
        StatesLoss(RegistrationLoss(2))(prediction[:2], target)  # type: ignore[arg-type]


def states_problem(size: tuple[int, ...]) -> tuple[Any, dict[str, torch.Tensor]]:
    moving, fixed, _ = data(size)
    generator = torch.Generator().manual_seed(6)
    fields = [
        scale * torch.randn(2, len(size), *size, dtype=torch.float64, generator=generator) for scale in (0.3, 1, 2, 3)
    ]
    ddf = fields.pop()
    return (warp_by_ddf(moving, ddf), ddf, fields), {"moving": moving, "fixed": fixed}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("gamma", "weights"),
    [
        (0.5, [0.5, 0.5, 0.5]),
        (0, [0, 0, 0]),
        ([1, 0.2, 3], [1, 0.2, 3]),
        # w_t = 10^((t - 1) / (T - 1)) of four states, in units of the last one: 10^-1, 10^-2/3, 10^-1/3
        ("exponential", [0.1, 0.21544346900318845, 0.46415888336127786]),
    ],
    ids=["Eq. 9", "final only", "each its own", "Eq. 4"],
)
def test_sum_over_states(size: tuple[int, ...], gamma: Any, weights: list[float]) -> None:
    prediction, target = states_problem(size)
    moving, fixed = target["moving"], target["fixed"]

    def by_hand(ddf: torch.Tensor) -> float:
        warped = warp_by_ddf(moving, ddf).numpy()
        return lncc_by_hand(warped, fixed.numpy()) + 0.2 * diffusion_by_hand(ddf.numpy())

    expected = by_hand(prediction[1]) + sum(w * by_hand(s) for w, s in zip(weights, prediction[2], strict=True))
    loss = StatesLoss(RegistrationLoss(len(size), 0.2), gamma)
    assert loss(prediction, target).item() == pytest.approx(expected, rel=1e-9)
    assert loss.weights(3) == pytest.approx(weights)


def test_without_states() -> None:
    (warped, ddf, _), target = states_problem((6, 7))
    one = RegistrationLoss(2)
    assert torch.equal(StatesLoss(one, 0.5)((warped, ddf, []), target), one(warped, target["fixed"], ddf))
    assert StatesLoss(one).gamma == 0.5


def test_exponential_weights_of_riir() -> None:
    # w_t = 10 ** ((t - 1) / 5) for t = 1 ... 6, over w_6 = 10
    loss = StatesLoss(RegistrationLoss(2), "exponential")
    expected = [0.1, 0.1584893192461114, 0.25118864315095796, 0.3981071705534972, 0.6309573444801932]
    assert loss.weights(5) == pytest.approx(expected, rel=1e-12)
    # whatever the number of states
    assert loss.weights(1) == [0.1] and loss.weights(2) == pytest.approx([0.1, 10**-0.5]) and loss.weights(0) == []


@pytest.mark.parametrize("size", [(6, 5), (4, 5, 3)])
def test_gradient_is_the_sum_of_the_states_gradients(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ndim = len(size)
    net = deq_net(tiny_update(ndim), max_steps=8, num_states=3, tolerance=0.0).double().train()
    moving, fixed, _ = data(size)
    one = RegistrationLoss(ndim, 0.2)

    def gradient(term: Any) -> torch.Tensor:
        net.zero_grad()
        term(net(moving, fixed)).backward()
        return torch.cat([p.grad.flatten().clone() for p in net.parameters() if p.grad is not None])

    whole = gradient(lambda out: StatesLoss(one, [0.5, 0.25, 0.125])(out, {"moving": moving, "fixed": fixed}))
    parts = gradient(lambda out: one(out[0], fixed, out[1]))
    for i, weight in enumerate((0.5, 0.25, 0.125)):
        part = gradient(lambda out, i=i: one(warp_by_ddf(moving, out[2][i]), fixed, out[2][i]))
        assert bool(part.abs().max() > 1e-6)
        parts = parts + weight * part
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-14)


# --- inside a mask ----------------------------------------------------------------------------------------------------


def masked_data(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    warped, fixed = torch.rand(2, 2, 1, *size, dtype=torch.float64, generator=generator)
    mask = (torch.rand(2, 1, *size, generator=generator) > 0.5).double() * 3  # any number above zero is inside
    mask[1, :, 2:] = 0  # a smaller one
    assert 0 < int((mask[1] > 0).sum()) < int((mask[0] > 0).sum())
    return warped, fixed, mask


@pytest.mark.parametrize("size", MASKED_SIZES)
def test_masked_similarity_against_brute_force(size: tuple[int, ...]) -> None:
    warped, fixed, mask = masked_data(size)
    expected = lncc_by_hand(warped.numpy(), fixed.numpy(), mask.numpy())
    loss = MaskedSimilarityLoss(len(size))
    for m in (mask, mask > 0, mask.to(torch.uint8)):
        value = loss(warped, fixed, m)
        assert value.dtype == torch.float64 and value.shape == ()
        assert value.item() == pytest.approx(expected, rel=1e-9)
    assert loss(warped, warped, mask).item() == pytest.approx(-1.0, abs=1e-9)


@pytest.mark.parametrize("size", MASKED_SIZES)
def test_a_mask_of_everything_is_no_mask(size: tuple[int, ...]) -> None:
    warped, fixed, _ = masked_data(size)
    whole = LocalNormalizedCrossCorrelationLoss(len(size), kernel_size=5)(warped, fixed)
    value = MaskedSimilarityLoss(len(size))(warped, fixed, torch.ones_like(fixed))
    torch.testing.assert_close(value, whole)


@pytest.mark.parametrize("size", MASKED_SIZES)
def test_only_what_is_inside_counts(size: tuple[int, ...]) -> None:
    warped, fixed, mask = masked_data(size)
    loss = MaskedSimilarityLoss(len(size), torch.nn.MSELoss(reduction="none"))
    expected = np.mean(
        [((w - f)[m > 0] ** 2).mean() for w, f, m in zip(*(t.numpy() for t in masked_data(size)), strict=True)]
    )
    assert loss(warped, fixed, mask).item() == pytest.approx(expected)
    loss(warped.requires_grad_(), fixed, mask).backward()
    assert bool((warped.grad[mask == 0] == 0).all()) and bool((warped.grad[mask > 0] != 0).all())
    beyond = warped.detach().where(mask > 0, float("nan"))
    assert loss(beyond, fixed, mask).item() == pytest.approx(expected)


@pytest.mark.parametrize("size", [(4, 5), (3, 4, 3)])
def test_gradient_of_the_masked_similarity(size: tuple[int, ...]) -> None:
    warped, fixed, mask = masked_data(size)
    loss = MaskedSimilarityLoss(len(size))
    assert torch.autograd.gradcheck(lambda w: loss(w, fixed, mask), warped.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_masked_similarity_is_float32_inside(dtype: torch.dtype, autocast: bool) -> None:
    warped, fixed, mask = masked_data((6, 9))
    warped, fixed = warped.to(dtype), fixed.to(dtype)
    expected = MaskedSimilarityLoss(2)(warped.double(), fixed.double(), mask).item()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = MaskedSimilarityLoss(2)(warped, fixed, mask.to(dtype))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_bad_masks_are_refused() -> None:
    warped, fixed, mask = masked_data((6, 9))
    loss = MaskedSimilarityLoss(2)
    for other in (mask[:1], mask[:, 0], mask[..., :-1]):
        with pytest.raises(ValueError, match=r"mask must have the shape of fixed, \(2, 1, 6, 9\), got \("):
            loss(warped, fixed, other)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"empty for batch item\(s\) \[1\]"):
        loss(warped, fixed, mask)
    with pytest.raises(ValueError, match='reduction="none"'):
        MaskedSimilarityLoss(2, torch.nn.MSELoss())(warped, fixed, mask + 1)


@pytest.mark.parametrize("size", MASKED_SIZES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_masked_similarity_within_the_sum_over_states(size: tuple[int, ...], checkpointed: bool) -> None:
    moving, fixed, mask = masked_data(size)
    generator = torch.Generator().manual_seed(8)
    fields = [
        torch.randn(2, len(size), *size, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    ]
    one = RegistrationLoss(len(size), 0.2, similarity=MaskedSimilarityLoss(len(size)))
    loss = StatesLoss(one, 0.5, checkpointed=checkpointed, mask_key="lung")
    target = {"moving": moving, "fixed": fixed, "lung": mask}
    value = loss((warp_by_ddf(moving, fields[0]), fields[0], fields[1:]), target)

    def by_hand(ddf: torch.Tensor) -> float:
        warped = warp_by_ddf(moving, ddf).detach().numpy()
        return lncc_by_hand(warped, fixed.numpy(), mask.numpy()) + 0.2 * DiffusionLoss()(ddf).item()

    assert value.item() == pytest.approx(sum(w * by_hand(f) for w, f in zip((1, 0.5, 0.5), fields, strict=True)))
    value.backward()
    assert all(bool(f.grad.abs().max() > 0) for f in fields)


def test_target_without_the_mask_is_refused() -> None:
    moving, fixed, mask = masked_data((6, 9))
    ddf = torch.zeros(2, 2, 6, 9, dtype=torch.float64)
    prediction: Any = (moving, ddf, [])
    target = {"moving": moving, "fixed": fixed}
    masked = RegistrationLoss(2, similarity=MaskedSimilarityLoss(2))
    with pytest.raises(KeyError, match="no mask 'lung' in the target"):
        StatesLoss(masked, mask_key="lung")(prediction, target)
    # nothing is masked unasked
    plain = StatesLoss(RegistrationLoss(2))
    assert torch.equal(plain(prediction, {**target, "lung": mask}), plain(prediction, target))


@pytest.mark.parametrize("size", MASKED_SIZES)
def test_default_similarity_inside_a_mask(size: tuple[int, ...]) -> None:
    moving, fixed, mask = masked_data(size)
    ddf = torch.zeros(2, len(size), *size, dtype=torch.float64)
    loss = RegistrationLoss(len(size), masked=True)
    expected = lncc_by_hand(moving.numpy(), fixed.numpy(), mask.numpy())
    assert loss(moving, fixed, ddf, mask).item() == pytest.approx(expected, rel=1e-9)
