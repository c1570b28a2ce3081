# SPDX-License-Identifier: Apache-2.0
"""Images, label maps and points warped by the field of an item, against SciPy and the function on tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

import monai_deq.transforms as transforms
from monai_deq.networks.blocks import warp_points_by_ddf
from monai_deq.transforms import WarpByDDFd, WarpPointsByDDF, WarpPointsByDDFd

SIZES = [(9, 7), (5, 8, 6)]


def scipy_warp(image: np.ndarray, ddf: np.ndarray, order: int) -> np.ndarray:
    """Channel by channel, coordinates clamped to the image."""
    coordinates = np.stack(np.meshgrid(*map(np.arange, ddf.shape[1:]), indexing="ij")) + ddf
    return np.stack([ndimage.map_coordinates(c, coordinates, order=order, mode="nearest") for c in image])


def random_ddf(size: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Up to three voxels, off the half voxels where nearest neighbours are a matter of rounding."""
    rng = np.random.default_rng(seed)
    whole, fraction = rng.integers(-3, 4, (len(size), *size)), rng.uniform(-0.4, 0.4, (len(size), *size))
    return (whole + fraction).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_images_linear_and_labels_nearest(size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    ddf = random_ddf(size)
    image = rng.random((2, *size))
    label = rng.integers(0, 3, (1, *size)).astype(np.int16) * 1000
    item = {"ddf": torch.from_numpy(ddf), "image": image, "label": torch.from_numpy(label), "name": "x"}
    out = WarpByDDFd(("image", "label"), output_keys=("moved", "moved_label"), mode=("bilinear", "nearest"))(item)
    assert set(out) == {*item, "moved", "moved_label"}
    assert out["moved"].dtype == torch.float64 and out["moved_label"].dtype == torch.int16
    np.testing.assert_allclose(out["moved"], scipy_warp(image, ddf.astype(float), 1), atol=1e-5)
    np.testing.assert_array_equal(out["moved_label"], scipy_warp(label, ddf, 0))
    np.testing.assert_array_equal(item["image"], image)


def test_the_field_pulls_back() -> None:
    image = torch.zeros(1, 5, 4)
    image[0, 3, 1] = 7
    ddf = torch.zeros(2, 5, 4)
    ddf[0] = 2  # every voxel looks two rows down
    moved = WarpByDDFd("image")({"image": image, "ddf": ddf})["image"]
    assert moved[0, 1, 1] == 7 and moved.sum() == 7


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.bool])
def test_nearest_keeps_type_and_values(dtype: torch.dtype) -> None:
    size = (6, 7)
    values = torch.randint(0, 200, (1, *size), generator=torch.Generator().manual_seed(0))
    label = (values > 100) if dtype == torch.bool else values.to(dtype)
    ddf = random_ddf(size)
    moved = WarpByDDFd("label", mode="nearest")({"label": label, "ddf": ddf})["label"]
    assert moved.dtype == dtype
    np.testing.assert_array_equal(moved, scipy_warp(label.numpy().astype(float), ddf, 0))


def test_linear_interpolation_does_not_cut_whole_numbers() -> None:
    # half-way between 0 and 1, then 2.75 between 2 and 3
    image = torch.tensor([[[0, 1, 2, 3]] * 3], dtype=torch.int16)
    ddf = torch.zeros(2, 3, 4)
    ddf[1, 0, 0], ddf[1, 1, 2] = 0.5, 0.75
    moved = WarpByDDFd("image")({"image": image, "ddf": ddf})["image"]
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved[0, :2, [0, 2]], torch.tensor([[0.5, 2.0], [0.0, 2.75]]))


