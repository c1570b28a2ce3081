# SPDX-License-Identifier: Apache-2.0
"""The memory of a bundle's systems against their steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monai_deq.evaluation import MEMORY_CASES, MemoryCase, MemoryRow, measure_memory, memory_plot, memory_table

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"


@pytest.mark.parametrize("size", [(32, 48), (16, 16, 32)])
def test_memory_of_the_papers_systems(size: tuple[int, ...], tmp_path: Path) -> None:
    rows = measure_memory(BUNDLE, tmp_path, size, steps=[4, 8], unrolled_steps=[1, 2], rounds=1)
    assert {row.failure for row in rows} == {None}
    peak = {(row.title, row.steps): row.peak_mb for row in rows}
    saved = {(row.title, row.steps): row.saved_mb for row in rows}
    assert {title for title, _ in peak} == {case.title for case in MEMORY_CASES}
    # an equilibrium's memory does not depend on the steps, that of unrolled systems grows by as much with each
    for title in ("DEQReg", "DEQReg, recomputed", "DEQReg, recomputed in parts"):
        assert saved[title, 4] == saved[title, 8]
        assert peak[title, 4] == pytest.approx(peak[title, 8], rel=0.02)
    for title in ("Unrolling", "GraDIRN", "RIIR"):
        assert 1.6 * saved[title, 1] < saved[title, 2] < 2.1 * saved[title, 1]
    # three states and the final one, two phantom steps each
    one, parts = saved["one step of the U-Net", 1], saved["DEQReg, recomputed in parts", 8]
    assert 7 * one < saved["DEQReg", 8] < 9 * one and parts < one < saved["DEQReg", 8]
    assert rows[0].ratio == 1 and rows[1].ratio == pytest.approx(rows[1].peak_mb / rows[0].peak_mb)
    # timed at the largest number of steps
    assert [row.steps for row in rows if row.seconds] == [1, 1, 2, 2, 2, 8, 8, 8]
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["spatial_size"] == list(size)
    assert [MemoryRow(**row) for row in written["rows"]] == rows
    table = (tmp_path / "memory.md").read_text()
    assert f"| DEQReg | 8 | {saved['DEQReg', 8]:.1f} | {peak['DEQReg', 8]:.1f} |" in table
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    with pytest.raises(FileExistsError, match="--overwrite true"):
        measure_memory(BUNDLE, tmp_path, size)


def test_one_that_fails_leaves_the_others(tmp_path: Path) -> None:
    cases = (MemoryCase("one", "voxelmorph", steps_key="one"), MemoryCase("none", "nothing"))
    rows = measure_memory(BUNDLE, tmp_path, (16, 16), steps=[2], cases=cases)
    assert rows[0].failure is None and "no configuration at" in str(rows[1].failure)
    assert "| none | 2 | failed: FileNotFoundError" in (tmp_path / "memory.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spatial_size": (16,)}, r"spatial_size must be two or three sizes, got \[16\]"),
        ({"steps": []}, r"steps must be whole numbers of at least 1, got \[\]"),
        ({"unrolled_steps": [0]}, r"unrolled_steps must be whole numbers of at least 1, got \[0\]"),
        ({"rounds": -1}, "rounds must be a whole number"),
        ({"cases": ()}, "cases must not be empty"),
        ({"solver_step": 3}, r"\['solver_step'\] is neither an argument of memory"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        measure_memory(BUNDLE, tmp_path, **arguments)


def test_table_and_plot_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows must not be empty"):
        memory_table([], (16, 16))
    (tmp_path / "there.png").touch()
    with pytest.raises(FileExistsError, match="overwrite"):
        memory_plot({}, "", tmp_path / "there.png")
