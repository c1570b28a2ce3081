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


def test_part_of_subjects_that_lack_something() -> None:
    parts = {"training": [{"subject": "1", "label": "a"}, {"subject": "2", "label": None}, {"subject": "3"}]}
    assert len(part_of(parts, "training")) == 3
    with pytest.raises(
        ValueError, match=r"The training part needs a label .* but 2 of its 3 subjects have none: 2, 3\."
    ):
        part_of(parts, "training", "label")


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_evaluation_of_a_part_names_its_first_subject_without_labels(tmp_path: Path, spatial_dims: int) -> None:
    cohort = write_sample_cohort(tmp_path / "cohort", 5, spatial_size_3d=(8, 8, 8), spatial_size_2d=(8, 8))
    names = sorted(p.name for p in cohort.iterdir() if p.is_dir())
    (cohort / names[1] / ("slice_seg24.nii.gz" if spatial_dims == 2 else "aligned_seg35.nii.gz")).unlink()
    for split in ("training", "test"):
        parser = ConfigParser()
        parser.read_config(str(BUNDLES / "oasis" / "evaluate.json"))
        parser.update({"dataset_dir": str(cohort), "split_sizes": [2, 1, 2], "spatial_dims": spatial_dims})
        parser["split"] = split
        if split == "test":  # whose subjects have all that is needed
            assert len(parser.get_parsed_content("subjects")) == 2
            continue
        with pytest.raises(RuntimeError) as caught:
            parser.get_parsed_content("subjects")
        message = str(caught.value.__cause__)
        assert "The training part needs a label" in message and f"none: {names[1]}." in message


def test_evaluation_says_which_parts_there_are(tmp_path: Path) -> None:
    cohort = write_sample_cohort(tmp_path / "cohort", 4, spatial_size_3d=(8, 8, 8), spatial_size_2d=(8, 8))
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / "oasis" / "evaluate.json"))
    parser.update({"dataset_dir": str(cohort), "split_sizes": [2, 1, 1], "split": "tset"})
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("subjects")
    assert "split must be one of" in str(caught.value.__cause__)
