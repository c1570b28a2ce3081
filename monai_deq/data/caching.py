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
from monai.data import CacheDataset, Dataset, MetaTensor
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, Transform, reset_ops_id
from monai.utils import convert_to_tensor

from monai_deq.data.pairs import GivenPairDataset, PairDataset
from monai_deq.networks import load_checkpoint, save_checkpoint
from monai_deq.utils import check_on_error, expand_user

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


class _SubjectsOnDisk(Dataset):
    """
    What the loading transforms give, one file a subject, which appears whole or not at all. MONAI's
    ``PersistentDataset`` loses the affines from the second read on (``track_meta=False``) or finds each file "corrupt"
    (``track_meta=True``: NumPy values of a NIfTI header are not read back), takes a cache of another image size for its
    own, fails at a file that was cut off, and does not see a flipped bit.
    """

    def __init__(self, data: Sequence[Any], transform: Callable[[Any], Any], cache_dir: str | Path) -> None:
        compose = copy.copy(transform) if isinstance(transform, Compose) else Compose(transform)
        compose.transforms = (*compose.transforms, _PlainMetadata())
        super().__init__(data, compose)
        self.folder = expand_user(cache_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.transform_hash = pickle_hashing(list(compose.flatten().transforms)).decode()

    def _file(self, item: Mapping[str, Any]) -> Path:
        """Where a subject is kept: another file where a scan, its name or the transforms are others."""
        scans = [Path(value) for value in item.values() if isinstance(value, (str, Path))]
        stats = [path.stat() for path in scans if path.is_file()]
        known = {**item, "files": [(stat.st_size, stat.st_mtime_ns) for stat in stats]}
        return self.folder / f"{pickle_hashing(known).decode()}{self.transform_hash}.pt"

    def __getitem__(self, index: Any) -> Any:
        file = self._file(self.data[index])
        if file.is_file():
            try:
                item = load_checkpoint(file)
                if lost := [key for key, value in self.data[index].items() if value is not None and key not in item]:
                    raise ValueError(f"it has no {lost}")
                return item
            except ValueError as e:
                logger.warning("%s is damaged and is made anew: %s", file, e)
        item = convert_to_tensor(super().__getitem__(index), convert_numeric=False, track_meta=True)
        save_checkpoint(item, file)
        return item


class _Attempt(Transform):
    """
    Loading transforms that give an error back, and keep it, in place of raising it: behind one MONAI's threads would
    read on while the process ends, which PyTorch aborts.
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform, self.errors = transform, list[Exception]()

    def __call__(self, data: Any) -> Any:
        try:
            return self.transform(data)
        except Exception as e:
            self.errors.append(e)
            return e


class _SubjectsInMemory(CacheDataset):
    """
    MONAI's data set, which reads all subjects before it raises the error of one, and logs those of the others; with
    ``on_error="skip"`` it logs all, and raises that of a subject where the subject is asked for.
    """

    def __init__(
        self, data: Sequence[Any], transform: Callable[[Any], Any], on_error: str = "stop", **kwargs: Any
    ) -> None:
        attempt = _Attempt(transform)
        # not copied here: PairDataset and GivenPairDataset copy what they give out
        super().__init__(data, attempt, copy_cache=False, **kwargs)
        for error in attempt.errors if on_error == "skip" else attempt.errors[1:]:
            logger.error("%s", error)
        if attempt.errors and on_error == "stop":
            raise attempt.errors[0]

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        if isinstance(item, Exception):
            raise item
        return item


def cached_subjects(
    subjects: Sequence[dict[str, Any]],
    transform: Callable[[Any], Any],
    cache_dir: str | Path | None = None,
    cache_rate: float = 1.0,
    num_workers: int = 0,
    on_error: str = "stop",
) -> Dataset:
    """Loaded subjects that are not read again each epoch, in memory by MONAI's ``CacheDataset``, or on disk.

    Args:
        subjects: ``{"subject": name, "image": file, "label": file or None}`` each, or pairs with their files.
        transform: loading transforms, without randomness.
        cache_dir: folder of a cache on disk, which runs may share: files are told apart by the subject's file names and
            by the transforms, and by their size and date. Defaults to None: in memory.
        cache_rate: share of the subjects kept in memory. Defaults to 1.
        num_workers: threads that fill the memory, one at least. Defaults to 0.
        on_error: where a subject cannot be read into memory: ``"stop"``, or ``"skip"``: read the others, and raise its
            error where it is asked for. Defaults to ``"stop"``.
    """
    check_on_error(on_error)
    if cache_dir is not None:
        return _SubjectsOnDisk(list(subjects), transform, cache_dir)
    return _SubjectsInMemory(list(subjects), transform, on_error, cache_rate=cache_rate, num_workers=num_workers)


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
