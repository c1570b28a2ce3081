# SPDX-License-Identifier: Apache-2.0
"""Data sets of brain MRI and lung CT, and their pairing for registration."""

from __future__ import annotations

from .caching import cached_given_pairs, cached_pairs, cached_subjects
from .downloads import PUBLIC_DATASETS, download_dataset
from .grid import Grid, affine_of, check_same_grid, grid_distance, grid_of, same_grid, source_of
from .images import (
    IMAGE_FORMATS,
    LPS,
    check_affine,
    existing_file,
    image_dims,
    image_stem,
    is_planar,
    load_nibabel,
    load_simpleitk,
    read_image,
    refuse_damaged,
    save_nifti,
    simpleitk_affine,
)
from .labels import SEG24_LABELS, SEG35_LABELS, label_set
from .learn2reg import Learn2RegDataset, find_learn2reg, keep_annotations
from .oasis import OasisDataset, find_oasis
from .pair_files import PAIR_FILES, pair_items, pairs_to_register, read_pair_list, scan_names
from .pairs import (
    FAILED_PAIRS,
    FailedPair,
    GivenPairDataset,
    GivenPairSampler,
    PairDataset,
    PairSampler,
    RandomPairSampler,
    ShardSampler,
    collate_annotated_pairs,
    names_of,
    pair_indices,
    pair_names,
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
    "IMAGE_FORMATS",
    "LPS",
    "PAIR_FILES",
    "PUBLIC_DATASETS",
    "SEG24_LABELS",
    "SEG35_LABELS",
    "FAILED_PAIRS",
    "FailedPair",
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
    "affine_of",
    "cached_given_pairs",
    "cached_pairs",
    "cached_subjects",
    "check_affine",
    "check_same_grid",
    "download_dataset",
    "collate_annotated_pairs",
    "existing_file",
    "find_learn2reg",
    "find_oasis",
    "grid_distance",
    "grid_of",
    "image_dims",
    "image_stem",
    "is_planar",
    "is_sample",
    "keep_annotations",
    "label_set",
    "load_nibabel",
    "load_simpleitk",
    "names_of",
    "pair_indices",
    "pair_items",
    "pair_names",
    "pairs_to_register",
    "part_of",
    "read_image",
    "refuse_damaged",
    "read_pair_list",
    "same_grid",
    "sample_dataset_dir",
    "sample_lung_dataset_dir",
    "save_nifti",
    "scan_names",
    "shard_loader",
    "simpleitk_affine",
    "source_of",
    "write_sample_cohort",
    "write_sample_lung_cohort",
]
