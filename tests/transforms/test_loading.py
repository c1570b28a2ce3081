# SPDX-License-Identifier: Apache-2.0
"""From files to items: what passes, what is scaled, how sizes change, what is kept beside, and what is refused."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, PersistentDataset
from monai.transforms import Compose

from monai_deq.metrics import TargetRegistrationErrorMetric
from monai_deq.networks.nets import DEQRegistrationNet
from monai_deq.transforms import (
    CheckedCompose,
    CheckLabeld,
    CheckRegistrationImaged,
    CheckSameGridd,
    DropSliceAxisd,
    FixedPointSolverd,
    LoadRegistrationImaged,
    ResampleDDF,
    ResampleDDFd,
    SaveRegistrationd,
    WarpByDDFd,
    load_annotated_pair_transforms,
    load_pair_transforms,
    load_subject_transforms,
)

# of a slice it is coronal: its second axis is the third of the world
AFFINE = np.array([[1.5, 0, 0, 3], [0, 0, -2, 7], [0, 0.5, 0, -4], [0, 0, 0, 1.0]])
SPACING = np.array([1.5, 0.5, 2.0])
SIZE = {2: (12, 10, 1), 3: (12, 10, 8)}
NUMBER = 6


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> str:
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


def read(file: str, ndim: int) -> np.ndarray:
    return nib.load(file).get_fdata().reshape(1, *SIZE[ndim][:ndim])


def unit(ndim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 0.7, SIZE[ndim]).astype(np.float32)


def labels(ndim: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 36, SIZE[ndim]).astype(np.uint8)


def ct(size: tuple[int, ...], seed: int) -> np.ndarray:
    """Hounsfield units, with the extremes in it."""
    array = np.random.default_rng(seed).integers(-1000, 2000, size).astype(np.int16)
    array.flat[:2] = -1000, 2000
    return array


def robust(array: np.ndarray) -> tuple[float, float]:
    """What becomes 0, the 0.1th percentile, and 1: the 99th of what is above it becomes 0.5."""
    values = np.sort(array, axis=None).astype(np.float64)
    low = values[int(0.001 * (len(values) - 1))]
    above = values[values > low]
    return low, 2 * above[int(0.99 * (len(above) - 1))] - low


def scaled(array: np.ndarray) -> np.ndarray:
    low, high = robust(array)
    return ((array.astype(np.float64) - low) / (high - low)).clip(0, 1)


def with_value(ndim: int, value: float) -> np.ndarray:
    image = unit(ndim)
    image[3, 4] = value
    return image


# ---- one transform


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.nii.gz"):
        LoadRegistrationImaged("image")({"image": str(tmp_path / "absent.nii.gz")})
    with pytest.raises(ValueError, match="'image' must be the name"):
        LoadRegistrationImaged("image")({"image": None})
    with pytest.raises(KeyError):
        LoadRegistrationImaged("image")({})


def test_single_transforms() -> None:
    image = torch.rand(1, 4, 5, 6)
    assert DropSliceAxisd("image")({"image": image})["image"] is image
    assert DropSliceAxisd("image")({"image": image[..., :1]})["image"].shape == (1, 4, 5)
    CheckRegistrationImaged("image", 3)({"image": image})
    with pytest.raises(ValueError, match="^image: "):  # the key where no file is known
        CheckRegistrationImaged("image", 2)({"image": image})
    with pytest.raises(ValueError, match="one image for each"):
        CheckLabeld(("a", "b"), "image")
    assert CheckSameGridd(allow_missing_keys=True)({}) == {}


# ---- a subject


def subject(
    folder: Path, ndim: int = 3, image: np.ndarray | None = None, label: np.ndarray | None = None
) -> dict[str, Any]:
    return {
        "subject": "S1",
        "image": save(folder / "image.nii.gz", unit(ndim) if image is None else image),
        "label": save(folder / "label.nii.gz", labels(ndim) if label is None else label),
    }


@pytest.mark.parametrize("ndim", [2, 3])
def test_loads_as_it_is(tmp_path: Path, ndim: int, caplog: pytest.LogCaptureFixture) -> None:
    given = subject(tmp_path, ndim)
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        item = load_subject_transforms(ndim)(given)
    assert not caplog.records
    size = SIZE[ndim][:ndim]
    for key, expected in (("image", unit(ndim)), ("label", labels(ndim))):
        dtype = torch.float32 if key == "image" else torch.int32
        assert isinstance(item[key], MetaTensor) and item[key].dtype == dtype
        assert tuple(item[key].shape) == (1, *size)
        np.testing.assert_array_equal(item[key][0].numpy(), expected.reshape(size))
        np.testing.assert_allclose(item[key].affine, AFFINE)  # whole, also in 2-D
    assert item["image"].spatial_ndim == ndim and item["subject"] == "S1"
    assert given["image"] == str(tmp_path / "image.nii.gz")  # the subject itself is not changed


def test_label_is_optional(tmp_path: Path) -> None:
    given = subject(tmp_path)
    without = {key: given[key] for key in ("subject", "image")}
    for item in (without, {**given, "label": None}):
        assert set(load_subject_transforms(3, (8, 8, 8))(item)) == {"subject", "image"}


@pytest.mark.parametrize("ndim", [2, 3])
def test_resize(tmp_path: Path, ndim: int) -> None:
    # intensity and label are the position along axis 0, so that the two must tell the same place after resizing
    ramp = np.broadcast_to(np.arange(12).reshape(12, 1, 1), SIZE[ndim])
    given = subject(tmp_path, ndim, (ramp / 20).astype(np.float32), ramp.astype(np.uint8))
    size = (8, 15, 9)[:ndim]
    item = load_subject_transforms(ndim, list(size))(given)
    assert tuple(item["image"].shape) == tuple(item["label"].shape) == (1, *size)
    # centre of output voxel o in input voxels, half-voxel convention
    centres = (np.arange(8) + 0.5) * 12 / 8 - 0.5
    middle = (0, slice(2, 6), 4, 4)[: ndim + 1]
    np.testing.assert_allclose(item["image"][middle] * 20, centres[2:6], atol=1e-3)
    np.testing.assert_array_equal(item["label"][(0, slice(None), 4, 4)[: ndim + 1]], np.round(centres))
    scale = np.eye(4)
    for axis in range(ndim):
        factor = SIZE[ndim][axis] / size[axis]
        scale[axis, axis], scale[axis, 3] = factor, (factor - 1) / 2
    for key in ("image", "label"):
        np.testing.assert_allclose(item[key].affine, AFFINE @ scale)


@pytest.mark.parametrize("ndim", [2, 3])
def test_resize_keeps_the_label_numbers(tmp_path: Path, ndim: int) -> None:
    numbers = np.zeros(SIZE[ndim], np.uint8)
    numbers[3:9, 2:8] = 7
    numbers[5:8, 4:7] = 35
    item = load_subject_transforms(ndim, (17, 7, 5)[:ndim])(subject(tmp_path, ndim, label=numbers))
    assert set(item["label"].unique().tolist()) == {0.0, 7.0, 35.0}
    assert float(item["image"].min()) >= 0.1 and float(item["image"].max()) <= 0.7


@pytest.mark.parametrize(
    "array",
    [
        np.random.default_rng(0).integers(5, 3000, SIZE[3]).astype(np.int16),
        np.random.default_rng(0).uniform(-1, 0.5, SIZE[3]).astype(np.float32),
    ],
)
def test_other_ranges_are_scaled_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, array: np.ndarray) -> None:
    given = subject(tmp_path, image=array)
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        image = load_subject_transforms(3)(given)["image"]
    np.testing.assert_allclose(image[0].numpy(), scaled(array), atol=1e-6)
    (message,) = caplog.messages
    assert given["image"] in message
    stated = [float(v) for v in message.split("[")[1].split("]")[0].split(",")]
    np.testing.assert_allclose(stated, robust(array), rtol=1e-4)
    np.testing.assert_allclose(image.affine, AFFINE)


@pytest.mark.parametrize(
    ("ndim", "image", "message"),
    [
        (3, np.zeros(SIZE[3], np.float32), "zero everywhere"),
        (3, np.full(SIZE[3], 0.25, np.float32), "0.25 everywhere"),
        (3, with_value(3, np.nan), "8 of 960 voxels are NaN"),
        (2, with_value(2, np.inf), "1 of 120 voxels"),
        (3, np.random.default_rng(0).random((6, 5, 4, 2)).astype(np.float32), "4-D.*2 channels of \\(6, 5, 4\\)"),
        (2, unit(3), "expected a 2-D image, got one of size \\(12, 10, 8\\)"),
        (3, unit(2), "expected a 3-D image, got one of size \\(12, 10, 1\\)"),
        (2, unit(2).reshape(12, 1, 10), "expected a 2-D image"),
    ],
)
def test_bad_images(tmp_path: Path, ndim: int, image: np.ndarray, message: str) -> None:
    given = subject(tmp_path, ndim, image=image)
    del given["label"]
    with pytest.raises(ValueError, match=message) as caught:
        load_subject_transforms(ndim)(given)
    assert given["image"] in str(caught.value)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (labels(3)[:, :, :7], r"size differs.*\(12, 10, 8\).*\(12, 10, 7\)"),
        (labels(3).astype(np.float32) + 0.5, "960 voxels"),
        (with_value(3, np.nan).round(), "nan"),
        (labels(3).astype(np.int16) - 50, "label numbers"),
        (with_value(3, np.inf).round(), "e.g. inf"),
        (with_value(3, 1e19).round(), "e.g. 1e\\+19"),
    ],
)
def test_bad_labels(tmp_path: Path, label: np.ndarray, message: str) -> None:
    given = subject(tmp_path, label=label)
    with pytest.raises(ValueError, match=message) as caught:
        load_subject_transforms(3)(given)
    assert given["label"] in str(caught.value)


def other_affine(column: int, factor: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:, column] *= factor
    return affine


def test_label_beside_its_image_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given, near, beside = subject(tmp_path), AFFINE.copy(), AFFINE.copy()
    near[2, 3] += 0.045  # of the second axis, 0.5 mm a voxel
    beside[2, 3] += 0.055
    save(tmp_path / "label.nii.gz", labels(3), near)
    load_subject_transforms(3)(given)
    for affine, message in (
        (beside, r"label.nii.gz lies up to 0\.11 voxels away from .*image.nii.gz"),
        (other_affine(0, -1), "orientation differs: .*image.nii.gz has RSP, .*label.nii.gz has LSP"),
        (np.eye(4), "spacing"),
    ):
        save(tmp_path / "label.nii.gz", labels(3), affine)
        with pytest.raises(ValueError, match="An image and its segmentation must share one voxel grid.*" + message):
            load_subject_transforms(3)(given)
    assert not caplog.records


def test_pair_of_subjects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same transforms read a pair; the grids are compared after that."""
    files = {"fixed": save(tmp_path / "f.nii.gz", unit(3, 1)), "moving": save(tmp_path / "m.nii.gz", unit(3, 2))}
    files["moving_label"] = save(tmp_path / "ml.nii.gz", labels(3))
    load = load_subject_transforms(3, None, ("fixed", "moving"), ("fixed_label", "moving_label"))
    item = CheckSameGridd()(load(files))
    assert set(item) == {"fixed", "moving", "moving_label"} and not caplog.records
    moved = AFFINE.copy()
    moved[0, 3] += 5
    for name, array in (("m", unit(3, 2)), ("ml", labels(3))):
        save(tmp_path / f"{name}.nii.gz", array, moved)
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        CheckSameGridd()(load(files))
    assert "origin" in caplog.text
    del files["moving_label"]
    for array, affine, message in (
        (unit(3), other_affine(0, 1.25), "spacing.*1.5, .*1.875, "),
        (unit(3), other_affine(0, -1), "orientation.*RSP.*LSP"),
        (unit(3)[:11], AFFINE, r"size.*\(12, 10, 8\).*\(11, 10, 8\)"),
    ):
        save(tmp_path / "m.nii.gz", array, affine)
        with pytest.raises(ValueError, match=message + ".*Resample one onto the other") as caught:
            CheckSameGridd()(load(files))
        assert files["fixed"] in str(caught.value) and files["moving"] in str(caught.value)


