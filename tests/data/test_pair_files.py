# SPDX-License-Identifier: Apache-2.0
"""Files of pairs to register: one pair, a list, the test part of a data set; their names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monai_deq.data import find_oasis, pairs_to_register
from monai_deq.transforms import SaveRegistrationd


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return str(path)


def write_list(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def no_dataset() -> Any:
    raise AssertionError("a data set is looked for")


def scan_pairs(*files: Any, **settings: Any) -> list[dict[str, Any]]:
    return pairs_to_register(no_dataset, *files, **settings)


def listed_pairs(path: Any) -> list[dict[str, Any]]:
    return pairs_to_register(no_dataset, pairs=path)


def test_one_pair(tmp_path: Path) -> None:
    fixed, moving, label = (touch(tmp_path / name) for name in ("b.x.nii.gz", "a.nii", "a_seg.nii.gz"))
    item = {"fixed": fixed, "moving": moving, "fixed_subject": "b.x", "moving_subject": "a"}
    assert scan_pairs(fixed, moving) == [item]
    assert scan_pairs(Path(fixed), Path(moving), label) == [{**item, "moving_label": label}]


def test_scans_told_apart_by_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [touch(tmp_path / f"OASIS_{i}" / "norm.nii.gz") for i in (1, 2)]
    (item,) = scan_pairs(*files)
    assert (item["fixed_subject"], item["moving_subject"]) == ("OASIS_1_norm", "OASIS_2_norm")
    monkeypatch.chdir(tmp_path / "OASIS_1")
    (item,) = scan_pairs("norm.nii.gz", "../OASIS_2/norm.nii.gz")
    assert (item["fixed_subject"], item["moving_subject"]) == ("OASIS_1_norm", "OASIS_2_norm")
    # in a list too, of scans that no pair has both of
    touch(tmp_path / "atlas.nii")
    entries = [{"fixed": "atlas.nii", "moving": f"OASIS_{i}/norm.nii.gz"} for i in (1, 2)]
    items = listed_pairs(write_list(tmp_path / "pairs.json", entries))
    assert [i["moving_subject"] for i in items] == ["OASIS_1_norm", "OASIS_2_norm"]


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path in quotes, or in a JSON file, reaches us with its tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    a, b = touch(tmp_path / "a.nii"), touch(tmp_path / "b.nii")
    (item,) = scan_pairs("~/a.nii", "~/b.nii", "~/b.nii")
    assert (item["fixed"], item["moving"], item["moving_label"]) == (a, b, b)
    pairs = write_list(tmp_path / "lists" / "pairs.json", [{"fixed": "~/a.nii", "moving": "~/b.nii"}])
    assert (listed_pairs(pairs)[0]["fixed"], listed_pairs(pairs)[0]["moving"]) == (a, b)


def test_errors_of_one_pair(tmp_path: Path) -> None:
    scan = touch(tmp_path / "a.nii")
    for pair in ((scan, None), (None, scan), (scan, ""), (None, None, scan), (None, None, None, scan)):
        with pytest.raises(ValueError, match="both --fixed and --moving are needed"):
            scan_pairs(*pair)
    with pytest.raises(ValueError, match=r"--pairs list\.json cannot go with --fixed, --moving"):
        scan_pairs(scan, scan, pairs="list.json")
    absent = tmp_path / "absent.nii"
    for key, files in {
        "fixed": (absent, scan),
        "moving": (scan, absent),
        "moving_label": (scan, scan, absent),
    }.items():
        with pytest.raises(FileNotFoundError, match=rf"pair: the file {key} .*absent.nii"):
            scan_pairs(*files)
    # a folder may be a DICOM series, which its reader sees to; no field is one
    assert scan_pairs(scan, tmp_path)[0]["moving"] == str(tmp_path)
    with pytest.raises(FileNotFoundError, match="initial_ddf"):
        scan_pairs(scan, scan, None, tmp_path)


def test_list_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are relative to the list, wherever the program runs."""
    a, b, seg = (touch(tmp_path / "scans" / name) for name in ("a.nii.gz", "b.nii.gz", "b_seg.nii.gz"))
    elsewhere = touch(tmp_path / "elsewhere" / "Zoë.nii")
    pairs = write_list(
        tmp_path / "scans" / "pairs.json",
        [
            {"fixed": "a.nii.gz", "moving": "b.nii.gz", "moving_label": "b_seg.nii.gz"},
            {"fixed": elsewhere, "moving": "a.nii.gz", "moving_label": None},
            {"fixed": "b.nii.gz", "moving": "a.nii.gz"},
        ],
    )
    expected = [
        {"fixed": a, "moving": b, "fixed_subject": "a", "moving_subject": "b", "moving_label": seg},
        {"fixed": elsewhere, "moving": a, "fixed_subject": "Zoë", "moving_subject": "a"},
        {"fixed": b, "moving": a, "fixed_subject": "b", "moving_subject": "a"},
    ]
    assert listed_pairs(pairs) == expected
    monkeypatch.chdir(tmp_path)
    assert [Path(p["fixed"]).resolve() for p in listed_pairs("scans/pairs.json")] == [
        Path(p["fixed"]) for p in expected
    ]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('[{"fixed": "a.nii",', ValueError, r"pairs.json is not valid JSON"),
        ("", ValueError, r"pairs.json is not valid JSON"),
        ({"fixed": "a.nii", "moving": "b.nii"}, ValueError, r"pairs.json must hold a list.*got dict"),
        ([], ValueError, r"must hold a list.*got an empty one"),
        (["a.nii"], ValueError, r"pair 0: expected the keys.*'a.nii'"),
        ([{"fixed": "a.nii"}], ValueError, r"pair 0: expected the keys"),
        ([{"fixed": "a.nii", "moving": "b.nii", "label": "b.nii"}], ValueError, r"pair 0: expected the keys.*label"),
        ([{"fixed": "a.nii", "moving": None}], ValueError, r"pair 0: expected the names of files"),
        ([{"fixed": 3, "moving": "b.nii"}], ValueError, r"pair 0: expected the names of files"),
        ([{"fixed": "a.nii", "moving": "b.nii", "moving_label": ["b.nii"]}], ValueError, r"the names of files"),
        (
            [{"fixed": "a.nii", "moving": "b.nii"}, {"fixed": "a.nii", "moving": "c.nii"}],
            FileNotFoundError,
            r"pair 1.*moving.*c.nii",
        ),
        ([{"fixed": "a.nii", "moving": ""}], FileNotFoundError, r"pair 0.*moving"),
        ([{"fixed": "a.nii", "moving": "b.nii"}] * 2, ValueError, r"two pairs are called b_to_a"),
        (
            [{"fixed": "a.nii", "moving": "b.nii", "name": "x"}, {"fixed": "b.nii", "moving": "a.nii", "name": "x"}],
            ValueError,
            r"two pairs are called x.*different file names",
        ),
    ],
)
def test_malformed_lists(tmp_path: Path, content: Any, error: type[Exception], message: str) -> None:
    for name in ("a.nii", "b.nii", "other/a.nii.gz"):
        touch(tmp_path / name)
    with pytest.raises(error, match=message):
        listed_pairs(write_list(tmp_path / "pairs.json", content))


