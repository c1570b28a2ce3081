# SPDX-License-Identifier: Apache-2.0
"""Pairs that are met again and again, for a training with persistent states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from monai_deq.data.given_pairs import GivenPairDataset, GivenPairSampler
from monai_deq.data.pairs import PairDataset, PairSampler, RandomPairSampler

__all__ = [
    "PooledGivenPair",
    "PooledGivenPairDataset",
    "PooledGivenPairSampler",
    "PooledPair",
    "PooledPairDataset",
    "PooledPairSampler",
]


class PooledPair(NamedTuple):
    """
    A pair and where its state is kept, see :py:class:`monai_deq.data.StatePool`.

    Args:
        fixed: index of the fixed subject.
        moving: index of the moving subject.
        slot: slot of the pool.
        ticket: number that tells this visit of the slot from others.
    """

    fixed: int
    moving: int
    slot: int
    ticket: int


class PooledGivenPair(NamedTuple):
    """
    A given pair and where its state is kept, see :py:class:`monai_deq.data.StatePool`.

    Args:
        pair: index of the pair.
        slot: slot of the pool.
        ticket: number that tells this visit of the slot from others.
    """

    pair: int
    slot: int
    ticket: int


class PooledPairDataset(PairDataset):
    """
    :py:class:`PairDataset` for the indices of a :py:class:`PooledPairSampler`: an item has ``"slot"`` and ``"ticket"``
    besides.
    """

    def __getitem__(self, index: PooledPair) -> Any:  # type: ignore[override]
        """The pair at an index."""
        if not isinstance(index, Sequence) or len(index) != 4:
            raise TypeError(f"PooledPairDataset takes the indices of a PooledPairSampler, got {index!r}.")
        item = super().__getitem__((index[0], index[1]))
        item["slot"], item["ticket"] = int(index[2]), int(index[3])
        return item


class PooledGivenPairDataset(GivenPairDataset):
    """
    :py:class:`GivenPairDataset` for the indices of a :py:class:`PooledGivenPairSampler`: an item has ``"slot"`` and
    ``"ticket"`` besides.
    """

    def __getitem__(self, index: PooledGivenPair) -> Any:  # type: ignore[override]
        """The pair at an index."""
        if not isinstance(index, Sequence) or len(index) != 3:
            raise TypeError(f"PooledGivenPairDataset takes the indices of a PooledGivenPairSampler, got {index!r}.")
        item = super().__getitem__(index[0])
        item["slot"], item["ticket"] = int(index[1]), int(index[2])
        return item


class _PooledSampler(PairSampler):
    """
    The pairs of another sampler, the class beside this one in the bases of a subclass, staying in a number of slots.

    A subclass gives ``_things``, the attribute that counts what the pairs are drawn from, and ``_item``.
    """

    _things: str

    @abstractmethod
    def _item(self, pair: Any, slot: int, ticket: int) -> Any:
        """What the data set takes as an index."""

    def _set_pool(self, slots: int, renewal: float, starts: int) -> None:
        if int(slots) != slots or slots < 1:
            raise ValueError(f"slots must be a whole number of at least 1, got {slots}.")
        if not 0 < renewal <= 1:
            raise ValueError(f"renewal must be in (0, 1], got {renewal}.")
        if int(starts) != starts or starts < 1:
            raise ValueError(f"starts must be a whole number of at least 1, got {starts}.")
        self.slots = int(slots)
        self.starts = int(starts)
        self.renewal = renewal
        self.epoch = 1

    def __len__(self) -> int:
        """Number of items in an epoch of this process."""
        return super().__len__() * self.starts

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws the next iteration gives; counts from 1, as Ignite does."""
        self.epoch = max(int(epoch), 1)

    def __iter__(self) -> Iterator[Any]:
        held: dict[int, tuple[Any, int]] = {}
        drawn: list[tuple[Any, int, int]] = []
        ticket = 0
        for epoch in range(1, self.epoch + 1):
            pairs = self._draw(epoch)
            # another generator than that of the pairs, so that these are the same with any number of slots
            key = ((self.seed * 0x9E3779B97F4A7C15 + epoch) * 0x9E3779B97F4A7C15 + self.rank + 1) % 2**63
            generator = torch.Generator().manual_seed(key)
            slots = torch.randint(self.slots, (len(pairs),), generator=generator).tolist()
            renewed = (torch.rand(len(pairs), generator=generator) < self.renewal).tolist()
            drawn = []
            for pair, slot, fresh in zip(pairs, slots, renewed, strict=True):
                if fresh or slot not in held:
                    held[slot] = (pair, ticket)
                    ticket += 1
                drawn.append((*held[slot], slot))
        # no two processes have the same ticket: random starts are drawn by it
        drawn = [(pair, number * self.num_replicas + self.rank, slot) for pair, number, slot in drawn]
        n = self.starts
        return iter(self._item(pair, slot * n + i, number * n + i) for pair, number, slot in drawn for i in range(n))

    def state_dict(self) -> dict[str, Any]:
        """What the draws depend on; the states of a pool mean nothing with other draws."""
        names = (self._things, "slots", "starts", "renewal", "seed", "num_replicas")
        return {**{name: getattr(self, name) for name in names}, "draws": len(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Make sure that a resumed training goes on with the draws that it began with.

        Args:
            state: what :py:meth:`state_dict` returned.

        Raises:
            ValueError: When they are others.
        """
        state = {"num_replicas": 1, **state}  # which checkpoints did not say at first
        changed = {name: (state.get(name), own) for name, own in self.state_dict().items() if state.get(name) != own}
        if changed:
            words = ", ".join(f"{name} {was} (now {now})" for name, (was, now) in changed.items())
            raise ValueError(f"the pool was trained with {words}: resume with the same, or start over.")


class PooledPairSampler(_PooledSampler, RandomPairSampler):
    """
    Ordered pairs of two different subjects that stay in a number of slots. Each draw takes a slot by chance; with the
    probability ``renewal`` its pair makes room for a fresh one, and otherwise the training goes on with it. A pair is
    so trained on ``1 / renewal`` times in the mean, whatever the number of slots. With a renewal of 1 the pairs are
    those of :py:class:`RandomPairSampler`.

    With ``starts`` above 1 each draw gives its pair so many times in a row, each with a state of its own, for
    iterations of one pair that begin in different places, see :py:class:`monai_deq.losses.EquilibriumLoss`. The pool
    then needs ``slots * starts`` slots, and a batch a multiple of ``starts`` items.

    The draws depend on the seed, the epoch and the rank alone, and not on workers or the global random state; those of
    the epochs before are repeated within, so that a resumed training goes on with the same pairs. Each process has
    slots and pairs of its own.

    Args:
        num_subjects: number of subjects, at least 2.
        pairs_per_epoch: draws in an epoch over all replicas, a multiple of ``num_replicas``.
        slots: number of slots. Defaults to 32.
        renewal: probability of a fresh pair, in (0, 1]. Defaults to 0.1.
        seed: seed of the draws. Defaults to 0.
        num_replicas: number of processes that share the epoch. Defaults to 1.
        rank: number of this process. Defaults to 0.
        starts: how often each draw gives its pair. Defaults to 1.

    Raises:
        ValueError: When a number is out of range.
    """

    _things = "num_subjects"

    def __init__(
        self,
        num_subjects: int,
        pairs_per_epoch: int,
        slots: int = 32,
        renewal: float = 0.1,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        starts: int = 1,
    ) -> None:
        RandomPairSampler.__init__(self, num_subjects, pairs_per_epoch, seed, num_replicas, rank)
        self._set_pool(slots, renewal, starts)

    def _item(self, pair: tuple[int, int], slot: int, ticket: int) -> PooledPair:
        return PooledPair(*pair, slot, ticket)


class PooledGivenPairSampler(_PooledSampler, GivenPairSampler):
    """
    Given pairs that stay in a number of slots: :py:class:`PooledPairSampler` with the draws of
    :py:class:`GivenPairSampler`. A pair may be in several slots at a time, each with a state of its own.

    Args:
        num_pairs: number of pairs.
        pairs_per_epoch: draws in an epoch over all replicas, a multiple of ``num_replicas``.
        slots: number of slots. Defaults to 32.
        renewal: probability of a fresh pair, in (0, 1]. Defaults to 0.1.
        seed: seed of the draws. Defaults to 0.
        num_replicas: number of processes that share the epoch. Defaults to 1.
        rank: number of this process. Defaults to 0.
        starts: how often each draw gives its pair. Defaults to 1.

    Raises:
        ValueError: When a number is out of range.
    """

    _things = "num_pairs"

    def __init__(
        self,
        num_pairs: int,
        pairs_per_epoch: int,
        slots: int = 32,
        renewal: float = 0.1,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        starts: int = 1,
    ) -> None:
        GivenPairSampler.__init__(self, num_pairs, pairs_per_epoch, seed, num_replicas, rank)
        self._set_pool(slots, renewal, starts)

    def _item(self, pair: int, slot: int, ticket: int) -> PooledGivenPair:
        return PooledGivenPair(pair, slot, ticket)
