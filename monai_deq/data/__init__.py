# SPDX-License-Identifier: Apache-2.0
"""Data sets of brain MRI and lung CT, and their pairing for registration."""

from __future__ import annotations

from .caching import cached_subjects
from .grid import Grid, check_same_grid, grid_of, source_of
from .labels import SEG24_LABELS, SEG35_LABELS, label_set
from .learn2reg import Learn2RegDataset, find_learn2reg, keep_annotations
from .oasis import OasisDataset, find_oasis
from .pairs import (
    GivenPairDataset,
    GivenPairSampler,
    PairDataset,
    PairSampler,
    RandomPairSampler,
    ShardSampler,
    collate_annotated_pairs,
    pair_indices,
    pairs_to_register,
)
from .pool import PooledDataset, PooledIndex, PooledSampler, StatePool
from .public_datasets import PUBLIC_DATASETS, PublicDataset, download_dataset
from .resumable_download import check_checksum, parse_checksum, resumable_download
from .sample import resolve_dataset_dir, sample_dataset_dir, write_sample_cohort
from .sample_folder import is_sample
from .sample_lung import resolve_lung_dataset_dir, sample_lung_dataset_dir, write_sample_lung_cohort
from .split import part_of
from .unpack import check_archive, unpack_archive

__all__ = [
    "PUBLIC_DATASETS",
    "SEG24_LABELS",
    "SEG35_LABELS",
    "GivenPairDataset",
    "GivenPairSampler",
    "Grid",
    "Learn2RegDataset",
    "OasisDataset",
    "PairDataset",
    "PairSampler",
    "PooledDataset",
    "PooledIndex",
    "PooledSampler",
    "PublicDataset",
    "RandomPairSampler",
    "ShardSampler",
    "StatePool",
    "cached_subjects",
    "check_archive",
    "check_checksum",
    "check_same_grid",
    "download_dataset",
    "collate_annotated_pairs",
    "find_learn2reg",
    "find_oasis",
    "grid_of",
    "is_sample",
    "keep_annotations",
    "label_set",
    "pair_indices",
    "pairs_to_register",
    "part_of",
    "parse_checksum",
    "resolve_dataset_dir",
    "resolve_lung_dataset_dir",
    "resumable_download",
    "sample_dataset_dir",
    "sample_lung_dataset_dir",
    "source_of",
    "unpack_archive",
    "write_sample_cohort",
    "write_sample_lung_cohort",
]
