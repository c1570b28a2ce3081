# SPDX-License-Identifier: Apache-2.0
"""Points and labels: closed forms, SciPy's interpolation, gradients, and what does not fit refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_deq.losses import KeypointLoss, KeypointSupervisedLoss, LabelLoss, LabelSupervisedLoss
from monai_deq.networks.blocks import warp_by_ddf

SIZES = [(6, 9), (4, 7, 5)]
SPACINGS = {2: (0.5, 2.0), 3: (1.5, 0.5, 3.0)}


def data(size: tuple[int, ...], count: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    ndim = len(size)
    ddf = 2 * torch.randn(2, ndim, *size, dtype=torch.float64, generator=generator)
    share = torch.rand(2, count, ndim, dtype=torch.float64, generator=generator)
    fixed = share * torch.tensor(size) - 0.5  # up to the border of the last voxels
    fixed[:, :2] = fixed[:, :2].round().clamp(min=0)  # on the grid too
    moving = 4 * torch.randn(2, count, ndim, dtype=torch.float64, generator=generator)
    return ddf, fixed, moving


def by_hand(ddf: torch.Tensor, fixed: torch.Tensor, moving: torch.Tensor, spacing: Any) -> list[float]:
    values = []
    for field, x, y in zip(ddf.numpy(), fixed.numpy(), moving.numpy(), strict=True):
        moved = np.stack([ndimage.map_coordinates(u, x.T, order=1, mode="nearest") for u in field], axis=1)
        values.append(float(np.mean(np.sum(((x + moved - y) * spacing) ** 2, axis=1))))
    return values


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("in_mm", [False, True])
def test_against_scipy(size: tuple[int, ...], in_mm: bool) -> None:
    ddf, fixed, moving = data(size)
    spacing = SPACINGS[len(size)] if in_mm else None
    expected = by_hand(ddf, fixed, moving, np.array(spacing or [1.0]))
    loss = KeypointLoss(spacing)
    value = loss(ddf, fixed, moving)
    assert value.dtype == torch.float64 and value.shape == ()
    assert value.item() == pytest.approx(np.mean(expected), rel=1e-10)
    # of different numbers; every pair counts the same
    few = by_hand(ddf[1:], fixed[1:, :4], moving[1:, :4], np.array(spacing or [1.0]))
    lists = [fixed[0], fixed[1, :4]], [moving[0], moving[1, :4]]
    assert loss(ddf, *lists).item() == pytest.approx((expected[0] + few[0]) / 2, rel=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_affine_field_in_closed_form(size: tuple[int, ...]) -> None:
    # linear interpolation is exact: points go to a known place
    ndim = len(size)
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(ndim, ndim, dtype=torch.float64, generator=generator)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij")).double()
    ddf = (torch.einsum("ij,j...->i...", matrix, grid) + 0.7).expand(2, -1, *size)
    fixed = torch.rand(2, 5, ndim, dtype=torch.float64, generator=generator) * (torch.tensor(size) - 1)
    moved = fixed + fixed @ matrix.T + 0.7
    assert KeypointLoss()(ddf, fixed, moved).item() == pytest.approx(0, abs=1e-20)
    away = torch.arange(1, ndim + 1).double()
    spacing = SPACINGS[ndim]
    expected = sum((s * a) ** 2 for s, a in zip(spacing, away.tolist(), strict=True))
    assert KeypointLoss(spacing)(ddf, fixed, moved + away).item() == pytest.approx(expected)


def test_points_go_where_the_image_comes_from() -> None:
    """A bright voxel of the moving image, and the place where the warped image shows it."""
    moving = torch.zeros(1, 1, 7, 9)
    moving[0, 0, 2, 6] = 1
    ddf = torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 7, 9)
    shown = torch.nonzero(warp_by_ddf(moving, ddf)[0, 0] > 0.5).float()[None]
    assert shown.tolist() == [[[3, 4]]]
    assert KeypointLoss()(ddf, shown, torch.tensor([[[2.0, 6.0]]])).item() == 0


@pytest.mark.parametrize("size", SIZES)
def test_gradient(size: tuple[int, ...]) -> None:
    ddf, fixed, moving = data(tuple(n - 2 for n in size), count=2)
    loss = KeypointLoss(SPACINGS[len(size)])
    assert torch.autograd.gradcheck(lambda u: loss(u, fixed, moving), ddf.requires_grad_())
    # descent brings the points together
    field = torch.zeros_like(ddf).requires_grad_()
    near = fixed + 0.1 * moving
    start = loss(field, fixed, near)
    (slope,) = torch.autograd.grad(start, field)
    assert loss(-0.01 * slope, fixed, near) < start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_inside(dtype: torch.dtype, autocast: bool) -> None:
    # at voxel 900 half precision knows half voxels only
    ddf = torch.full((1, 2, 1000, 3), 0.1, dtype=dtype)
    fixed = torch.tensor([[[900.3, 1.0]]], dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = KeypointLoss()(ddf, fixed, fixed)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.02, rel=2e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_axis_of_one_voxel(axis: int) -> None:
    size = [5, 5]
    size[axis] = 1
    fixed = torch.full((1, 1, 2), 2.0)
    fixed[..., axis] = 0
    assert KeypointLoss()(torch.ones(1, 2, *size), fixed, fixed).item() == pytest.approx(2.0)


def test_the_true_field_of_the_sample_has_no_loss(lung_cohort: Path) -> None:
    file = nib.load(lung_cohort / "true_ddf" / "disp_0001_0001.nii.gz")
    ddf = torch.from_numpy(np.asarray(file.dataobj)).movedim(-1, 0)[None]
    fixed, moving = (
        torch.from_numpy(np.loadtxt(lung_cohort / "keypointsTr" / f"NLST_0001_000{i}.csv", delimiter=","))[None]
        for i in range(2)
    )
    loss = KeypointLoss(tuple(float(s) for s in file.header.get_zooms()[:3]))
    assert loss(ddf, fixed, moving).item() < 1e-8
    assert loss(torch.zeros_like(ddf), fixed, moving).item() > 20
    assert loss(-ddf, fixed, moving).item() > 80


def test_bad_input_is_refused() -> None:
    ddf, fixed, moving = data((4, 7, 5))
    loss = KeypointLoss()
    with pytest.raises(ValueError, match=r"ddf must have shape .* got \(2, 2, 4, 7, 5\)"):
        loss(ddf[:, :2], fixed, moving)
    with pytest.raises(ValueError, match="as many pairs, got 2, 1 and 2"):
        loss(ddf, fixed[:1], moving)
    with pytest.raises(ValueError, match="batch item 0 has 11 fixed keypoints, but 10 moving ones"):
        loss(ddf, fixed, moving[:, :-1])
    with pytest.raises(ValueError, match=r"moving_keypoints of batch item 0: expected shape \(N, 3\), got \(11, 2\)"):
        loss(ddf, fixed, moving[..., :2])
    with pytest.raises(ValueError, match=r"fixed_keypoints of batch item 1: expected shape \(N, 3\), got \(0, 3\)"):
        loss(ddf, [fixed[0], fixed[1, :0]], [moving[0], moving[1, :0]])
    bad = moving.clone()
    bad[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="moving_keypoints of batch item 1: coordinates must be finite"):
        loss(ddf, fixed, bad)
    for axis, value in ((0, -0.6), (1, 6.6), (2, 100.0)):
        outside = fixed.clone()
        outside[1, 3, axis] = value
        with pytest.raises(
            ValueError,
            match=r"fixed_keypoints of batch item 1: 1 of 11 points lie outside the grid of size \(4, 7, 5\)",
        ):
            loss(ddf, outside, moving)
    for spacing in ((1.0, 0.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="spacing must be above zero"):
            KeypointLoss(spacing)
    with pytest.raises(ValueError, match="spacing must give 3 numbers"):
        KeypointLoss((1.0, 1.0))(ddf, fixed, moving)


class Norm(torch.nn.Module):
    def forward(self, prediction: Any, target: dict[str, Any]) -> torch.Tensor:
        return (prediction[0] - target["fixed"]).square().mean()


@pytest.mark.parametrize("size", SIZES)
def test_supervised_loss(size: tuple[int, ...]) -> None:
    ddf, fixed, moving = data(size)
    spacing = SPACINGS[len(size)]
    prediction, target = (torch.ones(2, 1), ddf, []), {"fixed": torch.zeros(2, 1)}
    points = {"fixed_keypoints": fixed, "moving_keypoints": moving}
    expected = 1 + 0.3 * KeypointLoss(spacing)(ddf, fixed, moving).item()
    assert KeypointSupervisedLoss(Norm(), 0.3, spacing)(prediction, {**target, **points}).item() == pytest.approx(
        expected
    )
    other = KeypointSupervisedLoss(Norm(), 0.3, spacing, "a", "b")
    assert other(prediction, {**target, "a": fixed, "b": moving}).item() == pytest.approx(expected)
    assert KeypointSupervisedLoss(Norm(), 0.0)(prediction, target).item() == 1
    with pytest.raises(KeyError, match=r"no \['fixed_keypoints', 'moving_keypoints'\] in the target"):
        KeypointSupervisedLoss(Norm(), 0.3)(prediction, target)
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="weight must not be negative"):
            KeypointSupervisedLoss(Norm(), weight)


def test_points_outside_are_clamped_where_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    ddf = torch.arange(4.0).reshape(1, 1, 4, 1).expand(1, 2, 4, 5)  # along both axes, the number of the row
    fixed, moving = [torch.tensor([[5.0, 1.0]])], [torch.tensor([[7.0, 4.0]])]
    with pytest.raises(ValueError, match="lie outside the grid"):
        KeypointLoss()(ddf, fixed, moving)
    # by 3 voxels, as the last row: to (8, 4)
    assert KeypointLoss(outside="clamp")(ddf, fixed, moving).item() == pytest.approx(1.0)
    assert "lie outside the grid" in caplog.text
    supervised = KeypointSupervisedLoss(Norm(), 0.5, outside="clamp")
    target = {"fixed": torch.ones(1, 1), "fixed_keypoints": fixed, "moving_keypoints": moving}
    assert supervised((torch.ones(1, 1), ddf, []), target).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="outside: expected 'refuse' or 'clamp'"):
        KeypointLoss(outside="clip")  # type: ignore[arg-type]


def label_maps(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    maps = torch.randint(0, 12, (2, 2, 1, *size), generator=generator)
    return 0.7 * torch.randn(2, len(size), *size, dtype=torch.float64, generator=generator), *maps


@pytest.mark.parametrize("size", SIZES)
def test_labels_against_scipy(size: tuple[int, ...]) -> None:
    ddf, fixed, moving = label_maps(size)
    fixed[fixed == 3] = 0  # on one side alone
    moving[0][moving[0] == 5] = 0
    places = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).astype(float)
    values = []
    for field, a, b in zip(ddf.numpy(), fixed.numpy(), moving.numpy(), strict=True):
        dice = []
        for label in range(1, 13):
            t, m = (a[0] == label).astype(float), (b[0] == label).astype(float)
            if t.any() and m.any():
                warped = ndimage.map_coordinates(m, places + field, order=1, mode="nearest")
                dice.append((2 * (warped * t).sum() + 1e-5) / (warped.sum() + t.sum() + 1e-5))
        values.append(1 - np.mean(dice))
    value = LabelLoss(range(1, 13))(ddf, fixed, moving.float())
    assert value.item() == pytest.approx(np.mean(values), rel=1e-6) and value.dtype == torch.float64


def test_gradient_of_labels() -> None:
    ddf, fixed, moving = label_maps((5, 4))
    loss = LabelLoss(range(1, 12))
    assert torch.autograd.gradcheck(lambda field: loss(field, fixed, moving), ddf.requires_grad_())


def test_labels_brought_over_each_other() -> None:
    fixed, moving = torch.zeros(2, 1, 1, 9, 8)
    fixed[..., 2:5, 2:6], moving[..., 4:7, 2:6] = 7, 7
    ddf = torch.zeros(1, 2, 9, 8)
    ddf[:, 0] = 2.0
    assert LabelLoss([7, 9])(ddf, fixed, moving).item() == pytest.approx(0, abs=1e-6)
    assert LabelLoss([7])(0 * ddf, fixed, moving).item() == pytest.approx(1 - 2 / 6, abs=1e-6)


def test_labels_that_do_not_fit() -> None:
    ddf, fixed, moving = label_maps((6, 5))
    with pytest.raises(ValueError, match="at least one label"):
        LabelLoss([])
    with pytest.raises(ValueError, match=r"fixed_label must have shape \(2, 1, 6, 5\), got \(2, 1, 6, 4\)"):
        LabelLoss([1])(ddf, fixed[..., :-1], moving)
    moving[1] = 0
    with pytest.raises(ValueError, match=r"batch item\(s\) \[1\] share none of the labels \[1, 2\]"):
        LabelLoss([1, 2])(ddf, fixed, moving)


def test_labels_beside_another_loss() -> None:
    ddf, fixed, moving = label_maps((6, 5))
    target = {"fixed_label": fixed, "moving_label": moving}

    def other(prediction: Any, target: Any) -> torch.Tensor:
        return prediction[1].square().mean()

    loss = LabelSupervisedLoss(other, 2.0, range(1, 12))
    expected = ddf.square().mean() + 2 * LabelLoss(range(1, 12))(ddf, fixed, moving)
    assert torch.allclose(loss((None, ddf, []), target), expected)
    assert loss.target_keys == ("fixed_label", "moving_label")
    with pytest.raises(KeyError, match="LabelSupervisedLoss finds no .*moving_label"):
        loss((None, ddf, []), {"fixed_label": fixed})
    without = LabelSupervisedLoss(other, 0, [1])
    assert without.target_keys == () and without((None, ddf, []), {}) == ddf.square().mean()
