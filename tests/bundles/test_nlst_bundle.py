# SPDX-License-Identifier: Apache-2.0
"""The NLST bundle, run by ``python -m monai.bundle``."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy.ndimage import map_coordinates
from shell import (
    BUNDLES,
    as_before,
    assert_equal,
    configs,
    error_of,
    output_of,
    parse,
    run_bundle,
    run_parsed,
    workflow,
)

from monai_deq.transforms import load_learn2reg_ddf

# smaller than the scans along two axes: all is judged at their full size
TINY: dict[str, Any] = {
    "max_epochs": 1,
    "pairs_per_epoch": 4,
    "max_steps": 2,
    "val_steps": 3,
    "spatial_size": [16, 16, 16],
    "lr_decay_power": 0.0,
    "pooled": "true",
    "rest#pool_slots": 2,
}
TEST_CASES = ("0004", "0005")


def bundle(run_id: str, name: str, folder: Path, **overrides: object) -> str:
    return output_of(run_bundle(run_id, configs("nlst", name), folder, **overrides))


def complain(message: str, run_id: str, name: str, folder: Path, **overrides: object) -> None:
    error = error_of(run_bundle(run_id, configs("nlst", name), folder, **overrides))
    assert re.search(message, error), error[-4000:]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation_summary.json").read_text())


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "models" / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, lung_cohort: Path) -> Path:
    """Stopped after the first of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    stopped = {**TINY, "max_epochs": 2, "train#trainer#max_epochs": 1}
    bundle("training", "train", folder, dataset_dir=lung_cohort, bundle_root=folder, **stopped)
    return folder


@pytest.fixture
def broken(tmp_path: Path, lung_cohort: Path) -> Path:
    return Path(shutil.copytree(lung_cohort, tmp_path / "broken"))


def test_resumed_training_keeps_the_weights_of_the_lowest_error(
    lung_cohort: Path, trained: Path, tmp_path: Path
) -> None:
    common = {"dataset_dir": lung_cohort, **TINY, "max_epochs": 2}
    out = bundle("training", "train", tmp_path, bundle_root="whole", **common)
    errors = [float(value) for value in re.findall(r"Metrics -- .*val_tre: ([\d.]+)", out)]
    assert len(errors) == 2 and errors[0] != errors[1]
    record = json.loads((tmp_path / "whole" / "models" / "model.json").read_text())
    best = 1 + errors.index(min(errors))
    assert record["training"] == {
        "smoothness_weight": 0.125,
        "keypoint_weight": 0.0,
        "learning_rate": 0.0015,
        "training_pairs": 4 * best,
        "epoch": best,
    }
    assert record["spatial_size"] == [16, 16, 16]
    scan = nib.load(next((lung_cohort / "imagesTr").iterdir()))
    axes = "".join(nib.aff2axcodes(scan.affine))
    assert record["preprocessing"] == {"window": [-1200.0, 400.0], "orientation": axes}
    assert record["network"]["rest"]["pool_slots"] == 2

    shutil.copytree(trained / "models", tmp_path / "parts" / "models")
    complain("--resume true", "training", "train", tmp_path, bundle_root="parts", **common)
    bundle("training", "train", tmp_path, bundle_root="parts", resume="true", **common)
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert_equal(parts, whole)
    assert parts["training"]["best_metric"] == pytest.approx(min(errors), abs=1e-3)
    assert (whole["pool"]["tickets"] >= 0).all() and whole["pool"]["states"].abs().max() > 0


