# SPDX-License-Identifier: Apache-2.0
"""Subjects or pairs that are read and resized once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, MetaTensor, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, Transform, reset_ops_id

from monai_deq.data.pairs import GivenPairDataset, PairDataset

__all__ = ["cached_given_pairs", "cached_pairs", "cached_subjects"]

logger = logging.getLogger("monai_deq")


def _plain(value: Any) -> Any:
    """Meta data in the types that ``torch.load`` reads back without trusting the file."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value) if value.dtype.kind in "biuf" else value.tolist()
    return value if value is None or isinstance(value, (str, int, float, torch.Tensor)) else str(value)


class _PlainMetadata(Transform):
    """The last transform before an item goes to the disk: meta data that can be read back."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        reset_ops_id(data)  # here, since PersistentDataset would do it afterwards, and writes an enumeration
        for value in data.values():
            if isinstance(value, MetaTensor):
                value.meta, value.applied_operations = _plain(value.meta), _plain(value.applied_operations)
        return data


class _SubjectsOnDisk(PersistentDataset):
    """
    MONAI's data set for what the loading transforms give. By default it loses the affines from the second read on
    (``track_meta=False``), finds each file "corrupt" (``track_meta=True``: NumPy values of a NIfTI header are not read
    back), takes a cache of another image size for its own, and fails at a file that was cut off.
    """

    def __init__(self, data: Sequence[Any], transform: Callable[[Any], Any], cache_dir: str | Path) -> None:
        compose = copy.copy(transform) if isinstance(transform, Compose) else Compose(transform)
        compose.transforms = (*compose.transforms, _PlainMetadata())
        super().__init__(data, compose, cache_dir, hash_transform=pickle_hashing, reset_ops_id=False, track_meta=True)

    def __getitem__(self, index: Any) -> Any:
        try:
            return super().__getitem__(index)
        except PermissionError:
            raise
        except Exception as e:
            file = Path(str(self.cache_dir)) / f"{self.hash_func(self.data[index]).decode()}{self.transform_hash}.pt"
            if not file.is_file():
                raise
            # a file is written when the transforms are through: it is the file that cannot be read
            logger.warning("%s is damaged (%s) and is made anew", file, type(e).__name__)
            file.unlink(missing_ok=True)
            return super().__getitem__(index)


def cached_subjects(
    subjects: Sequence[dict[str, Any]],
    transform: Callable[[Any], Any],
    cache_dir: str | Path | None = None,
    cache_rate: float = 1.0,
    num_workers: int = 0,
) -> Dataset:
    """Loaded subjects that are not read again each epoch, by MONAI's ``CacheDataset`` or ``PersistentDataset``.

    Args:
        subjects: ``{"subject": name, "image": file, "label": file or None}`` each, or pairs with their files.
        transform: loading transforms, without randomness.
        cache_dir: folder of a cache on disk, which runs may share: files are told apart by the subject's file names and
            by the transforms. It is not noticed when a scan itself changes. Defaults to None: in memory.
        cache_rate: share of the subjects kept in memory. Defaults to 1.
        num_workers: threads that fill the memory, one at least. Defaults to 0.
    """
    if cache_dir is not None:
        return _SubjectsOnDisk(list(subjects), transform, cache_dir)
    # not copied here: PairDataset and GivenPairDataset copy what they give out
    return CacheDataset(list(subjects), transform, cache_rate=cache_rate, num_workers=num_workers, copy_cache=False)


def cached_pairs(
    subjects: Sequence[dict[str, Any]],
    transform: Callable[[Any], Any],
    cache: Mapping[str, Any] | None = None,
    label_key: str | None = "label",
) -> PairDataset:
    """The cyclic pairs of subjects that are read once; ``cache``: further arguments of :py:func:`cached_subjects`.

    With ``label_key=None``, see :py:class:`PairDataset`, segmentations are not even read.
    """
    if label_key is None:
        subjects = [{k: v for k, v in subject.items() if k != "label"} for subject in subjects]
    return PairDataset(cached_subjects(subjects, transform, **(cache or {})), "cyclic", label_key=label_key)


def cached_given_pairs(
    pairs: Sequence[dict[str, Any]], transform: Callable[[Any], Any], cache: Mapping[str, Any] | None = None
) -> GivenPairDataset:
    """Given pairs that are read once; ``cache`` has further arguments of :py:func:`cached_subjects`."""
    return GivenPairDataset(cached_subjects(pairs, transform, **(cache or {})))
