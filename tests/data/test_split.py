# SPDX-License-Identifier: Apache-2.0
"""One part of a split, by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from monai_deq.data import part_of, write_sample_cohort

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


def test_part_of() -> None:
    parts = {"training": [{"subject": "1"}], "validation": [], "test": [{"subject": "2"}]}
    assert part_of(parts, "test") == [{"subject": "2"}] and part_of(parts, "validation") == []
    with pytest.raises(ValueError, match="split must be one of 'training', 'validation', 'test', got 'tset'"):
        part_of(parts, "tset")


def test_evaluation_says_which_parts_there_are(tmp_path: Path) -> None:
    cohort = write_sample_cohort(tmp_path / "cohort", 4, spatial_size_3d=(8, 8, 8), spatial_size_2d=(8, 8))
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / "oasis" / "evaluate.json"))
    parser.update({"dataset_dir": str(cohort), "split_sizes": [2, 1, 1], "split": "tset"})
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("subjects")
    assert "split must be one of" in str(caught.value.__cause__)
