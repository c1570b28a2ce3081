# SPDX-License-Identifier: Apache-2.0
"""Solvers and step limits of a bundle's methods side by side, on tiny images and untrained weights."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from monai_deq.data import write_sample_cohort
from monai_deq.evaluation import SPEED_CASES, measure_speed, speed_table

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"


def write_checkpoint(name: str, results: Path, spatial_dims: int, **settings: Any) -> None:
    parser = ConfigParser()
    overlays = ["slices.json"] if spatial_dims == 2 else []
    parser.read_config([str(BUNDLE / f) for f in ("train.json", *overlays, f"methods/{name}.json")])
    parser.update({"max_steps": 2, "num_states": 0, "is_sample": True, "spatial_dims": spatial_dims, **settings})
    torch.manual_seed(0)
    network = parser.get_parsed_content("network")
    # some motion, that differs from step to step
    for flow in (module for name, module in network.named_modules() if name.endswith("flow")):
        torch.nn.init.normal_(flow.weight, std=0.02)
    path = results / name / "models" / "model.pt"
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    own = {"spatial_size": None, "val_steps": 3, "max_steps": 2, **settings}
    path.with_suffix(".json").write_text(json.dumps(own))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_cases_of_one_network(spatial_dims: int, tmp_path: Path) -> None:
    cohort = write_sample_cohort(tmp_path / "cohort", 5, spatial_size_3d=(18, 16, 21), spatial_size_2d=(32, 37))
    results = tmp_path / "results"
    write_checkpoint("riir", results, spatial_dims)
    write_checkpoint("deqreg_pool", results, spatial_dims, coarser_levels=2, coarse_steps=4)
    cases: dict[str, dict[str, Any]] = {
        "RIIR": {"method": "riir"},
        "full": {"method": "deqreg_pool", "coarse_tolerance": 0.0, "tolerance": 0.0},
        "quick": {
            "method": "deqreg_pool",
            "solver": "anderson",
            "coarse_solver": "anderson",
            "coarse_steps": 2,
            "coarse_tolerance": 0.0,
            "solver_steps": 2,
            "tolerance": 100.0,
        },
        "absent": {"method": "deqreg"},
    }
    overlays = ["slices.json"] if spatial_dims == 2 else []
    common = {"dataset_dir": str(cohort), "split_sizes": [2, 1, 2], "overlays": overlays}
    rows = measure_speed(BUNDLE, results, tmp_path / "out", cases, rounds=2, **common)
    riir, full, quick, absent = rows
    assert [row.title for row in rows] == list(cases)
    # three steps at full size; at the smaller ones by their share of the voxels
    half, quarter = 0.5**spatial_dims, 0.25**spatial_dims
    assert riir.evaluations == 3
    assert full.evaluations == pytest.approx(3 + 4 * half + 4 * quarter) and full.converged == 0
    # its first step is within the tolerance
    assert quick.evaluations == pytest.approx(1 + 2 * half + 2 * quarter) and quick.converged == 1
    assert riir.time_ratio == 1 and full.seconds > 0 and math.isfinite(quick.time_ratio)
    assert "no checkpoint" in str(absent.failure) and math.isnan(absent.dice)
    # Dice as the evaluation wrote it
    (pairs,) = (results / "riir" / "comparison").glob("*/evaluation_pairs.csv")
    with pairs.open() as file:
        dice = [float(row["dice"]) for row in csv.DictReader(file)]
    assert riir.dice == pytest.approx(sum(dice) / len(dice))
    written = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert written["rows"][1]["evaluations"] == full.evaluations and written["rows"][3]["dice"] is None
    table = (tmp_path / "out" / "speed.md").read_text()
    assert f"| full | {100 * full.dice:.2f} | {full.folded_percent:.3f} | {full.evaluations:.1f} | 0 |" in table
    assert "| absent | failed: FileNotFoundError" in table
    with pytest.raises(FileExistsError, match="--overwrite true"):
        measure_speed(BUNDLE, results, tmp_path / "out", cases, **common)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cases": {}}, "cases must not be empty"),
        ({"cases": {"a": {"solver": "plain"}}}, "'a' must be a dictionary with the name of an overlay"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        ({"solver_step": 3}, r"\['solver_step'\] is neither an argument of speed"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        measure_speed(BUNDLE, tmp_path, tmp_path, **arguments)


def test_default_cases_are_methods_of_the_bundle() -> None:
    known = {path.stem for path in (BUNDLE / "methods").glob("*.json")}
    settings = json.loads((BUNDLE / "evaluate.json").read_text())
    for case in SPEED_CASES.values():
        assert case["method"] in known and set(case) - {"method"} <= set(settings)
    with pytest.raises(ValueError, match="rows must not be empty"):
        speed_table([])
