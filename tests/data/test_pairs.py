# SPDX-License-Identifier: Apache-2.0
"""Pairs: schemes, data sets of loaded ones, samplers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, Dataset, MetaTensor
from monai.transforms import Compose, Identityd
from torch.utils.data import DataLoader

from monai_deq.data import (
    FAILED_PAIRS,
    GivenPairDataset,
    GivenPairSampler,
    PairDataset,
    RandomPairSampler,
    ShardSampler,
    collate_annotated_pairs,
    pair_indices,
    pair_names,
    shard_loader,
)


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
        (ShardSampler, (3, 0), "batch_size a whole number of at least 1, got 3 and 0"),
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


class Broken(Dataset):
    """Items of one number each, one of which cannot be loaded."""

    data = [{"fixed_subject": f"f{i}", "moving_subject": f"m{i}"} for i in range(5)]

    def __init__(self) -> None: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 3:
            raise OSError("not\n  there")
        return {**self.data[index], "value": torch.full((1, 3 if index == 4 else 2), float(index))}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_loaded_is_left_out_of_its_batch(num_workers: int) -> None:
    dataset = Broken()
    with pytest.raises(OSError, match="not"):
        list(shard_loader(dataset, 2, num_workers))
    first, second, third = shard_loader(dataset, 2, num_workers, on_error="skip")
    assert first["value"].flatten().tolist() == [0, 0, 1, 1] and FAILED_PAIRS not in first
    assert second["value"].flatten().tolist() == [2, 2] and second["moving_subject"] == ["m2"]
    assert list(map(str, second[FAILED_PAIRS])) == ["m3 to f3: OSError: not there"]
    assert third["fixed_subject"] == ["f4"]
    # nor what makes no batch with the others
    failed = list(shard_loader(dataset, 5, num_workers, on_error="skip"))[0]
    assert set(failed) == {FAILED_PAIRS} and len(failed[FAILED_PAIRS]) == 5
    with pytest.raises(ValueError, match="on_error: expected stop or skip, got 'no'"):
        shard_loader(dataset, on_error="no")


def test_names_without_loading() -> None:
    subjects = [{"subject": name, "image": "absent.nii.gz"} for name in "abc"]
    names = pair_names(PairDataset(subjects, "cyclic"))
    assert names == [{"fixed_subject": f, "moving_subject": m} for f, m in ("ab", "bc", "ca")]
    assert pair_names(Broken()) == Broken.data
    named = [{"fixed_subject": 1, "moving_subject": "m", "name": "n", "fixed": "absent.nii.gz"}, {"fixed": "x"}]
    found = [{"fixed_subject": "1", "moving_subject": "m", "name": "n"}, {"name": "pair 1"}]
    assert pair_names(Dataset(named)) == pair_names(GivenPairDataset(named)) == found


def test_a_sampler_shares_what_is_left() -> None:
    samplers = [ShardSampler(9, 2, 2, rank) for rank in range(2)]
    for sampler in samplers:
        sampler.share([1, 4, 5, 8])
    assert [list(sampler) for sampler in samplers] == [[1, 4], [5, 8]] and len(samplers[0]) == 2
    samplers[1].share([])
    assert list(samplers[1]) == []
