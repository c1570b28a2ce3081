# SPDX-License-Identifier: Apache-2.0
"""The folders of the synthetic cohorts: layout, determinism, whole or not at all, and that the readers read them."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

import monai_deq.data.sample_cohorts as sample_cohorts
from monai_deq.data import (
    find_learn2reg,
    find_oasis,
    is_sample,
    sample_dataset_dir,
    sample_lung_dataset_dir,
    write_sample_cohort,
    write_sample_lung_cohort,
)
from monai_deq.metrics import compute_target_registration_error
from monai_deq.transforms import load_annotated_pair_transforms, load_learn2reg_ddf, load_subject_transforms


def write_brains(folder, **more):
    return write_sample_cohort(
        folder, **{"num_subjects": 2, "spatial_size_3d": (8,) * 3, "spatial_size_2d": (8, 12), **more}
    )


def write_lungs(folder, **more):
    return write_sample_lung_cohort(folder, **{"num_pairs": (1, 0, 1), "spatial_size": (16, 20, 24), **more})


both = pytest.mark.parametrize("write", [write_brains, write_lungs])


def read(file):
    return np.asarray(nib.load(file).dataobj)


def below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("write", "count"), [(write_brains, 2 * 4 + 5), (write_lungs, 2 * 7 + 3)])
def test_same_seed_same_bytes(tmp_path, write, count):
    a, b, c = (below(write(tmp_path / n, seed=seed)) for n, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert a == b and len(a) == count and set(c) == set(a)
    data = [f for f in a if f.endswith((".nii.gz", ".csv"))]
    assert all(a[f] != c[f] for f in data)
    images = [a[f] for f in data if "norm" in f or "images" in f]
    assert len(set(images)) == len(images) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # no temporary folder is left


def test_more_pairs_leave_the_first_as_they_are(tmp_path, lung_cohort):
    few = write_sample_lung_cohort(tmp_path / "a", num_pairs=(1, 0, 0), spatial_size=(20, 16, 24))
    first = "imagesTr/NLST_0001_0000.nii.gz"
    assert (few / first).read_bytes() == (lung_cohort / first).read_bytes()
    assert not np.array_equal(read(few / first), read(lung_cohort / "imagesTr/NLST_0002_0000.nii.gz"))


@both
def test_existing_folders(tmp_path, write):
    root = write(tmp_path / "s")
    before = (root / "sample.json").stat().st_mtime_ns
    (root / "note.txt").write_text("mine")
    assert write(tmp_path / "s") == root
    assert (root / "sample.json").stat().st_mtime_ns == before and (root / "note.txt").exists()
    other = write_lungs if write is write_brains else write_brains
    for write_other, more in ((write, {"seed": 1}), (other, {})):
        with pytest.raises(FileExistsError, match="other parameters"):
            write_other(tmp_path / "s", **more)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="no sample cohort"):
        write(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert is_sample(write(tmp_path / "empty"))


@both
def test_whole_or_not_at_all(tmp_path, monkeypatch, write):
    saved = []

    def full_disk(file, *args):
        saved.append(file)
        if len(saved) == 3:
            raise OSError("no space left on device")

    monkeypatch.setattr(sample_cohorts, "_save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@both
def test_another_process_was_faster(tmp_path, monkeypatch, write):
    save = sample_cohorts._save

    def meanwhile(file, *args):
        monkeypatch.setattr(sample_cohorts, "_save", save)
        write(tmp_path / "s")
        save(file, *args)

    monkeypatch.setattr(sample_cohorts, "_save", meanwhile)
    assert is_sample(write(tmp_path / "s"))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("write", "arguments", "message"),
    [
        (write_brains, {"num_subjects": 1}, "num_subjects"),
        (write_brains, {"spatial_size_2d": (16, 16, 16)}, "sizes"),
        (write_lungs, {"num_pairs": (0, 0, 0)}, "num_pairs must give 3 numbers"),
        (write_lungs, {"num_pairs": (1, 1)}, "num_pairs must give 3 numbers"),
        (write_lungs, {"num_pairs": (-1, 1, 1)}, "none negative"),
        (write_lungs, {"spatial_size": (32, 32)}, r"3 sizes of at least 16, got \(32, 32\)"),
        (write_lungs, {"spatial_size": (32, 8, 32)}, "3 sizes of at least 16"),
    ],
)
def test_bad_arguments(tmp_path, write, arguments, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "s", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dim", [2, 3])
def test_brains_are_read_back(brain_cohort, dim):
    dataset = find_oasis(brain_cohort, dim)
    assert dataset.layout == "neurite-OASIS"
    assert [s["subject"] for s in dataset.subjects] == [f"OASIS_OAS1_900{i}_MR1" for i in range(1, 8)]
    item = load_subject_transforms(dim)(dataset.subjects[0])
    assert tuple(item["image"].shape) == ((1, 18, 16, 21) if dim == 3 else (1, 32, 37))
    assert float(item["image"].min()) >= 0.0 and 0.3 < float(item["image"].max()) <= 1.0
    lines = (brain_cohort / f"seg{len(dataset.label_names)}_labels.txt").read_text().splitlines()
    assert dict(line.split() for line in lines) == {str(k): v for k, v in {0: "Unknown", **dataset.label_names}.items()}
    assert "ynthetic" in (brain_cohort / "README.txt").read_text()


def test_layout_of_lungs(lung_cohort):
    content = json.loads((lung_cohort / "NLST_dataset.json").read_text())
    lists = {
        "training_paired_images": ("Tr", (1, 2)),
        "registration_val": ("Tr", (3,)),
        "registration_test": ("Ts", (4, 5)),
        "test_paired_images": ("Ts", (4, 5)),
    }
    for key, (where, numbers) in lists.items():
        files = [[f"./images{where}/NLST_{n:04d}_000{i}.nii.gz" for i in range(2)] for n in numbers]
        assert content[key] == [{"fixed": fixed, "moving": moving} for fixed, moving in files]
    assert (content["numTraining"], content["numTest"], content["numPairedTraining"]) == (6, 4, 2)
    assert (content["name"], content["tensorImageShape"]) == ("NLST", {"0": [20, 16, 24]})
    listed = content["training"] + content["test"]
    assert len(listed) == 10 and all(set(entry) == {"image", "mask", "keypoint"} for entry in listed)
    for entry in listed:
        for kind, file in entry.items():
            # as in the data set itself
            assert file.endswith(".nii.gz")
            assert (lung_cohort / (file.replace(".nii.gz", ".csv") if kind == "keypoint" else file)).is_file()
    on_disk = {str(p.relative_to(lung_cohort)) for p in lung_cohort.glob("images*/*")}
    assert {entry["image"].removeprefix("./") for entry in listed} == on_disk
    assert "ynthetic" in (lung_cohort / "README.txt").read_text()


def test_lungs_are_read_back(lung_cohort):
    dataset = find_learn2reg(lung_cohort)
    assert dataset.name == "NLST"
    parts = (("Tr", dataset.training), ("Tr", dataset.registration_val), ("Ts", dataset.registration_test))
    number = 0
    for where, pairs in parts:
        for pair in pairs:
            number += 1
            item = load_annotated_pair_transforms()(pair)
            for i, role in enumerate(("fixed", "moving")):
                name = f"NLST_{number:04d}_000{i}"
                assert tuple(item[role].shape) == (1, 20, 16, 24)
                mask = read(lung_cohort / f"masks{where}" / f"{name}.nii.gz")
                np.testing.assert_array_equal(item[f"{role}_mask"][0], mask)
                points = np.loadtxt(lung_cohort / f"keypoints{where}" / f"{name}.csv", delimiter=",")
                np.testing.assert_allclose(item[f"{role}_keypoints"], points, atol=1e-5)
            ddf = load_learn2reg_ddf(lung_cohort / "true_ddf", pair["fixed_subject"], pair["moving_subject"])
            field = read(lung_cohort / "true_ddf" / f"disp_{number:04d}_{number:04d}.nii.gz")
            assert np.array_equal(ddf, np.moveaxis(field, -1, 0))
            spacing = nib.load(lung_cohort / f"images{where}" / f"NLST_{number:04d}_0000.nii.gz").header.get_zooms()
            keypoints = (item[f"{role}_keypoints"][None] for role in ("fixed", "moving"))
            error = compute_target_registration_error(ddf[None], *keypoints, [float(s) for s in spacing])
            assert error.item() < 1e-4  # keypoints in float32
    assert number == 5


def test_is_sample(tmp_path, brain_cohort, lung_cohort):
    assert not is_sample(tmp_path) and not is_sample(tmp_path / "absent")
    for content in ("not json", json.dumps({"generator": "someone else"}), "[]"):
        (tmp_path / "sample.json").write_text(content)
        assert not is_sample(tmp_path)
    assert is_sample(brain_cohort) and is_sample(str(lung_cohort))


def test_where_they_live(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path / "monai"))
    assert sample_dataset_dir() == tmp_path / "monai" / "monai_deq_sample"
    assert sample_lung_dataset_dir() == tmp_path / "monai" / "monai_deq_sample_lung"
    monkeypatch.delenv("MONAI_DATA_DIRECTORY")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache = tmp_path / "home" / ".cache" / "monai_deq"
    assert sample_dataset_dir() == cache / f"sample-{sample_cohorts.VERSION}"
    assert sample_lung_dataset_dir() == cache / f"sample-lung-{sample_cohorts.VERSION}"
