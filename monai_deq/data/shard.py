# SPDX-License-Identifier: Apache-2.0
"""Each item of a data set in one of several processes."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

__all__ = ["ShardSampler"]


class ShardSampler(Sampler[int]):
    """
    The items of a data set in their order, each in one process. The first process has the first ones, and so on: what
    the processes have, put together by their numbers, is in the order of the data set. Nothing is repeated to make the
    shares equal, which would count some items twice: they differ by one batch at most, and where there are more
    processes than batches some have none, see :py:class:`monai_deq.engines.RegistrationEvaluator`.

    Args:
        num_items: number of items.
        num_replicas: number of processes. Defaults to 1.
        rank: number of this process. Defaults to 0.
        batch_size: of the loader. A batch is not divided, so that the batches are those of one process. Defaults to 1.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(self, num_items: int, num_replicas: int = 1, rank: int = 0, batch_size: int = 1) -> None:
        if num_items < 0 or batch_size < 1:
            raise ValueError(
                f"num_items must not be negative and batch_size at least 1, got {num_items} and {batch_size}."
            )
        if num_replicas < 1 or not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be in 0..num_replicas-1, got rank={rank}, num_replicas={num_replicas}.")
        each, more = divmod(-(-num_items // batch_size), num_replicas)
        begin = rank * each + min(rank, more)
        end = begin + each + int(rank < more)
        self.indices = range(min(begin * batch_size, num_items), min(end * batch_size, num_items))

    def __len__(self) -> int:
        """Number of items of this process."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
