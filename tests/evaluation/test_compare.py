# SPDX-License-Identifier: Apache-2.0
"""The comparison of a bundle's methods, with tiny images and untrained weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from monai_deq.data import write_sample_cohort, write_sample_lung_cohort
from monai_deq.evaluation import METHODS, BundleMethod, compare, measure_costs, method_evaluation
from monai_deq.evaluation.method_costs import FirstPair
from monai_deq.evaluation.step_scores import score_steps

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"
SETTINGS: dict[str, Any] = {"split_sizes": [2, 1, 2], "solver_steps": 1, "max_steps": 2, "num_states": 0}
METRICS = ["dice", "folded_percent"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_cohort(
        tmp_path_factory.mktemp("data") / "cohort", 5, spatial_size_3d=(18, 16, 21), spatial_size_2d=(32, 37)
    )


def overlays(spatial_dims: int) -> list[str]:
    return ["slices.json"] if spatial_dims == 2 else []


def write_checkpoint(name: str, results: Path, spatial_dims: int = 2, seed: int = 0, **settings: Any) -> Path:
    """A checkpoint as training leaves it, of a network with its initial weights."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / f) for f in ("train.json", *overlays(spatial_dims), f"methods/{name}.json")])
    parser.update({k: v for k, v in SETTINGS.items() if k != "split_sizes"})
    torch.manual_seed(seed)
    path = results / name / "models" / "model.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)
    own = {"spatial_size": None, "val_steps": 1, "max_steps": 2, "unwarped_moving": parser["unwarped_moving"]}
    path.with_suffix(".json").write_text(json.dumps({**own, **settings}))
    return path


@pytest.mark.parametrize(
    "spatial_dims, methods", [(2, METHODS), (3, ("affine", "elastix", "riir", "gradirn", "deqreg"))]
)
def test_methods_in_one_table(spatial_dims: int, methods: tuple[str, ...], cohort: Path, tmp_path: Path) -> None:
    for method in methods:
        if method not in ("affine", "elastix", "riir"):
            write_checkpoint(method, tmp_path, spatial_dims)
    table = compare(
        BUNDLE,
        tmp_path,
        methods,
        overlays(spatial_dims),
        metrics=METRICS,
        cost_rounds=1,
        dataset_dir=str(cohort),
        **SETTINGS,
    )
    rows = {row["name"]: row for row in table.to_rows()}
    assert list(rows) == list(methods)
    # RIIR was not trained: a row with the reason; all others have scores of the two pairs
    assert "no checkpoint" in rows["riir"]["failure"] and rows["riir"]["dice_mean"] is None
    for name, row in rows.items():
        if name != "riir":
            assert row["failure"] is None and row["dice_pairs"] == 2, row
    summary = json.loads(next((tmp_path / "affine" / "comparison").rglob("evaluation_summary.json")).read_text())
    assert rows["affine"]["dice_mean"] == pytest.approx(summary["summary"]["dice_before"]["mean"])
    assert rows["affine"]["folded_percent_mean"] == 0 and not rows["affine"]["ranked"]
    assert rows["elastix"]["dice_mean"] > rows["affine"]["dice_mean"]

    # costs: numbers for what can be measured, and an unrolled network keeps more than a single step
    for name, row in rows.items():
        if name not in ("affine", "elastix", "riir"):
            assert row["parameters"] > 0 and row["training_seconds"] > 0 and row["inference_seconds"] > 0
            assert row["training_memory_mb"] >= row["saved_memory_mb"] * 0.5 > 0
            assert "CPU" in row["memory_kind"]
    assert rows["elastix"]["inference_seconds"] > 0 and rows["elastix"]["training_memory_mb"] is None
    assert {p.name for p in tmp_path.glob("comparison.*")} == {f"comparison.{s}" for s in ("md", "csv", "json", "png")}
    text = (tmp_path / "comparison.md").read_text()
    assert all(word in text for word in ("elastix", "GraDIRN", "DEQReg", "failed", "synthetic sample"))


