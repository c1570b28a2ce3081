# SPDX-License-Identifier: Apache-2.0
"""The NLST bundle: from the shell, as a user runs it, and in this process where only its settings matter."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from scipy.ndimage import map_coordinates
from shell import output_of, run_bundle

from monai_deq.data import write_sample_lung_cohort
from monai_deq.evaluation import METHODS
from monai_deq.transforms import load_learn2reg_ddf

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "nlst"
OASIS = BUNDLE.parent / "oasis"
# smaller than the scans along two axes: all is judged at their full size
SIZE = [16, 16, 16]
TINY = {"max_epochs": 1, "pairs_per_epoch": 4, "max_steps": 2, "val_steps": 3, "pool_slots": 2, "spatial_size": SIZE}
TINY.update(pooled=True, lr_decay_power=0.0)
# so few steps that every schedule still has its shape
STEPS = {"deqreg_pool": 2, "deqreg": 6, "deqreg12": 2, "voxelmorph": 1, "unrolling": 1, "gradirn": 1, "riir": 3}
TEST_CASES = ("0004", "0005")


def shell(run_id: str, name: str, folder: Path, **overrides: object) -> subprocess.CompletedProcess:
    return run_bundle(run_id, BUNDLE / f"{name}.json", folder, **overrides)


def succeed(*args: Any, **kwargs: Any) -> str:
    return output_of(shell(*args, **kwargs))


def here(run_id: str, name: str, method: str | None = None, **overrides: Any) -> ConfigParser:
    """Run a configuration in this process."""
    parser = ConfigParser()
    files = [BUNDLE / f"{name}.json", *([] if method is None else [BUNDLE / "methods" / f"{method}.json"])]
    parser.read_config([str(f) for f in files])
    parser.update({k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()})
    parser.get_parsed_content("initialize")
    parser.get_parsed_content(run_id)
    return parser


def complain(message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(Exception) as caught:
        here(*args, **kwargs)
    errors: list[BaseException] = []
    error: BaseException | None = caught.value
    while error is not None and error not in errors:  # MONAI's parser wraps what a component says
        errors.append(error)
        error = error.__cause__ or error.__context__
    assert any(re.search(message, str(e)) for e in errors), errors


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation_summary.json").read_text())


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_lung_cohort(tmp_path_factory.mktemp("data") / "cohort", (2, 1, 2), (20, 16, 24))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    succeed("training", "train", folder, dataset_dir=cohort, bundle_root=folder, **TINY)
    return folder


@pytest.fixture
def broken(tmp_path: Path, cohort: Path) -> Path:
    return Path(shutil.copytree(cohort, tmp_path / "broken"))


def test_resumed_training_keeps_the_weights_of_the_lowest_error(cohort: Path, trained: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": cohort, **TINY, "max_epochs": 2}
    out = succeed("training", "train", tmp_path, bundle_root=tmp_path / "whole", **common)
    errors = [float(value) for value in re.findall(r"Metrics -- .*val_tre: ([\d.]+)", out)]
    assert len(errors) == 2 and errors[0] != errors[1]
    settings = json.loads((tmp_path / "whole" / "models" / "model.json").read_text())
    assert settings["epoch"] == 1 + errors.index(min(errors))
    expected = {"spatial_size": SIZE, "window": [-1200.0, 400.0], "smoothness_weight": 0.125}
    expected.update(masked_similarity=True, keypoint_weight=0.0, pool_slots=2)
    assert {k: settings[k] for k in expected} == expected

    shutil.copytree(trained / "models", tmp_path / "parts" / "models")
    complain("--resume true", "training", "train", bundle_root=tmp_path / "parts", **common)
    here("training", "train", bundle_root=tmp_path / "parts", resume="true", **common)
    whole, parts = (torch.load(tmp_path / x / "models" / "last.pt", weights_only=True) for x in ("whole", "parts"))
    assert parts["trainer"] == whole["trainer"] and parts["best_metric"] == pytest.approx(min(errors), abs=1e-3)
    torch.testing.assert_close(parts["network"], whole["network"])
    torch.testing.assert_close(parts["pool"], whole["pool"])
    assert (whole["pool"]["tickets"] >= 0).all() and whole["pool"]["states"].abs().max() > 0


def test_the_submission_has_the_scores_of_the_evaluation(cohort: Path, trained: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": cohort, "bundle_root": trained}
    out = succeed("evaluating", "evaluate", tmp_path, output_dir=tmp_path / "eval", **common)
    succeed("inference", "inference", tmp_path, output_dir="out", submission_dir="submission", **common)
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
        fixed = nib.load(cohort / "imagesTs" / f"{names[0]}.nii.gz")
        spacing = fixed.header.get_zooms()
        points = [np.loadtxt(cohort / "keypointsTs" / f"{name}.csv", delimiter=",") for name in names]
        masks = [np.asarray(nib.load(cohort / "masksTs" / f"{name}.nii.gz").dataobj) for name in names]
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
    # neither of the three is written over, and that is said before any pair is registered
    complain("exists already", "evaluating", "evaluate", output_dir=tmp_path / "eval", **common)
    complain("exists already", "inference", "inference", output_dir=tmp_path / "out", **common)
    other = {"output_dir": tmp_path / "other", "submission_dir": tmp_path / "submission"}
    complain("disp_0004_0004.nii.gz exists already", "inference", "inference", **other, **common)
    assert not (tmp_path / "other").exists()


def test_two_scans_without_anything_else(cohort: Path, trained: Path, tmp_path: Path) -> None:
    fixed, moving = (cohort / "imagesTr" / f"NLST_0001_{i:04d}.nii.gz" for i in range(2))
    pair = {"fixed": fixed, "moving": moving, "bundle_root": trained}
    here("run", "inference", output_dir=tmp_path / "out", **pair)
    name = "NLST_0001_0001_to_NLST_0001_0000"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"{name}_{end}" for end in ("warped.nii.gz", "ddf.nii.gz", "record.json")
    }
    warped, field = (np.asarray(nib.load(tmp_path / "out" / f"{name}_{n}.nii.gz").dataobj) for n in ("warped", "ddf"))
    grid = np.stack(np.meshgrid(*map(np.arange, warped.shape), indexing="ij"))
    hounsfield = nib.load(moving).get_fdata()
    expected = map_coordinates(hounsfield, grid + np.moveaxis(field, -1, 0), order=1, mode="nearest")
    assert np.abs(warped - expected).max() < 0.05 and np.abs(field).max() > 1e-3
    # a Learn2Reg name is needed for a submission, and that is said at once
    scan = shutil.copy(moving, tmp_path / "scan.nii.gz")
    complain("no name of a Learn2Reg scan", "run", "inference", **{**pair, "moving": scan}, submission_dir=tmp_path)
    # another window, another field
    here("run", "inference", output_dir=tmp_path / "soft", window=[-200.0, 300.0], **pair)
    assert not np.array_equal(field, np.asarray(nib.load(tmp_path / "soft" / f"{name}_ddf.nii.gz").dataobj))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "elastix"])
def test_overlay_trains_and_evaluates(method: str, cohort: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": cohort, "bundle_root": tmp_path}
    title = ConfigParser.load_config_file(str(BUNDLE / "methods" / f"{method}.json"))["method"]
    if method != "affine":
        settings = {**TINY, "pairs_per_epoch": 2, "max_steps": STEPS[method]}
        del settings["val_steps"]
        here("training", "train", method, **common, **settings, **({"val_steps": 2} if method == "deqreg_pool" else {}))
        assert json.loads((tmp_path / "models" / "model.json").read_text())["method"] == title
    here("evaluating", "evaluate", method, **common, split="validation")
    summary = summary_of(tmp_path / "eval")
    assert summary["method"] == title and summary["num_pairs"] == 1
    scores = {name: value["mean"] for name, value in summary["summary"].items()}
    assert (scores["tre"] == pytest.approx(scores["tre_before"])) == (method == "affine")


@pytest.mark.parametrize(
    "overrides",
    [
        {"masked_similarity": "false"},
        {"keypoint_weight": 0.5, "batch_size": 2},  # pairs differ in the number of keypoints
        {"masked_similarity": "false", "keypoint_weight": 0.5, "smoothness_weight": 0.0, "pool_renewal": 1.0},
    ],
)
def test_supervision(overrides: dict[str, Any], cohort: Path, trained: Path, tmp_path: Path) -> None:
    settings = {**TINY, "dataset_dir": cohort, "bundle_root": tmp_path}
    plain = here("training", "train", **settings, **{**overrides, "learning_rate": 0.0}, seed=3)
    loss = here("training", "train", **{**settings, "overwrite": True}, learning_rate=0.0, seed=3)
    losses = [parser.get_parsed_content("train#trainer").state.metrics["train_loss"] for parser in (plain, loss)]
    assert np.isfinite(losses).all() and abs(losses[0] - losses[1]) > 1e-3
    target = plain.get_parsed_content("target_keys")
    assert ("fixed_mask" in target) == (overrides.get("masked_similarity") != "false")
    assert ("moving_keypoints" in target) == ("keypoint_weight" in overrides)


def test_keypoints_outside_are_for_the_loss_too() -> None:
    for outside in ("refuse", "clamp"):
        parser = ConfigParser()
        parser.read_config(str(BUNDLE / "train.json"))
        parser.update({"is_sample": True, "keypoint_weight": 0.5, "keypoints_outside": outside})
        assert parser.get_parsed_content("loss").loss.keypoint_loss.outside == outside


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
        ("must have the shape of its image", other_mask, {}),
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
    settings = {**TINY, "dataset_dir": broken, "bundle_root": tmp_path / "run"}
    complain(message, "training", "train", **{**settings, **overrides})
    assert not list(tmp_path.rglob("*.pt"))


def test_pairs_without_masks_or_keypoints(broken: Path, trained: Path, tmp_path: Path) -> None:
    for folder in ("masksTs", "keypointsTs"):
        shutil.rmtree(broken / folder)
    common = {"dataset_dir": broken, "bundle_root": trained, "output_dir": tmp_path / "out"}
    complain("test part needs 'fixed_mask', but 2 of its 2 pairs have none", "evaluating", "evaluate", **common)
    here("inference", "inference", **common)
    assert len(list((tmp_path / "out").glob("*_warped.nii.gz"))) == 2


def test_what_the_bundles_share_is_the_same() -> None:
    overlays = [f"methods/{p.name}" for p in (OASIS / "methods").glob("*.json")]
    assert {p.name for p in (BUNDLE / "methods").glob("*.json")} == {Path(name).name for name in overlays}
    for name in (*overlays, "LICENSE", "logging.conf"):
        assert (BUNDLE / name).read_text() == (OASIS / name).read_text(), name
    own = {
        "train": {"task", "window", "keypoints_outside", "masked_similarity", "keypoint_weight", "cases"},
        "evaluate": {"task", "window", "keypoints_outside", "cases"},
        "inference": {"task", "window"},
    }
    own["train"] |= {"inside_mask", "target_keys", "load_pair", "load_scans"}
    gone = {"train": {"label_set", "subjects", "load_subject"}, "evaluate": {"label_set", "subjects"}}
    for name in own:
        ours, theirs = (ConfigParser.load_config_file(str(b / f"{name}.json")) for b in (BUNDLE, OASIS))
        assert set(ours) - set(theirs) == own[name]
        assert set(theirs) - set(ours) == gone.get(name, {"is_sample"})
        for run_id in ("network_def", "update", "network", "inferer", "optimizer", "initialize", "run"):
            assert ours.get(run_id) == theirs.get(run_id), (name, run_id)


@pytest.mark.parametrize("name, workflow_type", [("train", "train"), ("evaluate", "infer"), ("inference", "infer")])
def test_properties_of_the_bundle_specification(name: str, workflow_type: str, cohort: Path, tmp_path: Path) -> None:
    workflow = ConfigWorkflow(
        config_file=str(BUNDLE / f"{name}.json"),
        workflow_type=workflow_type,
        logging_file=False,
        dataset_dir=str(cohort),
        bundle_root=str(tmp_path),
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.network_def is not None
    workflow.finalize()
