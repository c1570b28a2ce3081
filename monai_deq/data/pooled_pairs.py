# SPDX-License-Identifier: Apache-2.0
"""Pairs that are met again and again, for a training with persistent states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from monai_deq.data.pairs import PairDataset, RandomPairSampler

__all__ = ["PooledPair", "PooledPairDataset", "PooledPairSampler"]


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


class PooledPairSampler(RandomPairSampler):
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
        super().__init__(num_subjects, pairs_per_epoch, seed, num_replicas, rank)
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

    def __iter__(self) -> Iterator[PooledPair]:  # type: ignore[override]
        held: dict[int, PooledPair] = {}
        drawn: list[PooledPair] = []
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
                    held[slot] = PooledPair(*pair, slot, ticket)
                    ticket += 1
                drawn.append(held[slot])
        n = self.starts
        return iter(PooledPair(d.fixed, d.moving, d.slot * n + i, d.ticket * n + i) for d in drawn for i in range(n))

    def state_dict(self) -> dict[str, Any]:
        """What the draws depend on; the states of a pool mean nothing with other draws."""
        names = ("num_subjects", "slots", "starts", "renewal", "seed")
        return {**{name: getattr(self, name) for name in names}, "draws": len(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Make sure that a resumed training goes on with the draws that it began with.

        Args:
            state: what :py:meth:`state_dict` returned.

        Raises:
            ValueError: When they are others.
        """
        changed = {name: (state.get(name), own) for name, own in self.state_dict().items() if state.get(name) != own}
        if changed:
            words = ", ".join(f"{name} {was} (now {now})" for name, (was, now) in changed.items())
            raise ValueError(f"the pool was trained with {words}: resume with the same, or start over.")
