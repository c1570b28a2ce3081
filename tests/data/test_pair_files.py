# SPDX-License-Identifier: Apache-2.0
"""Files of pairs to register: one pair, a list, the test part of a data set; their names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monai_deq.data import find_oasis, pair_items, pairs_to_register, read_pair_list, scan_names
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


def make(*files: Path) -> list[Path]:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    return list(files)


@pytest.mark.parametrize(
    "files, names",
    [
        (["bert/mri/norm.mgz", "ernie/mri/norm.mgz"], ["bert_norm", "ernie_norm"]),
        (["a/bert/mri/norm.mgz", "b/bert/mri/norm.mgz", "b/bert/mri/aseg.mgz"], ["a_norm", "b_norm", "aseg"]),
        (["x/scan.nii.gz", "x/scan.mgz"], ["scan.nii.gz", "scan.mgz"]),
        (["scan.nii.gz", "other.nii"], ["scan", "other"]),
        (["a/1/s.nii", "a/2/s.nii", "b/1/s.nii", "b/2/s.nii"], ["a_1_s", "a_2_s", "b_1_s", "b_2_s"]),
        (["s.nii", "s.nii"], ["s", "s"]),
        (["a/s.nii", "a/s.nii", "b/s.nii"], ["a_s", "a_s", "b_s"]),
        (["1.nii.gz", "2.nii.gz"], ["1", "2"]),
        (["a b#1,%20'\"é脳.nii.gz", "c.nii"], ["a b#1,%20'\"é脳", "c"]),
        (["v1.2.nii.gz", "v1.3.nii.gz"], ["v1.2", "v1.3"]),
        (["SCAN.NII.GZ", "scan.nrrd"], ["SCAN", "scan"]),
        (["series", "other.dcm"], ["series", "other"]),
    ],
)
def test_names_tell_scans_apart(files, names, tmp_path):
    assert scan_names([tmp_path / file for file in files]) == names


def test_names_of_many_folders_are_different(tmp_path):
    """A hundred scans of one name, at different depths."""
    files = [
        tmp_path / f"s{i % 10}" / f"t{i // 10}" / ("deep" if i % 3 else "er/deep") / "T1.nii.gz" for i in range(100)
    ]
    files += [tmp_path / "T1.nii.gz", tmp_path / "s1" / "T1.mgz"]
    names = scan_names(files)
    assert len(set(names)) == len(files) and all("/" not in name and name.endswith(("T1", "T1.mgz")) for name in names)


@pytest.mark.parametrize(
    "files",
    [["a/b_c/s.nii", "a_b/c/s.nii"], ["a_b/s.nii", "a/b_s.nii"], ["a/s.nii", "b/s.nii", "x/a_s.nii", "y/s_2.nii"]],
)
def test_names_whose_parts_join_alike_are_different(files, tmp_path):
    assert len(set(scan_names([tmp_path / file for file in files]))) == len(files)


def test_results_of_subjects_of_freesurfer(tmp_path):
    fixed, a, b = make(*(tmp_path / s / "mri" / "norm.mgz" for s in ("fsaverage", "bert", "ernie")))
    items = pair_items([{"fixed": fixed, "moving": a}, {"fixed": fixed, "moving": b}])
    assert [f"{i['moving_subject']}_to_{i['fixed_subject']}" for i in items] == [
        "bert_norm_to_fsaverage_norm",
        "ernie_norm_to_fsaverage_norm",
    ]


def test_names_that_are_given(tmp_path):
    fixed, moving = make(tmp_path / "f.nii", tmp_path / "m.nii")
    pair = {"fixed": fixed, "moving": moving}
    for name in ("1", "a b", "é#,%", "v1.2"):
        assert pair_items([{**pair, "name": name}])[0]["name"] == name
    for name in ("a/b", "../a", "", ".hidden", "..", "/a"):
        with pytest.raises(ValueError, match="^pair: expected a name for files"):
            pair_items([{**pair, "name": name}])
    with pytest.raises(ValueError, match="^pair: two pairs are called m_to_f"):
        pair_items([pair, pair])
    with pytest.raises(ValueError, match="two pairs are called x"):
        pair_items([{**pair, "name": "x"}, {**pair, "name": "x"}])
    assert len(pair_items([{**pair, "name": "x"}, pair])) == 2


def test_hidden_files_have_names_that_can_be_written(tmp_path):
    fixed, moving = make(tmp_path / "f.nii", tmp_path / ".m.nii")
    with pytest.raises(ValueError, match="expected a name for files, without folders, got '.m_to_f'"):
        pair_items([{"fixed": fixed, "moving": moving}])
    assert pair_items([{"fixed": fixed, "moving": moving, "name": "m"}])


def test_files_that_are_not_there(tmp_path):
    fixed, moving = make(tmp_path / "f.nii", tmp_path / "m.nii")
    pair = {"fixed": fixed, "moving": moving}
    for key in ("fixed", "moving", "fixed_label", "fixed_keypoints", "initial_transform"):
        with pytest.raises(FileNotFoundError, match=f"^here: the file {key} .*absent"):
            pair_items([{**pair, key: tmp_path / "absent"}], ["here"])
    with pytest.raises(FileNotFoundError, match="initial_transform"):
        pair_items([{**pair, "initial_transform": [fixed, tmp_path / "absent"]}])
    (tmp_path / "series").mkdir()
    assert pair_items([{**pair, "moving": tmp_path / "series"}])[0]["moving_subject"] == "series"
    with pytest.raises(FileNotFoundError, match="fixed_keypoints"):
        pair_items([{**pair, "fixed_keypoints": tmp_path / "series"}])
    item = pair_items([{**pair, "fixed_label": None, "initial_transform": [str(fixed)]}])[0]
    assert "fixed_label" not in item and item["initial_transform"] == [str(fixed)]


LISTS = {
    "plain": "fixed,moving,name\nf.nii,m 1.nii,one\nf.nii,m2.nii,\n",
    "mark of byte order": "\ufefffixed,moving,name\nf.nii,m 1.nii,one\nf.nii,m2.nii,\n",
    "Windows": "fixed,moving,name\r\nf.nii,m 1.nii,one\r\nf.nii,m2.nii,\r\n",
    "blanks": " fixed , moving , name \n f.nii , m 1.nii , one \n f.nii , m2.nii ,  \n",
    "quotes": '"fixed","moving","name"\n"f.nii","m 1.nii","one"\n"f.nii","m2.nii",""\n',
    "order": "name,moving,fixed\none,m 1.nii,f.nii\n,m2.nii,f.nii\n",
    "empty lines": "fixed,moving,name\n\nf.nii,m 1.nii,one\n\nf.nii,m2.nii,\n\n",
    "empty column": "fixed,moving,name,fixed_label\nf.nii,m 1.nii,one,\nf.nii,m2.nii,,\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_csv(kind, tmp_path):
    make(*(tmp_path / name for name in ("f.nii", "m 1.nii", "m2.nii")))
    (tmp_path / "pairs.csv").write_text(LISTS[kind], encoding="utf-8", newline="")
    items = read_pair_list(tmp_path / "pairs.csv")
    assert [item["moving"] for item in items] == [str(tmp_path / "m 1.nii"), str(tmp_path / "m2.nii")]
    assert items[0]["name"] == "one" and "name" not in items[1] and "fixed_label" not in items[0]


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_names_with_marks_of_all_kinds(ending, tmp_path):
    names = ["a,b.nii", "a#b.nii", "50%.nii", "it's.nii", "脳.nii", "007.nii", "1e5.nii", "NA.nii", "null"]
    make(tmp_path / "f.nii", *(tmp_path / name for name in names))
    path = tmp_path / f"pairs.{ending}"
    if ending == "csv":
        path.write_text("fixed,moving,name\n" + "".join(f'f.nii,"{n}",00{i}\n' for i, n in enumerate(names)), "utf-8")
    else:
        entries = [{"fixed": "f.nii", "moving": n, "name": f"00{i}"} for i, n in enumerate(names)]
        path.write_text(json.dumps(entries, ensure_ascii=False), "utf-8")
    items = read_pair_list(path)
    assert [Path(item["moving"]).name for item in items] == names
    assert [item["name"] for item in items] == [f"00{i}" for i in range(len(names))]


def test_json_with_a_mark_of_byte_order(tmp_path):
    make(tmp_path / "f.nii", tmp_path / "m.nii")
    entries = [{"fixed": "f.nii", "moving": "m.nii", "fixed_label": None}]
    (tmp_path / "pairs.json").write_text(json.dumps(entries), encoding="utf-8-sig")
    assert len(read_pair_list(tmp_path / "pairs.json")) == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("fixed,moving\nf.nii,\n", "pair 0"),
        ("fixed,moving\n,m.nii\n", "pair 0"),
        ("fixed,movin\nf.nii,m.nii\n", "pair 0: expected the keys"),
        ("fixed;moving\nf.nii;m.nii\n", "pair 0: expected the keys"),
        ("fixed,moving\nf.nii,m.nii\nf.nii,absent.nii\n", "pair 1: the file moving .*absent.nii"),
        ("fixed,moving\nf.nii,m.nii\nf.nii,m.nii\n", "pair 1: two pairs are called m_to_f .*pair 0"),
        ("fixed,moving,name\nf.nii,m.nii,a/b\n", "pair 0: expected a name"),
        ("fixed,moving\nf.nii,m.nii,x,y\n", "pairs.csv"),
        ("fixed,moving\n", "pairs.csv must hold a list"),
        ("", "pairs.csv is not valid CSV"),
    ],
)
def test_csv_that_is_none(text, words, tmp_path):
    make(tmp_path / "f.nii", tmp_path / "m.nii")
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        read_pair_list(tmp_path / "pairs.csv")
    assert "pairs.csv" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_binary_list(tmp_path):
    for name in ("pairs.csv", "pairs.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x01\x89PNG" * 20)
        with pytest.raises(ValueError, match=f"{name} is not valid"):
            read_pair_list(tmp_path / name)


@pytest.mark.parametrize("lines", [[",x.nii"], ["", ",x.nii"], [",x.nii", ",x.nii"]])
def test_csv_with_more_cells_than_names(lines, tmp_path):
    """pandas would take the first column for an index where all lines have one more, and shift the others."""
    make(tmp_path / "f.nii", tmp_path / "m.nii", tmp_path / "x.nii", tmp_path / "0.nii", tmp_path / "1.nii")
    rows = [f"f.nii,{i}.nii{more}" for i, more in enumerate(lines)]
    (tmp_path / "pairs.csv").write_text("\n".join(["fixed,moving", *rows]))
    with pytest.raises(ValueError, match=r"pairs.csv is not valid CSV: pair \d has 3 cells, the first line has 2"):
        read_pair_list(tmp_path / "pairs.csv")


def test_a_column_twice_and_names_that_no_file_has(tmp_path):
    make(tmp_path / "f.nii", tmp_path / "m.nii")
    path = tmp_path / "pairs.csv"
    path.write_text("fixed,moving,fixed\nf.nii,m.nii,m.nii\n")
    with pytest.raises(ValueError, match=r"pairs.csv is not valid CSV: a column is there twice"):
        read_pair_list(path)
    for name in ("x" * 300, "x\0y"):
        path.with_suffix(".json").write_text(json.dumps([{"fixed": "f.nii", "moving": name}]))
        with pytest.raises(FileNotFoundError, match="pairs.json, pair 0: the file moving .* does not exist"):
            read_pair_list(path.with_suffix(".json"))


def test_json_nested_without_an_end(tmp_path):
    (tmp_path / "pairs.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="pairs.json is not valid JSON"):
        read_pair_list(tmp_path / "pairs.json")
