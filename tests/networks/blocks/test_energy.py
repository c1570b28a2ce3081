# SPDX-License-Identifier: Apache-2.0
"""The step down the energy: value, slope and direction against finite differences, length, where it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import BendingEnergyLoss, DiffusionLoss
from nets import deq_net, pair
from torch.func import functional_call

from monai_deq.networks.blocks import EnergyUpdate, LocalCorrelationLoss, gaussian_smooth, warp_by_ddf
from monai_deq.networks.nets import UnrolledRegistrationNet
from monai_deq.solvers import random_smooth_ddf
from monai_deq.transforms import FixedPointSolver

SIZES = [(9, 8), (6, 7, 6)]
SPACINGS = {2: (2.0, 0.7), 3: (0.5, 1.5, 1.0)}


def smooth_pair(size: tuple[int, ...], batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    moving, fixed = (gaussian_smooth(t, 1.0) for t in pair(size, batch, torch.float64))
    return moving, fixed


def field(size: tuple[int, ...], rms: float = 0.8, batch: int = 2) -> torch.Tensor:
    return random_smooth_ddf((batch, len(size), *size), rms, 1.5, seed=5, dtype=torch.float64)


def nothing(update: EnergyUpdate, size: tuple[int, ...], batch: int = 2, dtype: Any = torch.float64) -> torch.Tensor:
    return torch.zeros(batch, update.hidden_channels, *size, dtype=dtype)


def step(
    update: EnergyUpdate, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Delta of the first step, the smoothed gradient G and the energy."""
    with torch.no_grad():
        delta, hidden = update(moving, fixed, ddf, nothing(update, tuple(ddf.shape[2:]), len(ddf), ddf.dtype), **kwargs)
    # an average over the steps to which the first one gives a tenth
    return delta, 10 * hidden[:, : ddf.shape[1]], update.measured(hidden)[0]


def diffusion_by_hand(ddf: torch.Tensor, spacing: tuple[float, ...]) -> torch.Tensor:
    """Mean over voxels and components of the squared differences, summed over the axes."""
    u = ddf.numpy() * np.reshape(spacing, (-1, *[1] * len(spacing)))
    total = sum((np.diff(u, axis=2 + axis) ** 2).reshape(len(u), -1).sum(1) / h**2 for axis, h in enumerate(spacing))
    return torch.as_tensor(total / u[0].size)


