# SPDX-License-Identifier: Apache-2.0
"""The gradient of a similarity by the displacement: closed form, finite differences, second derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import GlobalMutualInformationLoss, LocalNormalizedCrossCorrelationLoss

from monai_deq.networks.blocks import similarity_gradient, warp_by_ddf

SIZES = [(5, 7), (4, 3, 6)]


def losses(ndim: int) -> list[torch.nn.Module]:
    return [
        torch.nn.MSELoss(),
        LocalNormalizedCrossCorrelationLoss(spatial_dims=ndim, kernel_size=3),
        GlobalMutualInformationLoss(num_bins=6),
    ]


def problem(size: tuple[int, ...], batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images in (0, 1), and displacements that sample between the kinks of linear interpolation."""
    generator = torch.Generator().manual_seed(sum(size))
    moving, fixed = 0.1 + 0.8 * torch.rand(2, batch, 1, *size, dtype=torch.float64, generator=generator)
    whole = torch.randint(-1, 2, (batch, len(size), *size), generator=generator)
    part = 0.2 + 0.6 * torch.rand(whole.shape, dtype=torch.float64, generator=generator)
    return moving, fixed, whole + part


def inside(size: tuple[int, ...], batch: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Displacements that end inside the image: the voxel below, the part of the cell, the displacement itself."""
    rng = np.random.default_rng(1)
    grid = np.broadcast_to(np.indices(size), (batch, len(size), *size))
    below = np.stack([rng.integers(0, n - 1, (batch, *size)) for n in size], axis=1)
    part = rng.uniform(0.05, 0.95, grid.shape)
    return below, part, below + part - grid


@pytest.mark.parametrize("size", [(5, 7), (9, 4), (4, 3, 6)])
def test_closed_form_of_the_squared_error(size: tuple[int, ...]) -> None:
    # I = a x0^2 + b x1 + c x0 x1 (+ d x2): between i and i + 1 the interpolant of x0^2 is i^2 + (2 i + 1) (x0 - i)
    below, part, ddf = inside(size)
    x = below + part
    scales = np.asarray([1.0, -0.5]).reshape(2, *[1] * len(size))  # one image an item
    grid = np.indices(size).astype(float)
    image = 0.02 * grid[0] ** 2 + 0.05 * grid[1] + 0.03 * grid[0] * grid[1] + sum(0.04 * g for g in grid[2:])
    squared = below[:, 0] ** 2 + (2 * below[:, 0] + 1) * part[:, 0]
    warped = scales * (0.02 * squared + 0.05 * x[:, 1] + 0.03 * x[:, 0] * x[:, 1] + sum(0.04 * x[:, 2:].swapaxes(0, 1)))
    slopes = [0.02 * (2 * below[:, 0] + 1) + 0.03 * x[:, 1], 0.05 + 0.03 * x[:, 0]]
    slopes += [np.full_like(x[:, 0], 0.04)] * (len(size) - 2)
    fixed = np.random.default_rng(2).uniform(size=(2, *size))
    expected = np.stack([2 * (warped - fixed) * scales * s for s in slopes], axis=1)

    moving = torch.from_numpy(scales * image)[:, None]
    gradient, at = similarity_gradient(
        torch.nn.MSELoss(), moving, torch.from_numpy(fixed)[:, None], torch.from_numpy(ddf)
    )
    np.testing.assert_allclose(at.detach()[:, 0], warped, rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(3))
def test_items_alone(size: tuple[int, ...], kind: int) -> None:
    loss = losses(len(size))[kind]
    moving, fixed, ddf = problem(size)
    together, warped = similarity_gradient(loss, moving, fixed, ddf)
    for i in range(2):
        one = slice(i, i + 1)
        alone, at = similarity_gradient(loss, moving[one], fixed[one], ddf[one])
        assert alone.abs().max() > 1e-3
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(warped[one], at, rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(3))
def test_finite_differences(size: tuple[int, ...], kind: int) -> None:
    loss = losses(len(size))[kind]
    moving, fixed, ddf = problem(size)
    gradient, _ = similarity_gradient(loss, moving, fixed, ddf)
    count = 2 * int(np.prod(size))
    flat = ddf.flatten()
    for k in range(0, len(flat), 11):
        values = []
        for step in (1e-5, -1e-5):
            moved = flat.clone()
            moved[k] += step
            values.append(float(loss(warp_by_ddf(moving, moved.view_as(ddf)), fixed)))
        slope = count * (values[0] - values[1]) / 2e-5
        assert float(gradient.flatten()[k]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(3))
def test_second_derivatives(size: tuple[int, ...], kind: int) -> None:
    loss = losses(len(size))[kind]
    inputs = [t.requires_grad_() for t in problem(size)]

    def f(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return similarity_gradient(loss, *inputs)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    # the images alone: the displacement at the first step needs no gradient
    ddf = inputs.pop().detach()
    assert torch.autograd.gradcheck(lambda m, x: similarity_gradient(loss, m, x, ddf), inputs, fast_mode=True)


def test_second_derivatives_entry_by_entry() -> None:
    moving, fixed, ddf = problem((3, 4))
    loss = losses(2)[1]
    ddf.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: similarity_gradient(loss, moving, fixed, u)[0], (ddf,))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(size: tuple[int, ...], mode: type) -> None:
    moving, fixed, ddf = problem(size)
    expected, at = similarity_gradient(torch.nn.MSELoss(), moving, fixed, ddf)
    with mode():
        for inputs in ((moving, fixed, ddf), tuple(t.clone() for t in (moving, fixed, ddf))):  # those of the mode too
            gradient, warped = similarity_gradient(torch.nn.MSELoss(), *inputs)
            assert not gradient.requires_grad and not warped.requires_grad
            assert gradient.grad_fn is None
            assert torch.equal(gradient, expected) and torch.equal(warped, at)
            assert not torch.is_grad_enabled()
    assert not ddf.requires_grad and torch.is_grad_enabled()
    # what needs gradients elsewhere is left as it is
    ddf.requires_grad_()
    with torch.no_grad():
        similarity_gradient(torch.nn.MSELoss(), moving.requires_grad_(), fixed, ddf)
    assert ddf.grad is None and moving.grad is None


@pytest.mark.parametrize("kind", range(3))
def test_float32_under_autocast(kind: int) -> None:
    moving, fixed, ddf = (t.float() for t in problem((6, 5)))
    seen = []

    class Seen(torch.nn.Module):
        def forward(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            seen.extend([warped.dtype, fixed.dtype, torch.is_autocast_enabled("cpu")])
            return losses(2)[kind](warped, fixed)

    expected, _ = similarity_gradient(Seen(), moving, fixed, ddf)
    with torch.autocast("cpu", torch.bfloat16):
        gradient, _ = similarity_gradient(Seen(), moving, fixed, ddf)
        rounded, warped = similarity_gradient(Seen(), moving.bfloat16(), fixed.bfloat16(), ddf)
    assert gradient.dtype == rounded.dtype == torch.float32 and warped.dtype == torch.bfloat16
    assert torch.equal(gradient, expected)
    assert seen == [torch.float32, torch.float32, False] * 3
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0.1 * float(expected.detach().abs().max()))


class Blind(torch.nn.Module):
    def forward(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return fixed.mean()


def test_losses_that_do_not_fit() -> None:
    moving, fixed, ddf = problem((4, 5))
    with pytest.raises(ValueError, match=r"MSELoss must give one number .*got shape \(2, 1, 4, 5\)"):
        similarity_gradient(torch.nn.MSELoss(reduction="none"), moving, fixed, ddf)
    with pytest.raises(ValueError, match=r"Blind must give one number .*got shape \(\) without a gradient"):
        similarity_gradient(Blind(), moving, fixed, ddf)
    with pytest.raises(ValueError, match=r"ddf must have shape \(2, 2, 4, 5\)"):
        similarity_gradient(torch.nn.MSELoss(), moving, fixed, ddf[:, :1])
