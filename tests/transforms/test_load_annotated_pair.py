# SPDX-License-Identifier: Apache-2.0
"""load_annotated_pair_transforms: values, sizes and spacing of all that belongs to a pair, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_deq.metrics import TargetRegistrationErrorMetric
from monai_deq.transforms import ResampleDDF, load_annotated_pair_transforms

AFFINE = np.array([[1.5, 0, 0, 3], [0, 0, -2, 7], [0, 0.5, 0, -4], [0, 0, 0, 1.0]])
SIZES = {2: (12, 8, 1), 3: (12, 8, 10)}
NUMBER = 6


def save(path: Path, array: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return str(path)


def make_pair(folder: Path, ndim: int = 3, **other: Any) -> dict[str, Any]:
    """A pair in Hounsfield units; ``other`` replaces an array of it."""
    rng = np.random.default_rng(0)
    size = SIZES[ndim]
    pair = {}
    for role in ("fixed", "moving"):
        arrays = {
            role: rng.integers(-1500, 1000, size).astype(np.int16),
            f"{role}_mask": (rng.random(size) > 0.5).astype(np.uint8),
            f"{role}_label": rng.integers(0, 4, size).astype(np.uint8),
        }
        for key, array in arrays.items():
            pair[key] = save(folder / f"{key}.nii.gz", other.get(key, array))
        points = other.get(f"{role}_keypoints", rng.uniform(0, np.array(size[:ndim]) - 1, (NUMBER, ndim)))
        pair[f"{role}_keypoints"] = str(folder / f"{role}.csv")
        np.savetxt(pair[f"{role}_keypoints"], points, delimiter=",", fmt="%.4f")
    return {**pair, "case": "X_0001", "fixed_subject": "X_0001_0000", "moving_subject": "X_0001_0001"}


def read(file: str, ndim: int) -> np.ndarray:
    return nib.load(file).get_fdata().reshape(1, *SIZES[ndim][:ndim])


def check_at_full_size(item: dict[str, Any], pair: dict[str, Any], ndim: int, scans: str = "") -> None:
    for role in ("fixed", "moving"):
        for key in (f"{role}_mask", f"{role}_label"):
            np.testing.assert_array_equal(item[key], read(pair[key], ndim))
        np.testing.assert_allclose(item[role + scans].affine, AFFINE)
        points = np.loadtxt(pair[f"{role}_keypoints"], delimiter=",")
        np.testing.assert_allclose(item[f"{role}_keypoints"], points, atol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_as_in_the_files(tmp_path: Path, ndim: int) -> None:
    pair = make_pair(tmp_path, ndim)
    item = load_annotated_pair_transforms(ndim, window=(-1000, 500))(pair)
    assert set(item) == set(pair) and item["case"] == "X_0001"
    check_at_full_size(item, pair, ndim)
    for role in ("fixed", "moving"):
        assert isinstance(item[role], MetaTensor) and item[role].dtype == torch.float32
        expected = (np.clip(read(pair[role], ndim), -1000, 500) + 1000) / 1500
        np.testing.assert_allclose(item[role], expected, atol=1e-6)
    default = load_annotated_pair_transforms(ndim)(pair)["fixed"]
    np.testing.assert_allclose(default, (np.clip(read(pair["fixed"], ndim), -1200, 400) + 1200) / 1600, atol=1e-6)
    whole = load_annotated_pair_transforms(ndim, window=None)(pair)["fixed"]
    file = read(pair["fixed"], ndim)
    np.testing.assert_allclose(whole, (file - file.min()) / (file.max() - file.min()), atol=1e-6)


@pytest.mark.parametrize("ndim", [2, 3])
def test_resized_pair_keeps_places_and_lengths(tmp_path: Path, ndim: int) -> None:
    """Of one field, resampled, the error in mm is the same at both sizes."""
    full_size, size = SIZES[ndim][:ndim], (6, 12, 5)[:ndim]
    pair = make_pair(tmp_path, ndim)
    full, small = (load_annotated_pair_transforms(ndim, s)(pair) for s in (None, size))
    spacing = np.linalg.norm(AFFINE[:3, :ndim], axis=0) * np.divide(full_size, size)
    for key in ("fixed", "moving", "fixed_mask", "moving_label"):
        assert tuple(small[key].shape) == (1, *size)
        np.testing.assert_allclose(np.linalg.norm(small[key].affine[:3, :ndim], axis=0), spacing)
    assert set(small["fixed_mask"].unique().tolist()) == {0, 1}
    # the voxel of the file that holds the centre of a new one
    nearest = [np.floor((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(size, full_size, strict=True)]
    expected = full["fixed_label"].numpy()[0][np.ix_(*nearest)]
    np.testing.assert_array_equal(small["fixed_label"][0], expected)
    # a constant displacement, the same length on both grids
    ddf = torch.full((ndim, *full_size), 0.75)
    errors = []
    for item, field in ((full, ddf), (small, ResampleDDF()(ddf, size))):
        score = TargetRegistrationErrorMetric()(
            [field], [item["fixed_keypoints"]], moving_points=[item["moving_keypoints"]], reference=[item["fixed"]]
        )
        errors.append(float(score))
    fixed, moving = (np.loadtxt(pair[f"{role}_keypoints"], delimiter=",") for role in ("fixed", "moving"))
    truth = np.linalg.norm((fixed + 0.75 - moving) * [1.5, 0.5, 2.0][:ndim], axis=1).mean()
    np.testing.assert_allclose(errors, truth, rtol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_scans_kept_at_full_size(tmp_path: Path, ndim: int) -> None:
    pair = make_pair(tmp_path, ndim)
    size = (6, 12, 5)[:ndim]
    item = load_annotated_pair_transforms(ndim, size, keep_scans=True)(pair)
    check_at_full_size(item, pair, ndim, "_scan")
    for role in ("fixed", "moving"):
        np.testing.assert_array_equal(item[f"{role}_scan"], read(pair[role], ndim))
        assert tuple(item[role].shape) == (1, *size) and 0 <= item[role].min() < item[role].max() <= 1


def test_annotations_are_optional(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    some = {key: pair[key] for key in ("fixed", "moving", "fixed_mask")}
    assert set(load_annotated_pair_transforms(3, (6, 6, 6))(some)) == set(some)


BAD = {
    "mask of another shape": ({"fixed_mask": np.zeros((12, 8, 9), np.uint8)}, r"fixed_mask.nii.gz: .*\(1, 12, 8, 9\)"),
    "mask of probabilities": ({"moving_mask": np.full(SIZES[3], 0.5)}, "moving_mask.nii.gz: .* label numbers"),
    "image of another size": (
        {
            "moving": np.arange(288).reshape(12, 8, 3),
            **{f"moving_{kind}": np.zeros((12, 8, 3), np.uint8) for kind in ("mask", "label")},
        },
        r"their size differs: .*fixed.nii.gz has \(12, 8, 10\), .*moving.nii.gz has \(12, 8, 3\)",
    ),
    "keypoints of another number": (
        {"moving_keypoints": np.ones((5, 3))},
        r"has 6 points and 'moving_keypoints' has 5 \(X_0001_0000 and X_0001_0001\)",
    ),
    "keypoints outside": ({"fixed_keypoints": np.full((NUMBER, 3), 11.0)}, "fixed.csv: 6 of 6 keypoints lie outside"),
    "keypoints in 2-D": ({"fixed_keypoints": np.ones((NUMBER, 2))}, "fixed.csv: expected lines of 3 voxel coordinates"),
    "intensities in [0, 1]": (
        {"moving": np.linspace(0, 1, 960).reshape(SIZES[3])},
        r"moving.nii.gz: .* \[0, 1\] already",
    ),
    "constant image": ({"fixed": np.full(SIZES[3], -1000.0)}, "fixed.nii.gz: the image has the value -1000 everywhere"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_pairs_are_refused_by_name(tmp_path: Path, what: str) -> None:
    other, message = BAD[what]
    other = {key: array.astype(np.int16) if array.dtype == np.int64 else array for key, array in other.items()}
    with pytest.raises(ValueError, match=message):
        load_annotated_pair_transforms(3, (6, 6, 6))(make_pair(tmp_path, **other))


def test_bad_arguments_and_files(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, fixed_keypoints=np.full((NUMBER, 3), 11.0))
    assert load_annotated_pair_transforms(3, outside="clamp")(pair)["fixed_keypoints"].shape == (NUMBER, 3)
    Path(pair["moving_keypoints"]).unlink()
    with pytest.raises(FileNotFoundError, match="moving.csv"):
        load_annotated_pair_transforms(3, outside="clamp")(pair)
    for arguments, message in (
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3"),
        ({"spatial_size": (6, 6)}, "spatial_size must be 3 numbers"),
        ({"window": (3, 1)}, "window must be"),
        ({"outside": "zeros"}, "outside: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            load_annotated_pair_transforms(**arguments)