def test_compose_raises_the_error_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.nii.gz"):
        load_subject_transforms(3)({"image": str(tmp_path / "absent.nii.gz")})
    file = Path(save(tmp_path / "cut.nii.gz", unit(3)))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(RuntimeError, match=r"cut.nii.gz.*incomplete.*download it again") as caught:
        load_subject_transforms(3)({"image": file})
    assert isinstance(caught.value.__cause__, EOFError)  # what the reader said is kept
    nested = CheckedCompose([CheckedCompose([CheckRegistrationImaged("image", 3)])])
    with pytest.raises(ValueError, match="zero everywhere"):
        nested({"image": torch.zeros(1, 4, 4, 4)})

    def plain(item: Any) -> None:
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        CheckedCompose([plain])({})


def test_works_with_workers_and_disk_caches(tmp_path: Path) -> None:
    """The transforms can be sent to other processes, and items be kept on disk."""
    transforms = pickle.loads(pickle.dumps(load_subject_transforms(3, (8, 8, 8))))
    dataset = PersistentDataset([subject(tmp_path)], transforms, cache_dir=tmp_path / "cache")
    first, again = dataset[0], dataset[0]
    assert torch.equal(first["image"], again["image"]) and first["image"].shape == (1, 8, 8, 8)


# ---- a pair to register


