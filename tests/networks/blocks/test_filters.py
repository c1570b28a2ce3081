# SPDX-License-Identifier: Apache-2.0
"""The filters against scipy and NumPy, whole and slab by slab, and their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_deq.networks.blocks import box_sum, central_difference, filters, gaussian_smooth

SHAPES = [(2, 3, 9, 7), (1, 1, 8, 5), (2, 1, 5, 6, 7), (1, 2, 1, 4, 3), (2, 1, 6, 1)]
#: so small that each slab is one voxel thick
SLABS = [None, 1, 40]


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def set_slab(monkeypatch: pytest.MonkeyPatch, slab: int | None) -> None:
    if slab is not None:
        monkeypatch.setattr(filters, "_SLAB", slab)


def sum_by_hand(x: np.ndarray, radius: int) -> np.ndarray:
    """Sum over all shifts of the window of the image with zeros around."""
    ndim = x.ndim - 2
    padded = np.pad(x, [(0, 0), (0, 0), *[(radius, radius)] * ndim])
    out = np.zeros_like(x)
    for shift in np.ndindex(*[2 * radius + 1] * ndim):
        out += padded[(..., *(slice(s, s + n) for s, n in zip(shift, x.shape[2:], strict=True)))]
    return out


def gaussian_by_hand(x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    for axis, sigma in enumerate(sigmas, start=2):
        if sigma:
            offsets = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
            weights = np.exp(-0.5 * (offsets / sigma) ** 2)
            x = ndimage.convolve1d(x, weights / weights.sum(), axis=axis, mode="constant")
    return x


@pytest.mark.parametrize("slab", SLABS)
@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5, 11])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_over_windows(
    shape: tuple[int, ...], radius: int, slab: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slab(monkeypatch, slab)
    x = image(shape)
    if radius <= 3:
        expected = sum_by_hand(x.numpy(), radius)
    else:
        size = 2 * radius + 1
        expected = ndimage.uniform_filter(x.numpy(), (1, 1, *[size] * (x.ndim - 2)), mode="constant")
        expected = expected * size ** (x.ndim - 2)
    before = x.clone()
    np.testing.assert_allclose(box_sum(x, radius), expected, rtol=0, atol=1e-10)
    assert torch.equal(x, before)
    # with gradients there are no slabs
    np.testing.assert_allclose(box_sum(x.requires_grad_(), radius).detach(), expected, rtol=0, atol=1e-10)


def test_sums_of_whole_numbers_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    x = image((1, 2, 30, 21), torch.float32).mul(5).round()
    whole = box_sum(x, 4)
    assert whole.dtype == torch.float32
    np.testing.assert_array_equal(whole, sum_by_hand(x.double().numpy(), 4))
    for slab in (1, 100, 300):
        monkeypatch.setattr(filters, "_SLAB", slab)
        assert torch.equal(box_sum(x, 4), whole)


@pytest.mark.parametrize("slab", SLABS)
@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.5, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian(shape: tuple[int, ...], sigma: float, slab: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_slab(monkeypatch, slab)
    x = image(shape)
    before, ndim = x.clone(), x.ndim - 2
    expected = gaussian_by_hand(x.numpy(), [sigma] * ndim)
    np.testing.assert_allclose(gaussian_smooth(x, sigma), expected, rtol=0, atol=1e-13)
    sigmas = [sigma, 0.7, 2.0][:ndim]
    expected = gaussian_by_hand(x.numpy(), sigmas)
    np.testing.assert_allclose(gaussian_smooth(x, sigmas), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(gaussian_smooth(x.requires_grad_(), tuple(sigmas)).detach(), expected, atol=1e-13)
    assert torch.equal(x.detach(), before)


def test_gaussian_keeps_the_sum_inside() -> None:
    x = torch.zeros(1, 1, 31, 29, dtype=torch.float64)
    x[..., 15, 14] = 2.0
    smooth = gaussian_smooth(x, [2.0, 1.0])[0, 0]
    assert float(smooth.sum()) == pytest.approx(2)
    # standard deviations, a little less by the cut at three of them
    for axis, sigma in enumerate((2.0, 1.0)):
        profile = smooth.sum(1 - axis)
        offsets = torch.arange(len(profile)) - len(profile) // 2
        assert float((profile * offsets**2).sum() / 2) ** 0.5 == pytest.approx(sigma, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_differences(shape: tuple[int, ...]) -> None:
    x = image(shape)
    for axis in range(x.ndim - 2):
        one = shape[axis + 2] == 1
        expected = np.zeros(shape) if one else np.gradient(x.numpy(), axis=axis + 2)
        np.testing.assert_allclose(central_difference(x, axis), expected, rtol=0, atol=1e-14)


def test_gradients() -> None:
    for shape in ((2, 1, 4, 3), (1, 2, 3, 1, 4)):
        x = image(shape).requires_grad_()
        for radius in (1, 3):
            assert torch.autograd.gradcheck(lambda t, radius=radius: box_sum(t, radius), x)
        assert torch.autograd.gradcheck(lambda t: gaussian_smooth(t, [0.8, 0.0, 1.1][: t.ndim - 2]), x)
        assert torch.autograd.gradcheck(lambda t: central_difference(t, 0), x)
