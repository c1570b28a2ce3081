# SPDX-License-Identifier: Apache-2.0
"""Data sets of brain MRI and lung CT, and their pairing for registration."""

from __future__ import annotations

from .caching import cached_subjects
from .downloads import PUBLIC_DATASETS, download_dataset
from .given_pairs import GivenPairDataset, GivenPairSampler, collate_annotated_pairs
from .grid import Grid, check_same_grid, grid_of, source_of
from .learn2reg import Learn2RegDataset, find_learn2reg
from .learn2reg_split import keep_annotations, split_pairs
from .oasis import (
    LEARN2REG_OASIS,
    NEURITE_OASIS,
    SEG24_LABELS,
    SEG35_LABELS,
    OasisDataset,
    find_oasis,
    label_set,
    split_subjects,
)
from .pairs import PairDataset, PairSampler, RandomPairSampler, fixed_pairs, pair_indices, pairs_as_indices
from .pooled_pairs import (
    PooledGivenPair,
    PooledGivenPairDataset,
    PooledGivenPairSampler,
    PooledPair,
    PooledPairDataset,
    PooledPairSampler,
)
from .sample_cohorts import (
    is_sample,
    sample_dataset_dir,
    sample_lung_dataset_dir,
    write_sample_cohort,
    write_sample_lung_cohort,
)
from .scan_pairs import learn2reg_scan_pairs, listed_pairs, scan_pairs, split_scan_pairs
from .shard import ShardSampler
from .split import part_of
from .state_pool import StatePool

__all__ = [
    "LEARN2REG_OASIS",
    "NEURITE_OASIS",
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
    "PooledGivenPair",
    "PooledGivenPairDataset",
    "PooledGivenPairSampler",
    "PooledPair",
    "PooledPairDataset",
    "PooledPairSampler",
    "RandomPairSampler",
    "ShardSampler",
    "StatePool",
    "cached_subjects",
    "check_same_grid",
    "download_dataset",
    "collate_annotated_pairs",
    "find_learn2reg",
    "find_oasis",
    "fixed_pairs",
    "grid_of",
    "is_sample",
    "keep_annotations",
    "label_set",
    "learn2reg_scan_pairs",
    "listed_pairs",
    "pair_indices",
    "pairs_as_indices",
    "part_of",
    "sample_dataset_dir",
    "sample_lung_dataset_dir",
    "scan_pairs",
    "source_of",
    "split_pairs",
    "split_scan_pairs",
    "split_subjects",
    "write_sample_cohort",
    "write_sample_lung_cohort",
]
