# SPDX-License-Identifier: Apache-2.0
"""Fixed pairs, random pairs and the data set of pairs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose, Identityd

from monai_deq.data import PairDataset, RandomPairSampler, fixed_pairs, pair_indices, pairs_as_indices


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


def test_fixed_pairs():
    assert pair_indices(4) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert pair_indices(2) == [(0, 1), (1, 0)]
    assert pair_indices(3, "all") == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    items = [{"subject": s} for s in "abc"]
    assert [(p["fixed"]["subject"], p["moving"]["subject"]) for p in fixed_pairs(items)] == [
        ("a", "b"),
        ("b", "c"),
        ("c", "a"),
    ]
    assert pairs_as_indices(fixed_pairs(items), items[::-1]) == [(2, 1), (1, 0), (0, 2)]
    with pytest.raises(ValueError, match="at least 2"):
        fixed_pairs(items[:1])
    with pytest.raises(ValueError, match="'ring'"):
        fixed_pairs(items, "ring")
    with pytest.raises(ValueError, match="'c'"):
        pairs_as_indices(fixed_pairs(items), items[:2])


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


def test_batches_from_a_sampler():
    sampler = RandomPairSampler(3, 4, seed=1)
    loader = DataLoader(PairDataset(subjects(3)), batch_size=2, sampler=sampler, num_workers=0)
    got = [
        (int(f), int(m))
        for b in loader
        for f, m in zip(b["fixed"].mean((1, 2, 3)), b["moving"].mean((1, 2, 3)), strict=True)
    ]
    assert got == list(sampler)


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


def test_sampler_shares_of_replicas():
    whole = list(RandomPairSampler(5, 12, seed=3))
    shares = [list(RandomPairSampler(5, 12, seed=3, num_replicas=3, rank=r)) for r in range(3)]
    assert [len(s) for s in shares] == [4, 4, 4]
    assert [pair for group in zip(*shares, strict=True) for pair in group] == whole
    assert len(RandomPairSampler(5, 12, num_replicas=3)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_subjects": 1, "pairs_per_epoch": 4}, "at least 2"),
        ({"num_subjects": 3, "pairs_per_epoch": 0}, "positive multiple"),
        ({"num_subjects": 3, "pairs_per_epoch": 5, "num_replicas": 2}, "positive multiple"),
        ({"num_subjects": 3, "pairs_per_epoch": 4, "num_replicas": 2, "rank": 2}, "rank"),
    ],
)
def test_sampler_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomPairSampler(**arguments)
