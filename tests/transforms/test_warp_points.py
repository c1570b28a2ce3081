# SPDX-License-Identifier: Apache-2.0
"""WarpPointsByDDF and its dictionary form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

import monai_deq.transforms as transforms
from monai_deq.networks.blocks import warp_points_by_ddf
from monai_deq.transforms import WarpPointsByDDF, WarpPointsByDDFd


@pytest.mark.parametrize("size", [(6, 9), (5, 7, 4)])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, MetaTensor])
def test_array_and_dictionary_form(size: tuple[int, ...], kind) -> None:
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


def test_missing_keys_and_errors() -> None:
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
