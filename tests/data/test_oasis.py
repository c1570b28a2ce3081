# SPDX-License-Identifier: Apache-2.0
"""Finding OASIS in its two layouts, and splitting its subjects. Files are empty: nothing here is loaded."""

from __future__ import annotations

import json
import logging

import pytest

from monai_deq.data import find_oasis, part_of, write_sample_cohort

FILES = {3: ("aligned_norm.nii.gz", "aligned_seg35.nii.gz"), 2: ("slice_norm.nii.gz", "slice_seg24.nii.gz")}


def name(i):
    return f"OASIS_OAS1_{i:04d}_MR1"


def write_neurite(root, numbers, dims=(2, 3), order=None, without=()):
    for i in numbers:
        (root / name(i)).mkdir(parents=True)
        for dim in dims:
            for file in FILES[dim]:
                if (i, file) not in without:
                    (root / name(i) / file).touch()
    if order is not None:
        (root / "subjects.txt").write_text("".join(f"{name(i)}\n" for i in order))
    return root


def write_learn2reg(root, content=None, remove=()):
    """Layout of the challenge: the training list names the validation subjects too; test labels are not public."""
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (root / folder).mkdir(parents=True)
    for i in (1, 2, 3, 438, 439):
        for folder in ("imagesTr", "labelsTr"):
            (root / folder / f"OASIS_{i:04d}_0000.nii.gz").touch()
    for i in (501, 502):
        (root / "imagesTs" / f"OASIS_{i:04d}_0000.nii.gz").touch()

    def file(folder, i):
        return f"./{folder}/OASIS_{i:04d}_0000.nii.gz"

    if content is None:
        content = {
            "name": "OASIS",
            "training": [{"image": file("imagesTr", i), "label": file("labelsTr", i)} for i in (1, 2, 3, 438, 439)],
            "registration_val": [{"fixed": file("imagesTr", 439), "moving": file("imagesTr", 438)}],
            "registration_test": [{"fixed": file("imagesTs", 502), "moving": file("imagesTs", 501)}],
        }
    for path in remove:
        (root / path).unlink()
    (root / "OASIS_dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return root


@pytest.mark.parametrize("dim", [2, 3])
def test_neurite_order_and_files(tmp_path, dim):
    write_neurite(tmp_path, [1, 2, 7], order=[7, 1, 2])
    found = find_oasis(tmp_path, dim)
    assert (found.layout, found.spatial_dims, found.root) == ("neurite-OASIS", dim, tmp_path)
    assert [s["subject"] for s in found.subjects] == [name(7), name(1), name(2)]
    image, label = FILES[dim]
    assert found.subjects[0]["image"] == str(tmp_path / name(7) / image)
    assert found.subjects[0]["label"] == str(tmp_path / name(7) / label)
    assert len(found.label_names) == {2: 24, 3: 35}[dim]


def test_neurite_without_list_is_sorted(tmp_path):
    write_neurite(tmp_path, [3, 1, 2])
    assert [s["subject"] for s in find_oasis(str(tmp_path), 3).subjects] == [name(1), name(2), name(3)]


def test_neurite_partial_download_is_logged(tmp_path, caplog):
    write_neurite(tmp_path, [1, 2], without=[(2, "aligned_seg35.nii.gz")])
    write_neurite(tmp_path, [3], dims=(2,), order=[1, 2, 3, 4])
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        found = find_oasis(tmp_path, 3)
    assert [s["subject"] for s in found.subjects] == [name(1), name(2)]
    assert found.subjects[1]["label"] is None
    assert len(caplog.messages) == 1 and "2 of 4 subjects named by subjects.txt" in caplog.messages[0]
    assert "1 of these a segmentation" in caplog.messages[0]


def test_neurite_refusals(tmp_path):
    write_neurite(tmp_path / "slices", [1, 2], dims=(2,))
    with pytest.raises(
        FileNotFoundError, match=r"aligned_norm.nii.gz.*2 of them with slice_norm.nii.gz.*spatial_dims=2"
    ):
        find_oasis(tmp_path / "slices", 3)
    write_neurite(tmp_path / "broken", [1, 2], without=[(2, "aligned_norm.nii.gz")])
    with pytest.raises(FileNotFoundError, match=f"{name(2)}.aligned_norm.nii.gz"):
        find_oasis(tmp_path / "broken", 3)
    write_neurite(tmp_path / "twice", [1, 2], order=[1, 2, 1])
    with pytest.raises(ValueError, match=f"twice: {name(1)}"):
        find_oasis(tmp_path / "twice", 3)
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3"):
        find_oasis(tmp_path / "twice", 4)


def test_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.*does not exist"):
        find_oasis(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="OASIS_OAS1_NNNN_MR1/.*OASIS_dataset.json.*found nothing"):
        find_oasis(tmp_path)
    (tmp_path / "holiday.jpg").touch()
    (tmp_path / "more").mkdir()
    with pytest.raises(FileNotFoundError, match="found holiday.jpg, more/"):
        find_oasis(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_oasis(tmp_path / "holiday.jpg")


def test_learn2reg(tmp_path):
    found = find_oasis(write_learn2reg(tmp_path), 3)
    assert found.layout == "Learn2Reg OASIS"
    assert [s["subject"] for s in found.subjects] == [f"OASIS_{i:04d}" for i in (1, 2, 3, 438, 439, 502, 501)]
    assert found.subjects[0]["image"] == str(tmp_path / "imagesTr/OASIS_0001_0000.nii.gz")
    assert found.subjects[0]["label"] == str(tmp_path / "labelsTr/OASIS_0001_0000.nii.gz")
    assert found.subjects[-1]["label"] is None
    with pytest.raises(ValueError, match="3-D images only"):
        find_oasis(tmp_path, 2)


def test_learn2reg_validation_labels_outside_the_training_list(tmp_path):
    write_learn2reg(tmp_path)
    content = json.loads((tmp_path / "OASIS_dataset.json").read_text())
    content["training"] = content["training"][:3]
    (tmp_path / "OASIS_dataset.json").write_text(json.dumps(content))
    labels = {s["subject"]: s["label"] for s in find_oasis(tmp_path).subjects}
    assert labels["OASIS_0439"] == str(tmp_path / "labelsTr/OASIS_0439_0000.nii.gz")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", ValueError, "not valid JSON"),
        ({"training": []}, ValueError, r"missing \['registration_val'\].*\['training'\]"),
        (
            {"training": [{"label": "x"}], "registration_val": []},
            ValueError,
            r"training\[0\] must have the key 'image'",
        ),
        (
            {"training": [{"image": "./imagesTr/LungCT_0001_0000.nii.gz"}], "registration_val": []},
            ValueError,
            "LungCT_0001",
        ),
        (
            {"training": [], "registration_val": [{"fixed": "./imagesTr/OASIS_0001_0000.nii.gz"}]},
            ValueError,
            r"registration_val\[0\] must have the keys 'fixed' and 'moving'",
        ),
        (
            {"training": [{"image": "./imagesTr/OASIS_0999_0000.nii.gz"}], "registration_val": []},
            FileNotFoundError,
            "OASIS_0999_0000.nii.gz",
        ),
    ],
)
def test_learn2reg_bad_json(tmp_path, content, error, message):
    with pytest.raises(error, match=message):
        find_oasis(write_learn2reg(tmp_path, content))


