# SPDX-License-Identifier: Apache-2.0
"""The schedules are those of the paper and of the bundles of version 0.1.0."""

from __future__ import annotations

from typing import Any

import pytest

from monai_deq.engines import Schedule, nlst_schedule, oasis_schedule

PAPER = {
    "max_epochs": 100,
    "pairs_per_epoch": None,
    "batch_size": 1,
    "learning_rate": 1e-4,
    "lr_decay_power": 0.0,
    "smoothness_weight": 0.1,
    "max_steps": 12,
    "val_steps": 96,
    "spatial_size": None,
}
SAMPLE = {"learning_rate": 1.5e-3, "lr_decay_power": 0.9}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), {}),
        (oasis_schedule(3, False), {"spatial_size": (128, 128, 128)}),
        (
            oasis_schedule(3, True),
            {**SAMPLE, "max_epochs": 2, "pairs_per_epoch": 100, "batch_size": 2, "max_steps": 2, "val_steps": 4},
        ),
        (
            oasis_schedule(2, False),
            {
                "max_epochs": 12,
                "pairs_per_epoch": 300,
                "learning_rate": 5e-4,
                "lr_decay_power": 0.9,
                "smoothness_weight": 1.0,
            },
        ),
        (
            oasis_schedule(2, True),
            {
                "max_epochs": 6,
                "pairs_per_epoch": 100,
                "batch_size": 2,
                "learning_rate": 5e-4,
                "lr_decay_power": 0.9,
                "smoothness_weight": 1.0,
                "val_steps": 16,
            },
        ),
        (nlst_schedule(False), {"smoothness_weight": 0.125, "spatial_size": (224, 192, 224)}),
        (
            nlst_schedule(True),
            {
                **SAMPLE,
                "max_epochs": 3,
                "pairs_per_epoch": 120,
                "batch_size": 4,
                "smoothness_weight": 0.125,
                "max_steps": 4,
                "val_steps": 8,
                "spatial_size": (24, 16, 32),
            },
        ),
    ],
)
def test_schedules(schedule: Schedule, expected: dict[str, Any]) -> None:
    assert vars(schedule) == {**PAPER, **expected}
