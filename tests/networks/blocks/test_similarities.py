# SPDX-License-Identifier: Apache-2.0
"""Similarities against loops over windows, MONAI's losses and finite differences, of first and second order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import GlobalMutualInformationLoss, LocalNormalizedCrossCorrelationLoss
from nets import pair

from monai_deq.networks.blocks import FeatureLoss, LocalCorrelationLoss
from monai_deq.networks.blocks.similarities import similarity_and_gradient

SIZES = [(8, 11), (5, 7, 6)]


def foreign(ndim: int) -> list[torch.nn.Module]:
    return [
        torch.nn.MSELoss(),
        LocalNormalizedCrossCorrelationLoss(spatial_dims=ndim, kernel_size=3),
        GlobalMutualInformationLoss(num_bins=6),
    ]


class MaskedSquare(torch.nn.Module):
    """Learnable, with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, warped: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        square = (self.scale * warped - fixed) ** 2
        return (square if mask is None else square * mask).mean()


def standardised(image: np.ndarray) -> np.ndarray:
    return (image - image.mean()) / image.std()


def correlation_by_hand(
    warped: np.ndarray, fixed: np.ndarray, width: int, floor: float, inside: np.ndarray | None = None
) -> float:
    """Loop over the voxels of one pair, windows cut at the border."""
    p, t = standardised(warped), standardised(fixed)
    radius, total = width // 2, 0.0
    for place in np.ndindex(*p.shape):
        if inside is not None and not inside[place]:
            continue
        window = tuple(slice(max(i - radius, 0), i + radius + 1) for i in place)
        a, b = p[window], t[window]
        cross = np.mean((a - a.mean()) * (b - b.mean()))
        if b.std() >= floor / 2:
            total += cross**2 / (max(a.var(), min(b.var(), floor**2)) * max(b.var(), floor**2))
    return -total / p.size