def test_list_that_is_absent_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"list of pairs .*pairs.json"):
        listed_pairs(tmp_path / "pairs.json")
    (tmp_path / "pairs.json").write_bytes(b'[{"fixed": "\xff\xfe"}]')
    with pytest.raises(ValueError, match=r"pairs.json is not valid JSON"):
        listed_pairs(tmp_path / "pairs.json")


def test_pairs_of_a_split(tmp_path: Path) -> None:
    names = [f"OASIS_OAS1_{i:04d}_MR1" for i in range(1, 7)]
    images = [touch(tmp_path / name / "slice_norm.nii.gz") for name in names]
    labels = [touch(tmp_path / name / "slice_seg24.nii.gz") for name in names[:4]]
    items = pairs_to_register(lambda: find_oasis(tmp_path, 2), split_sizes=[2, 1, None])
    expected = [(3, 4), (4, 5), (5, 3)]
    assert [(i["fixed_subject"], i["moving_subject"]) for i in items] == [(names[f], names[m]) for f, m in expected]
    assert [(i["fixed"], i["moving"]) for i in items] == [(images[f], images[m]) for f, m in expected]
    # only the last pair moves a subject that has a segmentation
    assert [i.get("moving_label") for i in items] == [None, None, labels[3]]
    # every pair gets files of its own
    saver = SaveRegistrationd(tmp_path / "out")
    assert len({path for item in items for path in saver.paths(item).values()}) == 3 * 5
    listed = pairs_to_register(lambda: find_oasis(tmp_path, 2), split_lists={"test": ["0001", 6]})
    assert [i["fixed_subject"] for i in listed] == [names[0], names[5]]
