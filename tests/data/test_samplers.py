# SPDX-License-Identifier: Apache-2.0
"""Samplers: the same draws for the same seed and epoch, equal shares of the processes, every item of a shard once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from monai_deq.data import GivenPairSampler, RandomPairSampler, ShardSampler


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
    monkeypatch.setattr("monai_deq.data.samplers.process_count", lambda: 3)
    monkeypatch.setattr("monai_deq.data.samplers.process_rank", lambda: 2)
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
def test_refuses(sampler: Any, arguments: tuple[int, ...], message: str) -> None:
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
