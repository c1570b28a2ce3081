# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the bundle's systems: memory against steps, scaling with the images, solvers side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from monai_deq.evaluation import (
    MEMORY_CASES,
    SCALING_CASES,
    SPEED_CASES,
    Timing,
    measure_memory,
    measure_scaling,
    measure_speed,
)
from monai_deq.evaluation.benchmarks import _note_times


def written_rows(path: Path, columns: list[str]) -> pd.DataFrame:
    """The rows of a JSON file, null as NaN but for the failure."""
    rows = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))["rows"]
    assert all(list(row) == columns for row in rows)
    return pd.DataFrame(rows)


def test_times_in_terms_of_the_first() -> None:
    rows: dict[str, dict[str, Any]] = {"slow": {}, "quick": {}, "broken": {}}
    slow, quick = Timing((4.0, 2.0, 3.0)), Timing((1.0, 2.0, 1.5))
    _note_times(rows, {"slow": slow, "quick": quick, "broken": Timing((), "no memory")}, "quick")
    # medians 3 and 1.5; ratios 4, 1 and 2
    assert rows["slow"] == {"seconds": 3.0, "time_ratio": 2.0} and rows["quick"]["time_ratio"] == 1
    assert rows["broken"] == {"failure": "no memory"}
    _note_times(rows, {"slow": slow}, "absent")
    assert math.isnan(rows["slow"]["time_ratio"])


def test_memory_of_the_papers_systems(oasis: Path, tmp_path: Path) -> None:
    size = (32, 48)
    rows = measure_memory(oasis, tmp_path, size, steps=[4, 6], unrolled_steps=[1, 2], rounds=1)
    assert rows["failure"].isna().all(), rows["failure"].to_list()
    by_case = rows.set_index(["title", "steps"])
    peak, saved = by_case["peak_mb"], by_case["saved_mb"]
    assert list(dict.fromkeys(rows["title"])) == list(MEMORY_CASES)
    # an equilibrium's memory does not depend on the steps, that of unrolled systems grows by as much with each
    for title in ("DEQReg", "DEQReg, recomputed", "DEQReg, recomputed in parts"):
        assert saved[title, 4] == saved[title, 6]
        assert peak[title, 4] == pytest.approx(peak[title, 6], rel=0.02)
    for title in ("Unrolling", "GraDIRN", "RIIR"):
        assert 1.6 * saved[title, 1] < saved[title, 2] < 2.1 * saved[title, 1]
    # three states and the final one, two phantom steps each
    one, parts = saved["one step of the U-Net", 1], saved["DEQReg, recomputed in parts", 6]
    assert 7 * one < saved["DEQReg", 6] < 9 * one and parts < one < saved["DEQReg", 6]
    assert rows["ratio"].to_list() == pytest.approx((rows["peak_mb"] / rows["peak_mb"][0]).to_list())
    # timed at the largest number of steps
    assert rows["steps"][rows["seconds"].notna()].to_list() == [1, 1, 2, 2, 2, 6, 6, 6]
    assert json.loads((tmp_path / "memory.json").read_text())["spatial_size"] == list(size)
    written = written_rows(tmp_path / "memory.json", list(rows))
    assert written["peak_mb"].to_list() == rows["peak_mb"].to_list()
    table = (tmp_path / "memory.md").read_text()
    assert f"| DEQReg | 6 | {saved['DEQReg', 6]:.1f} | {peak['DEQReg', 6]:.1f} |" in table
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    with pytest.raises(FileExistsError, match="overwrite"):
        measure_memory(oasis, tmp_path, size)


