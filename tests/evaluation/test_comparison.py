# SPDX-License-Identifier: Apache-2.0
"""The comparison of a bundle's methods, with tiny images and untrained weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from monai_deq.baselines import InitialAlignment
from monai_deq.evaluation import BundleMethod, compare, costs, methods
from monai_deq.evaluation import comparison as study
from monai_deq.solvers import SolverRecord

METRICS = ["dice", "folded_percent"]
Writer = Callable[..., Path]


def rows_by_name(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in frame.to_dict("records")}


@pytest.fixture
def arguments(oasis: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Of a comparison on slices, of two pairs, with one step of each method."""
    settings = {**overrides, "solver_steps": 1}
    return {"bundle_dir": oasis, "overlays": "slices.json", "overrides": settings, "metrics": METRICS, "cost_rounds": 0}


class Shifted(InitialAlignment):
    """In place of elastix, which takes 15 seconds to load: every image is shifted by a voxel."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()

    def solve(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, SolverRecord]:
        ddf, record = super().solve(*args, **kwargs)
        return ddf + 1, record


def test_methods_in_one_table(
    arguments: dict[str, Any], write_checkpoint: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_deq.baselines.ElastixRegistration", Shifted)
    names = study.METHODS
    for name in names:
        if name not in ("affine", "elastix", "riir"):
            write_checkpoint(name, tmp_path, record={"training": {"training_pairs": 7}})
    table = compare(results_dir=tmp_path, **{**arguments, "cost_rounds": 1})
    rows = rows_by_name(table.to_frame())
    assert list(rows) == list(names)
    # RIIR was not trained: a row with the reason; all others have scores of the two pairs
    assert "no checkpoint" in rows["riir"]["failure"] and rows["riir"]["dice_mean"] is None
    for name, row in rows.items():
        if name != "riir":
            assert row["failure"] is None and row["dice_pairs"] == 2, row
    summary = json.loads(next((tmp_path / "affine" / "comparison").rglob("evaluation_summary.json")).read_text())
    assert not list(tmp_path.glob("*/comparison/*/*.png"))  # pictures take time
    assert rows["affine"]["dice_mean"] == pytest.approx(summary["summary"]["dice_before"]["mean"])
    assert rows["affine"]["folded_percent_mean"] == 0 and not rows["affine"]["ranked"]

    # costs: numbers for what can be measured, and an unrolled network keeps more than a single step
    for name, row in rows.items():
        if name not in ("affine", "elastix", "riir"):
            assert row["parameters"] > 0 and row["training_seconds"] > 0 and row["inference_seconds"] > 0
            assert row["training_memory_mb"] >= row["saved_memory_mb"] * 0.5 > 0
            assert "CPU" in row["memory_kind"] and row["training_pairs"] == 7 and row["steps"] == 1
    assert rows["elastix"]["dice_mean"] != rows["affine"]["dice_mean"]
    assert rows["elastix"]["inference_seconds"] > 0 and rows["elastix"]["training_memory_mb"] is None
    assert {p.name for p in tmp_path.glob("comparison.*")} == {f"comparison.{s}" for s in ("md", "csv", "json", "png")}
    text = (tmp_path / "comparison.md").read_text()
    assert all(word in text for word in ("Affine", "VoxelMorph", "DEQReg", "failed", "synthetic sample"))


@pytest.mark.usefixtures("no_figures")
def test_what_is_done_is_not_repeated(
    arguments: dict[str, Any], write_checkpoint: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    for name in ("voxelmorph", "deqreg"):
        write_checkpoint(name, results)
    evaluated = []

    class Counted(methods.ConfigWorkflow):  # type: ignore[misc,name-defined]
        def run(self) -> Any:
            evaluated.append(Path(self.parser["bundle_root"]).name)
            return super().run()

    monkeypatch.setattr(methods, "ConfigWorkflow", Counted)

    def run(folder: Path, *names: str, overwrite: bool = True, **more: Any) -> dict[str, dict[str, Any]]:
        evaluated.clear()
        settings = {**arguments, "overrides": {**arguments["overrides"], **more}}
        return rows_by_name(compare(results_dir=folder, methods=names, overwrite=overwrite, **settings).to_frame())

    first = run(results, "affine", "deqreg", overwrite=False)
    assert evaluated == ["affine", "deqreg"]
    with pytest.raises(FileExistsError, match="comparison.md"):
        run(results, "affine", "deqreg", overwrite=False)
    # another method joins, and the folder moves: only the new one is evaluated
    moved = results.rename(tmp_path / "moved")
    second = run(moved, "affine", "voxelmorph", "deqreg")
    assert evaluated == ["voxelmorph"]
    assert all(second[n]["dice_mean"] == first[n]["dice_mean"] for n in ("affine", "deqreg"))
    # other weights, another setting: evaluated anew, and what was there stays
    kept = sorted(moved.rglob("evaluation_pairs.csv"))
    write_checkpoint("voxelmorph", moved, seed=1)
    run(moved, "affine", "voxelmorph", "deqreg")
    assert evaluated == ["voxelmorph"]
    run(moved, "affine", "deqreg", solver_steps=2)
    assert evaluated == ["affine", "deqreg"]
    assert set(kept) < set(moved.rglob("evaluation_pairs.csv")) and len(list(moved.rglob("evaluation_pairs.csv"))) == 6
    # half of the two files, as an evaluation that was stopped leaves them
    for path in moved.glob("affine/comparison/*/evaluation_summary.json"):
        path.unlink()
    run(moved, "affine", "deqreg")
    assert evaluated == ["affine"]


def test_costs_are_kept_for_their_set_of_methods(
    oasis: Path, overrides: dict[str, Any], write_checkpoint: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint("deqreg", tmp_path)
    measured = []

    def measure(methods: dict[str, BundleMethod], rounds: int) -> dict[str, dict[str, Any]]:
        measured.append((*methods, rounds))
        return {name: {"inference_seconds": len(measured) if rounds < 9 else "failed: memory"} for name in methods}

    monkeypatch.setattr(costs, "measure_costs", measure)

    def seconds(*names: str, rounds: int = 1, **more: Any) -> Any:
        of = {n: BundleMethod(n, oasis, tmp_path / n, ["slices.json"], {**overrides, **more}) for n in names}
        return [cost["inference_seconds"] for cost in costs.kept_costs(tmp_path, of, rounds).values()]

    # side by side means in one run: a further method is not measured alone
    assert [seconds("deqreg"), seconds("affine", "deqreg"), seconds("deqreg")] == [[1], [2, 2], [1]]
    # other rounds, another setting, other weights
    assert [seconds("deqreg", rounds=2), seconds("deqreg", solver_steps=1)] == [[3], [4]]
    write_checkpoint("deqreg", tmp_path, seed=1)
    assert [seconds("deqreg"), seconds("affine"), seconds()] == [[5], [6], []]
    # what failed is tried again
    assert [seconds("affine", rounds=9), seconds("affine", rounds=9)] == [["failed: memory"]] * 2
    assert measured[-2:] == [("affine", 9)] * 2 and len(measured) == 8


@pytest.mark.usefixtures("no_figures")
def test_a_failure_is_a_row_with_its_reason(
    arguments: dict[str, Any], write_checkpoint: Writer, tmp_path: Path
) -> None:
    for name in ("voxelmorph", "riir", "deqreg"):
        write_checkpoint(name, tmp_path)
    # weights of another network, one trained at another size
    shutil.copy(tmp_path / "voxelmorph" / "models" / "model.pt", tmp_path / "riir" / "models" / "model.pt")
    write_checkpoint("voxelmorph", tmp_path, record={"spatial_size": [16, 16]})
    write_checkpoint("gradirn", tmp_path, record={"method": "Unrolling"})
    write_checkpoint("deqreg12", tmp_path).write_bytes(b"no checkpoint")
    names = ["affine", "voxelmorph", "riir", "gradirn", "deqreg12", "deqreg"]
    table = compare(results_dir=tmp_path, methods=names, **arguments)
    reasons = {name: row["failure"] for name, row in rows_by_name(table.to_frame()).items()}
    assert "another architecture" in reasons["riir"] and "[16, 16]" in reasons["voxelmorph"]
    assert "trained as 'Unrolling'" in reasons["gradirn"]
    assert "deqreg12" in reasons["deqreg12"] and "not a readable checkpoint" in reasons["deqreg12"]
    assert reasons["affine"] is None and reasons["deqreg"] is None


@pytest.mark.usefixtures("no_figures")
def test_methods_without_training_take_the_size_of_the_reference(
    arguments: dict[str, Any], write_checkpoint: Writer, tmp_path: Path
) -> None:
    write_checkpoint("deqreg", tmp_path, record={"spatial_size": [16, 32]})
    # trained by a configuration of one's own, without an overlay
    (tmp_path / "deqreg").rename(tmp_path / "mine")
    table = compare(results_dir=tmp_path, methods=["affine", "mine"], reference="mine", **arguments)
    summary = json.loads(next((tmp_path / "affine").rglob("evaluation_summary.json")).read_text())
    assert summary["spatial_size"] == [16, 32]
    assert table.to_frame()["failure"].isna().all() and table.to_frame()["title"].to_list() == ["Affine", "DEQReg"]


@pytest.mark.usefixtures("no_figures")
def test_lung_pairs_inside_the_mask(nlst: Path, lung_cohort: Path, tmp_path: Path) -> None:
    lungs = {"dataset_dir": str(lung_cohort)}
    metrics = ["tre", "dice", "folded_percent", "std_log_jacobian"]
    table = compare(nlst, tmp_path, "affine", (), lungs, "affine", metrics, cost_rounds=0)  # type: ignore[arg-type]
    (row,) = table.to_frame().to_dict("records")
    summary = json.loads(next((tmp_path / "affine").rglob("evaluation_summary.json")).read_text())
    before = summary["summary"]["tre_before"]
    assert row["tre_mean"] == pytest.approx(before["mean"]) and row["tre_pairs"] == before["pairs"] == 2
    text = (tmp_path / "comparison.md").read_text()
    assert "TRE (mm)" in text and "jacobian: inside the fixed scan's lung mask" in text and "whole grid." not in text


@pytest.mark.parametrize(
    "given, message",
    [
        ({"methods": ["deqreg", "syn"]}, "no overlay for .'syn'."),
        ({"methods": ["affine"]}, "reference must be one of"),
        ({"methods": []}, "methods must be"),
        ({"methods": ["deqreg", "deqreg"]}, "each once"),
        ({"methods": "deqreg", "cost_rounds": -1}, "cost_rounds must be"),
        ({"methods": "deqreg", "metrics": "dise"}, "dise"),
        ({"methods": "deqreg", "overrides": {"solver_step": 3}}, r"'solver_step'.*is it solver_steps"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str, oasis: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare(oasis, tmp_path, **given)


def test_the_papers_methods_are_in_the_bundles(oasis: Path, nlst: Path) -> None:
    for bundle in (oasis, nlst):
        assert set(study.METHODS) <= {path.stem for path in (bundle / "methods").glob("*.json")}


def test_absent_overlay_of_the_data_set(oasis: Path, tmp_path: Path) -> None:
    method = BundleMethod("deqreg", oasis, tmp_path, ["absent.json"])
    with pytest.raises(FileNotFoundError, match="absent.json"):
        method.files("evaluate")