def test_what_is_done_is_not_repeated(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    for method in ("voxelmorph", "deqreg"):
        write_checkpoint(method, results)
    evaluated = []

    class Counted(method_evaluation.ConfigWorkflow):  # type: ignore[misc,name-defined]
        def run(self) -> Any:
            evaluated.append(Path(self.parser["bundle_root"]).name)
            return super().run()

    monkeypatch.setattr(method_evaluation, "ConfigWorkflow", Counted)

    def run(folder: Path, *methods: str, **more: Any) -> dict[str, dict[str, Any]]:
        evaluated.clear()
        table = compare(
            BUNDLE,
            folder,
            methods,
            ["slices.json"],
            metrics=METRICS,
            costs=False,
            dataset_dir=str(cohort),
            **{**SETTINGS, **more},
        )
        return {row["name"]: row for row in table.to_rows()}

    first = run(results, "affine", "deqreg")
    assert evaluated == ["affine", "deqreg"]
    with pytest.raises(FileExistsError, match="comparison.md"):
        run(results, "affine", "deqreg")
    # another method joins, and the folder moves: only the new one is evaluated
    moved = results.rename(tmp_path / "moved")
    second = run(moved, "affine", "voxelmorph", "deqreg", overwrite=True)
    assert evaluated == ["voxelmorph"]
    assert all(second[n]["dice_mean"] == first[n]["dice_mean"] for n in ("affine", "deqreg"))
    # other weights, another setting: evaluated anew, and what was there stays
    kept = sorted(moved.rglob("evaluation_pairs.csv"))
    write_checkpoint("voxelmorph", moved, seed=1)
    run(moved, "affine", "voxelmorph", "deqreg", overwrite=True)
    assert evaluated == ["voxelmorph"]
    run(moved, "affine", "deqreg", overwrite=True, solver_steps=2)
    assert evaluated == ["affine", "deqreg"]
    assert set(kept) < set(moved.rglob("evaluation_pairs.csv")) and len(list(moved.rglob("evaluation_pairs.csv"))) == 6
    # half of the two files, as an evaluation that was stopped leaves them
    for path in moved.glob("affine/comparison/*/evaluation_summary.json"):
        path.unlink()
    run(moved, "affine", "deqreg", overwrite=True)
    assert evaluated == ["affine"]


def test_costs_are_kept_for_their_set_of_methods(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("deqreg", tmp_path)
    arguments: dict[str, Any] = {"overlays": ["slices.json"], "metrics": METRICS, "dataset_dir": str(cohort)}

    def cost(*methods: str) -> dict[str, Any]:
        table = compare(BUNDLE, tmp_path, methods, cost_rounds=1, overwrite=True, **arguments, **SETTINGS)
        return {row["name"]: row["inference_seconds"] for row in table.to_rows()}

    first = cost("deqreg")
    assert cost("deqreg") == first
    # side by side means in one run: a further method is not measured alone
    assert cost("affine", "deqreg")["deqreg"] != first["deqreg"]
    assert cost("deqreg") == first


def test_a_failure_is_a_row_with_its_reason(cohort: Path, tmp_path: Path) -> None:
    for method in ("voxelmorph", "riir", "deqreg"):
        write_checkpoint(method, tmp_path)
    # one network of another method, one trained at another size
    shutil.copy(tmp_path / "voxelmorph" / "models" / "model.pt", tmp_path / "riir" / "models" / "model.pt")
    write_checkpoint("voxelmorph", tmp_path, spatial_size=[16, 16])
    write_checkpoint("gradirn", tmp_path, method="Unrolling")
    write_checkpoint("deqreg12", tmp_path).write_bytes(b"no checkpoint")
    table = compare(
        BUNDLE,
        tmp_path,
        ["affine", "voxelmorph", "riir", "gradirn", "deqreg12", "deqreg"],
        ["slices.json"],
        metrics=METRICS,
        costs=False,
        dataset_dir=str(cohort),
        **SETTINGS,
    )
    rows = {row["name"]: row for row in table.to_rows()}
    assert "another architecture" in rows["riir"]["failure"]
    assert "[16, 16]" in rows["voxelmorph"]["failure"]
    assert "trained as 'Unrolling'" in rows["gradirn"]["failure"]
    assert "deqreg12" in rows["deqreg12"]["failure"] and "not a readable checkpoint" in rows["deqreg12"]["failure"]
    assert rows["affine"]["failure"] is None and rows["deqreg"]["failure"] is None


def test_methods_without_training_take_the_size_of_the_reference(cohort: Path, tmp_path: Path) -> None:
    write_checkpoint("deqreg", tmp_path, spatial_size=[16, 32])
    arguments: dict[str, Any] = {"metrics": METRICS, "costs": False, "dataset_dir": str(cohort), **SETTINGS}
    table = compare(BUNDLE, tmp_path, ["affine", "deqreg"], "slices.json", **arguments)
    summary = json.loads(next((tmp_path / "affine").rglob("evaluation_summary.json")).read_text())
    assert summary["spatial_size"] == [16, 32]
    assert all(row["failure"] is None for row in table.to_rows())


def test_lung_pairs_inside_the_mask(tmp_path: Path) -> None:
    lungs = str(write_sample_lung_cohort(tmp_path / "cohort", (2, 1, 2), (20, 16, 24)))
    metrics = ["tre", "dice", "folded_percent", "std_log_jacobian"]
    options: dict[str, Any] = {"reference": "affine", "metrics": metrics, "costs": False, "dataset_dir": lungs}
    (row,) = compare(BUNDLE.parent / "nlst", tmp_path, ["affine"], **options).to_rows()
    summary = json.loads(next((tmp_path / "affine").rglob("evaluation_summary.json")).read_text())
    before = summary["summary"]["tre_before"]
    assert row["tre_mean"] == pytest.approx(before["mean"]) and row["tre_pairs"] == before["pairs"] == 2
    text = (tmp_path / "comparison.md").read_text()
    assert "TRE (mm)" in text and "jacobian: inside the fixed scan's lung mask" in text and "whole grid." not in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"methods": ["deqreg", "syn"]}, "no overlay for .'syn'."),
        ({"methods": ["affine"]}, "reference must be one of"),
        ({"methods": []}, "methods must be"),
        ({"methods": ["deqreg", "deqreg"]}, "each once"),
        ({"methods": "deqreg", "overwrite": "maybe"}, "overwrite"),
        ({"methods": "deqreg", "costs": "maybe"}, "costs"),
        ({"methods": "deqreg", "cost_rounds": 0}, "cost_rounds must be"),
        ({"methods": "deqreg", "metrics": "dise"}, "dise"),
        ({"methods": "deqreg", "solver_step": 3}, "'solver_step'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        compare(BUNDLE, tmp_path, **arguments)


def test_absent_overlay_of_the_data_set(tmp_path: Path) -> None:
    method = BundleMethod("deqreg", BUNDLE, tmp_path, ["absent.json"])
    with pytest.raises(FileNotFoundError, match="absent.json"):
        method.files("evaluate")


def test_costs_are_those_of_the_training(tmp_path: Path, cohort: Path) -> None:
    # of the overlay's three states only one was supervised
    saved = []
    for num_states in (1, 3):
        write_checkpoint("deqreg", tmp_path / str(num_states), max_steps=4, num_states=num_states)
        method = BundleMethod(
            "deqreg",
            BUNDLE,
            tmp_path / str(num_states) / "deqreg",
            ["slices.json"],
            {"dataset_dir": str(cohort), "split_sizes": [2, 1, 2]},
        )
        saved.append(measure_costs({"deqreg": method}, rounds=1)["deqreg"]["saved_memory_mb"])
    # two phantom steps for each supervised state and the final one
    assert saved[1] / saved[0] == pytest.approx(4 / 2, rel=0.1)


def test_costs_are_those_of_a_training_with_recomputation(tmp_path: Path, cohort: Path) -> None:
    memory = {}
    for name, trained, asked in [
        ("kept", {"use_checkpoint": False}, {}),
        ("recomputed", {"use_checkpoint": True}, {}),
        ("asked for", {"use_checkpoint": False}, {"use_checkpoint": "true"}),
        ("in parts", {"use_checkpoint": True, "checkpoint_parts": 4}, {}),
    ]:
        write_checkpoint("deqreg", tmp_path / name, max_steps=2, num_states=1, **trained)
        options = {"dataset_dir": str(cohort), "split_sizes": [2, 1, 2], **asked}
        method = BundleMethod("deqreg", BUNDLE, tmp_path / name / "deqreg", ["slices.json"], options)
        memory[name] = measure_costs({"deqreg": method}, rounds=1)["deqreg"]["saved_memory_mb"]
    assert memory["asked for"] == pytest.approx(memory["recomputed"], rel=0.02)
    assert memory["in parts"] < memory["recomputed"] < 0.6 * memory["kept"]


@pytest.mark.parametrize("amp", [True, False])
def test_amp_as_text(amp: bool, tmp_path: Path, cohort: Path) -> None:
    write_checkpoint("deqreg", tmp_path)
    # as it arrives from the command line
    options = {"dataset_dir": str(cohort), "split_sizes": [2, 1, 2], "amp": str(amp).lower()}
    method = BundleMethod("deqreg", BUNDLE, tmp_path / "deqreg", ["slices.json"], options)
    assert FirstPair(method).amp is amp
    scores = score_steps(method, [1])
    if amp:
        with pytest.raises(ValueError, match="amp false"):
            next(scores)
    else:
        assert next(scores).step == 1


def test_costs_of_a_network_with_coarser_ones(tmp_path: Path, cohort: Path) -> None:
    settings = {"coarser_levels": 1, "coarse_steps": 2, "unwarped_moving": True, "contraction_weight": 0.0}
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / f) for f in ("train.json", "slices.json", "methods/deqreg_pool.json")])
    parser.update({**settings, "max_steps": 2, "is_sample": True})
    path = tmp_path / "deqreg_pool" / "models" / "model.pt"
    path.parent.mkdir(parents=True)
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps({**settings, "max_steps": 2, "val_steps": 2, "spatial_size": None}))
    options = {"dataset_dir": str(cohort), "split_sizes": [2, 1, 2]}
    method = BundleMethod("deqreg_pool", BUNDLE, tmp_path / "deqreg_pool", ["slices.json"], options)
    costs = measure_costs({"deqreg_pool": method}, rounds=1)["deqreg_pool"]
    assert all(isinstance(costs[k], float) for k in ("saved_memory_mb", "training_seconds", "inference_seconds")), costs