def test_the_submission_has_the_scores_of_the_evaluation(lung_cohort: Path, trained: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": lung_cohort, "bundle_root": trained}
    out = bundle("evaluating", "evaluate", tmp_path, output_dir="eval", **common)
    bundle("inference", "inference", tmp_path, output_dir="out", submission_dir="submission", **common)
    summary = summary_of(tmp_path / "eval")
    with (tmp_path / "eval" / "evaluation_pairs.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert {p.name for p in (tmp_path / "submission").iterdir()} == {f"disp_{n}_{n}.nii.gz" for n in TEST_CASES}
    columns = {"tre_before", "tre", "tre_p95", "tre_learn2reg", "dice", "folded_percent", "std_log_jacobian"}
    columns |= {"sdlogj_learn2reg", "sdlogj_learn2reg_grid", "steps", "evaluations", "residual", "verdict"}
    assert columns <= set(rows[0]) and {r["steps"] for r in rows} == {"3"}
    for case, row in zip(TEST_CASES, rows, strict=True):
        names = [f"NLST_{case}_{i:04d}" for i in range(2)]
        assert [row["fixed"], row["moving"]] == names
        fixed = nib.load(lung_cohort / "imagesTs" / f"{names[0]}.nii.gz")
        spacing = fixed.header.get_zooms()
        points = [np.loadtxt(lung_cohort / "keypointsTs" / f"{name}.csv", delimiter=",") for name in names]
        masks = [np.asarray(nib.load(lung_cohort / "masksTs" / f"{name}.nii.gz").dataobj) for name in names]
        file = nib.load(tmp_path / "submission" / f"disp_{case}_{case}.nii.gz")
        assert file.shape == (*fixed.shape, 3) and file.get_data_dtype() == np.float32
        field = load_learn2reg_ddf(tmp_path / "submission", *names).numpy().astype(np.float64)
        np.testing.assert_array_equal(np.moveaxis(field, 0, -1), np.asarray(file.dataobj))
        for order, column in ((1, "tre"), (3, "tre_learn2reg")):
            moved = [
                map_coordinates(u, points[0].T, order=order, mode="nearest" if order == 1 else "constant")
                for u in field
            ]
            errors = np.linalg.norm((points[0] + np.stack(moved, axis=1) - points[1]) * spacing, axis=1)
            assert float(row[column]) == pytest.approx(errors.mean(), abs=1e-4)
            if column == "tre":
                assert float(row["tre_p95"]) == pytest.approx(np.percentile(errors, 95), abs=1e-4)
        before = np.linalg.norm((points[0] - points[1]) * spacing, axis=1).mean()
        assert float(row["tre_before"]) == pytest.approx(before, abs=1e-4) and abs(before - float(row["tre"])) > 1e-3
        # inside the lungs of the fixed scan, and everywhere
        jacobian = np.stack([np.stack(np.gradient(u), axis=-1) for u in field], axis=-2) + np.eye(3)
        log = np.log(np.linalg.det(jacobian) + 3)[2:-2, 2:-2, 2:-2]
        assert float(row["sdlogj_learn2reg_grid"]) == pytest.approx(log.std(), rel=1e-3)
        inside = masks[0][2:-2, 2:-2, 2:-2] > 0
        assert float(row["sdlogj_learn2reg"]) == pytest.approx(log[inside].std(), rel=1e-3)
        assert abs(log.std() - log[inside].std()) > 1e-5
        # the lung mask of the moving scan, warped, is what inference wrote
        warped = nib.load(tmp_path / "out" / f"{names[1]}_to_{names[0]}_warped_label.nii.gz").get_fdata()
        dice = 2 * (warped * masks[0]).sum() / (warped.sum() + masks[0].sum())
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-6)
    values = [float(row["tre"]) for row in rows]
    assert summary["summary"]["tre"]["mean"] == pytest.approx(np.mean(values))
    assert summary["summary"]["tre"]["p70"] == pytest.approx(np.percentile(values, 70))
    assert "synthetic sample" in summary["data_set"] and summary["window"] == [-1200.0, 400.0] and "p70" in out
    order = sorted(rows, key=lambda row: float(row["tre"]))
    assert [picture["fixed"] for picture in summary["pictures"]] == [row["fixed"] for row in order]
    assert all((tmp_path / "eval" / picture["file"]).stat().st_size > 20_000 for picture in summary["pictures"])
    # neither of the three is written over, and that is said before any pair is registered
    complain("exists already", "evaluating", "evaluate", tmp_path, output_dir="eval", **common)
    complain("exists already", "inference", "inference", tmp_path, output_dir="out", **common)
    other = {"output_dir": "other", "submission_dir": "submission"}
    complain("disp_0004_0004.nii.gz exists already", "inference", "inference", tmp_path, **other, **common)
    assert not (tmp_path / "other").exists()


def test_two_scans_without_anything_else(lung_cohort: Path, trained: Path, tmp_path: Path) -> None:
    fixed, moving = (lung_cohort / "imagesTr" / f"NLST_0001_{i:04d}.nii.gz" for i in range(2))
    pair = {"fixed": fixed, "moving": moving, "bundle_root": trained}
    bundle("run", "inference", tmp_path, output_dir="out", **pair)
    name = "NLST_0001_0001_to_NLST_0001_0000"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"{name}_{end}" for end in ("warped.nii.gz", "transform.nii.gz", "ddf.nii.gz", "record.json")
    }
    warped, field = (np.asarray(nib.load(tmp_path / "out" / f"{name}_{n}.nii.gz").dataobj) for n in ("warped", "ddf"))
    grid = np.stack(np.meshgrid(*map(np.arange, warped.shape), indexing="ij"))
    hounsfield = nib.load(moving).get_fdata()
    expected = map_coordinates(hounsfield, grid + np.moveaxis(field, -1, 0), order=1, mode="nearest")
    assert np.abs(warped - expected).max() < 0.05 and np.abs(field).max() > 1e-3
    # a Learn2Reg name is needed for a submission, and that is said at once
    scan = shutil.copy(moving, tmp_path / "scan.nii.gz")
    other = {**pair, "moving": scan, "submission_dir": "submission", "output_dir": "other"}
    complain("no name of a Learn2Reg scan", "run", "inference", tmp_path, **other)
    # another window, another field
    bundle("run", "inference", tmp_path, output_dir="soft", window=[-200.0, 300.0], **pair)
    assert not np.array_equal(field, np.asarray(nib.load(tmp_path / "soft" / f"{name}_ddf.nii.gz").dataobj))


