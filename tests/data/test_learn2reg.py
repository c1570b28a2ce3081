# SPDX-License-Identifier: Apache-2.0
"""Finding the pairs of a Learn2Reg task, and splitting them. Files are empty: nothing here is loaded."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monai_deq.data import (
    Learn2RegDataset,
    find_learn2reg,
    keep_annotations,
    pairs_to_register,
    write_sample_lung_cohort,
)

KINDS = {"images": ".nii.gz", "masks": ".nii.gz", "keypoints": ".csv"}


def entry(folder: str, case: int, scan: int) -> str:
    return f"./{folder}/NLST_{case:04d}_{scan:04d}.nii.gz"


def pair(case: int, part: str = "Tr") -> dict[str, str]:
    return {"fixed": entry(f"images{part}", case, 0), "moving": entry(f"images{part}", case, 1)}


def scan(case: int, number: int, part: str = "Tr") -> dict[str, str]:
    # keypoints are called .nii.gz, as the challenge has it
    words = {"image": "images", "mask": "masks", "keypoint": "keypoints"}
    return {word: entry(f"{folder}{part}", case, number) for word, folder in words.items()}


def write_nlst(
    root: Path,
    change: Callable[[dict[str, Any]], Any] | None = None,
    remove: tuple[str, ...] = (),
    training: int = 4,
) -> Path:
    """Cases 1, 2, ... for training, of which the last one validates, and case 999 for test."""
    for case in (*range(1, training + 1), 999):
        for kind, suffix in KINDS.items():
            folder = root / f"{kind}{'Ts' if case == 999 else 'Tr'}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in (0, 1):
                (folder / f"NLST_{case:04d}_{number:04d}{suffix}").touch()
    content: dict[str, Any] = {
        "name": "NLST",
        "pairings": "paired",
        "registration_direction": {"fixed": 0, "moving": 1},
        "training": [scan(case, number) for case in range(1, training + 1) for number in (0, 1)],
        "test": [scan(999, number, "Ts") for number in (0, 1)],
        "training_paired_images": [pair(case) for case in range(1, training + 1)],
        "registration_val": [pair(training)],
        "registration_test": [pair(999, "Ts")],
    }
    if change is not None:
        changed = change(content)
        content = content if changed is None else changed
    for path in remove:
        (root / path).unlink()
    (root / "NLST_dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def cases(pairs: list[dict[str, Any]]) -> list[str]:
    return [pair["case"] for pair in pairs]


def test_pairs_and_their_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        found = find_learn2reg(str(write_nlst(tmp_path)))
    assert (found.name, found.root) == ("NLST", tmp_path)
    assert cases(found.training) == ["NLST_0001", "NLST_0002", "NLST_0003"]  # the list names case 4 too
    assert cases(found.registration_val) == ["NLST_0004"] and cases(found.registration_test) == ["NLST_0999"]
    assert cases(found.pairs) == [f"NLST_{i:04d}" for i in (1, 2, 3, 4, 999)]
    expected = {"case": "NLST_0999"}
    for number, role in enumerate(("fixed", "moving")):
        name = f"NLST_0999_000{number}"
        expected |= {
            role: str(tmp_path / f"imagesTs/{name}.nii.gz"),
            f"{role}_mask": str(tmp_path / f"masksTs/{name}.nii.gz"),
            f"{role}_keypoints": str(tmp_path / f"keypointsTs/{name}.csv"),
            f"{role}_subject": name,
        }
    assert found.registration_test == [expected]
    (message,) = caplog.messages
    assert "5 pairs, 5 of them with keypoints, 5 with masks, 0 with labels" in message
    assert "3 for training (the list names 4" in message


def test_files_that_the_json_does_not_name_are_found_in_their_folders(tmp_path: Path) -> None:
    def images_only(content: dict[str, Any]) -> None:
        content["training"] = [{"image": scan["image"]} for scan in content["training"]]
        del content["test"]

    root = write_nlst(tmp_path, images_only)
    (root / "labelsTr").mkdir()
    for number in (0, 1):
        (root / f"labelsTr/NLST_0002_000{number}.nii.gz").touch()
    found = find_learn2reg(root)
    assert all("fixed_keypoints" in pair and "moving_mask" in pair for pair in found.pairs)
    assert [pair["case"] for pair in found.pairs if "fixed_label" in pair] == ["NLST_0002"]
    assert found.training[1]["moving_label"] == str(root / "labelsTr/NLST_0002_0001.nii.gz")


def test_a_test_set_alone(tmp_path: Path) -> None:
    """As a single pair to evaluate comes: no training at all, keypoints called .csv."""

    def test_only(content: dict[str, Any]) -> None:
        content["training"] = []
        for key in ("training_paired_images", "registration_val"):
            del content[key]
        content["test_paired_images"] = content["registration_test"]
        for scan in content["test"]:
            scan["keypoint"] = scan["keypoint"].replace(".nii.gz", ".csv")

    found = find_learn2reg(write_nlst(tmp_path, test_only))
    assert cases(found.pairs) == ["NLST_0999"] and "moving_keypoints" in found.pairs[0]
    assert found.training == found.registration_val == []


def test_other_names_and_shared_scans(tmp_path: Path) -> None:
    """A training pair that shares one scan with a test pair is not trained on."""

    def change(content: dict[str, Any]) -> None:
        content["registration_test"] = [{"fixed": pair(1)["fixed"], "moving": pair(2)["moving"]}]

    found = find_learn2reg(write_nlst(tmp_path, change))
    assert cases(found.training) == ["NLST_0003"]
    assert cases(found.registration_test) == ["NLST_0002_0001_to_NLST_0001_0000"]


def test_unpublished_annotations_of_test_pairs_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = tuple(f"keypointsTs/NLST_0999_000{number}.csv" for number in (0, 1))
    with caplog.at_level(logging.WARNING, logger="monai_deq"):
        found = find_learn2reg(write_nlst(tmp_path, remove=gone))
    assert "keypoint of NLST_0999_0000 and NLST_0999_0001 are named but not there" in caplog.text
    assert "fixed_keypoints" not in found.registration_test[0] and "fixed_mask" in found.registration_test[0]


@pytest.mark.parametrize(
    "gone",
    [
        ("imagesTr/NLST_0002_0001.nii.gz",),
        ("imagesTs/NLST_0999_0000.nii.gz",),
        ("masksTr/NLST_0003_0000.nii.gz",),
        ("keypointsTr/NLST_0004_0001.csv",),
        ("keypointsTs/NLST_0999_0000.csv",),  # one scan of a test pair alone
        ("keypointsTr/NLST_0001_0000.csv", "keypointsTr/NLST_0001_0001.csv"),  # both, of a training pair
    ],
)
def test_missing_files_are_named(tmp_path: Path, gone: tuple[str, ...]) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^{len(gone)} file\(s\)") as caught:
        find_learn2reg(write_nlst(tmp_path, remove=gone))
    assert all(str(tmp_path / name) in str(caught.value) for name in gone)


def test_one_scan_of_a_pair_without_what_the_other_has(tmp_path: Path) -> None:
    def unnamed(content: dict[str, Any]) -> None:
        for entry in content["training"]:
            del entry["mask"]

    with pytest.raises(FileNotFoundError, match="masksTr/NLST_0002_0001.nii.gz"):
        find_learn2reg(write_nlst(tmp_path, unnamed, remove=("masksTr/NLST_0002_0001.nii.gz",)))

    def elsewhere(content: dict[str, Any]) -> None:
        content["training"][3] = {"image": "./other/scan.nii.gz"}
        content["training_paired_images"][1]["moving"] = "./other/scan.nii.gz"

    write_nlst(tmp_path / "b", elsewhere)
    (tmp_path / "b/other").mkdir()
    (tmp_path / "b/other/scan.nii.gz").touch()
    with pytest.raises(ValueError, match="'other/scan.nii.gz' has no 'mask' although the other scan of its pair has"):
        find_learn2reg(tmp_path / "b")


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys:
            del content[key]

    return change


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: "{", "not valid JSON"),
        (lambda content: [content], "must hold an object with the lists .* got list"),
        (drop("training_paired_images"), "lacks a list of pairs: expected 'training_paired_images' where"),
        (drop("training", "training_paired_images", "registration_val", "registration_test"), "lacks a list of pairs"),
        (put(registration_val={"fixed": "x"}), "'registration_val' must be a list, got dict"),
        (put(registration_validation=[pair(1)]), r"unknown list\(s\) \['registration_validation'\]; expected .*_val"),
        (put(training=[{"mask": "x"}]), r"training\[0\] must have the key 'image', it has \['mask'\]"),
        (
            put(test=[{**scan(999, 0, "Ts"), "landmark": "x"}]),
            r"test\[0\] has the unknown key\(s\) \['landmark'\]; expected 'image' and perhaps \['mask', 'keypoint'",
        ),
        (put(training=["./imagesTr/NLST_0001_0000.nii.gz"]), r"training\[0\] must be an object of file names"),
        (put(test=[{**scan(999, 0, "Ts"), "keypoint": ""}]), r"test\[0\] must be an object of file names"),
        (put(registration_val=[{"fixed": 4}]), r"registration_val\[0\] must be an object of file names"),
        (put(registration_val=[{"fixed": "x"}]), r"registration_val\[0\] must have the keys 'fixed' and 'moving'"),
        (put(registration_val=[{**pair(4), "mask": "x"}]), r"registration_val\[0\] must have the keys .* no other"),
        (
            put(registration_val=[pair(4), pair(4)]),
            r"registration_val\[1\] names a pair that .* has already: NLST_0004",
        ),
        (
            put(registration_val=[{"fixed": pair(4)["fixed"], "moving": pair(4)["fixed"]}]),
            r"registration_val\[0\] pairs the image .*NLST_0004_0000.nii.gz' with itself",
        ),
        (put(training_paired_images=[], registration_val=[], registration_test=[]), "names no pair"),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_learn2reg(write_nlst(tmp_path, change))
    assert "NLST_dataset.json" in str(caught.value)


def test_no_task_or_several(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.*does not exist"):
        find_learn2reg(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no <NAME>_dataset.json .* found nothing"):
        find_learn2reg(tmp_path)
    write_nlst(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_learn2reg(tmp_path / "NLST_dataset.json")
    with pytest.raises(FileNotFoundError, match="no LungCT_dataset.json; found NLST"):
        find_learn2reg(tmp_path, task="LungCT")
    (tmp_path / "LungCT_dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="2 tasks, LungCT_dataset.json, NLST_dataset.json: choose one by `task`"):
        find_learn2reg(tmp_path)
    assert find_learn2reg(tmp_path, task="NLST").name == "NLST"


def numbers(split: dict[str, list[dict[str, Any]]]) -> list[list[int]]:
    assert list(split) == ["training", "validation", "test"]
    return [[int(pair["case"][-4:]) for pair in pairs] for pairs in split.values()]


def test_split_by_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = find_learn2reg(write_nlst(tmp_path))
    assert numbers(dataset.split([2, 1, 2])) == [[1, 2], [3], [4, 999]]
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        assert numbers(dataset.split([None, 1, 1])) == [[1, 2, 3], [4], [999]]
    assert "sizes [None, 1, 1] of 5 cases: training takes the remaining 3" in caplog.text
    for official in (None, "official"):
        assert numbers(dataset.split(official)) == [[1, 2, 3], [4], [999]]
    with pytest.raises(ValueError, match=r"sizes \[170, 10, 30\] .* need more cases than the 5 of NLST in "):
        dataset.split([170, 10, 30])
    for sizes in ([4, 1], "paper"):
        with pytest.raises(ValueError, match="sizes must give 3 numbers"):
            dataset.split(sizes)


def test_default_split_is_the_papers_of_the_whole_nlst(tmp_path: Path) -> None:
    pairs = [{"case": f"NLST_{i:04d}", "fixed": f"f{i}", "moving": f"m{i}", "fixed_keypoints": "x"} for i in range(210)]
    whole = Learn2RegDataset("NLST", tmp_path, pairs[:208], pairs[208:209], pairs[209:])
    assert [len(part) for part in whole.split().values()] == [170, 10, 30]
    for sizes, dataset in (("official", whole), (None, dataclasses.replace(whole, name="LungCT"))):
        assert [len(part) for part in dataset.split(sizes).values()] == [208, 1, 1]


def test_split_by_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = find_learn2reg(write_nlst(tmp_path))
    lists = {"training": ["0003", 1], "test": ["NLST_0999"]}
    assert numbers(dataset.split(lists=lists)) == [[3, 1], [], [999]]
    assert not caplog.records
    dataset.split(lists={"training": [1, 2], "test": [2]})
    assert "1 case(s) are in both training and test: NLST_0002" in caplog.text
    for lists, message in (
        ({"train": [1]}, r"unknown part\(s\) \['train'\]"),
        (
            {"test": [1, 77]},
            r"lists\['test'\] names 1 case\(s\) .* the 5 of NLST .*: 0077. Found NLST_0001",
        ),
        ({"test": [1, "0001"]}, r"lists\['test'\] names a case twice"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset.split(lists=lists)


def test_split_needs_keypoints(tmp_path: Path) -> None:
    gone = tuple(f"keypointsTs/NLST_0999_000{number}.csv" for number in (0, 1))
    dataset = find_learn2reg(write_nlst(tmp_path, remove=gone))
    with pytest.raises(ValueError, match="The test part needs keypoints, but 1 of its 2 pairs have none: NLST_0999"):
        dataset.split([2, 1, 2])
    assert numbers(dataset.split([2, 1, 2], require_keypoints=False))[2] == [4, 999]
    assert numbers(dataset.split([2, 1, 1]))[2] == [4]


def test_only_the_annotations_needed_are_kept(tmp_path: Path) -> None:
    pairs = find_learn2reg(write_nlst(tmp_path)).split()["training"]
    plain = keep_annotations(pairs, [])
    scored = keep_annotations(pairs)
    assert set(scored[0]) - set(plain[0]) == {"fixed_mask", "moving_mask", "fixed_keypoints", "moving_keypoints"}
    assert set(plain[0]) == {"fixed", "moving", "fixed_subject", "moving_subject", "case"}
    kept = keep_annotations(pairs, ["fixed_mask"])
    assert kept[1] == {**plain[1], "fixed_mask": pairs[1]["fixed_mask"]}
    assert "moving_mask" in pairs[0]  # the pairs themselves stay whole
    with pytest.raises(ValueError, match="test part needs 'moving_label', but 3 of its 3 pairs have none: NLST_0001"):
        keep_annotations(pairs, ["fixed_mask", "moving_label"], "test")
    with pytest.raises(ValueError, match="training part has no pairs"):
        keep_annotations([])
    with pytest.raises(ValueError, match="keys has \\['mask'\\]"):
        keep_annotations(pairs, ["mask"])


def test_scans_to_register(tmp_path: Path) -> None:
    root = write_nlst(tmp_path, remove=("keypointsTs/NLST_0999_0000.csv", "keypointsTs/NLST_0999_0001.csv"))

    def find() -> Learn2RegDataset:
        return find_learn2reg(root)

    (item,) = pairs_to_register(find)
    assert item == {
        "fixed": str(root / "imagesTs/NLST_0999_0000.nii.gz"),
        "moving": str(root / "imagesTs/NLST_0999_0001.nii.gz"),
        "fixed_subject": "NLST_0999_0000",
        "moving_subject": "NLST_0999_0001",
        "moving_label": str(root / "masksTs/NLST_0999_0001.nii.gz"),
    }
    for folder in ("labelsTr", "masksTr"):
        (root / folder).mkdir(exist_ok=True)
        for number in (0, 1):
            (root / folder / f"NLST_0001_{number:04d}.nii.gz").touch()
    (item,) = pairs_to_register(find, split_lists={"test": [1]})
    assert item["moving_label"] == str(root / "labelsTr/NLST_0001_0001.nii.gz")
    with pytest.raises(ValueError, match="test part has no pairs"):
        pairs_to_register(find, split_sizes=[4, 1, 0])


def test_the_sample_cohort_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(
        "monai_deq.data.learn2reg.write_sample_lung_cohort",
        lambda path: write_sample_lung_cohort(path, (1, 0, 1), (16, 20, 24)),
    )
    for nothing in (None, ""):
        with caplog.at_level(logging.INFO, logger="monai_deq"):
            found = find_learn2reg(nothing)
        assert found.is_sample and found.root == tmp_path / "monai_deq_sample_lung"
        assert "SYNTHETIC" in caplog.messages[0] and "--dataset_dir" in caplog.messages[0]
    assert [len(pairs) for pairs in found.split().values()] == [1, 0, 1]
    assert not find_learn2reg(write_nlst(tmp_path / "real")).is_sample
