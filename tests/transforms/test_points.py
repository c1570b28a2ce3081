# SPDX-License-Identifier: Apache-2.0
"""Keypoints from files, their checks, and how they follow a change of image size."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Resize

import monai_deq.transforms as transforms
from monai_deq.transforms import CheckSameKeypointsd, LoadKeypointsd, ResizeKeypointsd, load_keypoints, resize_keypoints


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("number", [1, 5])
def test_reads_the_coordinates(tmp_path: Path, ndim: int, number: int) -> None:
    points = np.random.default_rng(0).uniform(0, 200, (number, ndim)).round(4)
    file = write(tmp_path / "k.csv", "".join(",".join(f"{v:.4f}" for v in p) + "\n" for p in points))
    loaded = load_keypoints(file, ndim)
    assert loaded.shape == (number, ndim) and loaded.dtype == torch.float32
    np.testing.assert_array_equal(loaded, points.astype(np.float32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y,z\n1,2,3\n", "without a header; cannot read it"),
        ("1,2,3\n1,2\n", "cannot read it"),
        ("1 2 3\n", "cannot read it"),
        ("1,2\n3,4\n", r"expected lines of 3 voxel coordinates .* got 2 column\(s\)"),
        ("", "the file is empty"),
        ("1,2,3\n4,nan,6\n", "point 2 has NaN or infinity"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "k.csv", text)
    with pytest.raises(ValueError, match=message) as caught:
        load_keypoints(file, 3)
    assert file in str(caught.value)
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="binary.csv: expected lines"):
        load_keypoints(tmp_path / "binary.csv", 3)
    with pytest.raises(FileNotFoundError, match="absent.csv"):
        load_keypoints(tmp_path / "absent.csv", 3)


def test_points_outside_the_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item = {
        "fixed_keypoints": write(tmp_path / "f.csv", "0,0,0\n-0.5,3,4.5\n1,2,7\n-3,0,0\n"),
        "fixed": MetaTensor(torch.zeros(1, 4, 5, 5), meta={"filename_or_obj": "scan.nii.gz"}),
    }
    with pytest.raises(ValueError, match=r"f.csv: 2 of 4 .* \(4, 5, 5\) \(scan.nii.gz\), e.g. line 3: \[1.0, 2.0, 7.0"):
        LoadKeypointsd("fixed_keypoints", "fixed")(item)
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        kept = LoadKeypointsd("fixed_keypoints", "fixed", outside="clamp")(item)["fixed_keypoints"]
    assert "2 of 4 keypoints lie outside" in caplog.text
    assert kept.tolist() == [[0, 0, 0], [-0.5, 3, 4.5], [1, 2, 7], [-3, 0, 0]]
    with pytest.raises(ValueError, match="outside: expected 'refuse' or 'clamp'"):
        LoadKeypointsd("fixed_keypoints", "fixed", outside="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one image for each"):
        LoadKeypointsd(("a", "b"), "fixed")
    assert LoadKeypointsd("a", "fixed", allow_missing_keys=True)({}) == {}
    with pytest.raises(KeyError):
        LoadKeypointsd("a", "fixed")({})


def test_sets_must_correspond() -> None:
    item = {"fixed_keypoints": torch.zeros(5, 3), "moving_keypoints": torch.ones(5, 3), "fixed_subject": "A"}
    assert CheckSameKeypointsd()(item) == item
    with pytest.raises(ValueError, match=r"'fixed_keypoints' has 5 points and 'moving_keypoints' has 4 \(A\)"):
        CheckSameKeypointsd()({**item, "moving_keypoints": torch.ones(4, 3)})
    assert CheckSameKeypointsd(allow_missing_keys=True)({}) == {}


@pytest.mark.parametrize(("old", "new"), [((12, 10), (8, 15)), ((12, 9, 10), (6, 9, 25))])
def test_points_stay_where_they_are_in_the_body(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """World coordinates through the affine that MONAI's Resize gives the image."""
    ndim = len(old)
    generator = torch.Generator().manual_seed(0)
    affine = torch.eye(ndim + 1, dtype=torch.float64)
    affine[:ndim] = torch.randn(ndim, ndim + 1, generator=generator, dtype=torch.float64)
    image = MetaTensor(torch.rand(1, *old, generator=generator), affine=affine)
    points = torch.rand(9, ndim, generator=generator, dtype=torch.float64) * (torch.tensor(old) - 1)
    resized = Resize(new, mode="bilinear" if ndim == 2 else "trilinear", align_corners=False)(image)

    def world(p: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return p @ matrix[:ndim, :ndim].T + matrix[:ndim, ndim]

    out = ResizeKeypointsd("points", "image", new)({"points": points, "image": image})["points"]
    torch.testing.assert_close(out, resize_keypoints(points, old, new))
    torch.testing.assert_close(world(out, resized.affine), world(points, affine))
    # the corners of the field of view
    corners = torch.tensor([[-0.5] * ndim, [n - 0.5 for n in old]])
    assert resize_keypoints(corners, old, new).tolist() == [[-0.5] * ndim, [n - 0.5 for n in new]]


def test_names() -> None:
    for name in ("LoadKeypoints", "CheckSameKeypoints", "ResizeKeypoints"):
        assert len({getattr(transforms, name + suffix) for suffix in ("d", "D", "Dict")}) == 1
    with pytest.raises(ValueError, match="one image for each"):
        ResizeKeypointsd("a", ("b", "c"), (4, 4))