def make_pair(folder: Path, ndim: int, **other: Any) -> dict[str, Any]:
    """A good pair with a label map; ``other`` replaces an array of it."""
    arrays = {"fixed": ct(SIZE[ndim], 1), "moving": ct(SIZE[ndim], 2), "moving_label": labels(ndim), **other}
    return {key: save(folder / f"{key}.nii.gz", array) for key, array in arrays.items()}


@pytest.mark.parametrize("ndim", [2, 3])
def test_scans_are_kept_beside_the_inputs(tmp_path: Path, ndim: int) -> None:
    item = {**make_pair(tmp_path, ndim), "name": "pair 1"}
    small = (4, 3, 2)[:ndim]
    out = load_pair_transforms(ndim, small)(item)
    assert out["name"] == "pair 1"
    for key in ("fixed", "moving"):
        scan, image = out[f"{key}_scan"], out[key]
        np.testing.assert_array_equal(scan, read(item[key], ndim))
        assert isinstance(scan, MetaTensor) and scan.dtype == torch.float32 and scan.spatial_ndim == ndim
        np.testing.assert_allclose(scan.affine, AFFINE)
        assert tuple(image.shape) == (1, *small) and image.dtype == torch.float32
        assert 0 <= float(image.min()) < float(image.max()) <= 1
        # the small grid has the same field of view
        expected = SPACING[:ndim] * np.divide(SIZE[ndim][:ndim], small)
        np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :ndim], axis=0), expected)
    np.testing.assert_array_equal(out["moving_label"], read(item["moving_label"], ndim))


