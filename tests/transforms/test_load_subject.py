# SPDX-License-Identifier: Apache-2.0
"""Loading of subjects: what passes, what is scaled, what is refused, and how sizes change."""

from __future__ import annotations

import logging
import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, PersistentDataset

from monai_deq.transforms import (
    CheckedCompose,
    CheckLabeld,
    CheckRegistrationImaged,
    CheckSameGridd,
    DropSliceAxisd,
    LoadRegistrationImaged,
    ScaleToUnitRanged,
    load_subject_transforms,
)

AFFINE = np.array([[-1.0, 0, 0, 80], [0, 0, 2.0, -0.5], [0, -1.5, 0, 96], [0, 0, 0, 1]])
SIZE = {2: (12, 10, 1), 3: (12, 10, 9)}


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


def unit(dim, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 0.7, SIZE[dim]).astype(np.float32)


def labels(dim, seed=0):
    return np.random.default_rng(seed).integers(0, 36, SIZE[dim]).astype(np.uint8)


def subject(tmp_path, dim=3, image=None, label=None):
    image = unit(dim) if image is None else image
    label = labels(dim) if label is None else label
    return {
        "subject": "S1",
        "image": save(tmp_path / "image.nii.gz", image),
        "label": save(tmp_path / "label.nii.gz", label),
    }


@pytest.mark.parametrize("dim", [2, 3])
def test_loads_as_it_is(tmp_path, dim, caplog):
    given = subject(tmp_path, dim)
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        item = load_subject_transforms(dim)(given)
    assert not caplog.records
    size = SIZE[dim][:dim]
    for key, expected in (("image", unit(dim)), ("label", labels(dim))):
        assert isinstance(item[key], MetaTensor) and item[key].dtype == torch.float32
        assert tuple(item[key].shape) == (1, *size)
        np.testing.assert_array_equal(item[key][0].numpy(), expected.reshape(size))
        np.testing.assert_allclose(item[key].affine, AFFINE)  # whole, also in 2-D
    assert item["image"].spatial_ndim == dim and item["subject"] == "S1"
    assert given["image"] == str(tmp_path / "image.nii.gz")  # the subject itself is not changed


@pytest.mark.parametrize("absent", ["none", "no key"])
def test_label_is_optional(tmp_path, absent):
    given = subject(tmp_path)
    if absent == "none":
        given["label"] = None
    else:
        del given["label"]
    assert set(load_subject_transforms(3, (8, 8, 8))(given)) == {"subject", "image"}


@pytest.mark.parametrize("dim", [2, 3])
def test_resize(tmp_path, dim):
    # intensity and label are the position along axis 0, so that the two must tell the same place after resizing
    ramp = np.broadcast_to(np.arange(12).reshape(12, *[1] * (len(SIZE[dim]) - 1)), SIZE[dim])
    given = subject(tmp_path, dim, (ramp / 20).astype(np.float32), ramp.astype(np.uint8))
    size = (8, 15, 9)[:dim]
    item = load_subject_transforms(dim, list(size))(given)
    assert tuple(item["image"].shape) == tuple(item["label"].shape) == (1, *size)
    # centre of output voxel o in input voxels, half-voxel convention
    centres = (np.arange(8) + 0.5) * 12 / 8 - 0.5
    middle = (0, slice(2, 6), 4, 4)[: dim + 1]
    np.testing.assert_allclose(item["image"][middle] * 20, centres[2:6], atol=1e-3)
    np.testing.assert_array_equal(item["label"][(0, slice(None), 4, 4)[: dim + 1]], np.round(centres))
    scale = np.eye(4)
    for axis in range(dim):
        factor = SIZE[dim][axis] / size[axis]
        scale[axis, axis], scale[axis, 3] = factor, (factor - 1) / 2
    for key in ("image", "label"):
        np.testing.assert_allclose(item[key].affine, AFFINE @ scale)