def test_learn2reg_missing_parts(tmp_path):
    write_learn2reg(tmp_path / "label", remove=["labelsTr/OASIS_0002_0000.nii.gz"])
    with pytest.raises(FileNotFoundError, match=r"1 file\(s\).*labelsTr/OASIS_0002_0000.nii.gz"):
        find_oasis(tmp_path / "label")
    write_learn2reg(tmp_path / "json")
    (tmp_path / "json" / "OASIS_dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match="OASIS_dataset.json; found no"):
        find_oasis(tmp_path / "json")


def ids(split):
    return {part: [int(s["subject"][11:15]) for s in subjects] for part, subjects in split.items()}


def test_split_by_sizes(tmp_path, caplog):
    dataset = find_oasis(write_neurite(tmp_path, range(1, 9), order=[8, 7, 6, 5, 4, 3, 2, 1]))
    assert ids(dataset.split([4, 1, 2])) == {"training": [8, 7, 6, 5], "validation": [4], "test": [3, 2]}
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        assert ids(dataset.split([None, 1, 2])) == {
            "training": [8, 7, 6, 5, 4],
            "validation": [3],
            "test": [2, 1],
        }
    assert "training takes the remaining 5" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((300, 30, 84), "more subjects than the 8.*null in JSON"),
        ((6, 2, None), "more subjects than the 8"),
        ((None, 2, None), "at most one"),
        ((3, 2), "3 numbers"),
        ((3, -1, 2), "non-negative"),
        ((3.0, 1, 2), "non-negative integers"),
    ],
)
def test_split_bad_sizes(tmp_path, sizes, message):
    dataset = find_oasis(write_neurite(tmp_path, range(1, 9)))
    with pytest.raises(ValueError, match=message):
        dataset.split(sizes)


