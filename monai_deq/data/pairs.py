# SPDX-License-Identifier: Apache-2.0
"""Pairs of loaded images: data sets, samplers, loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from monai.data import DataLoader, list_data_collate
from torch.utils.data import Dataset, Sampler

from monai_deq.data.grid import check_same_grid
from monai_deq.utils import check_on_error, failure_reason, process_count, process_rank

__all__ = [
    *("FAILED_PAIRS", "FailedPair", "GivenPairDataset", "GivenPairSampler", "PairDataset", "PairSampler"),
    *("RandomPairSampler", "ShardSampler", "collate_annotated_pairs", "names_of", "pair_indices", "pair_names"),
    "shard_loader",
]

_POINTS = ("fixed_keypoints", "moving_keypoints")
_NAMES = ("fixed_subject", "moving_subject", "name")
#: key of a batch with its pairs that could not be loaded, see :py:func:`shard_loader`
FAILED_PAIRS = "failed_pairs"


class MapDataset(Sized, Protocol):
    """A map-style data set of loaded subjects or pairs, such as MONAI's ``CacheDataset``."""

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def pair_indices(num_subjects: int, scheme: str = "cyclic") -> list[tuple[int, int]]:
    """Ordered pairs ``(fixed, moving)`` of subject indices.

    Args:
        num_subjects: number of subjects, at least 2.
        scheme: ``"cyclic"``: ``(i, i + 1)`` and last ``(n - 1, 0)``, or ``"all"`` ordered pairs of two different
            subjects. Defaults to ``"cyclic"``.
    """
    if num_subjects < 2:
        raise ValueError(f"Pairs need at least 2 subjects, got {num_subjects}.")
    if scheme == "cyclic":
        return [(i, (i + 1) % num_subjects) for i in range(num_subjects)]
    if scheme == "all":
        return [(i, j) for i in range(num_subjects) for j in range(num_subjects) if i != j]
    raise ValueError(f"Unknown pairing scheme {scheme!r}; expected 'cyclic' or 'all'.")


class PairDataset(Dataset):
    """Pairs of the items of a subject data set.

    An item has ``"fixed"`` and ``"moving"`` (images), ``"fixed_subject"`` and ``"moving_subject"`` (names), and
    ``"fixed_label"`` and ``"moving_label"`` where both have a segmentation. Tensors are copies, which may be changed in
    place.

    Args:
        dataset: loaded subjects with ``"subject"``, ``"image"`` ``(C, *spatial)`` and perhaps ``label_key``.
        pairs: what an integer index means: a list of ``(fixed, moving)`` subject indices, or a scheme of
            :py:func:`pair_indices`. Defaults to ``"all"`` ordered pairs.
        transform: applied to each pair. Defaults to None.
        label_key: key of the segmentation in a subject; None leaves segmentations out, which a batch of several pairs
            needs where only some subjects have one. Defaults to ``"label"``.

    Raises:
        ValueError: When a pair list names a subject that does not exist or pairs a subject with itself.
    """

    def __init__(
        self,
        dataset: MapDataset,
        pairs: Sequence[tuple[int, int]] | str | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        label_key: str | None = "label",
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.label_key = label_key
        if pairs is None or isinstance(pairs, str):
            self.pairs = pair_indices(len(dataset), pairs or "all")
        else:
            self.pairs = [self._check(pair) for pair in pairs]

    def _check(self, pair: Sequence[int]) -> tuple[int, int]:
        if len(pair) != 2:
            raise ValueError(f"A pair is (fixed index, moving index), got {pair!r}.")
        fixed, moving = (int(i) for i in pair)
        last = len(self.dataset) - 1
        if fixed == moving or not all(0 <= i <= last for i in (fixed, moving)):
            raise ValueError(f"A pair needs two different subjects out of 0..{last}, got {tuple(pair)}.")
        return fixed, moving

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        """The pair at an integer index, or of two subject indices ``(fixed, moving)``; their grids must not differ."""
        pair = self._check(index) if isinstance(index, Sequence) else self.pairs[index]
        fixed, moving = self.dataset[pair[0]], self.dataset[pair[1]]
        names = [str(s.get("subject", i)) for s, i in zip((fixed, moving), pair, strict=True)]
        check_same_grid(fixed["image"], moving["image"], f"subject {names[0]}", f"subject {names[1]}")
        item = {"fixed": fixed["image"].clone(), "moving": moving["image"].clone()}
        if self.label_key is not None and all(s.get(self.label_key) is not None for s in (fixed, moving)):
            item.update(fixed_label=fixed[self.label_key].clone(), moving_label=moving[self.label_key].clone())
        item["fixed_subject"], item["moving_subject"] = names
        return item if self.transform is None else self.transform(item)


class GivenPairDataset(Dataset):
    """Pairs that a data set gives, loaded by :py:func:`monai_deq.transforms.load_annotated_pair_transforms`.

    They may be inhale and exhale scan of one person. Tensors are copies.
    """

    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.dataset[index]
        return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in pair.items()}


