# SPDX-License-Identifier: Apache-2.0
"""What each process draws: random pairs, given pairs, or its share of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from monai.data import DataLoader
from torch.utils.data import Dataset, Sampler

from monai_deq.utils import process_count, process_rank

__all__ = ["SEED_FACTOR", "GivenPairSampler", "PairSampler", "RandomPairSampler", "ShardSampler", "shard_loader"]

# keeps (seed, epoch) and (seed + 1, epoch - 1) apart in the one number that a generator takes: large and odd
SEED_FACTOR = 0x9E3779B97F4A7C15


def _replicas(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Number of processes and of this one, by default those of the process group."""
    num_replicas = process_count() if num_replicas is None else num_replicas
    rank = process_rank() if rank is None else rank
    if num_replicas < 1 or not 0 <= rank < num_replicas:
        raise ValueError(f"rank must be in 0..num_replicas-1, got rank={rank}, num_replicas={num_replicas}.")
    return num_replicas, rank


class PairSampler(Sampler, ABC):
    """Base of the samplers that draw a number of pairs for each epoch, the same for the same seed and epoch.

    The pairs come from a generator of the sampler's own: neither the global random state nor the number of workers
    matters. Call :py:meth:`set_epoch` before each epoch, as with ``torch.utils.data.DistributedSampler``; every replica
    draws the same list and keeps every ``num_replicas``-th pair of it. A subclass gives ``_draw_all``.

    Args:
        pairs_per_epoch: pairs that one epoch draws over all replicas, rounded up to a multiple of their number.
        seed: seed of the draws. Defaults to 0.
        num_replicas: number of processes that share the epoch. Defaults to None: those of the process group.
        rank: number of this process. Defaults to None: that in the process group.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(
        self, pairs_per_epoch: int, seed: int = 0, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        self.num_replicas, self.rank = _replicas(num_replicas, rank)
        if pairs_per_epoch < 1:
            raise ValueError(f"pairs_per_epoch must be positive, got {pairs_per_epoch}.")
        # unequal shares would leave one process waiting for the others at the end of the epoch
        self.pairs_per_epoch = -(-pairs_per_epoch // self.num_replicas) * self.num_replicas
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose pairs the next iteration draws; counts from 0."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Number of pairs that this replica gives in an epoch."""
        return self.pairs_per_epoch // self.num_replicas

    @abstractmethod
    def _draw_all(self, generator: torch.Generator) -> list[Any]:
        """The pairs of an epoch over all replicas."""

    def draw(self, epoch: int) -> list[Any]:
        """What this replica gives in an epoch."""
        generator = torch.Generator().manual_seed((self.seed * SEED_FACTOR + epoch) % 2**63)
        return self._draw_all(generator)[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.draw(self.epoch))

    def state_dict(self) -> dict[str, Any]:
        """What the draws of all replicas depend on, beside the epoch."""
        return {"seed": self.seed, "num_replicas": self.num_replicas, "draws": len(self)}


class RandomPairSampler(PairSampler):
    """Ordered pairs of two different subject indices, fresh for each epoch, see :py:class:`PairSampler`.

    Args:
        num_subjects: number of subjects, at least 2.
        pairs_per_epoch: see :py:class:`PairSampler`.
        seed: see :py:class:`PairSampler`.
        num_replicas: see :py:class:`PairSampler`.
        rank: see :py:class:`PairSampler`.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(
        self,
        num_subjects: int,
        pairs_per_epoch: int,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if num_subjects < 2:
            raise ValueError(f"Pairs need at least 2 subjects, got num_subjects={num_subjects}.")
        super().__init__(pairs_per_epoch, seed, num_replicas, rank)
        self.num_subjects = num_subjects

    def _draw_all(self, generator: torch.Generator) -> list[tuple[int, int]]:
        fixed = torch.randint(self.num_subjects, (self.pairs_per_epoch,), generator=generator)
        step = torch.randint(1, self.num_subjects, (self.pairs_per_epoch,), generator=generator)  # 1..n-1: never itself
        moving = (fixed + step) % self.num_subjects
        return [(f, m) for f, m in torch.stack([fixed, moving], dim=1).tolist()]

    def state_dict(self) -> dict[str, Any]:
        """See :py:class:`PairSampler`."""
        return {"num_subjects": self.num_subjects, **super().state_dict()}


class GivenPairSampler(PairSampler):
    """
    Indices of given pairs, a fresh order for each epoch, see :py:class:`PairSampler`: all pairs in turn, and again from
    the first one on in another order, until the epoch is full.

    Args:
        num_pairs: number of pairs.
        pairs_per_epoch: see :py:class:`PairSampler`.
        seed: see :py:class:`PairSampler`.
        num_replicas: see :py:class:`PairSampler`.
        rank: see :py:class:`PairSampler`.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(
        self,
        num_pairs: int,
        pairs_per_epoch: int,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if num_pairs < 1:
            raise ValueError(f"There must be a pair to draw, got num_pairs={num_pairs}.")
        super().__init__(pairs_per_epoch, seed, num_replicas, rank)
        self.num_pairs = num_pairs

    def _draw_all(self, generator: torch.Generator) -> list[int]:
        passes = -(-self.pairs_per_epoch // self.num_pairs)
        orders = [torch.randperm(self.num_pairs, generator=generator) for _ in range(passes)]
        return torch.cat(orders)[: self.pairs_per_epoch].tolist()

    def state_dict(self) -> dict[str, Any]:
        """See :py:class:`PairSampler`."""
        return {"num_pairs": self.num_pairs, **super().state_dict()}


class ShardSampler(Sampler[int]):
    """
    The items of a data set in their order, each in one process. The first process has the first ones, and so on: what
    the processes have, put together by their numbers, is in the order of the data set. Nothing is repeated to make the
    shares equal, which would count some items twice: they differ by one batch at most, and where there are more
    processes than batches some have none, see :py:class:`monai_deq.engines.RegistrationEvaluator`.

    Args:
        num_items: number of items.
        batch_size: of the loader. A batch is not divided, so that the batches are those of one process. Defaults to 1.
        num_replicas: number of processes. Defaults to None: those of the process group.
        rank: number of this process. Defaults to None: that in the process group.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(
        self, num_items: int, batch_size: int = 1, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        if num_items < 0 or batch_size < 1:
            raise ValueError(
                f"num_items must not be negative and batch_size at least 1, got {num_items} and {batch_size}."
            )
        num_replicas, rank = _replicas(num_replicas, rank)
        each, more = divmod(-(-num_items // batch_size), num_replicas)
        begin = rank * each + min(rank, more)
        end = begin + each + int(rank < more)
        self.indices = range(min(begin * batch_size, num_items), min(end * batch_size, num_items))

    def __len__(self) -> int:
        """Number of items of this process."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def shard_loader(dataset: Dataset, batch_size: int = 1, num_workers: int = 0) -> DataLoader:
    """
    MONAI's loader of this process's share of a data set, see :py:class:`ShardSampler`.

    Args:
        dataset: the data set.
        batch_size: of the loader. Defaults to 1.
        num_workers: of the loader. Defaults to 0.
    """
    sampler = ShardSampler(len(dataset), batch_size)  # type: ignore[arg-type]
    return DataLoader(dataset, sampler=sampler, batch_size=batch_size, num_workers=num_workers)