@pytest.mark.usefixtures("no_figures")
def test_memory_of_volumes(oasis: Path, tmp_path: Path) -> None:
    names = ("one step of the U-Net", "DEQReg", "DEQReg, recomputed in parts")
    cases = {name: MEMORY_CASES[name] for name in names}
    # of the bundle's U-Net the two finest levels alone
    widths = {"encoder_channels": [16, 32], "decoder_channels": [32], "final_channels": [16]}
    unet = {"_target_": "monai_deq.networks.blocks.RegistrationUNet", "spatial_dims": 3, "in_channels": 5, **widths}
    rows = measure_memory(oasis, tmp_path, (16, 16, 16), steps=[4], cases=cases, overrides={"update#backbone": unet})
    one, whole, parts = rows["saved_mb"]
    assert 7 * one < whole < 9 * one and parts < one and rows["seconds"].isna().all()
    assert "time" not in (tmp_path / "memory.md").read_text()


def test_scaling_of_the_papers_systems(oasis: Path, tmp_path: Path) -> None:
    sizes, count = [(32, 48), (64, 96)], len(SCALING_CASES)
    rows = measure_scaling(oasis, tmp_path, sizes, rounds=1)
    assert rows["failure"].isna().all(), rows["failure"].to_list()
    assert [*zip(rows["title"], rows["spatial_size"], strict=True)] == [(t, s) for s in sizes for t in SCALING_CASES]
    # all that is allocated are images: as much more as there are voxels
    growth = rows["peak_mb"][count:].to_numpy() / rows["peak_mb"][:count].to_numpy()
    assert (growth > 0.8 * 4).all() and (growth < 1.1 * 4).all() and (rows["seconds"] > 0).all()
    assert rows["time_ratio"][0] == rows["time_ratio"][count] == 1
    # at the least the input of the U-Net and the displacement are there at once: 6 channels of 4 bytes
    *_, plain, anderson = rows["peak_mb"]
    assert plain > 6 * 4 * 64 * 96 / 1e6
    # the states that Anderson mixes
    assert anderson > plain
    written = written_rows(tmp_path / "scaling.json", list(rows))
    assert written["seconds"].to_list() == rows["seconds"].to_list()
    assert f"| 32 x 48 | VoxelMorph | {rows['seconds'][0]:.3g} | 1.00 |" in (tmp_path / "scaling.md").read_text()
    assert all((tmp_path / f"scaling_{name}.png").stat().st_size > 10_000 for name in ("time", "memory"))


@pytest.mark.usefixtures("no_figures")
def test_scaling_of_volumes(oasis: Path, tmp_path: Path) -> None:
    cases = {"DEQReg": {"method": "deqreg_pool", "solver_steps": 2}}
    rows = measure_scaling(oasis, tmp_path, [(16, 16, 24)], cases, rounds=1)
    assert rows["failure"].to_list() == [None] and rows["peak_mb"][0] > 8 * 4 * 16 * 16 * 24 / 1e6


