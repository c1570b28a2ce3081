# SPDX-License-Identifier: Apache-2.0
"""ShardSampler: every item once, in order, whole batches."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from monai_deq.data import ShardSampler


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("num_items", [0, 1, 5, 12, 13])
def test_batches_are_those_of_one_process(num_items: int, replicas: int, batch_size: int) -> None:
    items = list(range(100, 100 + num_items))
    whole = [batch.tolist() for batch in DataLoader(items, batch_size)] if items else []
    found, sizes = [], []
    for rank in range(replicas):
        sampler = ShardSampler(num_items, replicas, rank, batch_size)
        own = [batch.tolist() for batch in DataLoader(items, batch_size, sampler=sampler)]
        assert sum(map(len, own)) == len(sampler)
        found += own
        sizes.append(len(own))
    assert found == whole
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "num_items must not be negative"),
        ((3, 1, 0, 0), "batch_size at least 1"),
        ((3, 0), "rank must be in"),
        ((3, 2, 2), "rank must be in"),
    ],
)
def test_refuses(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardSampler(*arguments)