@pytest.mark.parametrize("dim", [2, 3])
def test_resize_keeps_the_label_numbers(tmp_path, dim):
    numbers = np.zeros(SIZE[dim], np.uint8)
    numbers[3:9, 2:8] = 7
    numbers[5:8, 4:7] = 35
    item = load_subject_transforms(dim, (17, 7, 5)[:dim])(subject(tmp_path, dim, label=numbers))
    assert set(item["label"].unique().tolist()) == {0.0, 7.0, 35.0}
    assert float(item["image"].min()) >= 0.1 and float(item["image"].max()) <= 0.7


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 8, 8), 8, (8, 8, 0), (8, 8, 7.5)])
def test_bad_spatial_size(size):
    with pytest.raises(ValueError, match="spatial_size must be 3 numbers"):
        load_subject_transforms(3, size)


def test_bad_spatial_dims():
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3"):
        load_subject_transforms(4)


@pytest.mark.parametrize(
    ("array", "low", "high"),
    [
        (np.random.default_rng(0).integers(5, 3000, SIZE[3]).astype(np.int16), 5, 2999),
        (np.random.default_rng(0).uniform(-1, 0.5, SIZE[3]).astype(np.float32), -1, 0.5),
    ],
)
def test_other_ranges_are_scaled_and_said(tmp_path, caplog, array, low, high):
    given = subject(tmp_path, image=array)
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        image = load_subject_transforms(3)(given)["image"]
    a = array.astype(np.float64)
    np.testing.assert_allclose(image[0].numpy(), (a - a.min()) / (a.max() - a.min()), atol=1e-6)
    (message,) = caplog.messages
    assert given["image"] in message
    stated = [float(v) for v in message.split("[")[1].split("]")[0].split(",")]
    np.testing.assert_allclose(stated, [a.min(), a.max()], rtol=1e-5)
    np.testing.assert_allclose(stated, [low, high], rtol=0.02)
    np.testing.assert_allclose(image.affine, AFFINE)


def truncated(tmp_path, compressed=True):
    file = tmp_path / ("cut.nii.gz" if compressed else "cut.nii")
    save(file, unit(3))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return str(file)


def no_nifti(tmp_path):
    file = tmp_path / "page.nii.gz"
    file.write_text("<html>404</html>")
    return str(file)


@pytest.mark.parametrize("make", [truncated, lambda p: truncated(p, compressed=False), no_nifti])
def test_damaged_files(tmp_path, make):
    file = make(tmp_path)
    with pytest.raises(RuntimeError, match="download it again") as caught:
        LoadRegistrationImaged("image")({"image": file})
    assert file in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.nii.gz"):
        LoadRegistrationImaged("image")({"image": str(tmp_path / "absent.nii.gz")})
    with pytest.raises(ValueError, match="'image' must be the name"):
        LoadRegistrationImaged("image")({"image": None})
    with pytest.raises(KeyError):
        LoadRegistrationImaged("image")({})


def with_value(dim, value):
    image = unit(dim)
    image[3, 4] = value
    return image


@pytest.mark.parametrize(
    ("dim", "image", "message"),
    [
        (3, np.zeros(SIZE[3], np.float32), "zero everywhere"),
        (3, np.full(SIZE[3], 0.25, np.float32), "0.25 everywhere"),
        (3, with_value(3, np.nan), "9 of 1080 voxels are NaN"),
        (2, with_value(2, np.inf), "1 of 120 voxels"),
        (3, np.random.default_rng(0).random((6, 5, 4, 2)).astype(np.float32), "4-D.*2 channels of \\(6, 5, 4\\)"),
        (2, unit(3), "expected a 2-D image, got one of size \\(12, 10, 9\\)"),
        (3, unit(2), "expected a 3-D image, got one of size \\(12, 10, 1\\)"),
        (2, unit(2).reshape(12, 1, 10), "expected a 2-D image"),
    ],
)
def test_bad_images(tmp_path, dim, image, message):
    given = subject(tmp_path, dim, image=image)
    del given["label"]
    with pytest.raises(ValueError, match=message) as caught:
        load_subject_transforms(dim)(given)
    assert given["image"] in str(caught.value)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (labels(3)[:, :, :8], r"\(1, 12, 10, 9\).*got \(1, 12, 10, 8\)"),
        (labels(3).astype(np.float32) + 0.5, "1080 voxels"),
        (with_value(3, np.nan).round(), "nan"),
        (labels(3).astype(np.int16) - 50, "label numbers"),
    ],
)
def test_bad_labels(tmp_path, label, message):
    given = subject(tmp_path, label=label)
    with pytest.raises(ValueError, match=message) as caught:
        load_subject_transforms(3)(given)
    assert given["label"] in str(caught.value)