def test_split_by_lists(tmp_path, caplog):
    dataset = find_oasis(write_neurite(tmp_path, range(1, 6)))
    lists = {"training": ["0004", name(1)], "test": [5, "0004"]}
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        assert ids(dataset.split(lists=lists)) == {"training": [4, 1], "validation": [], "test": [5, 4]}
    assert "both training and test" in caplog.text and name(4) in caplog.text
    with pytest.raises(ValueError, match="0099"):
        dataset.split(lists={"test": ["0099"]})
    with pytest.raises(ValueError, match="unknown part.*'train'"):
        dataset.split(lists={"train": ["0001"]})
    with pytest.raises(ValueError, match="twice"):
        dataset.split(lists={"test": ["0001", name(1)]})


def test_split_learn2reg_short_names(tmp_path):
    dataset = find_oasis(write_learn2reg(tmp_path))
    split = dataset.split(lists={"training": ["0002"], "test": ["OASIS_0438"]})
    assert split["training"][0]["subject"] == "OASIS_0002" and split["test"][0]["subject"] == "OASIS_0438"


def test_split_needs_labels_to_score(tmp_path):
    without = [(1, "aligned_seg35.nii.gz"), (4, "aligned_seg35.nii.gz")]
    dataset = find_oasis(write_neurite(tmp_path, range(1, 5), without=without))
    with pytest.raises(ValueError, match=f"test part needs segmentations.*{name(4)}"):
        dataset.split((2, 1, 1))
    assert ids(dataset.split((2, 1, 1), require_labels=False))["test"] == [4]
    assert ids(dataset.split((2, 1, 0)))["training"] == [1, 2]  # unlabelled in training is fine


def test_default_split(tmp_path):
    assert len(ids(find_oasis(write_neurite(tmp_path / "a", range(1, 415)), 3).split())["test"]) == 84
    slices = find_oasis(write_neurite(tmp_path / "b", range(1, 336), dims=(2,)), 2)
    assert [len(part) for part in slices.split().values()] == [300, 30, 5]
    with pytest.raises(ValueError, match=r"sizes \[300, 30, 84\] .* need more subjects than the 5 with 3-D images in"):
        find_oasis(write_neurite(tmp_path / "c", range(1, 6)), 3).split()


def test_part_whose_subjects_lack_labels(tmp_path):
    dataset = find_oasis(write_neurite(tmp_path, range(1, 6), without=[(2, "aligned_seg35.nii.gz")]))
    parts = dataset.split([2, 1, 2])
    assert len(part_of(parts, "test", "label")) == 2
    with pytest.raises(ValueError, match=rf"training part needs a label of each .* 1 of its 2 .* none: {name(2)}\."):
        part_of(parts, "training", "label")


def test_the_sample_cohort_stands_in(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(
        "monai_deq.data.oasis.write_sample_cohort",
        lambda path: write_sample_cohort(path, 13, spatial_size_3d=(8, 8, 8), spatial_size_2d=(8, 8)),
    )
    for nothing in (None, ""):
        with caplog.at_level(logging.INFO, logger="monai_deq"):
            found = find_oasis(nothing, 2)
        assert found.is_sample and found.root == tmp_path / "monai_deq_sample"
        assert "SYNTHETIC" in caplog.messages[0] and "--dataset_dir" in caplog.messages[0]
    assert [len(part) for part in found.split().values()] == [10, 2, 1]
    assert not find_oasis(write_neurite(tmp_path / "real", [1])).is_sample
