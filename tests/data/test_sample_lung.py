# SPDX-License-Identifier: Apache-2.0
"""The synthetic lung cohort: layout, determinism, anatomy, and that the displacement it says is the true one."""

from __future__ import annotations

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss
from scipy import ndimage

import monai_deq.data.sample_lung as sample_lung
from monai_deq.data import (
    find_learn2reg,
    is_sample,
    resolve_lung_dataset_dir,
    sample_lung_dataset_dir,
    write_sample_cohort,
    write_sample_lung_cohort,
)
from monai_deq.metrics import compute_target_registration_error
from monai_deq.transforms import load_annotated_pair_transforms, load_learn2reg_ddf

TINY = {"num_pairs": (1, 0, 1), "spatial_size": (16, 20, 24)}
PAIRS = [("Tr", 1), ("Tr", 2), ("Ts", 3)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_sample_lung_cohort(tmp_path_factory.mktemp("cohort") / "sample", num_pairs=(1, 1, 1))


def read(file):
    return np.asarray(nib.load(file).dataobj)


def pair_of(root, where, number):
    """Everything of a pair as the files have it, fixed before moving, and the true field ``(3, *spatial)``."""
    names = [f"NLST_{number:04d}_000{i}" for i in range(2)]
    scans = [read(root / f"images{where}" / f"{n}.nii.gz") for n in names]
    masks = [read(root / f"masks{where}" / f"{n}.nii.gz") for n in names]
    points = [np.loadtxt(root / f"keypoints{where}" / f"{n}.csv", delimiter=",") for n in names]
    field = np.moveaxis(read(root / "true_ddf" / f"disp_{number:04d}_{number:04d}.nii.gz"), -1, 0).astype(np.float64)
    spacing = np.array(nib.load(root / f"images{where}" / f"{names[0]}.nii.gz").header.get_zooms())
    return scans, masks, points, field, spacing


def tre(field, points, spacing, order=1):
    """As design and Learn2Reg have it: displacement at the fixed points, times the spacing."""
    at_points = np.stack([ndimage.map_coordinates(u, points[0].T, order=order) for u in field], axis=1)
    return np.linalg.norm((points[0] + at_points - points[1]) * spacing, axis=1)


def warp(image, field, order):
    grid = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"))
    return ndimage.map_coordinates(image.astype(np.float64), grid + field, order=order, mode="nearest")


def test_same_seed_same_bytes(tmp_path):
    a, b = (write_sample_lung_cohort(tmp_path / n, **TINY, seed=5) for n in "ab")
    c = write_sample_lung_cohort(tmp_path / "c", **TINY, seed=6)
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert len(files) == 2 * 7 + 3
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    assert sorted(p.relative_to(c) for p in c.rglob("*") if p.is_file()) == files
    data = [f for f in files if f.name.endswith((".nii.gz", ".csv"))]
    assert all((a / f).read_bytes() != (c / f).read_bytes() for f in data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # no temporary folder is left


def test_more_pairs_leave_the_first_as_they_are(tmp_path):
    a = write_sample_lung_cohort(tmp_path / "a", num_pairs=(1, 0, 0), spatial_size=(16, 20, 24))
    b = write_sample_lung_cohort(tmp_path / "b", num_pairs=(2, 0, 0), spatial_size=(16, 20, 24))
    first = "imagesTr/NLST_0001_0000.nii.gz"
    assert (a / first).read_bytes() == (b / first).read_bytes()
    assert not np.array_equal(read(b / first), read(b / "imagesTr/NLST_0002_0000.nii.gz"))


def test_existing_folders(tmp_path):
    root = write_sample_lung_cohort(tmp_path / "s", **TINY)
    before = (root / "NLST_dataset.json").stat().st_mtime_ns
    (root / "note.txt").write_text("mine")
    assert write_sample_lung_cohort(tmp_path / "s", **TINY) == root
    assert (root / "NLST_dataset.json").stat().st_mtime_ns == before and (root / "note.txt").exists()
    with pytest.raises(FileExistsError, match="other parameters"):
        write_sample_lung_cohort(tmp_path / "s", **TINY, seed=1)
    with pytest.raises(FileExistsError, match="other parameters"):
        write_sample_cohort(tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="no sample cohort"):
        write_sample_lung_cohort(tmp_path / "full", **TINY)
    assert is_sample(root)


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    saved = []

    def full_disk(file, *args):
        saved.append(file)
        if len(saved) == 3:
            raise OSError("no space left on device")

    monkeypatch.setattr(sample_lung, "_save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_sample_lung_cohort(tmp_path / "s", **TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_pairs": (0, 0, 0)}, "num_pairs must give 3 numbers"),
        ({"num_pairs": (1, 1)}, "num_pairs must give 3 numbers"),
        ({"num_pairs": (-1, 1, 1)}, "none negative"),
        ({"spatial_size": (32, 32)}, r"3 sizes of at least 16, got \(32, 32\)"),
        ({"spatial_size": (32, 8, 32)}, "3 sizes of at least 16"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_sample_lung_cohort(tmp_path / "s", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_layout(cohort):
    content = json.loads((cohort / "NLST_dataset.json").read_text())
    lists = {"training_paired_images": 1, "registration_val": 2, "registration_test": 3, "test_paired_images": 3}
    for key, number in lists.items():
        where = "Ts" if number == 3 else "Tr"
        names = [f"./images{where}/NLST_{number:04d}_000{i}.nii.gz" for i in range(2)]
        assert content[key] == [{"fixed": names[0], "moving": names[1]}]
    assert (content["numTraining"], content["numTest"], content["numPairedTraining"]) == (4, 2, 1)
    assert (content["name"], content["tensorImageShape"]) == ("NLST", {"0": [48, 32, 64]})
    listed = content["training"] + content["test"]
    assert len(listed) == 6 and all(set(entry) == {"image", "mask", "keypoint"} for entry in listed)
    for entry in listed:
        for kind, file in entry.items():
            # as in the data set itself
            assert file.endswith(".nii.gz")
            assert (cohort / (file.replace(".nii.gz", ".csv") if kind == "keypoint" else file)).is_file()
    on_disk = {str(p.relative_to(cohort)) for p in cohort.glob("images*/*")}
    assert {entry["image"].removeprefix("./") for entry in listed} == on_disk
    assert "ynthetic" in (cohort / "README.txt").read_text()


def test_read_back(cohort):
    dataset = find_learn2reg(cohort)
    assert dataset.name == "NLST"
    parts = (dataset.training, dataset.registration_val, dataset.registration_test)
    for (where, number), pairs in zip(PAIRS, parts, strict=True):
        (pair,) = pairs
        item = load_annotated_pair_transforms()(pair)
        scans, masks, points, field, spacing = pair_of(cohort, where, number)
        for role, mask, at in zip(("fixed", "moving"), masks, points, strict=True):
            assert tuple(item[role].shape) == (1, 48, 32, 64)
            np.testing.assert_array_equal(item[f"{role}_mask"][0], mask)
            np.testing.assert_allclose(item[f"{role}_keypoints"], at, atol=1e-5)
        ddf = load_learn2reg_ddf(cohort / "true_ddf", pair["fixed_subject"], pair["moving_subject"])
        assert np.array_equal(ddf, field)
        keypoints = (item[f"{role}_keypoints"][None] for role in ("fixed", "moving"))
        error = compute_target_registration_error(ddf[None], *keypoints, spacing.tolist())
        assert error.item() < 1e-4  # keypoints in float32


@pytest.mark.parametrize(("where", "number"), PAIRS)
def test_the_true_field_has_no_error(cohort, where, number):
    _, _, points, field, spacing = pair_of(cohort, where, number)
    assert len(points[0]) == len(points[1]) > 80
    before = tre(np.zeros_like(field), points, spacing)
    assert 4 < before.mean() < 14 and before.max() < 25
    assert tre(field, points, spacing).max() < 5e-5  # mm
    # with the cubic interpolation of Learn2Reg's own evaluation, nearly
    assert tre(field, points, spacing, order=3).mean() < 0.2
    for axis in range(3):  # it is no other convention
        assert tre(np.flip(field, axis=0), points, spacing).mean() > 2
        assert tre(np.roll(field, 3, axis=axis + 1), points, spacing).mean() > 0.1
    assert tre(-field, points, spacing).mean() > 1.9 * before.mean()


@pytest.mark.parametrize(("where", "number"), PAIRS)
def test_the_true_field_aligns_the_images(cohort, where, number):
    (fixed, moving), (lung, moving_lung), _, field, _ = pair_of(cohort, where, number)
    inside = lung > 0

    def correlation(image):
        return np.corrcoef(fixed[inside], image[inside])[0, 1]

    def dice(mask):
        return 2 * (inside & mask).sum() / (inside.sum() + mask.sum())

    assert correlation(moving) < 0.5 and correlation(warp(moving, field, 1)) > 0.8
    assert dice(moving_lung > 0) < 0.95 and dice(warp(moving_lung, field, 0) > 0) > 0.95
    # the ribs and the spine too
    assert np.corrcoef(fixed.ravel(), warp(moving, field, 1).ravel())[0, 1] > 0.98


@pytest.mark.parametrize(("where", "number"), PAIRS)
def test_the_true_field_is_a_diffeomorphism(cohort, where, number):
    _, (lung, _), _, field, _ = pair_of(cohort, where, number)
    slopes = np.moveaxis(np.stack([np.stack(np.gradient(u)) for u in field]), (0, 1), (-2, -1))
    jacobian = np.linalg.det(slopes + np.eye(3))
    assert jacobian.min() > 0.5
    # breathing out, the lung becomes smaller
    assert 0.7 < jacobian[lung > 0].mean() < 0.97
    # points are found by a fixed-point iteration that this makes converge
    assert np.linalg.norm(slopes, 2, axis=(-2, -1)).max() < 0.4


@pytest.mark.parametrize(("where", "number"), PAIRS)
def test_keypoints_are_on_vessels(cohort, where, number):
    scans, masks, points, _, _ = pair_of(cohort, where, number)
    for scan, mask, at in zip(scans, masks, points, strict=True):
        assert (at > 1).all() and (at < np.array(scan.shape) - 2).all()
        near = ndimage.binary_dilation(mask > 0)
        assert near[tuple(at.round().astype(int).T)].all()
        brightness = ndimage.map_coordinates(scan.astype(float), at.T, order=1)
        lung = scan[mask > 0]
        assert np.median(brightness) > np.percentile(lung, 85)
        # not all in one place: both lungs, top and bottom, front and back
        extent = np.argwhere(mask > 0)
        assert (np.ptp(at, axis=0) > 0.5 * np.ptp(extent, axis=0)).all()
        assert len(np.unique(at, axis=0)) == len(at)
    assert not np.array_equal(*points)


@pytest.mark.parametrize(("where", "number"), PAIRS)
def test_anatomy(cohort, where, number):
    scans, masks, *_ = pair_of(cohort, where, number)
    for i, (scan, mask) in enumerate(zip(scans, masks, strict=True)):
        file = nib.load(cohort / f"images{where}" / f"NLST_{number:04d}_000{i}.nii.gz")
        assert "".join(nib.aff2axcodes(file.affine)) == "LPS" and file.get_data_dtype() == np.int16
        assert file.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(file.header.get_zooms(), [6.0, 6.75, 4.5])
        of_mask = nib.load(cohort / f"masks{where}" / f"NLST_{number:04d}_000{i}.nii.gz")
        assert of_mask.get_data_dtype() == np.uint8 and np.array_equal(of_mask.affine, file.affine)
        assert np.unique(mask).tolist() == [0, 1] and 0.1 < mask.mean() < 0.25
        lungs, count = ndimage.label(mask)
        sizes = np.sort(np.bincount(lungs.ravel())[1:])
        assert count >= 2 and sizes[-2] > 0.3 * mask.sum()  # two of them
        lung = scan[mask > 0]
        assert -950 < np.median(lung) < -750 and np.percentile(lung, 99) > -300  # air, and vessels in it
        assert np.median(scan[0]) == pytest.approx(-1000, abs=15)  # outside
        assert (scan > 250).mean() > 0.02  # bone
        assert scan.min() >= -1024 and scan.max() < 800
    # the lung is larger and darker as they breathe in
    assert masks[0].sum() > 1.05 * masks[1].sum()
    assert np.median(scans[0][masks[0] > 0]) < np.median(scans[1][masks[1] > 0]) - 40


def test_people_differ(cohort):
    masks = [pair_of(cohort, *pair)[1][0] > 0 for pair in PAIRS]
    for i in range(3):
        for j in range(i):
            assert 0.8 < 2 * (masks[i] & masks[j]).sum() / (masks[i].sum() + masks[j].sum()) < 0.98


def test_registration_finds_the_field(tmp_path):
    """Plain gradient descent on LNCC from coarse to fine, no part of this package, comes near the truth."""
    root = write_sample_lung_cohort(tmp_path / "s", num_pairs=(0, 0, 1), spatial_size=(32, 32, 40))
    scans, _, points, field, spacing = pair_of(root, "Ts", 1)
    fixed, moving = (((torch.from_numpy(s).float() + 1000) / 1200).clamp(0, 1)[None, None] for s in scans)
    size = torch.tensor(fixed.shape[2:])
    identity = F.affine_grid(torch.eye(3, 4)[None], fixed.shape, align_corners=True)
    lncc, smooth = LocalNormalizedCrossCorrelationLoss(3, kernel_size=5), DiffusionLoss()
    ddf = torch.zeros(1, 3, 8, 8, 10)
    for coarse in ((8, 8, 10), (16, 16, 20)):
        ddf = F.interpolate(ddf, size=coarse, mode="trilinear", align_corners=True).requires_grad_()
        optimizer = torch.optim.Adam([ddf], lr=0.15)
        for _ in range(25):
            optimizer.zero_grad()
            full = F.interpolate(ddf, size=tuple(size), mode="trilinear", align_corners=True)
            grid = identity + (full.movedim(1, -1) * 2 / (size - 1)).flip(-1)
            warped = F.grid_sample(moving, grid, padding_mode="border", align_corners=True)
            (lncc(warped, fixed) + 0.3 * smooth(full)).backward()
            optimizer.step()
        ddf = ddf.detach()
    found = full.detach()[0].double().numpy()
    before = tre(np.zeros_like(field), points, spacing).mean()
    assert tre(found, points, spacing).mean() < 0.4 * before


def test_where_it_lives(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path / "monai"))
    assert sample_lung_dataset_dir() == tmp_path / "monai" / "monai_deq_sample_lung"
    monkeypatch.delenv("MONAI_DATA_DIRECTORY")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (
        sample_lung_dataset_dir() == tmp_path / "home" / ".cache" / "monai_deq" / f"sample-lung-{sample_lung.VERSION}"
    )


def test_resolve_dataset_dir(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path / "monai"))
    monkeypatch.setattr(sample_lung, "write_sample_lung_cohort", lambda path: write_sample_lung_cohort(path, **TINY))
    for nothing in (None, ""):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="monai_deq"):
            root = resolve_lung_dataset_dir(nothing)
        assert root == tmp_path / "monai" / "monai_deq_sample_lung" and is_sample(root)
        (message,) = caplog.messages
        assert "SYNTHETIC" in message and str(root) in message and "--dataset_dir" in message
    caplog.clear()
    assert resolve_lung_dataset_dir(str(tmp_path)) == tmp_path
    assert not caplog.records
    with pytest.raises(FileNotFoundError, match="absent"):
        resolve_lung_dataset_dir(tmp_path / "absent")
