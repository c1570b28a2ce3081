# SPDX-License-Identifier: Apache-2.0
"""load_pair_transforms: what the network gets, what is kept for writing, and which pairs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from monai_deq.networks.nets import DEQRegistrationNet
from monai_deq.transforms import FixedPointSolverd, ResampleDDFd, SaveRegistrationd, WarpByDDFd, load_pair_transforms

# a coronal slice: its second axis is the third of the world
AFFINE = np.array([[1.5, 0, 0, 3], [0, 0, -2, 7], [0, 0.5, 0, -4], [0, 0, 0, 1.0]])
SIZES = {2: (8, 6, 1), 3: (8, 6, 4)}


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> str:
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


def ct(size: tuple[int, ...], seed: int) -> np.ndarray:
    """Hounsfield units, odd numbers of 12 bits, with the extremes in it."""
    array = np.random.default_rng(seed).integers(-1000, 2000, size).astype(np.int16)
    array.flat[:2] = -1000, 2000
    return array


def make_pair(folder: Path, ndim: int, **other: Any) -> dict[str, Any]:
    """A good pair with a label map; ``other`` replaces an array of it."""
    arrays = {
        "fixed": ct(SIZES[ndim], 1),
        "moving": ct(SIZES[ndim], 2),
        "moving_label": (np.arange(np.prod(SIZES[ndim])) % 5).reshape(SIZES[ndim]).astype(np.uint8),
        **other,
    }
    return {key: write(folder / f"{key}.nii.gz", array) for key, array in arrays.items()}


@pytest.mark.parametrize("ndim", [2, 3])
def test_scans_are_kept_beside_the_inputs(tmp_path: Path, ndim: int) -> None:
    item = {**make_pair(tmp_path, ndim), "name": "pair 1"}
    small = (4, 3, 2)[:ndim]
    out = load_pair_transforms(ndim, small)(item)
    size = SIZES[ndim][:ndim]
    assert out["name"] == "pair 1"
    for key in ("fixed", "moving"):
        file = nib.load(item[key]).get_fdata().reshape(1, *size)
        scan, image = out[f"{key}_scan"], out[key]
        np.testing.assert_array_equal(scan, file)
        assert isinstance(scan, MetaTensor) and scan.dtype == torch.float32 and scan.spatial_ndim == ndim
        np.testing.assert_allclose(scan.affine, AFFINE)
        assert tuple(image.shape) == (1, *small) and image.dtype == torch.float32
        assert 0 <= float(image.min()) < float(image.max()) <= 1
        # the small grid has the same field of view
        expected = np.linalg.norm(AFFINE[:3, :ndim], axis=0) * np.divide(size, small)
        np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :ndim], axis=0), expected)
    label = nib.load(item["moving_label"]).get_fdata().reshape(1, *size)
    np.testing.assert_array_equal(out["moving_label"], label)


@pytest.mark.parametrize("ndim", [2, 3])
def test_without_resizing_the_input_is_the_scaled_scan(tmp_path: Path, ndim: int) -> None:
    item = make_pair(tmp_path, ndim)
    out = load_pair_transforms(ndim)(item)
    for key in ("fixed", "moving"):
        np.testing.assert_allclose(out[key], (out[f"{key}_scan"] + 1000) / 3000, atol=1e-6)
        out[key].zero_()
        out[key].affine[:] = 0
        np.testing.assert_array_equal(
            out[f"{key}_scan"], nib.load(item[key]).get_fdata().reshape(out[f"{key}_scan"].shape)
        )
        np.testing.assert_allclose(out[f"{key}_scan"].affine, AFFINE)


def test_images_in_unit_range_pass_unscaled(tmp_path: Path) -> None:
    images = {key: np.random.default_rng(i).random(SIZES[3]).astype(np.float32) / 2 for i, key in enumerate("ab")}
    pair = {"fixed": write(tmp_path / "a.nii", images["a"]), "moving": write(tmp_path / "b.nii", images["b"])}
    for label in ({}, {"moving_label": None}):
        out = load_pair_transforms(3)({**pair, **label})
        assert "moving_label" not in out
        np.testing.assert_array_equal(out["fixed"][0], images["a"])
        np.testing.assert_array_equal(out["moving"][0], images["b"])


def other_affine(column: int, factor: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:, column] *= factor
    return affine


BAD = {
    "size": (ct((8, 7, 4), 2), AFFINE, ValueError, "size.*fixed.nii.gz.*moving.nii.gz"),
    "spacing": (ct(SIZES[3], 2), other_affine(1, 1.1), ValueError, "spacing.*fixed.nii.gz.*0.5.*moving.nii.gz.*0.55"),
    "orientation": (ct(SIZES[3], 2), other_affine(0, -1), ValueError, "orientation.*fixed.nii.gz.*moving.nii.gz"),
    "4-D": (ct((8, 6, 4, 3), 2), AFFINE, ValueError, "moving.nii.gz.*4-D"),
    "2-D": (ct((8, 6, 1), 2), AFFINE, ValueError, "moving.nii.gz.*3-D"),
    "constant": (np.full(SIZES[3], 5.0), AFFINE, ValueError, "moving.nii.gz.*5 everywhere"),
    "NaN": (np.where(ct(SIZES[3], 2) < 1990, 0.5, np.nan), AFFINE, ValueError, "moving.nii.gz.*NaN"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_pairs_are_refused_by_name(tmp_path: Path, what: str) -> None:
    array, affine, error, message = BAD[what]
    pair = make_pair(tmp_path, 3)
    del pair["moving_label"]
    write(Path(pair["moving"]), array, affine)
    with pytest.raises(error, match=message):
        load_pair_transforms(3, (4, 4, 4))(pair)


def test_damaged_and_absent_files_are_refused_by_name(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 3)
    moving = Path(pair["moving"])
    moving.write_bytes(moving.read_bytes()[: moving.stat().st_size // 2])
    with pytest.raises(RuntimeError, match=r"moving.nii.gz.*incomplete"):
        load_pair_transforms(3)(pair)
    moving.unlink()
    with pytest.raises(FileNotFoundError, match=r"moving.nii.gz"):
        load_pair_transforms(3)(pair)


def test_bad_labels_are_refused_by_name(tmp_path: Path) -> None:
    for label, message in [
        (np.zeros((8, 6, 5), np.uint8), r"moving_label.nii.gz.*shape.*moving.nii.gz"),
        (np.full(SIZES[3], 0.5, np.float32), r"moving_label.nii.gz.*label numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_pair_transforms(3)(make_pair(tmp_path, 3, moving_label=label))


@pytest.mark.parametrize("size", [(4, 4), (4, 4, 4, 4), 4, (4, 4, 0), (4, 4, 2.5), "444"])
def test_bad_sizes_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="spatial_size must be 3 numbers"):
        load_pair_transforms(3, size)
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3"):
        load_pair_transforms(4)


class Shift(torch.nn.Module):
    """``f = shift - ddf``: the equilibrium is a shift along the first axis, in voxels of the network's grid."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        target = torch.zeros_like(ddf)
        target[:, 0] = self.shift
        return target - ddf


