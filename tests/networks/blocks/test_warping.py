# SPDX-License-Identifier: Apache-2.0
"""Images and points moved by a displacement field, against MONAI, SciPy, closed forms and finite differences."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp
from scipy.ndimage import map_coordinates

from monai_deq.networks.blocks import DDFWarp, check_outside, points_outside, warp_by_ddf, warp_points_by_ddf, warping
from monai_deq.networks.blocks.warping import identity_grid

SIZES = [(7, 10), (1, 5), (5, 8, 3)]


def images(size: tuple[int, ...], channels: int = 2, reach: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(size))
    image = torch.rand(2, channels, *size, dtype=torch.float64, generator=generator)
    ddf = reach * torch.randn(2, len(size), *size, dtype=torch.float64, generator=generator)
    return image, ddf


def scipy_warp(image: torch.Tensor, ddf: torch.Tensor, order: int) -> np.ndarray:
    coords = np.indices(image.shape[2:]) + ddf.numpy()
    warped = [
        [map_coordinates(c, where, order=order, mode="nearest") for c in item]
        for item, where in zip(image.numpy(), coords, strict=True)
    ]
    return np.asarray(warped)


@pytest.mark.parametrize("size", SIZES)
def test_as_monai_and_scipy(size: tuple[int, ...]) -> None:
    image, ddf = images(size)  # displacements reach far over the border
    warped = warp_by_ddf(image, ddf)
    torch.testing.assert_close(warped, Warp()(image, ddf), rtol=0, atol=1e-12)
    np.testing.assert_allclose(warped, scipy_warp(image, ddf, order=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(DDFWarp()(image, ddf), warped, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_nearest_keeps_labels(size: tuple[int, ...], dtype: torch.dtype) -> None:
    image, ddf = images(size, channels=1)
    labels = (image * 36).to(dtype)
    warped = warp_by_ddf(labels, ddf, mode="nearest")
    assert warped.dtype == dtype
    np.testing.assert_array_equal(warped, scipy_warp(labels, ddf, order=0))
    assert torch.equal(DDFWarp("nearest")(labels, ddf), warped)


def test_whole_numbers_are_not_interpolated() -> None:
    with pytest.raises(ValueError, match="int64.*nearest"):
        warp_by_ddf(torch.ones(1, 1, 4, 4, dtype=torch.int64), torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_subvoxel_at_high_index(dtype: torch.dtype, autocast: bool, axis: int) -> None:
    size, n = [3, 3], 4096
    size[axis] = n
    stripes = torch.arange(n) % 2  # 0, 1, 0, 1: exact in any precision
    image = (stripes[:, None] if axis == 0 else stripes[None]).expand(size)[None, None].to(dtype)
    ddf = torch.zeros(1, 2, *size, dtype=dtype)
    ddf[:, axis] = 0.05
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        warped = warp_by_ddf(image, ddf)
    assert warped.dtype == dtype
    line = warped[0, 0].movedim(axis, 0)[:, 1].double()
    expected = 0.05 + 0.9 * stripes.double()
    expected[-1] = 1.0  # beyond the border
    # float32 coordinates at index 4096 are good to 5e-4 voxel; the rest is the rounding of the result and the field
    torch.testing.assert_close(line, expected, rtol=0, atol=5e-4 + torch.finfo(dtype).eps)


def test_float64_image_is_not_rounded() -> None:
    image = torch.full((1, 1, 4, 5), 1 + 1e-12, dtype=torch.float64)
    warped = warp_by_ddf(image, torch.zeros(1, 2, 4, 5))
    torch.testing.assert_close(warped, image, rtol=0, atol=1e-15)


def test_grid_is_kept_for_its_shape_alone() -> None:
    cpu = torch.device("cpu")
    identity_grid.cache_clear()
    first = identity_grid((3, 4), cpu, torch.float32)
    np.testing.assert_array_equal(first[0], np.indices((3, 4)))
    assert identity_grid((3, 4), cpu, torch.float32) is first
    for other in (((4, 3), torch.float32), ((3, 4, 1), torch.float32), ((3, 4), torch.float64)):
        grid = identity_grid(other[0], cpu, other[1])
        assert grid is not first and grid.shape[2:] == other[0] and grid.dtype == other[1]
    for n in range(5, 30):
        identity_grid((n, 2), cpu, torch.float32)
    assert identity_grid.cache_info().currsize <= 8

    identity_grid.cache_clear()
    for batch in (1, 2):  # whatever the batch
        warp_by_ddf(torch.rand(batch, 1, 3, 4), torch.rand(batch, 2, 3, 4))
    assert (identity_grid.cache_info().misses, identity_grid.cache_info().hits) == (1, 1)
    # the kept grid is not changed by what is done with it
    np.testing.assert_array_equal(identity_grid((3, 4), cpu, torch.float32)[0], np.indices((3, 4)))


def test_grid_of_inference_serves_training() -> None:
    identity_grid.cache_clear()
    image, ddf = torch.rand(1, 1, 3, 4), torch.zeros(1, 2, 3, 4, requires_grad=True)
    with torch.inference_mode():
        warp_by_ddf(image, torch.zeros(1, 2, 3, 4))
    warp_by_ddf(image, ddf + 0.3).sum().backward()
    assert ddf.grad is not None and bool(ddf.grad.abs().sum() > 0)


@pytest.mark.parametrize(
    ("image", "ddf", "words"),
    [
        ((1, 1, 4, 5), (1, 2, 5, 4), [r"\(1, 2, 4, 5\)", r"\(1, 2, 5, 4\)"]),
        ((1, 1, 4, 5), (1, 3, 4, 5), [r"\(1, 2, 4, 5\)", r"\(1, 3, 4, 5\)"]),
        ((2, 1, 4, 5, 6), (1, 3, 4, 5, 6), [r"\(2, 3, 4, 5, 6\)", r"\(1, 3, 4, 5, 6\)"]),
        ((1, 4, 5), (2, 4, 5), [r"\(B, C, H, W\[, D\]\)", r"\(1, 4, 5\)"]),
    ],
)
def test_wrong_shapes(image: tuple[int, ...], ddf: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".*".join(words[:1])) as error:
        warp_by_ddf(torch.zeros(image), torch.zeros(ddf))
    error.match(words[1])


def test_wrong_mode() -> None:
    with pytest.raises(ValueError, match="cubic"):
        DDFWarp("cubic")


@pytest.mark.parametrize("size", [(4, 5), (3, 4, 2)])
def test_gradient(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 1, *size, dtype=torch.float64, generator=generator)
    # linear interpolation has a kink at every voxel: stay between them, and reach over the border too
    ddf = torch.randint(-2, 3, (2, len(size), *size), generator=generator) + 0.2
    ddf = ddf + 0.6 * torch.rand(ddf.shape, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(warp_by_ddf, (image.requires_grad_(), ddf.requires_grad_()))


def test_backward_at_nan_does_not_end_the_process() -> None:
    # in PyTorch the 2-D backward kernel of the CPU reads out of bounds there: in a process of its own
    code = f"""
