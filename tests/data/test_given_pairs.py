# SPDX-License-Identifier: Apache-2.0
"""Given pairs: each is drawn as often as the others, also from a pool, and nothing done to one reaches the cache."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset

from monai_deq.data import (
    GivenPairDataset,
    GivenPairSampler,
    PooledGivenPair,
    PooledGivenPairDataset,
    PooledGivenPairSampler,
    collate_annotated_pairs,
)


def pairs(number: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "fixed": torch.full((1, 4, 4), float(i)),
            "fixed_keypoints": torch.full((i + 1, 2), float(i)),
            "moving_keypoints": torch.full((i + 1, 2), i + 0.5),
            "fixed_subject": f"s{i}",
        }
        for i in range(number)
    ]


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


def test_the_pool_keeps_pairs_and_renews_them() -> None:
    sampler = PooledGivenPairSampler(5, 2000, slots=3, renewal=0.25)
    flat = list(sampler)
    assert len(flat) == 2000 and all(isinstance(p, PooledGivenPair) for p in flat)
    by_ticket: dict[int, set[tuple[int, int]]] = {}
    for p in flat:
        by_ticket.setdefault(p.ticket, set()).add((p.pair, p.slot))
    assert all(len(visits) == 1 for visits in by_ticket.values())
    assert len(by_ticket) / len(flat) == pytest.approx(0.25, abs=0.03)
    counts = Counter(p.pair for p in flat)
    assert set(counts) == set(range(5)) and max(counts.values()) < 1.5 * min(counts.values())
    # without a pool: the draws themselves
    plain = GivenPairSampler(5, 12)
    plain.set_epoch(1)
    assert [p.pair for p in PooledGivenPairSampler(5, 12, renewal=1.0)] == list(plain)
    twice = list(PooledGivenPairSampler(5, 4, slots=3, starts=2))
    assert [p.pair for p in twice[::2]] == [p.pair for p in twice[1::2]]
    assert all(
        b == PooledGivenPair(a.pair, a.slot + 1, a.ticket + 1) for a, b in zip(twice[::2], twice[1::2], strict=True)
    )


def test_resuming_with_other_draws_is_refused() -> None:
    state = PooledGivenPairSampler(5, 20).state_dict()
    PooledGivenPairSampler(5, 20).load_state_dict(state)
    with pytest.raises(ValueError, match="num_pairs 5 \\(now 6\\)"):
        PooledGivenPairSampler(6, 20).load_state_dict(state)


def test_batches_with_lists_of_keypoints() -> None:
    sampler = PooledGivenPairSampler(5, 6, slots=3)
    data = Dataset(pairs())
    loader = DataLoader(PooledGivenPairDataset(data), batch_size=2, sampler=sampler, collate_fn=collate_annotated_pairs)
    expected = list(sampler)
    for i, batch in enumerate(loader):
        now = expected[2 * i : 2 * i + 2]
        assert batch["slot"].tolist() == [p.slot for p in now] and batch["ticket"].tolist() == [p.ticket for p in now]
        assert batch["fixed"].shape == (2, 1, 4, 4) and batch["fixed_subject"] == [f"s{p.pair}" for p in now]
        assert [len(points) for points in batch["fixed_keypoints"]] == [p.pair + 1 for p in now]
        assert [float(points[0, 0]) for points in batch["moving_keypoints"]] == [p.pair + 0.5 for p in now]
    without = [{k: v for k, v in pair.items() if "keypoints" not in k} for pair in pairs(2)]
    assert set(collate_annotated_pairs(without)) == {"fixed", "fixed_subject"}


def test_a_pair_is_a_copy() -> None:
    data = pairs()
    given = GivenPairDataset(data)
    assert len(given) == 5
    given[1]["fixed"].zero_()
    assert float(data[1]["fixed"].max()) == 1.0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_pairs=0"):
        GivenPairSampler(0, 4)
    with pytest.raises(ValueError, match="pairs_per_epoch must be a positive multiple"):
        PooledGivenPairSampler(3, 0)
    with pytest.raises(ValueError, match="renewal must be"):
        PooledGivenPairSampler(3, 4, renewal=0)
    with pytest.raises(TypeError, match="indices of a PooledGivenPairSampler"):
        PooledGivenPairDataset(pairs())[1]  # type: ignore[index]
