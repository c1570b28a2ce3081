# SPDX-License-Identifier: Apache-2.0
"""Pairs: schemes, data sets of loaded ones, samplers, and files to register."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, Identityd
from torch.utils.data import DataLoader

from monai_deq.data import (
    GivenPairDataset,
    GivenPairSampler,
    PairDataset,
    RandomPairSampler,
    ShardSampler,
    collate_annotated_pairs,
    find_oasis,
    pair_indices,
    pairs_to_register,
)
from monai_deq.transforms import SaveRegistrationd


def subjects(n, size=(4, 6), labelled=lambda i: True, spacing=lambda i: 1.0):
    """Loaded subjects; image i is filled with i, its label with 10 + i."""
    items = []
    for i in range(n):
        affine = np.diag([spacing(i), 1.0, 1.0, 1.0])
        item = {"subject": f"S{i}", "image": MetaTensor(torch.full((1, *size), float(i)), affine=affine)}
        if labelled(i):
            item["label"] = MetaTensor(torch.full((1, *size), 10.0 + i), affine=affine)
        items.append(item)
    return items


def test_schemes():
    assert pair_indices(4) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert pair_indices(2) == [(0, 1), (1, 0)]
    assert pair_indices(3, "all") == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    with pytest.raises(ValueError, match="at least 2"):
        pair_indices(1)
    with pytest.raises(ValueError, match="'ring'"):
        pair_indices(4, "ring")


@pytest.mark.parametrize("size", [(4, 6), (4, 5, 3)])
def test_items(size):
    dataset = PairDataset(subjects(3, size), pairs="cyclic")
    assert len(dataset) == 3
    item = dataset[2]
    assert item["fixed_subject"] == "S2" and item["moving_subject"] == "S0"
    assert item["fixed"].shape == (1, *size) and isinstance(item["fixed"], MetaTensor)
    values = [float(item[k].mean()) for k in ("fixed", "moving", "fixed_label", "moving_label")]
    assert values == [2.0, 0.0, 12.0, 10.0]
    assert dataset[(0, 2)]["moving_subject"] == "S2"  # as a sampler asks
    assert len(PairDataset(subjects(4))) == 12
    assert PairDataset(subjects(4), pairs=[[3, 1]])[0]["fixed_subject"] == "S3"  # a list from JSON


def test_labels_only_where_both_have_one():
    dataset = PairDataset(subjects(3, labelled=lambda i: i != 1))
    assert "fixed_label" in dataset[(0, 2)]
    assert not {"fixed_label", "moving_label"} & set(dataset[(0, 1)])
    without = PairDataset(subjects(3, labelled=lambda i: i != 1), label_key=None)
    assert "fixed_label" not in without[(0, 2)]


def test_bad_pairs():
    for pairs in ([(0, 0)], [(0, 3)], [(-1, 1)], [(0, 1, 2)]):
        with pytest.raises(ValueError, match="pair"):
            PairDataset(subjects(3), pairs=pairs)
    with pytest.raises(ValueError, match="two different subjects"):
        PairDataset(subjects(3))[(1, 1)]
    mixed = subjects(2) + subjects(1, size=(5, 6))
    mixed[2]["subject"] = "big"
    with pytest.raises(ValueError, match=r"size.*subject S1 has \(4, 6\), subject big has \(5, 6\)"):
        PairDataset(mixed)[(1, 2)]
    with pytest.raises(ValueError, match=r"spacing.*subject S0 has \[1.0, 1.0\], subject S1 has \[2.0, 1.0\]"):
        PairDataset(subjects(2, spacing=lambda i: 1.0 + i))[0]


def test_the_cache_stays_as_it_was():
    # without a random transform of its own, CacheDataset gives out the very tensors that it keeps
    cached = CacheDataset(subjects(2), transform=Compose([Identityd("image")]), progress=False)
    assert cached[0]["image"] is cached[0]["image"]

    def spoil(item):
        for key in ("fixed", "moving", "fixed_label", "moving_label"):
            item[key].mul_(0.0).sub_(1.0)
            item[key].meta["note"] = "spoilt"
        return item

    assert float(PairDataset(cached, transform=spoil)[(0, 1)]["moving"].mean()) == -1.0
    clean = PairDataset(cached)[(0, 1)]
    assert float(clean["moving"].mean()) == 1.0 and float(clean["moving_label"].mean()) == 11.0
    assert "note" not in clean["moving"].meta


def given_pairs(number: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "fixed": torch.full((1, 4, 4), float(i)),
            "fixed_keypoints": torch.full((i + 1, 2), float(i)),
            "moving_keypoints": torch.full((i + 1, 2), i + 0.5),
            "fixed_subject": f"s{i}",
        }
        for i in range(number)
    ]


def test_a_pair_is_a_copy() -> None:
    data = given_pairs()
    given = GivenPairDataset(data)
    assert len(given) == 5
    given[1]["fixed"].zero_()
    assert float(data[1]["fixed"].max()) == 1.0


def test_batches_with_lists_of_keypoints() -> None:
    pairs = given_pairs(2)
    batch = collate_annotated_pairs(pairs)
    assert batch["fixed"].shape == (2, 1, 4, 4) and batch["fixed_subject"] == ["s0", "s1"]
    for key in ("fixed_keypoints", "moving_keypoints"):
        assert all(a is b[key] for a, b in zip(batch[key], pairs, strict=True))
    without = [{k: v for k, v in pair.items() if "keypoints" not in k} for pair in pairs]
    assert set(collate_annotated_pairs(without)) == {"fixed", "fixed_subject"}


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
    with pytest.raises(FileNotFoundError, match="moving"):
        scan_pairs(scan, tmp_path)  # a folder


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
            [{"fixed": "a.nii", "moving": "b.nii"}, {"fixed": "other/a.nii.gz", "moving": "b.nii"}],
            ValueError,
            r"two pairs are called b_to_a.*different file names",
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
    assert len({path for item in items for path in saver.paths(item).values()}) == 3 * 4
    listed = pairs_to_register(lambda: find_oasis(tmp_path, 2), split_lists={"test": ["0001", 6]})
    assert [i["fixed_subject"] for i in listed] == [names[0], names[5]]


def test_sampler_is_determined_by_seed_and_epoch():
    def draw(seed=0, epoch=0):
        sampler = RandomPairSampler(10, 50, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw()
    assert torch.equal(state, torch.get_rng_state())  # the global random state is not touched
    torch.manual_seed(2)
    assert draw() == first
    assert len({tuple(draw(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    sampler = RandomPairSampler(10, 50)
    assert len(sampler) == 50 and list(sampler) == list(sampler)  # the epoch decides, not how often it was read


def test_sampler_covers_all_ordered_pairs_evenly():
    counts = Counter(RandomPairSampler(4, 12000))
    assert set(counts) == {(i, j) for i in range(4) for j in range(4) if i != j}
    chi2 = sum((c - 1000) ** 2 / 1000 for c in counts.values())
    assert chi2 < 31.3  # 99.9 % quantile of chi-square with 11 degrees of freedom
    assert set(RandomPairSampler(2, 50)) == {(0, 1), (1, 0)}


def test_sampler_shares_of_replicas(monkeypatch):
    whole = list(RandomPairSampler(5, 12, seed=3))
    shares = [list(RandomPairSampler(5, 12, seed=3, num_replicas=3, rank=r)) for r in range(3)]
    assert [len(s) for s in shares] == [4, 4, 4]
    assert [pair for group in zip(*shares, strict=True) for pair in group] == whole
    # rounded up to equal shares
    assert [len(list(RandomPairSampler(5, 10, 3, 3, rank))) for rank in range(3)] == [4, 4, 4]
    # by default those of the process group
    monkeypatch.setattr("monai_deq.data.pairs.process_count", lambda: 3)
    monkeypatch.setattr("monai_deq.data.pairs.process_rank", lambda: 2)
    assert list(RandomPairSampler(5, 11, seed=3)) == shares[2]
    assert list(ShardSampler(7)) == [5, 6]


def test_all_pairs_in_turn() -> None:
    sampler = GivenPairSampler(5, 12, seed=3)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 12
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5)) and drawn[:5] != drawn[5:10]
    torch.manual_seed(8)  # the global random state does not matter
    assert list(sampler) == drawn
    sampler.set_epoch(1)
    assert list(sampler) != drawn
    halves = [list(GivenPairSampler(5, 12, seed=3, num_replicas=2, rank=rank)) for rank in range(2)]
    assert [i for both in zip(*halves, strict=True) for i in both] == drawn


@pytest.mark.parametrize(
    ("sampler", "arguments", "message"),
    [
        (RandomPairSampler, (1, 4), "at least 2"),
        (RandomPairSampler, (3, 0), "must be positive"),
        (RandomPairSampler, (3, 4, 0, 2, 2), "rank must be in"),
        (GivenPairSampler, (0, 4), "num_pairs=0"),
        (GivenPairSampler, (3, 0), "must be positive"),
        (ShardSampler, (-1,), "num_items must not be negative"),
        (ShardSampler, (3, 0), "batch_size at least 1"),
        (ShardSampler, (3, 1, 0), "rank must be in"),
        (ShardSampler, (3, 1, 2, 2), "rank must be in"),
    ],
)
def test_samplers_refuse(sampler: Any, arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(*arguments)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("num_items", [0, 1, 5, 12, 13])
def test_batches_are_those_of_one_process(num_items: int, replicas: int, batch_size: int) -> None:
    items = list(range(100, 100 + num_items))
    whole = [batch.tolist() for batch in DataLoader(items, batch_size)] if items else []
    found, sizes = [], []
    for rank in range(replicas):
        sampler = ShardSampler(num_items, batch_size, replicas, rank)
        own = [batch.tolist() for batch in DataLoader(items, batch_size, sampler=sampler)]
        assert sum(map(len, own)) == len(sampler)
        found += own
        sizes.append(len(own))
    assert found == whole
    assert max(sizes) - min(sizes) <= 1