import runpy, torch
warp_by_ddf = runpy.run_path({warping.__file__!r})["warp_by_ddf"]
for ndim, n in ((2, 64), (3, 16)):
    image, ddf = torch.rand(1, 1, *[n] * ndim), torch.full((1, ndim, *[n] * ndim), float("nan"))
    ddf.requires_grad_()
    (g,) = torch.autograd.grad(warp_by_ddf(image, ddf).sum(), ddf, create_graph=True)
    (g.square().sum() + ddf.sum()).backward()
    print("alive", ndim)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "alive 2\nalive 3" in result.stdout, result.stderr[-1000:]


# --- points -----------------------------------------------------------------------------------------------------------


POINT_SIZES = [(9, 7), (5, 8, 6)]


def points_and_field(size: tuple[int, ...], batch: int = 2, number: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Points all over the voxels of the grid, its outer half voxels included, and a rough field; float64."""
    generator = torch.Generator().manual_seed(5)
    unit = torch.rand(batch, number, len(size), generator=generator, dtype=torch.float64)
    ddf = 3 * torch.randn(batch, len(size), *size, generator=generator, dtype=torch.float64)
    return unit * torch.tensor(size) - 0.5, ddf


@pytest.mark.parametrize("size", POINT_SIZES)
def test_points_agree_with_scipy(size: tuple[int, ...]) -> None:
    points, ddf = points_and_field(size)
    expected = np.stack(
        [
            p + np.stack([map_coordinates(channel, p.T, order=1, mode="nearest") for channel in d], axis=1)
            for p, d in zip(points.numpy(), ddf.numpy(), strict=True)
        ]
    )
    np.testing.assert_allclose(warp_points_by_ddf(points, ddf), expected, rtol=0, atol=1e-12)
    single = warp_points_by_ddf(points.float(), ddf.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", POINT_SIZES)
def test_affine_fields_are_followed_exactly(size: tuple[int, ...]) -> None:
    ndim = len(size)
    points = points_and_field(size)[0].clamp(min=0).minimum(torch.tensor(size, dtype=torch.float64) - 1)
    matrix = torch.randn(ndim, ndim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij"))
    ddf = torch.einsum("ij,j...->i...", matrix, grid) + 0.25
    moved = warp_points_by_ddf(points, ddf.expand(2, *ddf.shape))
    torch.testing.assert_close(moved, points + points @ matrix.T + 0.25)


def test_fixed_points_go_where_the_warped_intensities_come_from() -> None:
    moving = torch.zeros(1, 1, 6, 7)
    moving[0, 0, 4, 2] = 1  # a bright landmark
    ddf = torch.zeros(1, 2, 6, 7)
    ddf[:, 0], ddf[:, 1] = 3, -1
    fixed = warp_by_ddf(moving, ddf)[0, 0].round().nonzero().float()  # where it is seen on the fixed grid
    torch.testing.assert_close(fixed, torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(warp_points_by_ddf(fixed[None], ddf), torch.tensor([[[4.0, 2.0]]]))


def test_points_in_half_precision_and_integers() -> None:
    ddf = torch.zeros(1, 2, 300, 3, dtype=torch.float16)
    ddf[:, 0] = 0.0625  # lost if the coordinate 299 were added in half precision
    moved = warp_points_by_ddf(torch.tensor([[[299, 1]]]), ddf)
    torch.testing.assert_close(moved, torch.tensor([[[299.0625, 1.0]]]), rtol=0, atol=1e-4)


def test_points_on_an_axis_of_one_voxel_and_none() -> None:
    ddf = torch.arange(8.0).reshape(1, 2, 4, 1)
    moved = warp_points_by_ddf(torch.tensor([[[1.5, 0.0], [3.0, 0.4]]]), ddf)
    torch.testing.assert_close(moved, torch.tensor([[[3.0, 5.5], [6.0, 7.4]]]))
    assert warp_points_by_ddf(torch.zeros(1, 0, 2), ddf).shape == (1, 0, 2)


@pytest.mark.parametrize("size", POINT_SIZES)
def test_gradients_of_points(size: tuple[int, ...]) -> None:
    points, ddf = points_and_field(tuple(n // 2 for n in size), batch=1, number=2)
    points = points.clamp(min=0.1).minimum(torch.tensor(ddf.shape[2:]) - 1.1)
    assert torch.autograd.gradcheck(warp_points_by_ddf, (points.requires_grad_(), ddf.requires_grad_()))


def test_points_outside_are_refused_or_clamped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    ddf = torch.arange(12.0).reshape(1, 1, 3, 4).repeat(1, 2, 1, 1)
    points = torch.tensor([[[1.0, 2.0], [-2.0, 1.0], [2.4, 3.4], [5.0, 9.0]]])
    assert points_outside(points, (3, 4)).tolist() == [[False, True, False, True]]
    with pytest.raises(ValueError, match=r"2 of 4 points lie outside .* size \(3, 4\), e.g. \[-2.0, 1.0\]"):
        warp_points_by_ddf(points, ddf)
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        moved = warp_points_by_ddf(points, ddf, outside="clamp")
    assert "2 of 4 points lie outside" in caplog.text
    displacement = torch.tensor([6.0, 1, 11, 11])[:, None]  # of the voxels (1, 2), (0, 1), (2, 3), (2, 3)
    torch.testing.assert_close(moved, points + displacement)
    caplog.clear()
    warp_points_by_ddf(points[:, ::2], ddf, outside="clamp")
    assert not caplog.records


@pytest.mark.parametrize(
    ("points", "ddf", "outside", "message"),
    [
        (torch.zeros(1, 4, 3), torch.zeros(1, 2, 5, 5), "refuse", r"points must have shape \(1, N, 2\)"),
        (torch.zeros(2, 4, 2), torch.zeros(1, 2, 5, 5), "refuse", r"points must have shape \(1, N, 2\)"),
        (torch.zeros(4, 2), torch.zeros(1, 2, 5, 5), "refuse", r"got \(4, 2\)"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 3, 5, 5), "refuse", "ddf must have shape"),
        (torch.full((1, 4, 2), float("nan")), torch.zeros(1, 2, 5, 5), "clamp", "points must be finite"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 2, 5, 5), "zeros", "outside: expected 'refuse' or 'clamp', got 'zeros'"),
    ],
)
def test_bad_points_are_refused(points: torch.Tensor, ddf: torch.Tensor, outside: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warp_points_by_ddf(points, ddf, outside=outside)


def test_words_for_points_outside() -> None:
    check_outside("clamp")
    with pytest.raises(ValueError, match="outside: expected 'refuse' or 'clamp', got 'zeros'"):
        check_outside("zeros")


@pytest.mark.parametrize("size", [(11, 13), (5, 6, 7)])
def test_what_is_exported_is_not_kept_for_others(size: tuple[int, ...]) -> None:
    image, ddf = torch.rand(2, 1, *size), torch.randn(2, len(size), *size)
    identity_grid.cache_clear()
    program = torch.export.export(DDFWarp(), (image, ddf)).module()
    expected = Warp("bilinear", "border")(image, ddf)
    for warp in (program, DDFWarp()):
        torch.testing.assert_close(warp(image, ddf), expected, atol=1e-5, rtol=0)
    # nor the other way round: a grid that was there already
    program = torch.export.export(DDFWarp(), (image, ddf)).module()
    torch.testing.assert_close(program(image, ddf), expected, atol=1e-5, rtol=0)