def test_supervision(lung_cohort: Path, tmp_path: Path) -> None:
    settings = {**TINY, "dataset_dir": str(lung_cohort), "bundle_root": str(tmp_path), "overwrite": True}

    def loss(**overrides: object) -> tuple[float, list[str]]:
        parser = run_parsed("training", configs("nlst", "train"), **{**settings, **overrides, "learning_rate": 0.0})
        trainer = parser.get_parsed_content("train#trainer")
        return trainer.state.metrics["train_loss"], parser.get_parsed_content("target_keys")

    plain, _ = loss()
    for overrides in (
        {"masked_similarity": "false"},
        {"keypoint_weight": 0.5, "batch_size": 2},  # pairs differ in the number of keypoints
        {"masked_similarity": "false", "keypoint_weight": 0.5, "smoothness_weight": 0.0, "rest#pool_renewal": 1.0},
    ):
        value, target = loss(**overrides)
        assert np.isfinite(value) and abs(value - plain) > 1e-3
        assert ("fixed_mask" in target) == (overrides.get("masked_similarity") != "false")
        assert ("moving_keypoints" in target) == ("keypoint_weight" in overrides)


def test_keypoints_outside_are_for_the_loss_too() -> None:
    for outside in ("refuse", "clamp"):
        settings = {"found": SimpleNamespace(is_sample=True), "keypoint_weight": 0.5, "keypoints_outside": outside}
        loss = parse(configs("nlst", "train"), **settings).get_parsed_content("loss")
        assert loss.loss.term.outside == outside