@pytest.mark.parametrize("ndim", [2, 3])
def test_without_resizing_the_input_is_the_scaled_scan(tmp_path: Path, ndim: int) -> None:
    item = make_pair(tmp_path, ndim)
    out = load_pair_transforms(ndim)(item)
    for key in ("fixed", "moving"):
        np.testing.assert_allclose(out[key], scaled(read(item[key], ndim)), atol=1e-6)
        out[key].zero_()
        out[key].affine[:] = 0
        np.testing.assert_array_equal(out[f"{key}_scan"], read(item[key], ndim))
        np.testing.assert_allclose(out[f"{key}_scan"].affine, AFFINE)


def test_images_in_unit_range_pass_unscaled(tmp_path: Path) -> None:
    pair: dict[str, Any] = {key: save(tmp_path / key, unit(3, i)) for i, key in enumerate(("a.nii", "b.nii"))}
    pair = {"fixed": pair["a.nii"], "moving": pair["b.nii"]}
    for label in ({}, {"moving_label": None}):
        out = load_pair_transforms(3)({**pair, **label})
        assert "moving_label" not in out
        np.testing.assert_array_equal(out["fixed"][0], unit(3, 0))
        np.testing.assert_array_equal(out["moving"][0], unit(3, 1))


BAD_PAIR = {
    "4-D": (ct((12, 10, 8, 3), 2), "moving.nii.gz.*4-D"),
    "2-D": (ct((12, 10, 1), 2), "moving.nii.gz.*3-D"),
    "constant": (np.full(SIZE[3], 5.0), "moving.nii.gz.*5 everywhere"),
    "NaN": (with_value(3, np.nan), "moving.nii.gz.*NaN"),
}


