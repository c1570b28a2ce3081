# SPDX-License-Identifier: Apache-2.0
"""The loss against NumPy brute force, its precision, and its sum over states."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from monai_deq.losses import RegistrationLoss, StatesLoss
from monai_deq.networks.blocks import RegistrationUNet, UNetUpdate, warp_by_ddf
from monai_deq.networks.nets import DEQRegistrationNet

SIZES = [(6, 7), (4, 5, 6)]


def data(size: tuple[int, ...], batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    warped, fixed = torch.rand(2, batch, 1, *size, dtype=torch.float64, generator=generator)
    ddf = 3 * torch.randn(batch, len(size), *size, dtype=torch.float64, generator=generator)
    return warped, fixed, ddf


def lncc_by_hand(warped: np.ndarray, fixed: np.ndarray, window: int = 5) -> float:
    """Minus the mean squared local correlation; zero padding, variances of at least 1e-5 (sums over the window)."""
    half, n = window // 2, window ** (warped.ndim - 2)
    values = []
    for a, b in zip(warped[:, 0], fixed[:, 0], strict=True):
        a, b = np.pad(a, half), np.pad(b, half)
        for corner in itertools.product(*(range(s - 2 * half) for s in a.shape)):
            box = tuple(slice(c, c + window) for c in corner)
            p, t = a[box].ravel(), b[box].ravel()
            cross = np.sum((p - p.sum() / n) * (t - t.sum() / n))
            p_var, t_var = (max(np.sum((v - v.sum() / n) ** 2), 1e-5) for v in (p, t))
            values.append(cross**2 / (p_var * t_var))
    return -float(np.mean(values))


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
    [(0.5, [0.5, 0.5, 0.5]), (0, [0, 0, 0]), ([10 ** (t / 5) for t in range(3)], [1, 10**0.2, 10**0.4])],
    ids=["Eq. 9", "final only", "Eq. 4"],
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


@pytest.mark.parametrize("size", [(6, 5), (4, 5, 3)])
def test_gradient_is_the_sum_of_the_states_gradients(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ndim = len(size)
    backbone = RegistrationUNet(
        ndim, 2 + ndim, encoder_channels=(2, 2), decoder_channels=(2,), final_channels=(2,), flow_std=0.05
    )
    net = DEQRegistrationNet(UNetUpdate(ndim, backbone), max_steps=8, num_states=3, tolerance=0.0).double().train()
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
