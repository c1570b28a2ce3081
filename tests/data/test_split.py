# SPDX-License-Identifier: Apache-2.0
"""One part of a split, by its name."""

from __future__ import annotations

import pytest

from monai_deq.data import part_of


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
