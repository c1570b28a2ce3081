# SPDX-License-Identifier: Apache-2.0
"""Data sets of brain MRI and lung CT, and their pairing for registration."""

from __future__ import annotations

from .caching import cached_given_pairs, cached_pairs, cached_subjects
from .downloads import PUBLIC_DATASETS, download_dataset
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
    shard_loader,
)
from .pool import PooledDataset, PooledIndex, PooledSampler, StatePool
from .sample_cohorts import (
    is_sample,
    sample_dataset_dir,
    sample_lung_dataset_dir,
    write_sample_cohort,
    write_sample_lung_cohort,
)
from .split import part_of

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
    "RandomPairSampler",
    "ShardSampler",
    "StatePool",
    "cached_given_pairs",
    "cached_pairs",
    "cached_subjects",
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
    "sample_dataset_dir",
    "sample_lung_dataset_dir",
    "shard_loader",
    "source_of",
    "write_sample_cohort",
    "write_sample_lung_cohort",
]
