# SPDX-License-Identifier: Apache-2.0
"""Pairs of subjects: fixed lists of pairs, fresh random pairs for each epoch, and the data set that gives them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, Sampler

from monai_deq.data.grid import check_same_grid

__all__ = ["PairDataset", "PairSampler", "RandomPairSampler", "fixed_pairs", "pair_indices", "pairs_as_indices"]


class SubjectDataset(Sized, Protocol):
    """A map-style data set of loaded subjects, such as MONAI's ``CacheDataset`` or ``PersistentDataset``."""

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def pair_indices(num_subjects: int, scheme: str = "cyclic") -> list[tuple[int, int]]:
    """Ordered pairs ``(fixed, moving)`` of subject indices.

    Args:
        num_subjects: number of subjects, at least 2.
        scheme: ``"cyclic"``: pair ``i`` is ``(i, i + 1)``, the last one ``(n - 1, 0)``; with two subjects both orders.
            ``"all"``: every ordered pair of two different subjects. Defaults to ``"cyclic"``.

    Raises:
        ValueError: When there are fewer than two subjects or the scheme is unknown.
    """
    if num_subjects < 2:
        raise ValueError(f"Pairs need at least 2 subjects, got {num_subjects}.")
    if scheme == "cyclic":
        return [(i, (i + 1) % num_subjects) for i in range(num_subjects)]
    if scheme == "all":
        return [(i, j) for i in range(num_subjects) for j in range(num_subjects) if i != j]
    raise ValueError(f"Unknown pairing scheme {scheme!r}; expected 'cyclic' or 'all'.")


def fixed_pairs(subjects: Sequence[Mapping[str, Any]], scheme: str = "cyclic") -> list[dict[str, Mapping[str, Any]]]:
    """Pairs of subjects, the same at every call.

    Args:
        subjects: subjects as of :py:func:`monai_deq.data.find_oasis`.
        scheme: as in :py:func:`pair_indices`. Defaults to ``"cyclic"``: ``{"fixed": subjects[i], "moving": subjects[i
            + 1]}``.

    Raises:
        ValueError: When there are fewer than two subjects or the scheme is unknown.
    """
    return [{"fixed": subjects[i], "moving": subjects[j]} for i, j in pair_indices(len(subjects), scheme)]