def collate_annotated_pairs(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of pairs by MONAI's ``list_data_collate``, but keypoints, whose number differs, as lists of tensors."""
    points = {key: [pair[key] for pair in batch] for key in _POINTS if all(key in pair for pair in batch)}
    rest = [{key: value for key, value in pair.items() if key not in points} for pair in batch]
    return {**list_data_collate(rest), **points}


# keeps (seed, epoch) and (seed + 1, epoch - 1) apart in the one number that a generator takes: large and odd
SEED_FACTOR = 0x9E3779B97F4A7C15

Count = int | None


def _replicas(num_replicas: Count, rank: Count) -> tuple[int, int]:
    """Number of processes and of this one, by default those of the process group."""
    num_replicas = process_count() if num_replicas is None else num_replicas
    rank = process_rank() if rank is None else rank
    if num_replicas < 1 or not 0 <= rank < num_replicas:
        raise ValueError(f"rank must be in 0..num_replicas-1, got rank={rank}, num_replicas={num_replicas}.")
    return num_replicas, rank


class PairSampler(Sampler, ABC):
    """Base of the samplers that draw a number of pairs for each epoch, the same for the same seed and epoch.

    Call :py:meth:`set_epoch` before each epoch, as with ``torch.utils.data.DistributedSampler``; every replica draws
    the same list and keeps every ``num_replicas``-th pair of it. A subclass gives ``_draw_all``.

    Args:
        pairs_per_epoch: pairs that one epoch draws over all replicas, rounded up to a multiple of their number.
        seed: seed of the draws; the global random state does not matter. Defaults to 0.
        num_replicas: number of processes that share the epoch. Defaults to None: those of the process group.
        rank: number of this process. Defaults to None: that in the process group.
    """

    def __init__(self, pairs_per_epoch: int, seed: int = 0, num_replicas: Count = None, rank: Count = None) -> None:
        self.num_replicas, self.rank = _replicas(num_replicas, rank)
        if pairs_per_epoch < 1:
            raise ValueError(f"pairs_per_epoch must be positive, got {pairs_per_epoch}.")
        # unequal shares would leave one process waiting for the others at the end of the epoch
        self.pairs_per_epoch = -(-pairs_per_epoch // self.num_replicas) * self.num_replicas
        self.seed = seed
        self.epoch = 0
        #: draws that the next iteration leaves out: an epoch that goes on in its middle
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose pairs the next iteration draws; counts from 0."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.pairs_per_epoch // self.num_replicas

    @abstractmethod
    def _draw_all(self, generator: torch.Generator) -> list[Any]:
        """The pairs of an epoch over all replicas."""

    def draw(self, epoch: int) -> list[Any]:
        """What this replica gives in an epoch."""
        generator = torch.Generator().manual_seed((self.seed * SEED_FACTOR + epoch) % 2**63)
        return self._draw_all(generator)[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        return iter(self.draw(self.epoch)[skip:])

    def state_dict(self) -> dict[str, Any]:
        """What the draws of all replicas depend on, beside the epoch."""
        return {"seed": self.seed, "num_replicas": self.num_replicas, "draws": len(self)}


class RandomPairSampler(PairSampler):
    """Ordered pairs of two different subjects out of at least 2; see :py:class:`PairSampler`."""

    def __init__(
        self, num_subjects: int, pairs_per_epoch: int, seed: int = 0, num_replicas: Count = None, rank: Count = None
    ) -> None:
        if num_subjects < 2:
            raise ValueError(f"Pairs need at least 2 subjects, got num_subjects={num_subjects}.")
        super().__init__(pairs_per_epoch, seed, num_replicas, rank)
        self.num_subjects = num_subjects

    def _draw_all(self, generator: torch.Generator) -> list[tuple[int, int]]:
        fixed = torch.randint(self.num_subjects, (self.pairs_per_epoch,), generator=generator)
        step = torch.randint(1, self.num_subjects, (self.pairs_per_epoch,), generator=generator)  # 1..n-1: never itself
        return list(zip(fixed.tolist(), ((fixed + step) % self.num_subjects).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"num_subjects": self.num_subjects, **super().state_dict()}


class GivenPairSampler(PairSampler):
    """Given pairs out of ``num_pairs``, all in one order after another; see :py:class:`PairSampler`."""

    def __init__(
        self, num_pairs: int, pairs_per_epoch: int, seed: int = 0, num_replicas: Count = None, rank: Count = None
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
        return {"num_pairs": self.num_pairs, **super().state_dict()}


class ShardSampler(Sampler[int]):
    """The items of a data set in their order, each in one process: the first process has the first ones, and so on.

    Shares differ by one batch at most; with more processes than batches some have none. Nothing is repeated, which
    would count some items twice, see :py:class:`monai_deq.engines.RegistrationEvaluator`.

    Args:
        num_items: number of items.
        batch_size: of the loader; no batch is divided, so that they are those of one process. Defaults to 1.
        num_replicas: number of processes. Defaults to None: those of the process group.
        rank: number of this process. Defaults to None: that in the process group.
    """

    def __init__(self, num_items: int, batch_size: int = 1, num_replicas: Count = None, rank: Count = None) -> None:
        if not isinstance(batch_size, int) or num_items < 0 or batch_size < 1:
            expected = "num_items must not be negative and batch_size a whole number of at least 1"
            raise ValueError(f"{expected}, got {num_items} and {batch_size!r}.")
        self.batch_size = batch_size
        self.num_replicas, self.rank = _replicas(num_replicas, rank)
        self.share(range(num_items))

    def share(self, items: Sequence[int]) -> None:
        """Divide these items of the data set from now on, in place of all."""
        each, more = divmod(-(-len(items) // self.batch_size), self.num_replicas)
        begin = self.rank * each + min(self.rank, more)
        end = begin + each + int(self.rank < more)
        self.indices = items[begin * self.batch_size : end * self.batch_size]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


@dataclass(frozen=True)
class FailedPair:
    """A pair that was left out.

    Args:
        names: its names, see :py:func:`pair_names`.
        reason: why, in one line.
    """

    names: Mapping[str, str]
    reason: str

    def __str__(self) -> str:
        if {*_NAMES[:2]} <= set(self.names):
            return f"{self.names['moving_subject']} to {self.names['fixed_subject']}: {self.reason}"
        return f"{' '.join(self.names.values())}: {self.reason}"


def names_of(pair: Mapping[str, Any]) -> dict[str, str]:
    """The names that an item of a pair has."""
    return {key: str(pair[key]) for key in _NAMES if key in pair}


def pair_names(dataset: Any) -> list[dict[str, str]]:
    """``"fixed_subject"``, ``"moving_subject"`` and, where it has one, ``"name"`` of each pair of a data set of this
    package or of MONAI's, of which none is loaded."""
    if isinstance(dataset, _LoadedOrNot):
        return pair_names(dataset.dataset)
    inner = dataset.dataset if isinstance(dataset, (PairDataset, GivenPairDataset)) else dataset
    items: Any = getattr(inner, "data", inner)
    if isinstance(dataset, PairDataset):
        names = [str(subject.get("subject", i)) for i, subject in enumerate(items)]
        return [{"fixed_subject": names[fixed], "moving_subject": names[moving]} for fixed, moving in dataset.pairs]
    return [names_of(item) or {"name": f"pair {i}"} for i, item in enumerate(items)]


class _LoadedOrNot(Dataset):
    """The items of a data set of pairs, a :py:class:`FailedPair` in the place of one that cannot be loaded."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.names = dataset, pair_names(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as e:
            return FailedPair(self.names[index], failure_reason(e))


def _collate_loaded(batch: Sequence[Any]) -> dict[str, Any]:
    """A batch of the pairs that were loaded, those that were not under :py:data:`FAILED_PAIRS`."""
    failed = [pair for pair in batch if isinstance(pair, FailedPair)]
    loaded = [pair for pair in batch if not isinstance(pair, FailedPair)]
    collated: dict[str, Any] = {}
    try:
        collated = list_data_collate(loaded) if loaded else {}
    except Exception as e:
        failed += [FailedPair(names_of(pair), failure_reason(e)) for pair in loaded]
    return {**collated, FAILED_PAIRS: failed} if failed else collated


def shard_loader(dataset: Dataset, batch_size: int = 1, num_workers: int = 0, on_error: str = "stop") -> DataLoader:
    """MONAI's loader of this process's share of a data set, see :py:class:`ShardSampler`.

    Args:
        dataset: of pairs.
        batch_size: number of pairs in a batch. Defaults to 1.
        num_workers: processes that load. Defaults to 0.
        on_error: where a pair cannot be loaded: ``"stop"``, or ``"skip"``: it is left out of its batch, which has such
            ones listed under :py:data:`FAILED_PAIRS`, for :py:class:`monai_deq.engines.RegistrationEvaluator`.
            Defaults to ``"stop"``.
    """
    check_on_error(on_error)
    sampler = ShardSampler(len(dataset), batch_size)  # type: ignore[arg-type]
    given: dict[str, Any] = dict(sampler=sampler, batch_size=batch_size, num_workers=num_workers)
    if on_error == "stop":
        return DataLoader(dataset, **given)
    return DataLoader(_LoadedOrNot(dataset), collate_fn=_collate_loaded, **given)
