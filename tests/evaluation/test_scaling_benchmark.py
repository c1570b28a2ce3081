# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a registration against the size of the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monai_deq.evaluation import SCALING_CASES, ScalingRow, measure_scaling, scaling_table

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"


def test_systems_of_the_paper(tmp_path: Path) -> None:
    sizes = [(48, 64), (96, 128)]
    rows = measure_scaling(BUNDLE, tmp_path, sizes, rounds=1)
    assert {row.failure for row in rows} == {None}
    assert [(row.title, row.spatial_size) for row in rows] == [(t, s) for s in sizes for t in SCALING_CASES]
    for small, large in zip(rows[: len(SCALING_CASES)], rows[len(SCALING_CASES) :], strict=True):
        # all that is allocated are images: as much more as there are voxels
        assert 0.8 * 4 < large.peak_mb / small.peak_mb < 1.1 * 4
        assert small.seconds > 0 and large.seconds > 0
    assert rows[0].time_ratio == 1
    # at the least the input of the U-Net and the displacement are there at once: 6 channels of 4 bytes
    plain, anderson = rows[-2], rows[-1]
    assert plain.peak_mb > 6 * 4 * 96 * 128 / 1e6
    # the states that Anderson mixes
    assert anderson.peak_mb > plain.peak_mb
    written = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [ScalingRow(**{**row, "spatial_size": tuple(row["spatial_size"])}) for row in written] == rows
    table = (tmp_path / "scaling.md").read_text()
    assert f"| {' x '.join(map(str, sizes[0]))} | VoxelMorph | {rows[0].seconds:.3g} | 1.00 |" in table
    assert all((tmp_path / f"scaling_{name}.png").stat().st_size > 10_000 for name in ("time", "memory"))
    with pytest.raises(FileExistsError, match="--overwrite true"):
        measure_scaling(BUNDLE, tmp_path, sizes)


def test_volumes(tmp_path: Path) -> None:
    cases = {"DEQReg": {"method": "deqreg_pool", "solver_steps": 2}}
    (row,) = measure_scaling(BUNDLE, tmp_path, [(16, 16, 24)], cases, rounds=1)
    assert row.failure is None and row.spatial_size == (16, 16, 24)
    assert row.peak_mb > 8 * 4 * 16 * 16 * 24 / 1e6


def test_one_that_fails_leaves_the_others(tmp_path: Path) -> None:
    cases = {"none": {"method": "nothing"}, "one": {"method": "voxelmorph"}}
    rows = measure_scaling(BUNDLE, tmp_path, [(16, 16)], cases, rounds=1)
    assert "no configuration at" in str(rows[0].failure) and rows[1].failure is None
    table = (tmp_path / "scaling.md").read_text()
    # no first system that times could be given in terms of
    assert "| none | failed: FileNotFoundError" in table and f"| one | {rows[1].seconds:.3g} | - |" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sizes": []}, r"sizes must be sizes of images, .* got \[\]"),
        ({"sizes": [(16,)]}, r"got \[\(16,\)\]"),
        ({"sizes": [(16, 16), (16, 16, 16)]}, "all of two or all of three numbers"),
        ({"cases": {}}, "cases must not be empty"),
        ({"cases": {"one": "voxelmorph"}}, "'one' must be a dictionary"),
        ({"rounds": 0}, "rounds must be a whole number"),
        ({"solver_step": 3}, r"\['solver_step'\] is neither an argument of scaling"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        measure_scaling(BUNDLE, tmp_path, **arguments)


def test_table_of_nothing() -> None:
    with pytest.raises(ValueError, match="rows must not be empty"):
        scaling_table([])