def remove(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names:
            (root / name).unlink()

    return change


def points(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        values = np.loadtxt(root / name, delimiter=",")
        np.savetxt(root / name, edit(values), delimiter=",")

    return change


def other_mask(root: Path) -> None:
    file = root / "masksTr" / "NLST_0003_0000.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((20, 16, 23), np.uint8), np.eye(4)), file)


def unknown_list(root: Path) -> None:
    content = json.loads((root / "NLST_dataset.json").read_text())
    content["registration_validation"] = content.pop("registration_val")
    (root / "NLST_dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "message, change, overrides",
    [
        ("NLST_0001_0001.nii.gz", remove("imagesTr/NLST_0001_0001.nii.gz"), {}),
        ("NLST_0003_0001.csv", remove("keypointsTr/NLST_0003_0001.csv"), {}),
        ("correspond line by line", points("keypointsTr/NLST_0003_0000.csv", lambda p: p[1:]), {}),
        ("lie outside the image", points("keypointsTr/NLST_0003_0000.csv", lambda p: p + 9.0), {}),
        ("image and its segmentation must share one voxel grid, but their size differs", other_mask, {}),
        (r"unknown list\(s\) \['registration_validation'\]", unknown_list, {}),
        ("need more cases than the 5", None, {"split_sizes": [170, 10, 30]}),
        ("validation part has no pairs", None, {"split_lists": {"training": [1], "test": [2]}}),
        ("masked_similarity must be true or false, got 'maybe'", None, {"masked_similarity": "maybe"}),
        ("weight must not be negative", None, {"keypoint_weight": -1.0}),
        ("window must be its lower and its upper end", None, {"window": [400, -1200]}),
        ("does not exist", None, {"dataset_dir": "nowhere"}),
    ],
)
def test_bad_input_of_training(
    message: str, change: Callable[[Path], None] | None, overrides: dict[str, Any], broken: Path, tmp_path: Path
) -> None:
    if change is not None:
        change(broken)
    settings = {**TINY, "dataset_dir": broken, "bundle_root": "run", **overrides}
    complain(message, "training", "train", tmp_path, **settings)
    assert not list(tmp_path.rglob("*.pt"))


def test_pairs_without_masks_or_keypoints(broken: Path, trained: Path, tmp_path: Path) -> None:
    for folder in ("masksTs", "keypointsTs"):
        shutil.rmtree(broken / folder)
    common = {"dataset_dir": broken, "bundle_root": trained, "output_dir": "out"}
    message = "test part needs 'fixed_mask', but 2 of its 2 pairs have none"
    complain(message, "evaluating", "evaluate", tmp_path, **common)
    bundle("inference", "inference", tmp_path, **common)
    assert len(list((tmp_path / "out").glob("*_warped.nii.gz"))) == 2


@pytest.mark.parametrize("run_id, name", [("evaluating", "evaluate"), ("inference", "inference")])
def test_a_damaged_pair_does_not_stop_the_other(
    run_id: str, name: str, broken: Path, trained: Path, tmp_path: Path
) -> None:
    scan = broken / "imagesTs" / "NLST_0004_0000.nii.gz"
    whole = scan.read_bytes()
    scan.write_bytes(whole[:-50])
    given = {"dataset_dir": broken, "bundle_root": trained, "output_dir": "out", "on_error": "skip"}
    given |= {"submission_dir": "submission"} if name == "inference" else {}
    result = run_bundle(run_id, configs("nlst", name), tmp_path, **given)
    assert result.returncode == 1 and "1 of 2 pairs failed" in result.stdout
    assert f"  NLST_0004_0001 to NLST_0004_0000: RuntimeError: 'fixed': cannot read '{scan}'" in result.stdout
    scan.write_bytes(whole)
    if name == "inference":  # a pair is done with all that is asked for
        (tmp_path / "submission" / "disp_0005_0005.nii.gz").unlink()
        assert "already" not in bundle(run_id, name, tmp_path, **given, resume="true")
    else:
        assert "1 of 2 pairs are there already" in bundle(run_id, name, tmp_path, **given, resume="true")
    changed = {"output_dir": "once", **({"submission_dir": "submission_once"} if name == "inference" else {})}
    bundle(run_id, name, tmp_path, **{**given, **changed})
    for one, two in (("out", "once"), ("submission", "submission_once"))[: len(changed)]:
        made = sorted(p.name for p in (tmp_path / one).iterdir())
        assert made == sorted(p.name for p in (tmp_path / two).iterdir())
        assert all((tmp_path / one / n).read_bytes() == (tmp_path / two / n).read_bytes() for n in made)
    scan.write_bytes(b"none")
    (broken / "imagesTs" / "NLST_0005_0001.nii.gz").write_bytes(b"none")
    given |= dict.fromkeys(changed, "no")
    message = (
        "all 2 pairs failed, the first one was NLST_0004_0001 to NLST_0004_0000: RuntimeError: 'fixed': cannot read"
    )
    complain(message, run_id, name, tmp_path, **given)
    assert not (tmp_path / "no").exists()


def test_what_the_bundles_share_is_the_same() -> None:
    ours, theirs = (BUNDLES / name for name in ("nlst", "oasis"))
    shared = [f"methods/{p.name}" for p in (theirs / "methods").glob("*.json")]
    assert {p.name for p in (ours / "methods").glob("*.json")} == {Path(name).name for name in shared}
    # lungs want another weight
    shared = [name for name in shared if "energy" not in name]
    shared += [p.name for p in theirs.glob("multi_gpu_*.json")]
    for name in (*shared, "LICENSE", "logging.conf"):
        assert (ours / name).read_text() == (theirs / name).read_text(), name
    own = {
        "train": {"task", "window", "keypoints_outside", "masked_similarity", "masked", "keypoint_weight", "cases"},
        "evaluate": {"task", "window", "keypoints_outside", "cases", "part", "pair_metrics", "grid_regularity"},
        "inference": {"task", "window"},
    }
    own["train"].add("target_keys")
    gone = {
        "train": {"label_set", "label_weight", "label_key", "subjects"},
        "evaluate": {"label_set", "subjects", "label_metrics"},
    }
    for name in own:
        a, b = (ConfigParser.load_config_file(str(root / f"{name}.json")) for root in (ours, theirs))
        assert set(a) - set(b) == own[name] and set(b) - set(a) == gone.get(name, set())
        for part in ("network_def", "update", "network", "solver", "gradient", "inferer", "optimizer", "lr_scheduler"):
            assert a.get(part) == b.get(part), (name, part)
        for part in ("trained", "pool", "ema", "initialize", "run"):
            assert a.get(part) == b.get(part), (name, part)


@pytest.mark.parametrize("name, workflow_type", [("train", "train"), ("evaluate", "infer"), ("inference", "infer")])
def test_properties_of_the_bundle_specification(
    name: str, workflow_type: str, lung_cohort: Path, trained: Path
) -> None:
    with as_before():
        settings = {"dataset_dir": lung_cohort, "bundle_root": trained}
        created = workflow(configs("nlst", name), workflow_type, **settings)
        created.initialize()
        assert created.check_properties() == []
        assert created.network_def is not None
        created.finalize()
