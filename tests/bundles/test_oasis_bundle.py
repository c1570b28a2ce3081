# SPDX-License-Identifier: Apache-2.0
"""The OASIS bundle, run the way a user runs it: by ``python -m monai.bundle``, from another folder."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from html_pages import Page
from scipy.ndimage import map_coordinates
from shell import as_before, assert_equal, configs, error_of, output_of, run_bundle, run_bundle_in_shell, workflow

import monai_deq.evaluation

# a tiny network and schedule; every one of them is a plain override of the bundle's settings
TINY = {
    "max_epochs": 1,
    "pairs_per_epoch": 2,
    "max_steps": 3,
    "num_states": 1,
    "val_steps": 3,
    "split_sizes": "[3,2,2]",
}
IMAGES = {2: ("slice_norm.nii.gz", "slice_seg24.nii.gz"), 3: ("aligned_norm.nii.gz", "aligned_seg35.nii.gz")}


def files(name: str, spatial_dims: int, *overlays: str) -> list[str]:
    return configs("oasis", name, *(["slices.json"] if spatial_dims == 2 else []), *overlays)


def bundle(run_id: str, name: str, spatial_dims: int, folder: Path, shell: bool = False, **overrides: object) -> str:
    run = run_bundle_in_shell if shell else run_bundle
    return output_of(run(run_id, files(name, spatial_dims), folder, **overrides))


def fail(message: str, run_id: str, name: str, spatial_dims: int, folder: Path, **overrides: object) -> None:
    error = error_of(run_bundle(run_id, files(name, spatial_dims), folder, **overrides))
    assert message in error, error[-4000:]


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "models" / "last.pt", weights_only=True)


def losses(out: str) -> list[str]:
    return re.findall(r"train_loss: (\S+)", out)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, brain_cohort: Path) -> dict[int, tuple[Path, str]]:
    """One for slices, one for volumes, with what was printed."""
    done = {}
    for dims in (2, 3):
        folder = tmp_path_factory.mktemp(f"trained{dims}")
        settings = {"dataset_dir": brain_cohort, "bundle_root": folder, **TINY}
        done[dims] = folder, bundle("training", "train", dims, folder, **settings)
    return done


@pytest.fixture(params=[2, 3])
def trained(request: pytest.FixtureRequest, trainings: dict[int, tuple[Path, str]]) -> tuple[int, Path]:
    return request.param, trainings[request.param][0]


def test_training_writes_checkpoints_and_logs(trained: tuple[int, Path]) -> None:
    spatial_dims, folder = trained
    assert {p.name for p in (folder / "models").iterdir()} == {"last.pt", "model.pt", "model.json"}
    assert list((folder / "eval").glob("events.out.tfevents.*"))
    record = json.loads((folder / "models" / "model.json").read_text())
    assert set(record) == {"network", "method", "spatial_size", "steps", "preprocessing", "training"}
    network = record["network"]
    assert network["_target_"] == "monai_deq.networks.nets.DEQRegistrationNet" and network["coarse"] is None
    assert network["update"]["spatial_dims"] == spatial_dims
    assert network["solver"]["max_steps"] == 3 and network["gradient"]["num_states"] == 1
    assert (record["method"], record["steps"], record["spatial_size"]) == ("DEQReg", 3, None)
    assert len(record["preprocessing"]["orientation"]) == spatial_dims
    assert record["training"] == {
        "smoothness_weight": 1.0 if spatial_dims == 2 else 0.1,
        "learning_rate": 0.0005 if spatial_dims == 2 else 0.0015,
        "label_weight": 0.0,
        "training_pairs": 2,
        "epoch": 1,
    }
    checkpoint = last(folder)
    objects = {"optimizer", "lr_scheduler", "loss", "pool", "pool_draws"}
    assert set(checkpoint) == {"network", "averaged", *objects, "training", "scaler"}
    assert checkpoint["training"]["epoch"] == 1 and checkpoint["training"]["pairs"] == 2


def test_evaluation_files_agree_with_each_other(trained: tuple[int, Path], brain_cohort: Path, tmp_path: Path) -> None:
    spatial_dims, folder = trained
    common = {"dataset_dir": brain_cohort, "bundle_root": folder, "output_dir": "out", "split_sizes": "[3,2,2]"}
    settings = {**common, "solver_steps": 2, "batch_size": 2}
    out = bundle("evaluating", "evaluate", spatial_dims, tmp_path, spatial_dims == 2, **settings)
    assert "dice_before" in out and "folded_percent" in out and "residual" in out
    summary = json.loads((tmp_path / "out" / "evaluation_summary.json").read_text())
    with (tmp_path / "out" / "evaluation_pairs.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert summary["label_set"] == "all" and len(summary["labels"]) == (24 if spatial_dims == 2 else 35)
    subjects = [f"OASIS_OAS1_900{n}_MR1" for n in (6, 7)]
    assert [[r["fixed"], r["moving"]] for r in rows] == [subjects, subjects[::-1]]
    for name in ("dice", "dice_before", "hd", "hd95", "folded_percent", "std_log_jacobian", "sdlogj_learn2reg"):
        values = [float(r[name]) for r in rows]
        assert summary["summary"][name]["mean"] == pytest.approx(np.mean(values))
        assert summary["summary"][name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert {r["steps"] for r in rows} == {"2"}
    # before registration, counted here from the files
    labels = [np.asarray(nib.load(brain_cohort / s / IMAGES[spatial_dims][1]).dataobj) for s in subjects]
    both = [n for n in np.unique(labels[0]) if n and n in labels[1]]
    dice = [2 * ((labels[0] == n) & (labels[1] == n)).sum() / sum((x == n).sum() for x in labels) for n in both]
    assert float(rows[0]["dice_before"]) == pytest.approx(np.mean(dice), abs=1e-6)
    # and after, with the very command refused to overwrite it
    fail("exists already and is not overwritten", "run", "evaluate", spatial_dims, tmp_path, **common)
    # the better and the worse of the two pairs
    order = sorted(rows, key=lambda row: -float(row["dice"]))
    names = [f"evaluation_{kind}_1.png" for kind in ("best", "worst")]
    found = [{"fixed": r["fixed"], "moving": r["moving"], "file": n} for r, n in zip(order, names, strict=True)]
    assert summary["pictures"] == found
    monai_deq.evaluation.write_evaluation_report(tmp_path / "report.html", tmp_path / "out" / "evaluation_summary.json")
    page = Page(tmp_path / "report.html")
    assert page.check_alone() == 3 and {"Best pairs", "Worst pairs"} <= set(page.headings())
    # the scores do not depend on them
    settings.update(output_dir="plain", pictures=0)
    bundle("evaluating", "evaluate", spatial_dims, tmp_path, **settings)
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {"evaluation_pairs.csv", "evaluation_summary.json"}
    names = [f"{folder}/evaluation_pairs.csv" for folder in ("out", "plain")]
    assert len({(tmp_path / name).read_text() for name in names}) == 1


def test_inference_of_two_scans(trained: tuple[int, Path], brain_cohort: Path, tmp_path: Path) -> None:
    spatial_dims, folder = trained
    image, label = IMAGES[spatial_dims]
    fixed, moving = brain_cohort / "OASIS_OAS1_9006_MR1", brain_cohort / "OASIS_OAS1_9007_MR1"
    arguments = {
        "fixed": fixed / image,
        "moving": moving / image,
        "moving_label": moving / label,
        "bundle_root": folder,
        "output_dir": tmp_path / "out",
        "solver_steps": 3,
        "finish_steps": 0,
    }
    bundle("inference", "inference", spatial_dims, tmp_path, spatial_dims == 3, **arguments)
    stem = image.removesuffix(".nii.gz")
    name = f"{moving.name}_{stem}_to_{fixed.name}_{stem}_"
    written = {p.name.removeprefix(name) for p in (tmp_path / "out").iterdir()}
    assert written == {"warped.nii.gz", "transform.nii.gz", "ddf.nii.gz", "warped_label.nii.gz", "record.json"}
    fixed_nii, moving_nii = (nib.load(d / image) for d in (fixed, moving))
    warped, ddf = (nib.load(tmp_path / "out" / f"{name}{n}.nii.gz") for n in ("warped", "ddf"))
    assert warped.shape == fixed_nii.shape and ddf.shape == (*fixed_nii.shape, spatial_dims)
    assert np.allclose(warped.affine, fixed_nii.affine) and np.allclose(ddf.affine, fixed_nii.affine)
    # the field, applied by another library, gives the warped scan
    field = np.asarray(ddf.dataobj, dtype=np.float64)
    moving_array = np.asarray(moving_nii.dataobj, dtype=np.float64)
    if spatial_dims == 2:
        field, moving_array = field[:, :, 0], moving_array[:, :, 0]
    coordinates = np.stack(np.meshgrid(*map(np.arange, moving_array.shape), indexing="ij")) + np.moveaxis(field, -1, 0)
    expected = map_coordinates(moving_array, coordinates, order=1, mode="nearest")
    assert np.abs(np.squeeze(np.asarray(warped.dataobj)) - expected).max() < 1e-4
    record = json.loads((tmp_path / "out" / f"{name}record.json").read_text())
    assert record["steps"] == 3 and (record["reason"], record["verdict"]) == ("step limit", "step limit")
    # three steps and one from there are four
    start = tmp_path / "out" / f"{name}ddf.nii.gz"
    warm = {**arguments, "initial_ddf": start, "solver_steps": 1, "output_dir": "warm"}
    bundle("inference", "inference", spatial_dims, tmp_path, **warm)
    examined = {**arguments, "solver_steps": 4, "output_dir": "four"}
    settings = "{'spectral_iterations': 3, 'random_starts': 1}"
    bundle("inference", "inference", spatial_dims, tmp_path, **examined, certificate=settings)
    fields = [np.asarray(nib.load(tmp_path / d / f"{name}ddf.nii.gz").dataobj) for d in ("warm", "four", "out")]
    np.testing.assert_allclose(fields[0], fields[1], atol=1e-5)
    assert np.abs(fields[0] - fields[2]).max() > 1e-3
    record = json.loads((tmp_path / "four" / f"{name}record.json").read_text())
    assert record["spectral_radius"] > 0 and record["start_distance"] > 0 and "finish_steps" not in record
    # stored with other axes the network sees the scans as in its training
    back = np.array([[1, -1], [0, -1], [2, 1]])
    turned = {key: tmp_path / f"turned_{key}.nii.gz" for key in ("fixed", "moving")}
    for key, file in turned.items():
        nib.save(nib.load(arguments[key]).as_reoriented(back), file)
    given = {**arguments, **turned, "output_dir": "turned"}
    del given["moving_label"]
    bundle("inference", "inference", spatial_dims, tmp_path, **given)
    again = nib.load(tmp_path / "turned" / "turned_moving_to_turned_fixed_warped.nii.gz").as_reoriented(back)
    np.testing.assert_allclose(again.get_fdata(), warped.get_fdata(), atol=1e-3)
    # by default the energy goes on from there, and the record has both
    del arguments["finish_steps"]
    bundle("inference", "inference", spatial_dims, tmp_path, **{**arguments, "output_dir": "finished"})
    record = json.loads((tmp_path / "finished" / f"{name}record.json").read_text())
    assert (record["steps"], record["finish_steps"]) == (3, 40) and record["energy"] < record["energy_before_finish"]


def test_inference_over_a_list(trained: tuple[int, Path], brain_cohort: Path, tmp_path: Path) -> None:
    spatial_dims, folder = trained
    scans = [str(brain_cohort / f"OASIS_OAS1_900{n}_MR1" / IMAGES[spatial_dims][0]) for n in (1, 2, 3)]
    settings = {"pairs": "pairs.json", "bundle_root": folder, "output_dir": "out"}
    if spatial_dims == 3:  # scans named as in Learn2Reg OASIS
        scans = [str(shutil.copy(scan, tmp_path / f"OASIS_000{i}_0000.nii.gz")) for i, scan in enumerate(scans, 1)]
        settings["submission_dir"] = "submission"
    pairs = [{"fixed": scans[0], "moving": scans[1]}, {"fixed": scans[1], "moving": scans[2]}]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    bundle("run", "inference", spatial_dims, tmp_path, **settings)
    assert len(list((tmp_path / "out").glob("*_warped.nii.gz"))) == 2
    if spatial_dims == 3:
        for i in (1, 2):
            moving, fixed = f"OASIS_000{i + 1}_0000", f"OASIS_000{i}_0000"
            written = nib.load(tmp_path / "submission" / f"disp_000{i}_0000_000{i + 1}_0000.nii.gz")
            field = nib.load(tmp_path / "out" / f"{moving}_to_{fixed}_ddf.nii.gz")
            np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(field.dataobj))


@pytest.mark.parametrize("run_id, name", [("evaluating", "evaluate"), ("inference", "inference")])
def test_damaged_scans_do_not_stop_the_others(
    run_id: str, name: str, trained: tuple[int, Path], brain_cohort: Path, tmp_path: Path
) -> None:
    spatial_dims, folder = trained
    broken = shutil.copytree(brain_cohort, tmp_path / "broken")
    scan = broken / "OASIS_OAS1_9004_MR1" / IMAGES[spatial_dims][0]
    whole = scan.read_bytes()
    scan.write_bytes(whole[:-50])
    common = {"bundle_root": folder, "split_sizes": "[1,1,5]", "solver_steps": 2, "finish_steps": 0}
    given = {**common, "dataset_dir": broken, "output_dir": "out"}
    command = files(name, spatial_dims)
    assert f"cannot read '{scan}'" in error_of(run_bundle(run_id, command, tmp_path, **given))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    run = run_bundle_in_shell if spatial_dims == 2 else run_bundle
    result = run(run_id, command, tmp_path, **given, on_error="skip", num_workers=2)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith("Error: 2 of 5 pairs failed, see above; the others are done.\n")
    pairs = [f"OASIS_OAS1_900{m}_MR1 to OASIS_OAS1_900{f}_MR1" for f, m in ((3, 4), (4, 5))]
    log, listed = result.stdout.split("2 of 5 pairs failed; the same with --resume true does these alone:\n")
    for pair, line in zip(pairs, listed.splitlines(), strict=True):
        assert line.startswith(f"  {pair}: RuntimeError: ") and f"cannot read '{scan}'" in line
        assert f"pair failed: {line.strip()}" in log
    if name == "evaluate":
        summary = json.loads((tmp_path / "out" / "evaluation_summary.json").read_text())
        assert [f"{pair['moving']} to {pair['fixed']}" for pair in summary["failed"]] == pairs
        frame = monai_deq.evaluation.read_pair_results(tmp_path / "out" / "evaluation_pairs.csv")
        assert frame["dice"].isna().tolist() == [True, True, False, False, False]
        assert summary["num_pairs"] == 3 and summary["summary"]["dice"]["mean"] == pytest.approx(frame["dice"].mean())
    else:
        assert len(list((tmp_path / "out").glob("*_record.json"))) == 3
    # as if it had been whole from the beginning
    scan.write_bytes(whole)
    other = error_of(run_bundle(run_id, command, tmp_path, **{**given, "solver_steps": 1}, resume="true"))
    assert "was made with other settings, inferer.changes.max_steps 2 (now 1)" in other
    assert "3 of 5 pairs are there already" in bundle(run_id, name, spatial_dims, tmp_path, **given, resume="true")
    bundle(run_id, name, spatial_dims, tmp_path, **{**given, "output_dir": "once"})
    made = {p.name for p in (tmp_path / "once").iterdir()}
    assert made == {p.name for p in (tmp_path / "out").iterdir()}
    for file in made:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file
    assert "5 of 5 pairs are there already" in bundle(run_id, name, spatial_dims, tmp_path, **given, resume="true")


def test_training_is_reproducible(trainings: dict[int, tuple[Path, str]], brain_cohort: Path, tmp_path: Path) -> None:
    folder, out = trainings[3]
    again = bundle("training", "train", 3, tmp_path, dataset_dir=brain_cohort, bundle_root=tmp_path, **TINY)
    assert losses(again) and losses(again) == losses(out)
    assert_equal(last(tmp_path), last(folder))


def test_resumed_training_is_the_same_as_an_uninterrupted_one(
    trainings: dict[int, tuple[Path, str]], brain_cohort: Path, tmp_path: Path
) -> None:
    settings = {**TINY, "dataset_dir": brain_cohort, "max_epochs": 2}
    bundle("run", "train", 2, tmp_path, bundle_root="whole", **settings)
    # the schedule is that of two epochs in both
    bundle("run", "train", 2, tmp_path, bundle_root="parts", **settings, **{"train#trainer#max_epochs": 1})
    fail("--resume true", "training", "train", 2, tmp_path, bundle_root="parts", **settings)
    bundle("run", "train", 2, tmp_path, True, bundle_root="parts", resume="true", **settings)
    assert_equal(last(tmp_path / "parts"), last(tmp_path / "whole"))
    records = [(tmp_path / name / "models" / "model.json").read_text() for name in ("parts", "whole")]
    assert records[0] == records[1]
    # with a schedule of another length it is not resumed
    shorter = {**TINY, "dataset_dir": brain_cohort, "bundle_root": trainings[2][0], "max_epochs": 2, "resume": "true"}
    fail("its schedule has ended", "training", "train", 2, tmp_path, **shorter)


@pytest.mark.parametrize(
    "message, overrides",
    [
        ("does not exist", {"dataset_dir": "nowhere"}),
        ("No OASIS data set", {"dataset_dir": "."}),
        ("unknown solver 'newton'", {"solver#name": "newton"}),
        ("need more subjects than the 7", {"split_sizes": "[300,30,84]"}),
        ("checkpointed must be true or false, got 'maybe'", {"checkpointed": "maybe"}),
        ("pooled must be true or false, got 'maybe'", {"pooled": "maybe"}),
        ("has no setting max_epoch (is it max_epochs?)", {"max_epoch": 2}),
        ("has no setting pool_starts", {"pool_starts": 2}),
        ("unexpected keyword argument 'relaxatio'", {"rest#relaxatio": 0.3}),
        # the sample trains without what makes an iteration come to rest
        ("relaxation 0.25 does nothing unless rest is enabled", {"rest#relaxation": 0.25}),
    ],
)
def test_bad_settings_of_training(message: str, overrides: dict[str, str], brain_cohort: Path, tmp_path: Path) -> None:
    fail(message, "training", "train", 2, tmp_path, **{**TINY, "dataset_dir": brain_cohort, **overrides})
    assert not list(tmp_path.rglob("*.pt"))


def test_bad_scans_and_checkpoints_of_inference(trained: tuple[int, Path], brain_cohort: Path, tmp_path: Path) -> None:
    spatial_dims, folder = trained
    good = brain_cohort / "OASIS_OAS1_9001_MR1" / IMAGES[spatial_dims][0]
    truncated = tmp_path / "truncated.nii.gz"
    truncated.write_bytes(good.read_bytes()[:-200])
    for message, arguments in {
        "truncated.nii.gz": {"moving": truncated},
        "does not exist": {"moving": "nowhere.nii.gz"},
        "no checkpoint at": {"moving": good, "ckpt_path": "nowhere.pt"},
        "both --fixed and --moving": {"initial_ddf": good},
    }.items():
        settings = {"fixed": good, "bundle_root": folder, "output_dir": "o", **arguments}
        fail(message, "run", "inference", spatial_dims, tmp_path, **settings)
    # weights without their record, or with another one
    weights = tmp_path / "model.pt"
    shutil.copy(folder / "models" / "model.pt", weights)
    settings = {"fixed": good, "moving": good, "ckpt_path": weights, "output_dir": "o"}
    fail("no record at", "run", "inference", spatial_dims, tmp_path, **settings)
    record = json.loads((folder / "models" / "model.json").read_text())
    record["network"]["update"]["backbone"]["final_channels"] = [16]
    (tmp_path / "model.json").write_text(json.dumps(record))
    fail("another architecture", "run", "inference", spatial_dims, tmp_path, **settings)
    # the network of the other number of dimensions
    other = brain_cohort / "OASIS_OAS1_9001_MR1" / IMAGES[5 - spatial_dims][0]
    settings = {"fixed": other, "moving": other, "bundle_root": folder, "output_dir": "o"}
    fail(f"is of a {spatial_dims}-D network", "run", "inference", 5 - spatial_dims, tmp_path, **settings)
    settings = {"dataset_dir": brain_cohort, "split_sizes": "[3,2,2]", "bundle_root": folder, "output_dir": "o"}
    fail(f"is of a {spatial_dims}-D network", "run", "evaluate", 5 - spatial_dims, tmp_path, **settings)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name, workflow_type", [("train", "train"), ("evaluate", "infer"), ("inference", "infer")])
def test_properties_of_the_bundle_specification(
    name: str, workflow_type: str, trained: tuple[int, Path], brain_cohort: Path
) -> None:
    spatial_dims, folder = trained
    settings = {"dataset_dir": brain_cohort, "bundle_root": folder, "split_sizes": [3, 2, 2]}
    with as_before():
        created = workflow(files(name, spatial_dims), workflow_type, **settings)
        created.initialize()
        assert created.check_properties() == []
        assert created.network_def is not None
        created.finalize()