@pytest.mark.parametrize("ndim", [2, 3])
def test_written_scan_has_its_own_size_and_intensities(tmp_path: Path, ndim: int) -> None:
    """From files to files by way of a network that works at half the size."""
    pair = make_pair(tmp_path, ndim)
    network = DEQRegistrationNet(Shift(1.0), num_states=0)
    Compose(
        [
            load_pair_transforms(ndim, (4, 6, 2)[:ndim]),
            FixedPointSolverd(network),
            ResampleDDFd("fixed_scan"),
            WarpByDDFd(
                ("moving_scan", "moving_label"),
                output_keys=("warped", "warped_label"),
                mode=("bilinear", "nearest"),
            ),
            SaveRegistrationd(tmp_path / "out"),
        ]
    )({**pair, "fixed_subject": "f", "moving_subject": "m"})
    # one voxel of 8 / 4: two rows; the last rows look past the image and see its border
    rows = np.minimum(np.arange(8) + 2, 7)
    for key, name in (("moving", "warped"), ("moving_label", "warped_label")):
        written = nib.load(tmp_path / "out" / f"m_to_f_{name}.nii.gz")
        expected = nib.load(pair[key]).get_fdata()[rows]
        np.testing.assert_allclose(written.get_fdata(), expected, atol=2e-2 if name == "warped" else 0)
        np.testing.assert_allclose(written.affine, AFFINE, atol=1e-6)
    field = nib.load(tmp_path / "out" / "m_to_f_ddf.nii.gz")
    assert field.shape == (*SIZES[ndim], ndim)
    np.testing.assert_allclose(field.get_fdata()[..., 0], 2)
    np.testing.assert_allclose(field.get_fdata()[..., 1:], 0)
    assert json.loads((tmp_path / "out" / "m_to_f_record.json").read_text())["steps"] == 2


def test_intensities_in_a_window(tmp_path: Path) -> None:
    item = make_pair(tmp_path, 3)
    loaded = load_pair_transforms(3, window=(-1000, 200))(item)
    hu = ct(SIZES[3], 1).astype(np.float64)
    np.testing.assert_allclose(loaded["fixed"][0], (hu.clip(-1000, 200) + 1000) / 1200, atol=1e-6)
    np.testing.assert_array_equal(loaded["fixed_scan"][0], hu)
    with pytest.raises(ValueError, match="no intensity is inside the window"):
        load_pair_transforms(3, window=(3000, 4000))(item)
