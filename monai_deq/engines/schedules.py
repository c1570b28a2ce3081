# SPDX-License-Identifier: Apache-2.0
"""How long and on what grid the bundles train, for real data and for their samples."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Schedule", "nlst_schedule", "oasis_schedule"]


@dataclass(frozen=True)
class Schedule:
    """Settings of a training that go with the data.

    Args:
        max_epochs: number of epochs. Defaults to 100 (paper).
        pairs_per_epoch: number of pairs in an epoch. Defaults to ``None``: as many as there are subjects or pairs.
        batch_size: number of pairs in a batch. Defaults to 1.
        learning_rate: of AdamW. Defaults to 1e-4 (paper).
        lr_decay_power: exponent of the polynomial by which it falls to zero. Defaults to 0: it does not.
        smoothness_weight: ``lambda`` of Eq. 1. Defaults to 0.1 (paper, OASIS).
        max_steps: step limit ``T`` in training. Defaults to 12.
        val_steps: step limit in validation and evaluation. Defaults to 96.
        spatial_size: size in voxels that images are resampled to. Defaults to ``None``: as they are.
    """

    max_epochs: int = 100
    pairs_per_epoch: int | None = None
    batch_size: int = 1
    learning_rate: float = 1e-4
    lr_decay_power: float = 0.0
    smoothness_weight: float = 0.1
    max_steps: int = 12
    val_steps: int = 96
    spatial_size: tuple[int, ...] | None = None


def oasis_schedule(spatial_dims: int, is_sample: bool) -> Schedule:
    """Schedule of ``spatial_dims`` 3, or 2 for slices, on OASIS or its synthetic sample."""
    if spatial_dims == 3 and not is_sample:
        return Schedule(spatial_size=(128, 128, 128))
    if spatial_dims == 3:
        return Schedule(2, 100, 2, 0.0015, 0.9, max_steps=2, val_steps=4)
    if not is_sample:
        return Schedule(12, 300, 1, 0.0005, 0.9, smoothness_weight=1.0)
    return Schedule(6, 100, 2, 0.0005, 0.9, smoothness_weight=1.0, val_steps=16)


def nlst_schedule(is_sample: bool) -> Schedule:
    """Schedule on NLST or its synthetic sample."""
    if not is_sample:
        return Schedule(smoothness_weight=0.125, spatial_size=(224, 192, 224))
    return Schedule(
        3, 120, 4, 0.0015, 0.9, smoothness_weight=0.125, max_steps=4, val_steps=8, spatial_size=(24, 16, 32)
    )
