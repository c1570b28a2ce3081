# SPDX-License-Identifier: Apache-2.0
"""Pairs that a data set gives, such as inhale and exhale scan of one person: the data set of them, and its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.data import list_data_collate
from torch.utils.data import Dataset

from monai_deq.data.pairs import PairSampler, SubjectDataset

__all__ = ["GivenPairDataset", "GivenPairSampler", "collate_annotated_pairs"]

_POINTS = ("fixed_keypoints", "moving_keypoints")


class GivenPairDataset(Dataset):
    """
    The pairs of a data set of loaded pairs. Tensors are copies, so that what is done to a pair in place does not reach
    a cache behind the data set.

    Args:
        dataset: pairs after loading, dictionaries such as
            :py:func:`monai_deq.transforms.load_annotated_pair_transforms` gives them.
    """

    def __init__(self, dataset: SubjectDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at an index."""
        pair = self.dataset[index]
        return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in pair.items()}


class GivenPairSampler(PairSampler):
    """
    Indices of given pairs, a fresh order for each epoch, see :py:class:`PairSampler`: all pairs in turn, and again from
    the first one on in another order, until the epoch is full.

    Args:
        num_pairs: number of pairs.
        pairs_per_epoch: indices that one epoch draws over all replicas, a multiple of ``num_replicas``.
        seed: seed of the draws. Defaults to 0.
        num_replicas: number of processes that share the epoch. Defaults to 1.
        rank: number of this process. Defaults to 0.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(
        self, num_pairs: int, pairs_per_epoch: int, seed: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        if num_pairs < 1:
            raise ValueError(f"There must be a pair to draw, got num_pairs={num_pairs}.")
        super().__init__(pairs_per_epoch, seed, num_replicas, rank)
        self.num_pairs = num_pairs

    def _draw_all(self, generator: torch.Generator) -> list[int]:
        passes = -(-self.pairs_per_epoch // self.num_pairs)
        orders = [torch.randperm(self.num_pairs, generator=generator) for _ in range(passes)]
        return torch.cat(orders)[: self.pairs_per_epoch].tolist()


def collate_annotated_pairs(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    A batch of pairs whose keypoints differ in number: they become lists of tensors, all else what MONAI's
    ``list_data_collate`` makes of it.

    Args:
        batch: pairs, perhaps with ``"fixed_keypoints"`` and ``"moving_keypoints"``.
    """
    points = {key: [pair[key] for pair in batch] for key in _POINTS if all(key in pair for pair in batch)}
    rest = [{key: value for key, value in pair.items() if key not in points} for pair in batch]
    return {**list_data_collate(rest), **points}