class NoSimilarity(torch.nn.Module):
    def forward(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return 0 * warped.sum()


class ScaledSquare(torch.nn.Module):
    """A similarity with something to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.2, dtype=torch.float64))

    def forward(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return (warped - self.scale * fixed).square().mean()


def similarity_by_hand(kind: str, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Of each item; the correlation of the warped image with the mean and deviation that it had unwarped."""
    if kind == "square":
        return (warped - fixed).square().flatten(1).mean(1)
    loss = LocalCorrelationLoss(5)
    return torch.stack([loss(w, f) for w, f in zip(warped.split(1), fixed.split(1), strict=True)])


def smoothnesses(ndim: int) -> list[torch.nn.Module | None]:
    return [None, DiffusionLoss(), BendingEnergyLoss()]


# --- the energy and its slope -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_value_of_the_energy(size: tuple[int, ...], spaced: bool) -> None:
    moving, fixed = smooth_pair(size)
    ddf, spacing = field(size), SPACINGS[len(size)] if spaced else (1.0,) * len(size)
    update = EnergyUpdate(len(size), torch.nn.MSELoss(), 0.7, spacing=spacing if spaced else None)
    expected = similarity_by_hand("square", warp_by_ddf(moving, ddf), fixed) + 0.7 * diffusion_by_hand(ddf, spacing)
    torch.testing.assert_close(step(update, moving, fixed, ddf)[2], expected, rtol=1e-12, atol=0)
    update = EnergyUpdate(len(size), torch.nn.MSELoss(), weight=0)
    expected = similarity_by_hand("square", warp_by_ddf(moving, ddf), fixed)
    torch.testing.assert_close(step(update, moving, fixed, ddf)[2], expected, rtol=1e-12, atol=0)
    for smoothness in smoothnesses(len(size))[1:]:
        update = EnergyUpdate(len(size), torch.nn.MSELoss(), 0.7, smoothness)
        extra = torch.stack([smoothness(item) for item in ddf.split(1)])  # type: ignore[misc]
        torch.testing.assert_close(step(update, moving, fixed, ddf)[2], expected + 0.7 * extra, rtol=1e-9, atol=0)


def energy_after(
    update: EnergyUpdate, kind: str, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The energy after a displacement in voxels on the inside: ``phi o (id + v)``."""
    spacing, warped = tuple(update.spacing or [1.0] * update.spatial_dims), warp_by_ddf(moving, ddf)

    def energy(v: torch.Tensor) -> torch.Tensor:
        inside = v + warp_by_ddf(ddf, v)
        if update.smoothness is None:
            rough = diffusion_by_hand(inside, spacing)
        else:
            rough = torch.stack([update.smoothness(item) for item in inside.split(1)])
        value = 0.0 if kind == "none" else similarity_by_hand(kind, warp_by_ddf(warped, v), fixed)
        return value + update.weight * rough

    return energy


# MONAI indexes with lists
@pytest.mark.filterwarnings("ignore:Using a non-tuple")
@pytest.mark.parametrize("smooth", range(3))
@pytest.mark.parametrize("kind", ["square", "none"])
@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_slope_by_finite_differences(size: tuple[int, ...], spaced: bool, kind: str, smooth: int) -> None:
    # linear interpolation has a kink at the voxels, whose two slopes a symmetric difference averages as the step does
    moving, fixed = smooth_pair(size)
    ddf, ndim = field(size), len(size)
    similarity = torch.nn.MSELoss() if kind == "square" else NoSimilarity()
    spacing = SPACINGS[ndim] if spaced else None
    update = EnergyUpdate(ndim, similarity, 0.7, smoothnesses(ndim)[smooth], sigma=0, spacing=spacing)
    _, gradient, value = step(update, moving, fixed, ddf)
    energy = energy_after(update, kind, moving, fixed, ddf)
    torch.testing.assert_close(energy(torch.zeros_like(ddf)), value, rtol=1e-9, atol=1e-15)
    # per unit of the spacing
    unit = torch.tensor(spacing or [1.0] * ndim, dtype=torch.float64)
    generator, h, checked = torch.Generator().manual_seed(1), 1e-7, 0
    inner = (..., *(slice(1, -1) for _ in size))
    voxels = torch.cartesian_prod(*[torch.arange(1, n - 1) for n in size])
    for place in voxels[torch.randperm(len(voxels), generator=generator)[:6]].tolist():
        for axis in range(ndim):
            v = torch.zeros_like(ddf)
            v[:, axis][(slice(None), *place)] = h
            slope = (energy(v) - energy(-v)) / (2 * h) * ddf[0, 0].numel() / unit[axis]
            torch.testing.assert_close(gradient[:, axis][(slice(None), *place)], slope, rtol=1e-4, atol=1e-6)
            checked += 1
    assert checked == 6 * ndim and gradient[inner].abs().max() > 1e-3


@pytest.mark.parametrize("size", [(17, 15), (11, 12, 10)])
@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("kind", ["square", "correlation"])
def test_smoothed_slope_points_uphill(size: tuple[int, ...], spaced: bool, kind: str) -> None:
    moving, fixed = smooth_pair(size)
    ddf, ndim = field(size), len(size)
    similarity = torch.nn.MSELoss() if kind == "square" else LocalCorrelationLoss(5)
    spacing = SPACINGS[ndim] if spaced else None
    update = EnergyUpdate(ndim, similarity, 0.4, spacing=spacing)
    _, smooth, _ = step(update, moving, fixed, ddf)
    update.sigma = 0.0
    _, raw, _ = step(update, moving, fixed, ddf)
    sigmas = [1.5 / s for s in spacing or [1.0] * ndim]
    torch.testing.assert_close(smooth, gaussian_smooth(raw, sigmas), rtol=1e-9, atol=1e-11)
    # along -G the energy falls, item by item, by about what the slope says: <raw, G> of a mean
    energy = energy_after(update, kind, moving, fixed, ddf)
    unit = torch.tensor(spacing or [1.0] * ndim, dtype=torch.float64).view(1, -1, *[1] * ndim)
    h = 1e-3 / float(smooth.abs().max())
    before, after, other = (energy(k * h * smooth / unit) for k in (0, -1, 1))
    predicted = -(raw * smooth).flatten(1).sum(1) / ddf[0, 0].numel()
    assert bool((predicted < 0).all())
    torch.testing.assert_close((after - other) / (2 * h), predicted, rtol=0.2, atol=0)
    # at the kink of linear interpolation, a mean, it falls by more
    share = (after - before) / h / predicted
    assert bool((share > 0.8).all()) and bool((share < 1.45).all())


@pytest.mark.parametrize("size", SIZES)
def test_mask_of_the_similarity(size: tuple[int, ...]) -> None:
    moving, fixed = smooth_pair(size)
    mask = torch.zeros_like(fixed)
    mask[:, :, : size[0] // 2] = 1
    ddf = torch.zeros_like(field(size))
    update = EnergyUpdate(len(size), LocalCorrelationLoss(3), sigma=0)
    delta, gradient, value = step(update, moving, fixed, ddf, mask=mask)
    expected = torch.stack([LocalCorrelationLoss(3)(*(t[i : i + 1] for t in (moving, fixed, mask))) for i in range(2)])
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    # a window and a difference beyond the mask nothing pulls
    outside = gradient[:, :, size[0] // 2 + 1 :]
    assert not outside.any() and gradient.abs().max() > 0.1
    assert bool((delta[:, :, : size[0] // 2] != 0).any())


# --- the step ---------------------------------------------------------------------------------------------------------


def adam_by_hand(gradients: list[np.ndarray], length: float) -> np.ndarray:
    """Last step in the unit of the spacing, of gradients ``(B, ndim, *spatial)`` one after the other."""
    m = np.mean([0.0], keepdims=True)
    s = np.mean([0.0], keepdims=True)
    for g in gradients:
        m = 0.9 * m + 0.1 * g
        s = 0.99 * s + 0.01 * (g**2).mean(1, keepdims=True)
    k = len(gradients)
    axes = tuple(range(1, s.ndim))
    scale = (s + 0.09 * s.mean(axis=axes, keepdims=True)) / (1 - 0.99**k)
    v = -length * (m / (1 - 0.9**k)) / np.sqrt(scale)
    return v * length / np.maximum(np.sqrt((v**2).sum(1, keepdims=True)), length)


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_steps_by_hand(size: tuple[int, ...], spaced: bool) -> None:
    moving, fixed = smooth_pair(size)
    ndim = len(size)
    spacing = SPACINGS[ndim] if spaced else None
    update = EnergyUpdate(ndim, torch.nn.MSELoss(), 0.1, step=0.3, spacing=spacing)
    unit = np.reshape(spacing or [1.0] * ndim, (1, -1, *[1] * ndim))
    ddf, hidden, gradients = field(size), nothing(update, size), list[np.ndarray]()
    for _ in range(3):
        gradients.append(step(update, moving, fixed, ddf)[1].numpy())
        v = torch.from_numpy(adam_by_hand(gradients, 0.3) / unit)
        expected = v + warp_by_ddf(ddf, v) - ddf
        with torch.no_grad():
            delta, hidden = update(moving, fixed, ddf, hidden)
        torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-10)
        slope = np.sqrt((gradients[-1] ** 2).sum(1).reshape(2, -1).mean(1))
        np.testing.assert_allclose(update.measured(hidden)[1], slope, rtol=1e-9)
        ddf = ddf + delta
    assert (ddf - field(size)).abs().max() > 0.1


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("length", [0.05, 0.5])
@pytest.mark.parametrize("size", [*SIZES, (7, 5), (1, 9), (5, 1, 6)])
def test_length_of_a_step(size: tuple[int, ...], length: float, spaced: bool) -> None:
    moving, fixed = pair(size)
    ndim = len(size)
    spacing = SPACINGS[ndim] if spaced else None
    update = EnergyUpdate(ndim, step=length, spacing=spacing)
    state, hidden = torch.zeros(2, ndim, *size), nothing(update, size, dtype=torch.float32)
    unit = torch.tensor(spacing or [1.0] * ndim).view(1, -1, *[1] * ndim)
    delta, hidden = update(moving, fixed, state, hidden)
    # from no displacement the step is the displacement
    longest = (delta * unit).norm(dim=1).flatten(1).amax(1)
    assert bool((longest <= length * (1 + 1e-5)).all()) and bool((longest > 0.5 * length).all())


def test_steps_become_shorter_where_the_energy_does_not_fall() -> None:
    # of one item the energy falls, of the other it never does: only that one's steps become half as long
    class Given(torch.nn.Module):
        values = iter(())

        def forward(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            return next(self.values) + 1e-3 * (warped * fixed).sum()

    size, steps = (9, 12), 14
    moving, fixed = smooth_pair(size)
    fixed[..., 7:] = 0
    loss = Given()
    update = EnergyUpdate(2, loss, weight=0)
    hidden, ddf = nothing(update, size), torch.zeros(2, 2, *size, dtype=torch.float64)
    loss.values = iter([v for k in range(steps) for v in (-float(k), float(k))])
    lengths = []
    for _ in range(steps):
        # at the same place, the averages of the gradient are the gradient
        with torch.no_grad():
            delta, hidden = update(moving, fixed, ddf, hidden)
        # where it is shortest no step is cut to the longest there is
        lengths.append(delta.norm(dim=1).flatten(1).amin(1))
    falls, rises = torch.stack(lengths, dim=1).unbind()
    torch.testing.assert_close(falls, falls[:1].expand(steps), rtol=1e-6, atol=0)
    # the first gives the lowest energy; the sixth is the fifth without a lower one, the step itself is shorter
    assert 1e-3 < rises[0] < 0.45
    shares = torch.tensor([1.0] * 5 + [0.5] * 5 + [0.25] * 4, dtype=torch.float64)
    torch.testing.assert_close(rises, rises[0] * shares, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(21, 16), (9, 8, 11), (1, 9)])
def test_equal_images_stay_exactly_where_they_are(size: tuple[int, ...], dtype: torch.dtype) -> None:
    noisy = pair(size)[0]
    dark = noisy.clone()
    dark[..., : size[-1] // 2] = 0.1
    faint = dark + 1e-3 * pair(size, seed=1)[0]
    for image in (noisy, dark, faint, torch.zeros_like(noisy), torch.full_like(noisy, 0.3)):
        image = image.to(dtype)
        for similarity in (None, torch.nn.MSELoss()):
            update = EnergyUpdate(len(size), similarity)
            kind = torch.promote_types(dtype, torch.float32)
            ddf, hidden = torch.zeros(2, len(size), *size, dtype=kind), nothing(update, size, dtype=kind)
            for _ in range(3):
                delta, hidden = update(image, image.clone(), ddf, hidden)
                assert not delta.any() and bool(hidden.isfinite().all())


def test_images_without_contrast() -> None:
    image = pair((9, 8))[0]
    constant = torch.full_like(image, 0.7)
    update = EnergyUpdate(2)
    for moving, fixed in ((image, constant), (constant, image), (constant, 0 * constant)):
        ddf, hidden = torch.zeros(2, 2, 9, 8), nothing(update, (9, 8), dtype=torch.float32)
        delta, hidden = update(moving, fixed, ddf, hidden)
        assert not delta.any() and bool(hidden.isfinite().all())
    # the displacement there was becomes smoother
    ddf = field((9, 8)).float()
    after = ddf + update(constant, constant, ddf, nothing(update, (9, 8), dtype=torch.float32))[0]
    assert bool((diffusion_by_hand(after, (1, 1)) < 0.9 * diffusion_by_hand(ddf, (1, 1))).all())


@pytest.mark.parametrize("size", [*SIZES, (7, 5), (5, 9, 3)])
def test_items_do_not_see_each_other(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    update = EnergyUpdate(len(size))
    g = update.at(moving, fixed)

    def run(g: Any, ddf: torch.Tensor) -> torch.Tensor:
        hidden = nothing(update, size, len(ddf))
        for _ in range(8):
            delta, hidden = g(ddf, hidden)
            ddf = ddf + delta
        return torch.cat([ddf, hidden], dim=1)

    ddf = field(size)
    both = run(g, ddf)
    for i in range(2):
        one = slice(i, i + 1)
        torch.testing.assert_close(run(update.at(moving[one], fixed[one]), ddf[one]), both[one], rtol=1e-7, atol=1e-9)
    assert both[:, : len(size)].std() > 0.1


def test_an_item_that_is_not_finite() -> None:
    moving, fixed = pair((9, 8))
    fixed[0, 0, 3, 3] = float("nan")
    update = EnergyUpdate(2)
    ddf, hidden = torch.zeros(2, 2, 9, 8), nothing(update, (9, 8), dtype=torch.float32)
    delta, hidden = update(moving, fixed, ddf, hidden)
    assert bool(delta[1].isfinite().all()) and bool(hidden[1].isfinite().all()) and not delta[0].isfinite().all()


@pytest.mark.parametrize("around", [False, True])
def test_half_precision(around: bool) -> None:
    moving, fixed = (t.bfloat16() for t in pair((12, 9)))
    update = EnergyUpdate(2)
    ddf, hidden = torch.zeros(2, 2, 12, 9), nothing(update, (12, 9), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        delta, after = update(moving, fixed, ddf, hidden)
    expected = update(moving.float(), fixed.float(), ddf, hidden)
    assert delta.dtype == after.dtype == torch.float32
    assert torch.equal(delta, expected[0]) and torch.equal(after, expected[1])


def test_voxels_of_another_size_along_an_axis() -> None:
    # the same object with every other row: in units of the spacing the same step, at the rows that are left
    size = (61, 21)
    x, y = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in size], indexing="ij")

    def blob(row: float, column: float) -> torch.Tensor:
        return torch.exp(-((x - row) ** 2) / 60 - (y - column) ** 2 / 30)[None, None]

    moving, fixed = blob(31, 11), blob(29, 10)
    zero = torch.zeros(1, 2, *size, dtype=torch.float64)
    fine = EnergyUpdate(2, torch.nn.MSELoss(), 0.1, sigma=4.0, spacing=(1.0, 1.0))
    coarse = EnergyUpdate(2, torch.nn.MSELoss(), 0.1, sigma=4.0, spacing=(2.0, 1.0))
    wrong = EnergyUpdate(2, torch.nn.MSELoss(), 0.1, sigma=4.0)
    rows = (slice(None), slice(None), slice(None, None, 2))

    def run(update: EnergyUpdate, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        hidden = nothing(update, tuple(ddf.shape[2:]), 1)
        for _ in range(6):
            delta, hidden = update(moving, fixed, ddf, hidden)
            ddf = ddf + delta
        return ddf

    whole = run(fine, moving, fixed, zero)[rows]
    half = run(coarse, moving[rows], fixed[rows], zero[rows])
    scale = torch.tensor([2.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1)
    assert whole.abs().max() > 0.5
    error = (half * scale - whole).norm() / whole.norm()
    assert error < 0.05 < (run(wrong, moving[rows], fixed[rows], zero[rows]) * scale - whole).norm() / whole.norm()


@pytest.mark.parametrize("size", SIZES)
def test_axes_are_alike(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size, dtype=torch.float64)
    ndim, ddf = len(size), field(size)
    spacing, order = SPACINGS[ndim], list(range(ndim))[::-1]
    update = EnergyUpdate(ndim, spacing=spacing)
    expected = step(update, moving, fixed, ddf)[0]
    turned = EnergyUpdate(ndim, spacing=[spacing[i] for i in order])
    axes = [0, 1, *(2 + i for i in order)]
    delta = step(turned, moving.permute(axes), fixed.permute(axes), ddf[:, order].permute(axes))[0]
    torch.testing.assert_close(delta, expected[:, order].permute(axes), rtol=1e-9, atol=1e-10)
    for axis in range(ndim):
        sign = torch.ones(1, ndim, *[1] * ndim, dtype=torch.float64)
        sign[:, axis] = -1
        delta = step(update, *(t.flip(2 + axis) for t in (moving, fixed)), sign * ddf.flip(2 + axis))[0]
        torch.testing.assert_close(delta, sign * expected.flip(2 + axis), rtol=1e-8, atol=1e-9)


# --- what it is used in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 7), (5, 4, 6)])
def test_what_a_similarity_learns(size: tuple[int, ...]) -> None:
    # two sizes of two steps, the loss of the last displacement, by a parameter of the similarity
    moving, fixed = smooth_pair(size)
    net = UnrolledRegistrationNet(EnergyUpdate(len(size), ScaledSquare(), 0.05), steps=(2, 2)).train()

    def loss(scale: torch.Tensor) -> torch.Tensor:
        warped, ddf, _ = functional_call(net, {"updates.0.similarity.scale": scale}, (moving, fixed))
        return (warped - fixed).square().mean() + 0.3 * ddf.square().mean()

    scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(scale), scale)
    h = 1e-6
    with torch.no_grad():
        slope = (loss(scale + h) - loss(scale - h)) / (2 * h)
    assert abs(float(gradient)) > 1e-6
    assert float(gradient) == pytest.approx(float(slope), rel=1e-4)
    warped, ddf, _ = net(moving, fixed)
    ((warped - fixed).square().mean() + 0.3 * ddf.square().mean()).backward()
    assert net.updates[0].similarity.scale.grad == pytest.approx(float(gradient))  # type: ignore[union-attr]


def test_gradient_where_nothing_moves() -> None:
    moving, fixed = smooth_pair((8, 7))
    fixed[0] = moving[0]
    moving.requires_grad_()
    for similarity in (LocalCorrelationLoss(3), torch.nn.MSELoss()):
        net = UnrolledRegistrationNet(EnergyUpdate(2, similarity), steps=(2, 2)).train()
        warped, ddf, _ = net(moving, fixed)
        assert not ddf[0].any() and ddf[1].any()
        (gradient,) = torch.autograd.grad((warped - 0.5).square().sum() + ddf.square().sum(), moving)
        assert bool(gradient.isfinite().all()) and bool(gradient.flatten(1).any(dim=1).all())


def test_images_may_have_a_gradient() -> None:
    moving, fixed = smooth_pair((6, 5))
    for similarity in (LocalCorrelationLoss(3), torch.nn.MSELoss()):
        update = EnergyUpdate(2, similarity)
        hidden, ddf = nothing(update, (6, 5)), 0.3 + 0.1 * field((6, 5))
        assert torch.autograd.gradcheck(
            lambda m, u, update=update, hidden=hidden: update(m, fixed, u, hidden)[0],
            (moving.clone().requires_grad_(), ddf.clone().requires_grad_()),
            fast_mode=True,
        )


def test_a_hidden_state_is_not_carried_to_the_next_size() -> None:
    moving, fixed = pair((12, 10))
    seen = list[torch.Tensor]()

    class Noting(EnergyUpdate):
        def at(self, *pair: Any) -> Any:
            step = super().at(*pair)

            def noted(ddf: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                seen.append(hidden)
                return step(ddf, hidden)

            return noted

    net = UnrolledRegistrationNet(Noting(2), steps=(2, 3))
    for mode in (True, False):
        seen.clear()
        net.train(mode)(moving, fixed)
        assert [bool(h.any()) for h in seen] == [False, True, False, True, True]
        assert [h.shape[2] for h in seen] == [6, 6, 12, 12, 12]


@pytest.mark.parametrize("size", SIZES)
def test_map_of_an_equilibrium_network(size: tuple[int, ...]) -> None:
    moving, fixed = pair(size)
    update = EnergyUpdate(len(size))
    net = deq_net(update, num_states=0, max_steps=5, tolerance=0.0).eval()
    ddf, hidden = torch.zeros(2, len(size), *size), nothing(update, size, dtype=torch.float32)
    with torch.no_grad():
        for _ in range(5):
            delta, hidden = update(moving, fixed, ddf, hidden)
            ddf = ddf + delta
    torch.testing.assert_close(net(moving, fixed)[1], ddf, rtol=0, atol=1e-5)
    out = FixedPointSolver(net)(moving[0], fixed[0])
    torch.testing.assert_close(out[1], ddf[0], rtol=0, atol=1e-5)
    assert out[2]["steps"] == 5 and ddf.abs().max() > 0.3


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"weight": -0.1}, "weight must not be negative, got -0.1"),
        ({"weight": float("nan")}, "weight must not be negative, got nan"),
        ({"sigma": -1}, "sigma must not be negative, got -1"),
        ({"step": 0}, "step must be above zero, got 0"),
        ({"step": float("nan")}, "step must be above zero, got nan"),
        ({"spacing": (1.0,)}, r"spacing must be 2 numbers above zero, got \[1.0\]"),
        ({"spacing": (1, 0)}, r"spacing must be 2 numbers above zero, got \[1, 0\]"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EnergyUpdate(**{"spatial_dims": 2, **arguments})


def test_wrong_states() -> None:
    moving, fixed = pair((6, 5))
    update, ddf = EnergyUpdate(2), torch.zeros(2, 2, 6, 5)
    for shape in ((2, 2, 6, 5), (1, 4, 6, 5), (2, 4, 5, 6)):
        with pytest.raises(ValueError, match=r"hidden must have shape \(2, 4, 6, 5\), got"):
            update(moving, fixed, ddf, torch.zeros(shape))
    with pytest.raises(ValueError, match="ddf must have shape"):
        update(moving, fixed, ddf[:, :1], torch.zeros(2, 4, 6, 5))
    with pytest.raises(ValueError, match="Missing must give one number"):

        class Missing(torch.nn.Module):
            def forward(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
                return fixed.mean()

        EnergyUpdate(2, Missing())(moving, fixed, ddf, torch.zeros(2, 4, 6, 5))