def test_label_of_other_orientation_is_said(tmp_path, caplog):
    given = subject(tmp_path)
    save(given["label"], labels(3), np.eye(4))
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        load_subject_transforms(3)(given)
    assert "RAS" in caplog.text and "LIA" in caplog.text


def test_pair_of_files(tmp_path, caplog):
    """The same transforms read a pair; the grids are compared after that."""
    files = {"fixed": save(tmp_path / "f.nii.gz", unit(3, 1)), "moving": save(tmp_path / "m.nii.gz", unit(3, 2))}
    files["moving_label"] = save(tmp_path / "ml.nii.gz", labels(3))
    load = load_subject_transforms(3, None, ("fixed", "moving"), ("fixed_label", "moving_label"))
    item = CheckSameGridd()(load(files))
    assert set(item) == {"fixed", "moving", "moving_label"} and not caplog.records
    moved, coarse = AFFINE.copy(), AFFINE.copy()
    moved[0, 3] += 5
    coarse[0, 0] = -1.25
    save(files["moving"], unit(3, 2), moved)
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        CheckSameGridd()(load(files))
    assert "origin" in caplog.text
    del files["moving_label"]
    for array, affine, message in (
        (unit(3), coarse, "spacing.*1.0, .*1.25, "),
        (unit(3), AFFINE * [[-1], [1], [1], [1]], "orientation.*LIA.*RIA"),
        (unit(3)[:11], AFFINE, r"size.*\(12, 10, 9\).*\(11, 10, 9\)"),
    ):
        save(files["moving"], array, affine)
        with pytest.raises(ValueError, match=message + ".*Resample one onto the other") as caught:
            CheckSameGridd()(load(files))
        assert files["fixed"] in str(caught.value) and files["moving"] in str(caught.value)


def test_single_transforms():
    image = torch.rand(1, 4, 5, 6)
    assert DropSliceAxisd("image")({"image": image})["image"] is image
    assert DropSliceAxisd("image")({"image": image[..., :1]})["image"].shape == (1, 4, 5)
    assert ScaleToUnitRanged("image")({"image": image})["image"] is image
    CheckRegistrationImaged("image", 3)({"image": image})
    with pytest.raises(ValueError, match="^image: "):  # the key where no file is known
        CheckRegistrationImaged("image", 2)({"image": image})
    with pytest.raises(ValueError, match="one image for each"):
        CheckLabeld(("a", "b"), "image")
    assert CheckSameGridd(allow_missing_keys=True)({}) == {}


def test_compose_raises_the_error_itself(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.nii.gz"):
        load_subject_transforms(3)({"image": str(tmp_path / "absent.nii.gz")})
    with pytest.raises(RuntimeError, match="download it again") as caught:
        load_subject_transforms(3)({"image": truncated(tmp_path)})
    assert isinstance(caught.value.__cause__, EOFError)  # what the reader said is kept
    nested = CheckedCompose([CheckedCompose([CheckRegistrationImaged("image", 3)])])
    with pytest.raises(ValueError, match="zero everywhere"):
        nested({"image": torch.zeros(1, 4, 4, 4)})

    def plain(item):
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        CheckedCompose([plain])({})


def test_works_with_workers_and_disk_caches(tmp_path):
    """The transforms can be sent to other processes, and items be kept on disk."""
    transforms = pickle.loads(pickle.dumps(load_subject_transforms(3, (8, 8, 8))))
    dataset = PersistentDataset([subject(tmp_path)], transforms, cache_dir=tmp_path / "cache")
    first, again = dataset[0], dataset[0]
    assert torch.equal(first["image"], again["image"]) and first["image"].shape == (1, 8, 8, 8)
