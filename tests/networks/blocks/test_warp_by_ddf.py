# SPDX-License-Identifier: Apache-2.0
"""Warping against MONAI, SciPy and finite differences."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp
from scipy.ndimage import map_coordinates

from monai_deq.networks.blocks import DDFWarp, warp_by_ddf
from monai_deq.networks.blocks.warp import _identity_grid

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
    _identity_grid.cache_clear()
    first = _identity_grid((3, 4), cpu, torch.float32)
    np.testing.assert_array_equal(first[0], np.indices((3, 4)))
    assert _identity_grid((3, 4), cpu, torch.float32) is first
    for other in (((4, 3), torch.float32), ((3, 4, 1), torch.float32), ((3, 4), torch.float64)):
        grid = _identity_grid(other[0], cpu, other[1])
        assert grid is not first and grid.shape[2:] == other[0] and grid.dtype == other[1]
    for n in range(5, 30):
        _identity_grid((n, 2), cpu, torch.float32)
    assert _identity_grid.cache_info().currsize <= 8

    _identity_grid.cache_clear()
    for batch in (1, 2):  # whatever the batch
        warp_by_ddf(torch.rand(batch, 1, 3, 4), torch.rand(batch, 2, 3, 4))
    assert (_identity_grid.cache_info().misses, _identity_grid.cache_info().hits) == (1, 1)
    # the kept grid is not changed by what is done with it
    np.testing.assert_array_equal(_identity_grid((3, 4), cpu, torch.float32)[0], np.indices((3, 4)))


def test_grid_of_inference_serves_training() -> None:
    _identity_grid.cache_clear()
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


@pytest.mark.parametrize("ndim", [2, 3])
def test_backward_at_nan_does_not_end_the_process(ndim: int) -> None:
    # in PyTorch the 2-D backward kernel of the CPU reads out of bounds there: in a process of its own
    code = (
        "import torch; from monai_deq.networks.blocks import warp_by_ddf\n"
        f"image, ddf = torch.rand(1, 1, *[64] * {ndim}), torch.full((1, {ndim}, *[64] * {ndim}), float('nan'))\n"
        "ddf.requires_grad_()\n"
        "(g,) = torch.autograd.grad(warp_by_ddf(image, ddf).sum(), ddf, create_graph=True)\n"
        "(g.square().sum() + ddf.sum()).backward(); print('alive')"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "alive" in result.stdout, result.stderr[-1000:]