@pytest.mark.usefixtures("no_figures")
def test_one_that_fails_leaves_the_others(oasis: Path, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {"none": {"method": "nothing"}, "one": {"method": "voxelmorph"}}
    rows = measure_scaling(oasis, tmp_path, [(16, 16)], cases, rounds=1)
    assert "no configuration at" in rows["failure"][0] and rows["failure"][1] is None
    table = (tmp_path / "scaling.md").read_text()
    # no first system that times could be given in terms of
    assert "| none | failed: FileNotFoundError" in table and f"| one | {rows['seconds'][1]:.3g} | - |" in table
    cases["none"], cases["one"]["steps"] = {"method": "nothing"}, "one"
    rows = measure_memory(oasis, tmp_path, (16, 16), steps=[2], cases=cases)
    assert "no configuration at" in rows["failure"][0] and rows["peak_mb"][1] > 0 and math.isnan(rows["ratio"][1])
    assert "| none | 2 | failed: FileNotFoundError" in (tmp_path / "memory.md").read_text()


def test_solvers_of_one_network(
    oasis: Path, overrides: dict[str, Any], write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    results, output = tmp_path / "results", tmp_path / "out"
    write_checkpoint("riir", results, 2, 3, motion=0.02)
    write_checkpoint("deqreg_pool", results, 2, 3, motion=0.02, levels=3)
    quick = {"solver": "anderson", "coarse_solver": "anderson", "solver_steps": 2, "tolerance": 100.0}
    cases: dict[str, dict[str, Any]] = {
        "RIIR": {"method": "riir"},
        "full": {"method": "deqreg_pool", "coarse_tolerance": 0.0, "tolerance": 0.0},
        "quick": {"method": "deqreg_pool", "coarse_tolerance": 0.0, **quick},
        "absent": {"method": "deqreg"},
    }
    rows = measure_speed(oasis, results, output, cases, ["slices.json"], 2, overrides)
    assert rows["title"].to_list() == list(cases)
    _, full, fast, absent = (row for _, row in rows.iterrows())
    # three steps at full size and at each of the smaller ones; these count by their share of the voxels
    smaller = 3 * (0.5**2 + 0.25**2)
    # the first step of the quick one is within the tolerance
    assert rows["evaluations"][:3].to_list() == pytest.approx([3, 3 + smaller, 1 + smaller])
    assert full["converged"] == 0 and fast["converged"] == 1
    assert rows["time_ratio"][0] == 1 and full["seconds"] > 0 and math.isfinite(fast["time_ratio"])
    assert "no checkpoint" in absent["failure"] and math.isnan(absent["dice"])
    # Dice as the evaluation wrote it
    (pairs,) = (results / "riir" / "comparison").glob("*/evaluation_pairs.csv")
    assert rows["dice"][0] == pytest.approx(pd.read_csv(pairs)["dice"].mean())
    written = written_rows(output / "speed.json", list(rows))
    assert written["evaluations"][1] == full["evaluations"] and math.isnan(written["dice"][3])
    assert "dataset_dir" not in json.loads((output / "speed.json").read_text())["settings"]
    table = (output / "speed.md").read_text()
    expected = f"{100 * full['dice']:.2f} | {full['folded_percent']:.3f} | {full['evaluations']:.1f} | 0 |"
    assert f"| full | {expected}" in table and "| absent | failed: FileNotFoundError" in table


def test_default_cases_are_methods_of_the_bundle(oasis: Path) -> None:
    known = {path.stem for path in (oasis / "methods").glob("*.json")}
    settings = json.loads((oasis / "evaluate.json").read_text())
    for case in SPEED_CASES.values():
        assert case["method"] in known and set(case) - {"method"} <= set(settings)


@pytest.mark.parametrize(
    ("measure", "given", "words"),
    [
        (measure_memory, {"spatial_size": (16,)}, r"spatial_size must be two or three sizes, got \[16\]"),
        (measure_memory, {"steps": []}, r"steps must be whole numbers of at least 1, got \[\]"),
        (measure_memory, {"unrolled_steps": [0]}, r"unrolled_steps must be whole numbers of at least 1, got \[0\]"),
        (measure_memory, {"rounds": -1}, "rounds must be a whole number"),
        (measure_memory, {"cases": {}}, "cases must not be empty"),
        (measure_memory, {"overrides": {"solver_step": 3}}, r"overrides: \['solver_step'\] is no setting"),
        (measure_scaling, {"sizes": []}, r"sizes must be sizes of images, .* got \[\]"),
        (measure_scaling, {"sizes": [(16,)]}, r"got \[\(16,\)\]"),
        (measure_scaling, {"sizes": [(16, 16), (16, 16, 16)]}, "all of two or all of three numbers"),
        (measure_scaling, {"cases": {"one": "voxelmorph"}}, "'one' must be a dictionary"),
        (measure_scaling, {"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        (measure_speed, {"results_dir": "r", "cases": {"a": {"solver": "plain"}}}, "'a' must be a dictionary with the"),
        (measure_speed, {"results_dir": "r", "overrides": {"solver_step": 3}}, r"overrides: \['solver_step'\] is no"),
    ],
)
def test_wrong_arguments(
    measure: Callable[..., Any], given: dict[str, Any], words: str, oasis: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        measure(bundle_dir=oasis, output_dir=tmp_path, **given)