@pytest.mark.parametrize("what", BAD_PAIR)
def test_bad_pairs_are_refused_by_name(tmp_path: Path, what: str) -> None:
    array, message = BAD_PAIR[what]
    pair = make_pair(tmp_path, 3)
    del pair["moving_label"]
    save(tmp_path / "moving.nii.gz", array)
    with pytest.raises(ValueError, match=message):
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


def test_bad_labels_of_a_pair_are_refused_by_name(tmp_path: Path) -> None:
    # of a label map a fifth of which lies beyond the image
    for label, message in [
        (np.ones((12, 10, 10), np.uint8), r"moving_label.nii.gz: 240 of 1200 labelled voxels lie outside.*moving.nii"),
        (np.full(SIZE[3], 0.5, np.float32), r"moving_label.nii.gz.*label numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_pair_transforms(3)(make_pair(tmp_path, 3, moving_label=label))


@pytest.mark.parametrize("make", [load_subject_transforms, load_pair_transforms, load_annotated_pair_transforms])
def test_bad_sizes_are_refused(make: Any) -> None:
    for size in [(8, 8), (8, 8, 8, 8), 8, (8, 8, 0), (8, 8, 1), (8, 8, 7.5), "888"]:
        with pytest.raises(ValueError, match="spatial_size must be 3 numbers"):
            make(3, size)
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3"):
        make(4)


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
    Compose(
        [
            load_pair_transforms(ndim, (6, 10, 4)[:ndim]),
            FixedPointSolverd(DEQRegistrationNet(Shift(1.0))),
            ResampleDDFd("fixed_scan"),
            WarpByDDFd(
                ("moving_scan", "moving_label"),
                output_keys=("warped", "warped_label"),
                mode=("bilinear", "nearest"),
            ),
            SaveRegistrationd(tmp_path / "out"),
        ]
    )({**pair, "fixed_subject": "f", "moving_subject": "m"})
    # one voxel of 12 / 6: two rows; the last rows look past the image and see its border
    rows = np.minimum(np.arange(12) + 2, 11)
    for key, name in (("moving", "warped"), ("moving_label", "warped_label")):
        written = nib.load(tmp_path / "out" / f"m_to_f_{name}.nii.gz")
        expected = nib.load(pair[key]).get_fdata()[rows]
        np.testing.assert_allclose(written.get_fdata(), expected, atol=2e-2 if name == "warped" else 0)
        np.testing.assert_allclose(written.affine, AFFINE, atol=1e-6)
    field = nib.load(tmp_path / "out" / "m_to_f_ddf.nii.gz")
    assert field.shape == (*SIZE[ndim], ndim)
    np.testing.assert_allclose(field.get_fdata()[..., 0], 2)
    np.testing.assert_allclose(field.get_fdata()[..., 1:], 0)
    assert json.loads((tmp_path / "out" / "m_to_f_record.json").read_text())["steps"] == 2


def test_intensities_in_a_window(tmp_path: Path) -> None:
    item = make_pair(tmp_path, 3)
    loaded = load_pair_transforms(3, window=(-1000, 200))(item)
    hu = ct(SIZE[3], 1).astype(np.float64)
    np.testing.assert_allclose(loaded["fixed"][0], (hu.clip(-1000, 200) + 1000) / 1200, atol=1e-6)
    np.testing.assert_array_equal(loaded["fixed_scan"][0], hu)
    with pytest.raises(ValueError, match="no intensity is inside the window"):
        load_pair_transforms(3, window=(3000, 4000))(item)


@pytest.mark.parametrize("ndim", [2, 3])
def test_warm_start_on_the_networks_grid(ndim: int, tmp_path: Path) -> None:
    size = SIZE[ndim][:ndim]
    pair = make_pair(tmp_path, ndim)
    del pair["moving_label"]
    ddf = np.random.default_rng(3).normal(size=(*SIZE[ndim], ndim)).astype(np.float32)
    path = save(tmp_path / "ddf.nii.gz", ddf)
    expected = np.moveaxis(ddf.reshape(*size, ndim), -1, 0)
    assert "initial_ddf" not in load_pair_transforms(ndim)(pair)
    item = load_pair_transforms(ndim)({**pair, "initial_ddf": path})
    np.testing.assert_array_equal(item["initial_ddf"], expected)
    # at half the size: means over blocks of two voxels, in voxels twice as large
    half = [n // 2 for n in size]
    item = load_pair_transforms(ndim, half)({**pair, "initial_ddf": path})
    blocks = expected.astype(float).reshape(ndim, *[k for n in half for k in (n, 2)])
    assert item["initial_ddf"].shape == (ndim, *half) == (ndim, *item["fixed"].shape[1:])
    np.testing.assert_allclose(item["initial_ddf"], blocks.mean(axis=tuple(range(2, 2 * ndim + 1, 2))) / 2, atol=1e-6)


def test_warm_start_on_a_turned_grid(tmp_path: Path) -> None:
    """It displaces the same places of the body by the same vectors."""
    pair = make_pair(tmp_path, 3)
    ddf = np.random.default_rng(3).normal(size=(*SIZE[3], 3)).astype(np.float32)
    pair["initial_ddf"] = save(tmp_path / "ddf.nii.gz", ddf)
    item = load_pair_transforms(3, orientation="RAS")(pair)
    affine, size = item["fixed"].affine.numpy(), item["fixed"].shape[1:]
    assert tuple(size) == (12, 8, 10) and (affine[:3, :3].diagonal() > 0).all()
    voxels = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    old = np.round((world - AFFINE[:3, 3]) @ np.linalg.inv(AFFINE[:3, :3]).T).astype(int)
    expected = ddf[tuple(np.moveaxis(old, -1, 0))] @ AFFINE[:3, :3].T
    found = np.moveaxis(item["initial_ddf"].numpy(), 0, -1) @ affine[:3, :3].T
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(item["initial_ddf"].affine, affine)


# ---- a pair with annotations


def annotated_pair(folder: Path, ndim: int = 3, **other: Any) -> dict[str, Any]:
    """A pair in Hounsfield units; ``other`` replaces an array of it."""
    rng = np.random.default_rng(0)
    size = SIZE[ndim]
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


def check_at_full_size(item: dict[str, Any], pair: dict[str, Any], ndim: int, scans: str = "") -> None:
    for role in ("fixed", "moving"):
        for key in (f"{role}_mask", f"{role}_label"):
            np.testing.assert_array_equal(item[key], read(pair[key], ndim))
        np.testing.assert_allclose(item[role + scans].affine, AFFINE)
        points = np.loadtxt(pair[f"{role}_keypoints"], delimiter=",")
        np.testing.assert_allclose(item[f"{role}_keypoints"], points, atol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_annotated_pair_as_in_the_files(tmp_path: Path, ndim: int) -> None:
    pair = annotated_pair(tmp_path, ndim)
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
    np.testing.assert_allclose(whole, scaled(file), atol=1e-6)


@pytest.mark.parametrize("ndim", [2, 3])
def test_resized_annotated_pair_keeps_places_and_lengths(tmp_path: Path, ndim: int) -> None:
    """Of one field, resampled, the error in mm is the same at both sizes."""
    full_size, size = SIZE[ndim][:ndim], (6, 15, 4)[:ndim]
    pair = annotated_pair(tmp_path, ndim)
    full, small = (load_annotated_pair_transforms(ndim, s)(pair) for s in (None, size))
    spacing = SPACING[:ndim] * np.divide(full_size, size)
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
    truth = np.linalg.norm((fixed + 0.75 - moving) * SPACING[:ndim], axis=1).mean()
    np.testing.assert_allclose(errors, truth, rtol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_annotated_scans_kept_at_full_size(tmp_path: Path, ndim: int) -> None:
    pair = annotated_pair(tmp_path, ndim)
    size = (6, 12, 5)[:ndim]
    item = load_annotated_pair_transforms(ndim, size, keep_scans=True)(pair)
    check_at_full_size(item, pair, ndim, "_scan")
    for role in ("fixed", "moving"):
        np.testing.assert_array_equal(item[f"{role}_scan"], read(pair[role], ndim))
        assert tuple(item[role].shape) == (1, *size) and 0 <= item[role].min() < item[role].max() <= 1


def test_annotations_are_optional(tmp_path: Path) -> None:
    pair = annotated_pair(tmp_path)
    some = {key: pair[key] for key in ("fixed", "moving", "fixed_mask")}
    assert set(load_annotated_pair_transforms(3, (6, 6, 6))(some)) == set(some)


BAD_ANNOTATED = {
    "mask of another shape": (
        {"fixed_mask": np.zeros((12, 10, 7), np.uint8)},
        r"size differs: .*fixed.nii.gz has \(12, 10, 8\), .*fixed_mask.nii.gz has \(12, 10, 7\)",
    ),
    "mask of probabilities": ({"moving_mask": np.full(SIZE[3], 0.5)}, "moving_mask.nii.gz: .* label numbers"),
    "image of another size": (
        {
            "moving": ct((12, 10, 3), 0),
            **{f"moving_{kind}": np.zeros((12, 10, 3), np.uint8) for kind in ("mask", "label")},
        },
        r"their size differs: .*fixed.nii.gz has \(12, 10, 8\), .*moving.nii.gz has \(12, 10, 3\)",
    ),
    "keypoints of another number": (
        {"moving_keypoints": np.ones((5, 3))},
        r"has 6 points and 'moving_keypoints' has 5 \(X_0001_0000 and X_0001_0001\)",
    ),
    "keypoints outside": ({"fixed_keypoints": np.full((NUMBER, 3), 11.0)}, "fixed.csv: 6 of 6 keypoints lie outside"),
    "keypoints in 2-D": ({"fixed_keypoints": np.ones((NUMBER, 2))}, "fixed.csv: expected lines of 3 voxel coordinates"),
    "intensities in [0, 1]": ({"moving": np.linspace(0, 1, 960).reshape(SIZE[3])}, r"moving.nii.gz: .* already"),
    "constant image": ({"fixed": np.full(SIZE[3], -1000.0)}, "fixed.nii.gz: the image has the value -1000 everywhere"),
}


@pytest.mark.parametrize("what", BAD_ANNOTATED)
def test_bad_annotated_pairs_are_refused_by_name(tmp_path: Path, what: str) -> None:
    other, message = BAD_ANNOTATED[what]
    with pytest.raises(ValueError, match=message):
        load_annotated_pair_transforms(3, (6, 6, 6))(annotated_pair(tmp_path, **other))


def test_bad_arguments_and_keypoint_files(tmp_path: Path) -> None:
    pair = annotated_pair(tmp_path, fixed_keypoints=np.full((NUMBER, 3), 11.0))
    assert load_annotated_pair_transforms(3, outside="clamp")(pair)["fixed_keypoints"].shape == (NUMBER, 3)
    Path(pair["moving_keypoints"]).unlink()
    with pytest.raises(FileNotFoundError, match="moving.csv"):
        load_annotated_pair_transforms(3, outside="clamp")(pair)
    for arguments, message in (({"window": (3, 1)}, "window must be"), ({"outside": "zeros"}, "outside: expected")):
        with pytest.raises(ValueError, match=message):
            load_annotated_pair_transforms(**arguments)
