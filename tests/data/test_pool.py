# SPDX-License-Identifier: Apache-2.0
"""The pool: pairs stay in their slots and are renewed at the rate asked for, and states come back as they were put."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, RandGaussianNoised

from monai_deq.data import (
    GivenPairDataset,
    GivenPairSampler,
    PairDataset,
    PairSampler,
    PooledDataset,
    PooledIndex,
    PooledSampler,
    RandomPairSampler,
    StatePool,
)

SIZES = {2: (7, 6), 3: (5, 4, 6)}


def pooled(
    num: int = 7,
    pairs_per_epoch: int = 200,
    slots: int = 5,
    renewal: float = 0.1,
    kind: type[PairSampler] = RandomPairSampler,
    **settings: Any,
) -> PooledSampler:
    return PooledSampler(kind(num, pairs_per_epoch, **settings), slots, renewal)


def draws(epochs: int = 1, **settings: Any) -> list[list[PooledIndex]]:
    sampler = pooled(**settings)
    out = []
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        out.append(list(sampler))
        assert len(out[-1]) == len(sampler)
    return out


def test_a_ticket_is_one_pair_in_one_slot_and_grows_with_renewal() -> None:
    flat = sum(draws(epochs=3), [])
    by_ticket: dict[int, set[tuple[Any, int]]] = {}
    newest: dict[int, int] = {}
    seen = -1
    for pair in flat:
        fixed, moving = pair.pair
        assert 0 <= fixed < 7 and 0 <= moving < 7 and fixed != moving and 0 <= pair.slot < 5
        by_ticket.setdefault(pair.ticket, set()).add((pair.pair, pair.slot))
        # a new ticket is the next number; an old one is that which its slot has
        assert pair.ticket == seen + 1 or pair.ticket == newest[pair.slot]
        seen, newest[pair.slot] = max(seen, pair.ticket), pair.ticket
    assert all(len(v) == 1 for v in by_ticket.values())
    assert {p.slot for p in flat} == set(range(5))
    assert len({p.pair for p in flat}) > 25  # of 42


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
    sampler = pooled()
    sampler.set_epoch(2)
    assert list(sampler) == second == list(sampler)
    assert draws(epochs=2, seed=1)[1] != second
    replicas = [draws(num_replicas=2, rank=rank)[0] for rank in range(2)]
    assert len(replicas[0]) == len(replicas[1]) == 100 and replicas[0] != replicas[1]
    # random starts are drawn by the ticket: another one in each process
    assert not {p.ticket for p in replicas[0]} & {p.ticket for p in replicas[1]}


def test_given_pairs_are_kept_and_renewed_alike() -> None:
    (flat,) = draws(kind=GivenPairSampler, num=5, pairs_per_epoch=2000, slots=3, renewal=0.25)
    by_ticket: dict[int, set[tuple[int, int]]] = {}
    for p in flat:
        by_ticket.setdefault(p.ticket, set()).add((p.pair, p.slot))
    assert all(len(visits) == 1 for visits in by_ticket.values())
    assert len(by_ticket) / len(flat) == pytest.approx(0.25, abs=0.03)
    counts = Counter(p.pair for p in flat)
    assert set(counts) == set(range(5)) and max(counts.values()) < 1.5 * min(counts.values())


def test_draws_are_those_that_checkpoints_were_made_with() -> None:
    """Written down from version 0.1.0."""
    sampler = pooled(5, 6, slots=2, renewal=0.5, seed=3, num_replicas=2, rank=1)
    sampler.set_epoch(2)
    assert list(map(tuple, sampler)) == [((1, 3), 1, 3), ((3, 2), 1, 7), ((3, 2), 1, 7)]
    sampler = pooled(4, 6, slots=2, renewal=0.5, kind=GivenPairSampler, seed=3)
    assert list(map(tuple, sampler)) == [(0, 0, 0), (2, 1, 1), (0, 0, 0), (1, 1, 2), (1, 0, 3), (1, 1, 2)]


def test_resuming_with_other_draws_is_refused() -> None:
    state = pooled().state_dict()
    assert state == {
        "num_subjects": 7,
        "slots": 5,
        "starts": 1,
        "renewal": 0.1,
        "seed": 0,
        "num_replicas": 1,
        "draws": 200,
    }
    pooled().load_state_dict(state)
    with pytest.raises(ValueError, match=r"num_replicas 1 \(now 2\)"):
        pooled(pairs_per_epoch=400, num_replicas=2, rank=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"starts 2 \(now 1\)"):
        pooled().load_state_dict({**state, "starts": 2})
    # which a checkpoint need not say
    pooled().load_state_dict({k: v for k, v in state.items() if k not in ("num_replicas", "starts")})
    with pytest.raises(ValueError, match=r"trained with renewal 0.1 \(now 0.2\), seed 0 \(now 3\): resume"):
        pooled(renewal=0.2, seed=3).load_state_dict(state)
    given = pooled(kind=GivenPairSampler)
    given.load_state_dict(given.state_dict())
    with pytest.raises(ValueError, match=r"num_pairs 7 \(now 6\)"):
        pooled(6, kind=GivenPairSampler).load_state_dict(given.state_dict())


def test_an_epoch_under_way_is_not_changed() -> None:
    sampler = pooled(pairs_per_epoch=20)
    iterator, expected = iter(sampler), list(sampler)
    first = next(iterator)
    sampler.set_epoch(2)
    assert [first, *iterator] == expected


@pytest.mark.parametrize(
    "settings, words",
    [({"slots": 0}, "slots must be"), ({"renewal": 0.0}, "renewal must be in"), ({"renewal": 1.1}, "renewal must be")],
)
def test_refuses_pools(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pooled(**settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_carry_slot_and_ticket_through_a_loader(num_workers: int) -> None:
    subjects = PairDataset(Dataset([{"subject": str(i), "image": torch.full((1, 4, 5), float(i))} for i in range(7)]))
    given = GivenPairDataset(Dataset([{"fixed": torch.full((1, 4, 5), float(i))} for i in range(7)]))
    for dataset, kind in ((subjects, RandomPairSampler), (given, GivenPairSampler)):
        sampler = pooled(pairs_per_epoch=12, slots=3, kind=kind)
        pairs = PooledDataset(dataset)
        assert len(pairs) == len(dataset)
        expected = list(sampler)
        for i, batch in enumerate(DataLoader(pairs, sampler=sampler, batch_size=2, num_workers=num_workers)):
            now = expected[2 * i : 2 * i + 2]
            assert list(zip(batch["slot"].tolist(), batch["ticket"].tolist(), strict=True)) == [p[1:] for p in now]
            fixed = [p.pair if kind is GivenPairSampler else p.pair[0] for p in now]
            assert batch["fixed"][:, 0, 0, 0].tolist() == fixed
        assert i == 5
        with pytest.raises(TypeError, match="takes the indices of a PooledSampler, got 3"):
            pairs[3]  # type: ignore[index]


def test_random_transforms_depend_on_seed_and_ticket_alone() -> None:
    subjects = PairDataset(Dataset([{"subject": str(i), "image": torch.zeros(1, 4, 5)} for i in range(7)]))
    noise = RandGaussianNoised("fixed", prob=1.0, std=1.0)
    indices = list(pooled(pairs_per_epoch=12, slots=3, kind=RandomPairSampler))
    for dataset in (PooledDataset(subjects, noise, seed=3), PooledDataset(subjects, Compose([noise]), seed=3)):
        first = [dataset[i]["fixed"] for i in indices]
        assert all(torch.equal(dataset[i]["fixed"], x) for i, x in zip(indices[::-1], first[::-1], strict=True))
        tickets = {i.ticket: float(x.sum()) for i, x in zip(indices, first, strict=True)}
        assert len(set(tickets.values())) == len(tickets) and {"slot", "ticket", "moving"} <= set(dataset[indices[0]])
    other = PooledDataset(subjects, noise, seed=4)
    assert not torch.equal(other[indices[0]]["fixed"], PooledDataset(subjects, noise, seed=3)[indices[0]]["fixed"])


@pytest.mark.parametrize("kind", [RandomPairSampler, GivenPairSampler])
def test_renewing_every_pair_gives_those_of_the_sampler(kind: type[PairSampler]) -> None:
    for replicas, rank in ((1, 0), (2, 0), (2, 1)):
        settings = {"num": 7, "pairs_per_epoch": 40, "seed": 3, "num_replicas": replicas, "rank": rank}
        sampler = pooled(slots=4, renewal=1.0, kind=kind, **settings)
        for epoch in (1, 2):
            sampler.set_epoch(epoch)
            sampler.sampler.set_epoch(epoch)
            assert [p.pair for p in sampler] == list(sampler.sampler)


def fields(ndim: int, batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((batch, ndim, *SIZES[ndim]), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("in_file", [False, True])
def test_hands_back_what_was_put(ndim: int, in_file: bool, tmp_path: Path) -> None:
    pool = StatePool(4, tmp_path if in_file else None)
    like = torch.zeros(3, 1, *SIZES[ndim])
    assert pool.get([0, 1, 2], [0, 1, 2], like).abs().sum() == 0 and len(pool) == 0
    first, second = fields(ndim, 3), fields(ndim, 2, seed=1)
    pool.put([2, 0, 3], [5, 6, 7], first.clone().requires_grad_(True).double())
    assert len(pool) == 3
    torch.testing.assert_close(pool.get([3, 2, 0], [7, 5, 6], like), first[[2, 0, 1]])
    assert not pool.get([3], [7], like[:1]).requires_grad
    pool.put([0, 1], [6, 8], second)
    torch.testing.assert_close(pool.get([0, 1, 2], [6, 8, 5], like), torch.stack([*second, first[0]]))
    # what was handed out is a copy
    pool.get([0], [6], like[:1]).zero_()
    torch.testing.assert_close(pool.get([0], [6], like[:1]), second[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_slot_given_to_another_pair_starts_anew() -> None:
    pool, like = StatePool(2), torch.zeros(1, 1, *SIZES[2])
    old, new = fields(2, 1), fields(2, 1, seed=1)
    pool.put([1], [3], old)
    assert pool.get([1], [4], like).abs().sum() == 0
    pool.put([1], [4], new)
    # a batch of the old pair that was under way: neither handed out nor taken
    assert pool.get([1], [3], like).abs().sum() == 0
    pool.put([1], [3], old)
    torch.testing.assert_close(pool.get([1], [4], like), new)


def test_lets_go_of_what_is_not_finite() -> None:
    pool, like = StatePool(2), torch.zeros(2, 1, *SIZES[2])
    good, bad = fields(2, 2), fields(2, 2, seed=1)
    pool.put([0, 1], [0, 1], good)
    bad[1, 0, 2, 3] = float("nan")
    pool.put([0, 1], [0, 1], bad)
    # a displacement longer than the image is lost too
    far = torch.zeros(1, 2, *SIZES[2])
    far[0, 1, 0, 0] = max(SIZES[2]) + 1
    other = StatePool(1)
    other.put([0], [0], far)
    assert len(other) == 0
    torch.testing.assert_close(pool.get([0, 1], [0, 1], like), torch.stack([bad[0], torch.zeros_like(bad[1])]))
    assert len(pool) == 1


def test_checkpoint(tmp_path: Path) -> None:
    pool, like = StatePool(3), torch.zeros(1, 1, *SIZES[3])
    state = fields(3, 1)
    pool.put([1], [9], state)
    torch.save(pool.state_dict(), tmp_path / "pool.pt")
    loaded = torch.load(tmp_path / "pool.pt", weights_only=True)
    for folder in (None, tmp_path):
        other = StatePool(3, folder)
        other.load_state_dict(loaded)
        torch.testing.assert_close(other.get([1], [9], like), state)
        assert len(other) == 1
    # of a pool in a file the displacements are left out, and the pairs start anew
    again = StatePool(3)
    again.load_state_dict(other.state_dict())
    assert len(again) == 0 and again.get([1], [9], like).abs().sum() == 0
    with pytest.raises(ValueError, match="a pool of 3 slots, this one has 2"):
        StatePool(2).load_state_dict(loaded)


def test_refuses_states(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slots must be a whole number of at least 1, got 0"):
        StatePool(0)
    with pytest.raises(NotADirectoryError, match="an existing folder"):
        StatePool(2, tmp_path / "absent")
    pool, like = StatePool(2), torch.zeros(1, 1, *SIZES[2])
    for call in (lambda: pool.get([0], [0], torch.zeros(2, 1, 7, 6)), lambda: pool.put([0, 1], [0, 1], fields(2, 1))):
        with pytest.raises(ValueError, match="needs as many slots and tickets"):
            call()
    pool.put([0], [0], fields(2, 1))
    with pytest.raises(ValueError, match="displacements of one size: it has .2, 7, 6., got .3, 5, 4, 6."):
        pool.put([0], [0], fields(3, 1))
    with pytest.raises(ValueError, match="displacements of one size"):
        pool.get([0], [0], torch.zeros(1, 1, 8, 8))
    for slot, ticket in ((2, 0), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="expected slots 0 to 1 and tickets from 0"):
            pool.get([slot], [ticket], like)


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=rf"states of the pool need 4 MB in the folder {tmp_path}.*No space.*fewer slots"):
        StatePool(8, tmp_path).put([0], [0], torch.zeros(1, 2, 256, 256))


@pytest.mark.parametrize("states", [torch.zeros(2, 2, 7, 6), torch.zeros(3, 2, 7), torch.zeros(3, 2, 7, 6) / 0])
def test_states_that_do_not_fit_are_refused(states: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="the checkpoint has states .*(of 3 slots|not finite)"):
        StatePool(3).load_state_dict({"tickets": torch.tensor([1, -1, 2]), "states": states})
