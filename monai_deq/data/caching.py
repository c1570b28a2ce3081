# SPDX-License-Identifier: Apache-2.0
"""Subjects or pairs that are read and resized once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, MetaTensor, PersistentDataset
from monai.data.utils import pickle_hashing

__all__ = ["cached_subjects"]

logger = logging.getLogger("monai_deq")


def _safe(value: Any) -> Any:
    """Meta data in the types that ``torch.load`` reads back without trusting the file."""
    if isinstance(value, Mapping):
        return {str(k): _safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_safe(v) for v in value)
    if isinstance(value, Enum):
        return _safe(value.value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value) if value.dtype.kind in "biuf" else value.tolist()
    return value if value is None or isinstance(value, (str, int, float, torch.Tensor)) else str(value)


class _SubjectsOnDisk(PersistentDataset):
    """
    MONAI's data set for what the loading transforms give. Without it the affines are lost from the second read on
    (``track_meta=False``), or every read finds a "corrupt" file and loads the scan anew (``track_meta=True``: the NumPy
    values of a NIfTI header are not read back), and a cache filled under another image size is taken for this one's.
    """

    def __init__(self, data: Sequence[Any], transform: Callable[[Any], Any], cache_dir: str | Path) -> None:
        super().__init__(data, transform, cache_dir, hash_transform=pickle_hashing, track_meta=True)

    def _cachecheck(self, item_transformed: Any) -> Any:
        try:
            return super()._cachecheck(item_transformed)
        except PermissionError:
            raise
        except Exception as e:
            file = Path(str(self.cache_dir)) / f"{self.hash_func(item_transformed).decode()}{self.transform_hash}.pt"
            if not file.is_file():
                raise
            # it was there and could not be read; MONAI sees to some kinds of damage, not to a file that was cut off
            logger.warning("%s is damaged (%s) and is made anew", file, type(e).__name__)
            file.unlink(missing_ok=True)
            return super()._cachecheck(item_transformed)

    def _pre_transform(self, item_transformed: Any) -> Any:
        item = super()._pre_transform(item_transformed)
        for value in item.values():
            if isinstance(value, MetaTensor):
                value.meta = _safe(value.meta)
                value.applied_operations = _safe(value.applied_operations)
        return item


def cached_subjects(
    subjects: Sequence[dict[str, Any]],
    transform: Callable[[Any], Any],
    cache_dir: str | Path | None = None,
    cache_rate: float = 1.0,
    num_workers: int = 0,
) -> Dataset:
    """
    Data set of loaded subjects that does not read a file again each epoch: MONAI's ``CacheDataset`` in memory, or its
    ``PersistentDataset`` on disk.

    Args:
        subjects: ``{"subject": name, "image": file, "label": file or None}`` each, or pairs with their files.
        transform: loading transforms, without randomness.
        cache_dir: folder of a cache on disk, for data that do not fit into memory. Runs may share it: files are told
            apart by the subject's file names and by the transforms. It is not noticed when a scan itself changes.
            Defaults to ``None``: in memory.
        cache_rate: share of the subjects kept in memory. Defaults to 1.
        num_workers: threads that fill the memory, one at least. Defaults to 0.
    """
    if cache_dir is not None:
        return _SubjectsOnDisk(list(subjects), transform, cache_dir)
    return CacheDataset(
        data=list(subjects),
        transform=transform,
        cache_rate=cache_rate,
        num_workers=num_workers,
        copy_cache=False,  # PairDataset and GivenPairDataset copy what they give out
    )
