# SPDX-License-Identifier: Apache-2.0
"""PooledPairSampler and PooledPairDataset: pairs stay in their slots, and are renewed at the rate asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset

from monai_deq.data import PooledPair, PooledPairDataset, PooledPairSampler, RandomPairSampler


def draws(epochs: int = 1, **kwargs: Any) -> list[list[PooledPair]]:
    sampler = PooledPairSampler(**{"num_subjects": 7, "pairs_per_epoch": 200, "slots": 5, **kwargs})
    out = []
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        out.append(list(sampler))
        assert len(out[-1]) == len(sampler)
    return out


def test_a_ticket_is_one_pair_in_one_slot_and_grows_with_renewal() -> None:
    flat = sum(draws(epochs=3), [])
    by_ticket: dict[int, set[tuple[int, int, int]]] = {}
    newest: dict[int, int] = {}
    seen = -1
    for pair in flat:
        assert 0 <= pair.fixed < 7 and 0 <= pair.moving < 7 and pair.fixed != pair.moving and 0 <= pair.slot < 5
        by_ticket.setdefault(pair.ticket, set()).add((pair.fixed, pair.moving, pair.slot))
        # a new ticket is the next number; an old one is that which its slot has
        assert pair.ticket == seen + 1 or pair.ticket == newest[pair.slot]
        seen, newest[pair.slot] = max(seen, pair.ticket), pair.ticket
    assert all(len(v) == 1 for v in by_ticket.values())
    assert {p.slot for p in flat} == set(range(5))
    assert len({(p.fixed, p.moving) for p in flat}) > 25  # of 42


@pytest.mark.parametrize("renewal", [0.05, 0.3, 1.0])
def test_renewal_is_the_share_of_fresh_pairs(renewal: float) -> None:
    (flat,) = draws(pairs_per_epoch=4000, renewal=renewal)
    share = len({p.ticket for p in flat}) / len(flat)
    # five slots are filled at first; the binomial deviation is below 0.008
    assert share == pytest.approx(renewal, abs=0.025)


def test_epochs_go_on_from_one_another_and_are_the_same_again() -> None:
    first, second = draws(epochs=2)
    last = {p.slot: p for p in first}
    for pair in second[:5]:
        if pair.ticket <= max(p.ticket for p in first):
            assert pair == last[pair.slot]
    torch.manual_seed(5)  # the global random state does not matter
    sampler = PooledPairSampler(7, 200, 5)
    sampler.set_epoch(2)
    assert list(sampler) == second == list(sampler)
    assert draws(epochs=2, seed=1)[1] != second
    replicas = [draws(num_replicas=2, rank=rank)[0] for rank in range(2)]
    assert len(replicas[0]) == len(replicas[1]) == 100 and replicas[0] != replicas[1]
    # random starts are drawn by the ticket: another one in each process
    assert not {p.ticket for p in replicas[0]} & {p.ticket for p in replicas[1]}


@pytest.mark.parametrize("replicas", [1, 2])
def test_several_starts_give_each_draw_in_a_row_with_states_of_their_own(replicas: int) -> None:
    for rank in range(replicas):
        common = {"epochs": 2, "num_replicas": replicas, "rank": rank}
        once, thrice = draws(**common), draws(**common, starts=3)
        assert sum(len(epoch) for epoch in thrice) == 3 * sum(len(epoch) for epoch in once)
        for one, three in zip(once, thrice, strict=True):
            for i, pair in enumerate(one):
                same = three[3 * i : 3 * i + 3]
                assert {(p.fixed, p.moving) for p in same} == {(pair.fixed, pair.moving)}
                assert [p.slot for p in same] == [3 * pair.slot + k for k in range(3)]
                assert [p.ticket for p in same] == [3 * pair.ticket + k for k in range(3)]


def test_resuming_with_other_draws_is_refused() -> None:
    state = PooledPairSampler(7, 200, 5).state_dict()
    PooledPairSampler(7, 200, 5).load_state_dict(state)
    two = PooledPairSampler(7, 400, 5, num_replicas=2, rank=1)
    with pytest.raises(ValueError, match=r"num_replicas 1 \(now 2\)"):
        two.load_state_dict(state)
    # written before there were several processes
    del state["num_replicas"]
    PooledPairSampler(7, 200, 5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"trained with renewal 0.1 \(now 0.2\), seed 0 \(now 3\): resume"):
        PooledPairSampler(7, 200, 5, renewal=0.2, seed=3).load_state_dict(state)
    with pytest.raises(TypeError, match="takes the indices of a PooledPairSampler, got 3"):
        PooledPairDataset(Dataset([{"image": torch.zeros(1, 2, 2)}] * 2))[3]  # type: ignore[index]


def test_an_epoch_under_way_is_not_changed() -> None:
    sampler = PooledPairSampler(7, 20, 5)
    iterator, expected = iter(sampler), list(sampler)
    first = next(iterator)
    sampler.set_epoch(2)
    assert [first, *iterator] == expected


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_subjects": 1}, "at least 2 subjects"),
        ({"slots": 0}, "slots must be"),
        ({"starts": 0}, "starts must be a whole number of at least 1, got 0"),
        ({"renewal": 0.0}, "renewal must be in"),
        ({"renewal": 1.1}, "renewal must be in"),
        ({"pairs_per_epoch": 3, "num_replicas": 2}, "multiple of num_replicas=2"),
        ({"rank": 1}, "rank must be in"),
    ],
)
def test_refuses(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draws(**kwargs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_carry_slot_and_ticket_through_a_loader(num_workers: int) -> None:
    subjects = Dataset([{"subject": str(i), "image": torch.full((1, 4, 5), float(i))} for i in range(7)])
    sampler = PooledPairSampler(7, 12, 3)
    loader = DataLoader(PooledPairDataset(subjects), sampler=sampler, batch_size=2, num_workers=num_workers)
    got = []
    for batch in loader:
        names = zip(batch["fixed_subject"], batch["moving_subject"], strict=True)
        got += [
            PooledPair(int(f), int(m), int(s), int(t))
            for (f, m), s, t in zip(names, batch["slot"], batch["ticket"], strict=True)
        ]
        assert batch["fixed"][:, 0, 0, 0].tolist() == [p.fixed for p in got[-2:]]
    assert got == list(sampler)


@pytest.mark.parametrize("replicas", [1, 2])
def test_renewing_every_pair_gives_those_of_the_random_sampler(replicas: int) -> None:
    for rank in range(replicas):
        settings = {"num_subjects": 7, "pairs_per_epoch": 40, "seed": 3, "num_replicas": replicas, "rank": rank}
        pooled, random = PooledPairSampler(**settings, slots=4, renewal=1.0), RandomPairSampler(**settings)
        for epoch in (1, 2):
            pooled.set_epoch(epoch)
            random.set_epoch(epoch)
            assert [(p.fixed, p.moving) for p in pooled] == list(random)