@pytest.mark.parametrize("keypoint_weight", [0.0, 0.1])
def test_costs_of_given_pairs(keypoint_weight: float, tmp_path: Path) -> None:
    lungs = str(write_sample_lung_cohort(tmp_path / "cohort", (2, 1, 2), (20, 16, 24)))
    bundle = BUNDLE.parent / "nlst"
    parser = ConfigParser()
    parser.read_config([str(bundle / f) for f in ("train.json", "methods/voxelmorph.json")])
    parser.update({"is_sample": True})
    path = tmp_path / "voxelmorph" / "models" / "model.pt"
    path.parent.mkdir(parents=True)
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)
    settings = {"spatial_size": [16, 12, 16], "val_steps": 1, "keypoint_weight": keypoint_weight}
    path.with_suffix(".json").write_text(json.dumps(settings))
    methods = {m: BundleMethod(m, bundle, tmp_path / m, (), {"dataset_dir": lungs}) for m in ("affine", "voxelmorph")}
    costs = measure_costs(methods, rounds=1)
    assert isinstance(costs["affine"]["inference_seconds"], float)
    names = ("saved_memory_mb", "training_seconds", "inference_seconds")
    assert all(isinstance(costs["voxelmorph"][k], float) for k in names), costs


def test_help() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "monai_deq.evaluation", "compare", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    text = result.stdout + result.stderr
    assert "RESULTS_DIR" in text and "--cost_rounds" in text and "Traceback" not in text


def test_command_line(cohort: Path, tmp_path: Path) -> None:
    write_checkpoint("deqreg", tmp_path / "results")
    command = [sys.executable, "-W", "ignore", "-m", "monai_deq.evaluation", "compare"]
    command += ["--bundle_dir", str(BUNDLE), "--results_dir", "results", "--overlays", "['slices.json']"]
    command += ["--methods", "['affine','deqreg']", "--metrics", "['dice']", "--costs", "false"]
    command += ["--dataset_dir", str(cohort), "--split_sizes", "[2,1,2]", "--solver_steps", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "| Affine |" in result.stdout and "| DEQReg |" in result.stdout
    assert (tmp_path / "results" / "comparison.png").is_file()
