# SPDX-License-Identifier: Apache-2.0
"""Subjects that are read and resized once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from monai.data import CacheDataset, Dataset, PersistentDataset

__all__ = ["cached_subjects"]


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
        subjects: ``{"subject": name, "image": file, "label": file or None}`` each.
        transform: loading transforms, without randomness.
        cache_dir: folder of a cache on disk, for data that do not fit into memory. Defaults to ``None``: in memory.
        cache_rate: share of the subjects kept in memory. Defaults to 1.
        num_workers: threads that fill the memory. Defaults to 0.
    """
    if cache_dir is not None:
        return PersistentDataset(data=list(subjects), transform=transform, cache_dir=cache_dir)
    return CacheDataset(
        data=list(subjects),
        transform=transform,
        cache_rate=cache_rate,
        num_workers=num_workers or None,
        copy_cache=False,  # PairDataset copies what it gives out
    )
