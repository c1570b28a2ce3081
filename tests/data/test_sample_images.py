# SPDX-License-Identifier: Apache-2.0
"""The synthetic images: anatomy, that there is something to register, and that the true field is the true one."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss
from scipy import ndimage

from monai_deq.data import find_oasis, write_sample_cohort, write_sample_lung_cohort
from monai_deq.data.sample_images import brain_spacing, diffeomorphism

PAIRS = [("Tr", 1), ("Tr", 2), ("Ts", 3)]


@pytest.fixture(scope="module")
def brains(tmp_path_factory):
    return write_sample_cohort(tmp_path_factory.mktemp("brains") / "sample", num_subjects=4)


@pytest.fixture(scope="module")
def chests(tmp_path_factory):
    return write_sample_lung_cohort(tmp_path_factory.mktemp("lungs") / "sample", num_pairs=(1, 1, 1))


def read(file):
    return np.squeeze(np.asarray(nib.load(file).dataobj))


def mean_dice(a, b):
    shared = sorted((set(np.unique(a)) & set(np.unique(b))) - {0})
    return np.mean([2 * np.sum((a == n) & (b == n)) / (np.sum(a == n) + np.sum(b == n)) for n in shared])


@pytest.mark.parametrize("dim", [2, 3])
def test_brain(brains, dim):
    dataset = find_oasis(brains, dim)
    numbers = {name: n for n, name in dataset.label_names.items()}
    vessels = {"Left-Vessel", "Right-Vessel"}  # too thin for these voxels
    for subject in dataset.subjects:
        file = nib.load(subject["label"])
        labels, image = read(subject["label"]), read(subject["image"])
        assert file.get_data_dtype() == np.uint8 and image.dtype == np.float32
        assert "".join(nib.aff2axcodes(file.affine)) == "LIA"  # as the data set
        missing = set(numbers.values()) - set(np.unique(labels).tolist())
        assert missing <= {numbers[v] for v in vessels & set(numbers)}

        def world(name, labels=labels, file=file):
            voxels = np.argwhere(labels.reshape(file.shape) == numbers[name])
            return (nib.affines.apply_affine(file.affine, voxels)).mean(0)

        for name in ("Thalamus", "Putamen", "Hippocampus", "Cerebral-White-Matter"):
            assert world(f"Left-{name}")[0] < -5 < 5 < world(f"Right-{name}")[0]  # world x grows to the right
        assert world("Left-Caudate")[2] > world("Left-Hippocampus")[2]  # z grows upwards
        if dim == 3:
            assert world("Left-Cerebellum-Cortex")[1] < world("Brain-Stem")[1] < world("Left-Accumbens")[1]

        # T1: white matter bright, grey matter between, fluid dark, nothing outside
        def brightness(name, image=image, labels=labels):
            return image[labels == numbers[name]].mean()

        for side in ("Left", "Right"):
            white, grey = brightness(f"{side}-Cerebral-White-Matter"), brightness(f"{side}-Cerebral-Cortex")
            assert white > grey + 0.05 > brightness(f"{side}-Lateral-Ventricle") + 0.1
        corner = image[(slice(0, 3),) * dim]
        assert (corner == 0).all() and 0.4 < (image == 0).mean() < 0.85


@pytest.mark.parametrize("size", [(32, 32, 48), (80, 96)])
def test_subjects_differ_by_a_diffeomorphism(size):
    spacing = brain_spacing(size)
    for seed in range(2):
        u = diffeomorphism(np.random.default_rng(seed), size, spacing)
        u = u / spacing.reshape(-1, *[1] * len(size))
        jacobian = np.moveaxis(np.stack([np.stack(np.gradient(c)) for c in u]), (0, 1), (-2, -1)) + np.eye(len(size))
        assert np.linalg.det(jacobian).min() > 0
        assert 1.5 < np.abs(u).max() < 8  # a few voxels


@pytest.mark.parametrize("dim", [2, 3])
def test_overlap_before_registration(brains, dim):
    labels = [read(s["label"]) for s in find_oasis(brains, dim).subjects]
    dice = [mean_dice(labels[i], labels[j]) for i in range(4) for j in range(i)]
    assert 0.45 < np.mean(dice) < 0.7


def test_registration_recovers_the_differences(brains):
    """Plain gradient descent on LNCC, no part of this package, aligns two subjects."""
    a, b = find_oasis(brains, 2).subjects[:2]
    fixed, moving = (torch.tensor(read(s["image"]))[None, None] for s in (a, b))
    labels_a, labels_b = read(a["label"]), read(b["label"])
    identity = torch.nn.functional.affine_grid(torch.eye(2, 3)[None], fixed.shape, align_corners=True)
    scale = 2 / (torch.tensor(fixed.shape[2:]) - 1)
    ddf = torch.zeros(1, 2, *fixed.shape[2:], requires_grad=True)

    def warp(image, mode):
        grid = identity + (ddf.movedim(1, -1) * scale).flip(-1)
        return torch.nn.functional.grid_sample(image, grid, mode=mode, padding_mode="border", align_corners=True)

    optimizer = torch.optim.Adam([ddf], lr=0.1)
    lncc, smooth = LocalNormalizedCrossCorrelationLoss(2, kernel_size=5), DiffusionLoss()
    for _ in range(80):
        optimizer.zero_grad()
        (lncc(warp(moving, "bilinear"), fixed) + 0.1 * smooth(ddf)).backward()
        optimizer.step()
    with torch.no_grad():
        warped = warp(torch.tensor(labels_b)[None, None].float(), "nearest")[0, 0].numpy()
    assert mean_dice(labels_a, warped) > mean_dice(labels_a, labels_b) + 0.1


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


@pytest.mark.parametrize(("where", "number"), PAIRS)
def test_the_true_field_has_no_error(chests, where, number):
    _, _, points, field, spacing = pair_of(chests, where, number)
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
def test_the_true_field_aligns_the_images(chests, where, number):
    (fixed, moving), (lung, moving_lung), _, field, _ = pair_of(chests, where, number)
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
def test_the_true_field_is_a_diffeomorphism(chests, where, number):
    _, (lung, _), _, field, _ = pair_of(chests, where, number)
    slopes = np.moveaxis(np.stack([np.stack(np.gradient(u)) for u in field]), (0, 1), (-2, -1))
    jacobian = np.linalg.det(slopes + np.eye(3))
    assert jacobian.min() > 0.5
    # breathing out, the lung becomes smaller
    assert 0.7 < jacobian[lung > 0].mean() < 0.97
    # points are found by a fixed-point iteration that this makes converge
    assert np.linalg.norm(slopes, 2, axis=(-2, -1)).max() < 0.4


@pytest.mark.parametrize(("where", "number"), PAIRS)
def test_keypoints_are_on_vessels(chests, where, number):
    scans, masks, points, _, _ = pair_of(chests, where, number)
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
def test_chest(chests, where, number):
    scans, masks, *_ = pair_of(chests, where, number)
    for i, (scan, mask) in enumerate(zip(scans, masks, strict=True)):
        file = nib.load(chests / f"images{where}" / f"NLST_{number:04d}_000{i}.nii.gz")
        assert "".join(nib.aff2axcodes(file.affine)) == "LPS" and file.get_data_dtype() == np.int16
        assert file.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(file.header.get_zooms(), [6.0, 6.75, 4.5])
        of_mask = nib.load(chests / f"masks{where}" / f"NLST_{number:04d}_000{i}.nii.gz")
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


def test_people_differ(chests):
    masks = [pair_of(chests, *pair)[1][0] > 0 for pair in PAIRS]
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