def pairs_as_indices(
    pairs: Sequence[Mapping[str, Mapping[str, Any]]], subjects: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """Turn pairs of subjects (e.g. ``OasisDataset.registration_val``) into pairs of positions in ``subjects``.

    Raises:
        ValueError: When a pair names a subject that is not in ``subjects``.
    """
    position = {s["subject"]: i for i, s in enumerate(subjects)}
    absent = sorted({s["subject"] for pair in pairs for s in (pair["fixed"], pair["moving"])} - set(position))
    if absent:
        raise ValueError(f"pairs name subjects that are not among the {len(subjects)} given: {absent[:5]}.")
    return [(position[p["fixed"]["subject"]], position[p["moving"]["subject"]]) for p in pairs]


class PairDataset(Dataset):
    """Pairs of the items of a subject data set.

    An item is ``{"fixed": image, "moving": image, "fixed_subject": name, "moving_subject": name}``, and
    ``"fixed_label"`` and ``"moving_label"`` where both subjects have a segmentation. Tensors are copies, so that what
    is done to a pair in place does not reach a cache behind the subject data set.

    Args:
        dataset: subjects after loading, dictionaries with ``"subject"``, ``image_key`` and perhaps ``label_key``;
            images are ``(C, *spatial)``.
        pairs: what an integer index means: a list of ``(fixed, moving)`` subject indices, or a scheme of
            :py:func:`pair_indices`. Defaults to ``"all"`` ordered pairs.
        transform: applied to each pair. Defaults to None.
        image_key: key of the image in a subject. Defaults to ``"image"``.
        label_key: key of the segmentation in a subject; None leaves segmentations out, which a batch of several pairs
            needs where only some subjects have one. Defaults to ``"label"``.

    Raises:
        ValueError: When a pair list names a subject that does not exist or pairs a subject with itself.
    """

    def __init__(
        self,
        dataset: SubjectDataset,
        pairs: Sequence[tuple[int, int]] | str | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        image_key: str = "image",
        label_key: str | None = "label",
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.image_key = image_key
        self.label_key = label_key
        if pairs is None or isinstance(pairs, str):
            self.pairs = pair_indices(len(dataset), pairs or "all")
        else:
            self.pairs = [self._check(pair) for pair in pairs]

    def _check(self, pair: Sequence[int]) -> tuple[int, int]:
        if len(pair) != 2:
            raise ValueError(f"A pair is (fixed index, moving index), got {pair!r}.")
        fixed, moving = (int(i) for i in pair)
        if fixed == moving or not all(0 <= i < len(self.dataset) for i in (fixed, moving)):
            raise ValueError(
                f"A pair needs two different subjects out of 0..{len(self.dataset) - 1}, got {tuple(pair)}."
            )
        return fixed, moving

    def __len__(self) -> int:
        """Number of pairs that integer indices reach."""
        return len(self.pairs)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        """The pair at an integer index, or of two subject indices ``(fixed, moving)`` as a sampler gives them.

        Raises:
            ValueError: When the two images differ in size, spacing or orientation.
        """
        pair = self._check(index) if isinstance(index, Sequence) else self.pairs[index]
        fixed, moving = self.dataset[pair[0]], self.dataset[pair[1]]
        names = [str(s.get("subject", i)) for s, i in zip((fixed, moving), pair, strict=True)]
        check_same_grid(fixed[self.image_key], moving[self.image_key], *(f"subject {n}" for n in names))
        item = {"fixed": fixed[self.image_key].clone(), "moving": moving[self.image_key].clone()}
        if self.label_key is not None and all(s.get(self.label_key) is not None for s in (fixed, moving)):
            item["fixed_label"] = fixed[self.label_key].clone()
            item["moving_label"] = moving[self.label_key].clone()
        item["fixed_subject"], item["moving_subject"] = names
        return item if self.transform is None else self.transform(item)


class PairSampler(Sampler, ABC):
    """Base of the samplers that draw a number of pairs for each epoch, the same for the same seed and epoch.

    The pairs come from a generator of the sampler's own: neither the global random state nor the number of workers
    matters. Call :py:meth:`set_epoch` before each epoch, as with ``torch.utils.data.DistributedSampler``; every replica
    draws the same list and keeps every ``num_replicas``-th pair of it. A subclass gives ``_draw_all``.

    Args:
        pairs_per_epoch: pairs that one epoch draws over all replicas, a multiple of ``num_replicas``.
        seed: seed of the draws. Defaults to 0.
        num_replicas: number of processes that share the epoch. Defaults to 1.
        rank: number of this process. Defaults to 0.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(self, pairs_per_epoch: int, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        if num_replicas < 1 or not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be in 0..num_replicas-1, got rank={rank}, num_replicas={num_replicas}.")
        # unequal shares would leave one process waiting for the others at the end of the epoch
        if pairs_per_epoch < 1 or pairs_per_epoch % num_replicas:
            raise ValueError(
                f"pairs_per_epoch must be a positive multiple of num_replicas={num_replicas}, got {pairs_per_epoch}."
            )
        self.pairs_per_epoch = pairs_per_epoch
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
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

    def _draw(self, epoch: int) -> list[Any]:
        # the generator takes one number; a large odd factor keeps (seed, epoch) and (seed + 1, epoch - 1) apart
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
        return self._draw_all(generator)[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._draw(self.epoch))


class RandomPairSampler(PairSampler):
    """Ordered pairs of two different subject indices, fresh for each epoch, see :py:class:`PairSampler`.

    Args:
        num_subjects: number of subjects, at least 2.
        pairs_per_epoch: pairs that one epoch draws over all replicas, a multiple of ``num_replicas``.
        seed: seed of the draws. Defaults to 0.
        num_replicas: number of processes that share the epoch. Defaults to 1.
        rank: number of this process. Defaults to 0.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(
        self, num_subjects: int, pairs_per_epoch: int, seed: int = 0, num_replicas: int = 1, rank: int = 0
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
