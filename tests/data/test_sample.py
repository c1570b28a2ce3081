# SPDX-License-Identifier: Apache-2.0
"""The synthetic cohort: layout, determinism, anatomy, and that there is something to register."""

from __future__ import annotations

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.losses import DiffusionLoss, LocalNormalizedCrossCorrelationLoss

import monai_deq.data.sample as sample
from monai_deq.data import (
    find_oasis,
    is_sample,
    resolve_dataset_dir,
    sample_dataset_dir,
    split_subjects,
    write_sample_cohort,
)
from monai_deq.transforms.load_subject import load_subject_transforms

TINY = {"num_subjects": 2, "spatial_size_3d": (16, 16, 16), "spatial_size_2d": (16, 32)}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_sample_cohort(tmp_path_factory.mktemp("cohort") / "sample", num_subjects=4)


def read(file):
    return np.squeeze(np.asarray(nib.load(file).dataobj))


def mean_dice(a, b):
    shared = sorted((set(np.unique(a)) & set(np.unique(b))) - {0})
    return np.mean([2 * np.sum((a == n) & (b == n)) / (np.sum(a == n) + np.sum(b == n)) for n in shared])


def test_same_seed_same_bytes(tmp_path):
    a, b = (write_sample_cohort(tmp_path / n, **TINY, seed=5) for n in "ab")
    c = write_sample_cohort(tmp_path / "c", **TINY, seed=6)
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert len(files) == 2 * 4 + 5
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    assert sorted(p.relative_to(c) for p in c.rglob("*") if p.is_file()) == files
    images = [f for f in files if f.name.endswith(".nii.gz")]
    assert all((a / f).read_bytes() != (c / f).read_bytes() for f in images)
    first, second = (a / f"OASIS_OAS1_{i}_MR1" / "aligned_norm.nii.gz" for i in (9001, 9002))
    assert first.read_bytes() != second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # no temporary folder is left


def test_existing_folders(tmp_path):
    root = write_sample_cohort(tmp_path / "s", **TINY)
    before = (root / "subjects.txt").stat().st_mtime_ns
    (root / "note.txt").write_text("mine")
    assert write_sample_cohort(tmp_path / "s", **TINY) == root
    assert (root / "subjects.txt").stat().st_mtime_ns == before and (root / "note.txt").exists()
    with pytest.raises(FileExistsError, match="other parameters"):
        write_sample_cohort(tmp_path / "s", **TINY, seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="no sample cohort"):
        write_sample_cohort(tmp_path / "full", **TINY)
    (tmp_path / "empty").mkdir()
    assert is_sample(write_sample_cohort(tmp_path / "empty", **TINY))


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    saved = []

    def full_disk(file, *args):
        saved.append(file)
        if len(saved) == 3:
            raise OSError("no space left on device")

    monkeypatch.setattr(sample, "_save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_sample_cohort(tmp_path / "s", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="num_subjects"):
        write_sample_cohort(tmp_path / "s", num_subjects=1)
    with pytest.raises(ValueError, match="sizes"):
        write_sample_cohort(tmp_path / "s", spatial_size_2d=(16, 16, 16))


@pytest.mark.parametrize("dim", [2, 3])
def test_read_back(cohort, dim):
    dataset = find_oasis(cohort, dim)
    assert dataset.layout == "neurite-OASIS"
    assert [s["subject"] for s in dataset.subjects] == [f"OASIS_OAS1_900{i}_MR1" for i in (1, 2, 3, 4)]
    assert len(split_subjects(dataset, (2, 1, 1))["test"]) == 1
    item = load_subject_transforms(dim)(dataset.subjects[0])
    assert tuple(item["image"].shape) == ((1, 32, 32, 48) if dim == 3 else (1, 80, 96))
    assert float(item["image"].min()) >= 0.0 and 0.3 < float(item["image"].max()) <= 1.0
    lines = (cohort / f"seg{len(dataset.label_names)}_labels.txt").read_text().splitlines()
    assert dict(line.split() for line in lines) == {str(k): v for k, v in {0: "Unknown", **dataset.label_names}.items()}
    assert "ynthetic" in (cohort / "README.txt").read_text()


@pytest.mark.parametrize("dim", [2, 3])
def test_anatomy(cohort, dim):
    dataset = find_oasis(cohort, dim)
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
    spacing = sample._spacing(size)
    for seed in range(2):
        u = sample._diffeomorphism(np.random.default_rng(seed), size, spacing)
        u = u / spacing.reshape(-1, *[1] * len(size))
        jacobian = np.moveaxis(np.stack([np.stack(np.gradient(c)) for c in u]), (0, 1), (-2, -1)) + np.eye(len(size))
        assert np.linalg.det(jacobian).min() > 0
        assert 1.5 < np.abs(u).max() < 8  # a few voxels


@pytest.mark.parametrize("dim", [2, 3])
def test_overlap_before_registration(cohort, dim):
    labels = [read(s["label"]) for s in find_oasis(cohort, dim).subjects]
    dice = [mean_dice(labels[i], labels[j]) for i in range(4) for j in range(i)]
    assert 0.45 < np.mean(dice) < 0.7


def test_registration_recovers_the_differences(cohort):
    """Plain gradient descent on LNCC, no part of this package, aligns two subjects."""
    a, b = find_oasis(cohort, 2).subjects[:2]
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


def test_is_sample(tmp_path):
    assert not is_sample(tmp_path) and not is_sample(tmp_path / "absent")
    (tmp_path / "sample.json").write_text("not json")
    assert not is_sample(tmp_path)
    (tmp_path / "sample.json").write_text(json.dumps({"generator": "someone else"}))
    assert not is_sample(tmp_path)
    assert is_sample(write_sample_cohort(tmp_path / "s", **TINY))


def test_where_it_lives(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path / "monai"))
    assert sample_dataset_dir() == tmp_path / "monai" / "monai_deq_sample"
    monkeypatch.delenv("MONAI_DATA_DIRECTORY")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sample_dataset_dir() == tmp_path / "home" / ".cache" / "monai_deq" / f"sample-{sample.VERSION}"


def test_resolve_dataset_dir(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path / "monai"))
    monkeypatch.setattr(sample, "write_sample_cohort", lambda path: write_sample_cohort(path, **TINY))
    for nothing in (None, ""):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="monai_deq"):
            root = resolve_dataset_dir(nothing)
        assert root == tmp_path / "monai" / "monai_deq_sample" and is_sample(root)
        (message,) = caplog.messages
        assert "SYNTHETIC" in message and str(root) in message and "--dataset_dir" in message
    caplog.clear()
    assert resolve_dataset_dir(str(tmp_path)) == tmp_path
    assert not caplog.records
    with pytest.raises(FileNotFoundError, match="absent"):
        resolve_dataset_dir(tmp_path / "absent")