def flat_parts(size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose left and whose upper part have little contrast, some parts none."""
    moving, fixed = pair(size, dtype=dtype)
    for image, axis, value in ((moving, -1, 0.3), (fixed, 2, 0.2)):
        part = image.movedim(axis, 0)[: image.shape[axis] // 2 + 1]
        # of a standard deviation around 3e-3 of the image's, from voxel to voxel
        part.copy_(value + part * torch.logspace(-4, -2, part[0].numel(), dtype=dtype).view(part[0].shape))
    fixed[0, 0, :3, :3] = 0.2
    return moving, fixed


# --- LocalCorrelationLoss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("width", "floor"), [(3, 3e-3), (5, 3e-3), (7, 0.2)])
@pytest.mark.parametrize("size", SIZES)
def test_value_by_hand(size: tuple[int, ...], width: int, floor: float, masked: bool) -> None:
    loss = LocalCorrelationLoss(width, floor)
    for moving, fixed in (pair(size, dtype=torch.float64), flat_parts(size)):
        mask = (pair(size, seed=1)[0] > 0.4).double() if masked else None
        expected = [
            correlation_by_hand(m, f, width, floor, None if mask is None else mask[i, 0].numpy())
            for i, (m, f) in enumerate(zip(moving[:, 0].numpy(), fixed[:, 0].numpy(), strict=True))
        ]
        assert float(loss(moving, fixed, mask)) == pytest.approx(np.mean(expected), rel=1e-9)
        image, similarity = similarity_and_gradient(loss, moving, fixed, mask)
        np.testing.assert_allclose(similarity(image)[0], expected, rtol=1e-9)
        assert min(expected) > -1 and max(expected) < 0


@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize("size", [(13, 11), (9, 11, 10)])
def test_away_from_the_border_it_is_that_of_monai(size: tuple[int, ...], width: int) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    theirs = LocalNormalizedCrossCorrelationLoss(len(size), width, reduction="none", smooth_nr=0, smooth_dr=1e-12)
    mask = torch.zeros_like(fixed)
    mask[(..., *(slice(width // 2, n - width // 2) for n in size))] = 1
    expected = (theirs(moving, fixed) * mask).mean()
    torch.testing.assert_close(LocalCorrelationLoss(width)(moving, fixed, mask), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize("size", [(8, 11), (5, 4, 6)])
def test_gradient_in_closed_form(size: tuple[int, ...], width: int, masked: bool) -> None:
    loss = LocalCorrelationLoss(width)
    for moving, fixed in (pair(size, dtype=torch.float64), flat_parts(size)):
        mask = (pair(size, seed=1)[0] > 0.4).double() if masked else None
        image, similarity = similarity_and_gradient(loss, moving, fixed, mask)
        value, gradient = similarity(image)
        slot = image.clone().requires_grad_()
        (automatic,) = torch.autograd.grad(similarity(slot)[0].sum(), slot)
        scale = float(automatic.abs().max())
        torch.testing.assert_close(gradient / image[0].numel(), automatic, rtol=0, atol=1e-9 * scale)
        # one item does not see the other
        alone = similarity_and_gradient(loss, moving[1:], fixed[1:], None if mask is None else mask[1:])
        torch.testing.assert_close(alone[1](alone[0])[1], gradient[1:], rtol=1e-9, atol=1e-9 * scale)
        assert float(value[1]) == pytest.approx(float(alone[1](alone[0])[0]))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_gradient_by_finite_differences(size: tuple[int, ...], flat: bool) -> None:
    moving, fixed = flat_parts(size) if flat else pair(size, dtype=torch.float64)
    image, similarity = similarity_and_gradient(LocalCorrelationLoss(5), moving, fixed)
    gradient = similarity(image)[1] / image[0].numel()
    count, step = image[0].numel(), 1e-7
    for index in range(0, count, 7):
        difference = torch.zeros_like(image)
        difference.view(2, -1)[:, index] = step
        slope = (similarity(image + difference)[0] - similarity(image - difference)[0]) / (2 * step)
        torch.testing.assert_close(gradient.view(2, -1)[:, index], slope, rtol=1e-4, atol=1e-7)


def test_brightness_and_contrast_do_not_matter() -> None:
    moving, fixed = pair((12, 9), dtype=torch.float64)
    loss = LocalCorrelationLoss()
    expected = loss(moving, fixed)
    for scale, offset in ((0.01, 0.0), (300.0, -70.0), (-2.0, 5.0)):
        torch.testing.assert_close(loss(scale * moving + offset, fixed), expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(loss(moving, scale * fixed + offset), expected, rtol=1e-9, atol=0)
    assert float(loss(fixed, fixed)) == pytest.approx(-1)


@pytest.mark.parametrize("value", [0.0, 0.3, 1000.1])
def test_images_without_contrast(value: float) -> None:
    moving, _ = pair((9, 8))
    constant = torch.full_like(moving, value)
    for a, b in ((moving, constant), (constant, moving), (constant, constant)):
        image, similarity = similarity_and_gradient(LocalCorrelationLoss(), a, b)
        for t in similarity(image):
            assert not t.any() and bool(t.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [*SIZES, (31, 26)])
def test_equal_images_have_no_gradient_at_all(size: tuple[int, ...], dtype: torch.dtype) -> None:
    # neither where there is contrast, nor noise, nor nothing
    for moving in (pair(size, dtype=dtype)[0], *flat_parts(size, dtype)):
        image, similarity = similarity_and_gradient(LocalCorrelationLoss(), moving, moving.clone())
        value, gradient = similarity(image)
        assert not gradient.any()
        assert bool((value < -0.3).all()) and bool((value > -1 - 1e-5).all())


def test_wrong_arguments() -> None:
    for width in (0, 1, 4, 6.5, -3):
        with pytest.raises(ValueError, match=f"kernel_size must be an odd number of at least 3, got {width}"):
            LocalCorrelationLoss(width)  # type: ignore[arg-type]
    for floor in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"smallest_deviation must be above zero, got {floor}"):
            LocalCorrelationLoss(smallest_deviation=floor)


# --- any loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_other_losses(size: tuple[int, ...], kind: int) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    loss = foreign(len(size))[kind]
    image, similarity = similarity_and_gradient(loss, moving, fixed)
    assert image is moving
    with torch.no_grad():
        value, gradient = similarity(image)
        # item by item, and the gradient times the number of voxels
        expected = torch.stack([loss(moving[i : i + 1], fixed[i : i + 1]).reshape(()) for i in range(2)])
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        generator, step = torch.Generator().manual_seed(3), 1e-6
        for _ in range(4):
            way = torch.randn(image.shape, dtype=torch.float64, generator=generator)
            slope = (similarity(image + step * way)[0] - similarity(image - step * way)[0]) / (2 * step)
            product = (gradient * way).flatten(1).mean(dim=1)
            torch.testing.assert_close(product, slope, rtol=1e-5, atol=1e-9)
    assert not gradient.requires_grad and not value.requires_grad


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("size", [(4, 5), (3, 4, 3)])
def test_second_order(size: tuple[int, ...], kind: int) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    loss = [LocalCorrelationLoss(3), *foreign(len(size))][kind]
    image, similarity = similarity_and_gradient(loss, moving, fixed)
    assert torch.autograd.gradcheck(similarity, image.clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_by_a_parameter(masked: bool) -> None:
    moving, fixed = pair((5, 4), dtype=torch.float64)
    mask = (pair((5, 4), seed=1)[0] > 0.4).double() if masked else None
    loss = MaskedSquare()
    image, similarity = similarity_and_gradient(loss, moving, fixed, mask)
    value, gradient = similarity(image)
    weight = torch.ones_like(fixed) if mask is None else mask
    s, residual = 1.3, 1.3 * moving - fixed
    torch.testing.assert_close(gradient, 2 * s * residual * weight)
    (slope,) = torch.autograd.grad(gradient.sum(), loss.scale, retain_graph=True)
    # d/ds 2 s (s m - f) = 2 (s m - f) + 2 s m
    torch.testing.assert_close(slope, ((2 * residual + 2 * s * moving) * weight).sum())
    (slope,) = torch.autograd.grad(value.sum(), loss.scale)
    torch.testing.assert_close(slope, (2 * residual * moving * weight).flatten(1).mean(1).sum())


@pytest.mark.parametrize("kind", range(4))
def test_inference_mode(kind: int) -> None:
    moving, fixed = pair((9, 8), dtype=torch.float64)
    loss = [LocalCorrelationLoss(3), *foreign(2)][kind]
    image, similarity = similarity_and_gradient(loss, moving, fixed)
    expected = [t.detach() for t in similarity(image)]
    with torch.inference_mode():
        image, similarity = similarity_and_gradient(loss, moving.clone(), fixed.clone())
        for value, other in zip(similarity(image.clone()), expected, strict=True):
            torch.testing.assert_close(value.clone(), other, rtol=1e-12, atol=1e-15)


class Blind(torch.nn.Module):
    def forward(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return fixed.mean()


def test_losses_that_are_of_no_use() -> None:
    moving, fixed = pair((5, 4), dtype=torch.float64)
    image, similarity = similarity_and_gradient(Blind(), moving, fixed)
    with pytest.raises(ValueError, match=r"Blind must give one number .*got shape \(\) without a gradient"):
        similarity(image)
    image, similarity = similarity_and_gradient(torch.nn.MSELoss(reduction="none"), moving, fixed)
    with pytest.raises(ValueError, match=r"MSELoss must give one number .*got shape \(1, 1, 5, 4\)\."):
        similarity(image)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_features_beside_the_image(size: tuple[int, ...], masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    moving, fixed = torch.rand(2, 2, 4, *size, dtype=torch.float64, generator=generator)
    mask = (torch.rand(2, 1, *size, generator=generator) < 0.6) if masked else None
    loss = FeatureLoss(0.7)
    image, similarity = similarity_and_gradient(loss, moving, fixed, mask)
    value, gradient = similarity(image)
    inside = np.ones((2, 1, *size)) if mask is None else mask.numpy()
    for i in range(2):
        own = None if mask is None else mask[i : i + 1].double()
        of_image = LocalCorrelationLoss()(moving[i : i + 1, :1], fixed[i : i + 1, :1], own).item()
        apart = ((moving[i, 1:] - fixed[i, 1:]).numpy() ** 2 * inside[i]).sum() / np.prod(size)
        assert value[i].item() == pytest.approx(of_image + 0.7 * apart, rel=1e-10)
    assert loss(moving, fixed, mask).item() == pytest.approx(value.mean().item(), rel=1e-10)
    # by finite differences, at one voxel of each channel
    for channel in range(4):
        at = (1, channel, *(n // 2 for n in size))
        more, less = image.clone(), image.clone()
        more[at] += 1e-5
        less[at] -= 1e-5
        slope = (similarity(more)[0] - similarity(less)[0])[1].item() / 2e-5 * np.prod(size)
        assert gradient[at].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
    with pytest.raises(ValueError, match="weight must not be negative"):
        FeatureLoss(-1.0)