@pytest.mark.parametrize("size", SIZES)
def test_results_lie_on_the_grid_of_the_field(size: tuple[int, ...]) -> None:
    affine = torch.tensor([[0, 0, 2, 5], [1.5, 0, 0, -3], [0, -0.7, 0, 8], [0, 0, 0, 1]], dtype=torch.float64)
    meta = {"filename_or_obj": "fixed.nii.gz", "original_channel_dim": float("nan")}
    ddf = MetaTensor(torch.from_numpy(random_ddf(size)), affine=affine, meta=meta)
    label = MetaTensor(torch.ones(1, *size), affine=torch.eye(4), meta={"filename_or_obj": "label.nii.gz"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = WarpByDDFd("label", output_keys="moved", mode="nearest")({"label": label, "ddf": ddf})
    torch.testing.assert_close(out["moved"].affine, affine)
    # but it is made from the label's file
    assert out["moved"].meta["filename_or_obj"] == "label.nii.gz" and out["moved"].spatial_ndim == len(size)
    torch.testing.assert_close(out["label"].affine, torch.eye(4, dtype=torch.float64))
    out["moved"].affine[0, 3] = 0
    torch.testing.assert_close(ddf.affine, affine)
    plain = WarpByDDFd("label")({"label": label, "ddf": ddf.as_tensor()})["label"]
    assert not isinstance(plain, MetaTensor)


def test_missing_keys() -> None:
    ddf, image = torch.zeros(2, 4, 5), torch.rand(1, 4, 5)
    with pytest.raises(KeyError, match="label"):
        WarpByDDFd(("image", "label"))({"image": image, "ddf": ddf})
    out = WarpByDDFd(
        ("label", "image"), output_keys=("wl", "wi"), mode=("nearest", "bilinear"), allow_missing_keys=True
    )({"image": image, "ddf": ddf})
    assert set(out) == {"image", "ddf", "wi"}
    torch.testing.assert_close(out["wi"], image)
    with pytest.raises(KeyError, match=r"'ddf'.*\['image'\]"):
        WarpByDDFd("image")({"image": image})


def test_errors() -> None:
    with pytest.raises(ValueError, match="linear"):
        WarpByDDFd("image", mode="linear")
    with pytest.raises(ValueError):
        WarpByDDFd(("image", "label"), output_keys=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"ddf must have shape \(1, 2, 4, 5\)"):
        WarpByDDFd("image")({"image": torch.rand(1, 4, 5), "ddf": torch.zeros(2, 5, 5)})
    assert transforms.WarpByDDFD is transforms.WarpByDDFd is transforms.WarpByDDFDict


@pytest.mark.parametrize("size", [(6, 9), (5, 7, 4)])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, MetaTensor])
def test_points(size: tuple[int, ...], kind: Callable[[Any], Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(11, len(size), generator=generator) * (torch.tensor(size) - 1)
    ddf = torch.randn(len(size), *size, generator=generator)
    expected = warp_points_by_ddf(points[None], ddf[None])[0]
    moved = WarpPointsByDDF()(kind(points), kind(ddf))
    assert type(moved) is torch.Tensor
    torch.testing.assert_close(moved, expected)
    item = {"fixed_keypoints": kind(points), "ddf": kind(ddf), "name": "x"}
    out = WarpPointsByDDFd("fixed_keypoints", output_keys="warped_keypoints")(item)
    assert set(out) == {*item, "warped_keypoints"} and out["fixed_keypoints"] is item["fixed_keypoints"]
    torch.testing.assert_close(out["warped_keypoints"], expected)
    torch.testing.assert_close(WarpPointsByDDFd("fixed_keypoints")(item)["fixed_keypoints"], expected)


def test_points_missing_keys_and_errors() -> None:
    item = {"a": torch.zeros(1, 2), "ddf": torch.ones(2, 4, 5)}
    with pytest.raises(KeyError, match="b"):
        WarpPointsByDDFd(("a", "b"))(item)
    assert WarpPointsByDDFd(("b", "a"), output_keys=("c", "d"), allow_missing_keys=True)(item)["d"].tolist() == [[1, 1]]
    with pytest.raises(KeyError, match=r"'ddf'.*\['a'\]"):
        WarpPointsByDDFd("a")({"a": item["a"]})
    with pytest.raises(ValueError):
        WarpPointsByDDFd("a", output_keys=("b", "c"))
    for transform in (WarpPointsByDDF, lambda outside: WarpPointsByDDFd("a", outside=outside)):
        with pytest.raises(ValueError, match="outside: expected"):
            transform("border")
    far = {**item, "a": torch.tensor([[9.0, 1.0]])}
    with pytest.raises(ValueError, match="1 of 1 points lie outside"):
        WarpPointsByDDFd("a")(far)
    assert WarpPointsByDDFd("a", outside="clamp")(far)["a"].tolist() == [[10, 2]]
    assert transforms.WarpPointsByDDFD is transforms.WarpPointsByDDFd is transforms.WarpPointsByDDFDict
