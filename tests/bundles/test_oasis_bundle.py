# SPDX-License-Identifier: Apache-2.0
"""The OASIS bundle, run the way a user runs it: through ``python -m monai.bundle``, from another folder."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from scipy.ndimage import map_coordinates
from shell import output_of, run_bundle

from monai_deq.data import write_sample_cohort

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "oasis"
# a tiny network and schedule; every one of them is a plain override of the bundle's settings
TINY = {
    "max_epochs": 1,
    "pairs_per_epoch": 2,
    "max_steps": 3,
    "num_states": 1,
    "val_steps": 3,
    "split_sizes": "[3,2,2]",
}


def configs(name: str, spatial_dims: int) -> str:
    files = [BUNDLE / f"{name}.json", *([BUNDLE / "slices.json"] if spatial_dims == 2 else [])]
    return str([str(f) for f in files])


def bundle(run_id: str, name: str, spatial_dims: int, folder: Path, **overrides: object) -> subprocess.CompletedProcess:
    return run_bundle(run_id, configs(name, spatial_dims), folder, **overrides)


def succeed(*args: object, **kwargs: object) -> str:
    return output_of(bundle(*args, **kwargs))  # type: ignore[arg-type]


def fail(message: str, *args: object, **kwargs: object) -> None:
    result = bundle(*args, **kwargs)  # type: ignore[arg-type]
    assert result.returncode != 0
    assert message in result.stdout + result.stderr, result.stderr[-4000:]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_cohort(
        tmp_path_factory.mktemp("data") / "cohort", 7, spatial_size_3d=(18, 16, 21), spatial_size_2d=(32, 37)
    )


@pytest.fixture(scope="module", params=[2, 3])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp(f"trained{request.param}")
    succeed("training", "train", request.param, folder, dataset_dir=cohort, bundle_root=folder, **TINY)
    return request.param, folder


def test_training_writes_checkpoints_and_logs(trained: tuple[int, Path]) -> None:
    spatial_dims, folder = trained
    assert {p.name for p in folder.glob("models*/**/*") if p.is_file()} == {"last.pt", "model.pt", "model.json"}
    settings = json.loads(next(folder.glob("models*/**/model.json")).read_text())
    assert settings["spatial_dims"] == spatial_dims and settings["max_steps"] == 3
    assert list(folder.glob("eval*/**/events.out.tfevents.*"))


def test_evaluation_files_agree_with_each_other(trained: tuple[int, Path], cohort: Path, tmp_path: Path) -> None:
    spatial_dims, folder = trained
    out = succeed(
        "evaluating",
        "evaluate",
        spatial_dims,
        tmp_path,
        dataset_dir=cohort,
        bundle_root=folder,
        output_dir=tmp_path / "out",
        split_sizes="[3,2,2]",
        solver_steps=3,
        batch_size=2,
    )
    assert "dice_before" in out and "folded_percent" in out and "residual" in out
    summary = json.loads((tmp_path / "out" / "evaluation_summary.json").read_text())
    with (tmp_path / "out" / "evaluation_pairs.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert summary["label_set"] == "all" and len(summary["labels"]) == (24 if spatial_dims == 2 else 35)
    assert [(r["fixed"], r["moving"]) for r in rows] == [
        ("OASIS_OAS1_9006_MR1", "OASIS_OAS1_9007_MR1"),
        ("OASIS_OAS1_9007_MR1", "OASIS_OAS1_9006_MR1"),
    ]
    for name in ("dice", "dice_before", "hd", "hd95", "folded_percent", "std_log_jacobian", "sdlogj_learn2reg"):
        values = [float(r[name]) for r in rows]
        assert summary["summary"][name]["mean"] == pytest.approx(np.mean(values))
        assert summary["summary"][name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert {r["steps"] for r in rows} <= {"1", "2", "3"}
    # before registration, counted here from the files
    labels = [
        np.asarray(nib.load(cohort / s / f"{'slice_seg24' if spatial_dims == 2 else 'aligned_seg35'}.nii.gz").dataobj)
        for s in ("OASIS_OAS1_9006_MR1", "OASIS_OAS1_9007_MR1")
    ]
    both = [n for n in np.unique(labels[0]) if n and n in labels[1]]
    dice = [2 * ((labels[0] == n) & (labels[1] == n)).sum() / sum((x == n).sum() for x in labels) for n in both]
    assert float(rows[0]["dice_before"]) == pytest.approx(np.mean(dice), abs=1e-6)
    # and after, with the very command refused to overwrite it
    fail(
        "exists already and is not overwritten",
        "run",
        "evaluate",
        spatial_dims,
        tmp_path,
        dataset_dir=cohort,
        bundle_root=folder,
        output_dir=tmp_path / "out",
        split_sizes="[3,2,2]",
    )


def test_inference_of_two_scans(trained: tuple[int, Path], cohort: Path, tmp_path: Path) -> None:
    spatial_dims, folder = trained
    image, label = ("slice_norm", "slice_seg24") if spatial_dims == 2 else ("aligned_norm", "aligned_seg35")
    fixed, moving = cohort / "OASIS_OAS1_9006_MR1", cohort / "OASIS_OAS1_9007_MR1"
    arguments = {
        "fixed": fixed / f"{image}.nii.gz",
        "moving": moving / f"{image}.nii.gz",
        "moving_label": moving / f"{label}.nii.gz",
        "bundle_root": folder,
        "output_dir": tmp_path / "out",
        "solver_steps": 3,
    }
    succeed("inference", "inference", spatial_dims, tmp_path, **arguments)
    files = {
        p.name.removeprefix(f"{moving.name}_{image}_to_{fixed.name}_{image}_") for p in (tmp_path / "out").iterdir()
    }
    assert files == {"warped.nii.gz", "ddf.nii.gz", "warped_label.nii.gz", "record.json"}
    name = f"{moving.name}_{image}_to_{fixed.name}_{image}_"
    fixed_nii, moving_nii = (nib.load(d / f"{image}.nii.gz") for d in (fixed, moving))
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
    warm = {**arguments, "initial_ddf": start, "solver_steps": 1, "output_dir": tmp_path / "warm"}
    succeed("inference", "inference", spatial_dims, tmp_path, **warm)
    examined = {**arguments, "solver_steps": 4, "output_dir": tmp_path / "four"}
    settings = "{'spectral_iterations': 3, 'random_starts': 1}"
    succeed("inference", "inference", spatial_dims, tmp_path, **examined, certificate=settings)
    fields = [np.asarray(nib.load(tmp_path / d / f"{name}ddf.nii.gz").dataobj) for d in ("warm", "four", "out")]
    np.testing.assert_allclose(fields[0], fields[1], atol=1e-5)
    assert np.abs(fields[0] - fields[2]).max() > 1e-3
    record = json.loads((tmp_path / "four" / f"{name}record.json").read_text())
    assert record["spectral_radius"] > 0 and record["start_distance"] > 0


def test_inference_over_a_list(trained: tuple[int, Path], cohort: Path, tmp_path: Path) -> None:
    spatial_dims, folder = trained
    image = "slice_norm" if spatial_dims == 2 else "aligned_norm"
    scans = [str(cohort / f"OASIS_OAS1_900{n}_MR1" / f"{image}.nii.gz") for n in (1, 2, 3)]
    pairs = [{"fixed": scans[0], "moving": scans[1]}, {"fixed": scans[1], "moving": scans[2]}]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    common = {"pairs": "pairs.json", "bundle_root": folder, "output_dir": "out"}
    submission = {"submission_dir": "submission"} if spatial_dims == 3 else {}
    if submission:  # scans named as in Learn2Reg OASIS
        renamed = [shutil.copy(scan, tmp_path / f"OASIS_000{i}_0000.nii.gz") for i, scan in enumerate(scans, 1)]
        pairs = [{"fixed": str(renamed[i]), "moving": str(renamed[i + 1])} for i in range(2)]
        (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    succeed("run", "inference", spatial_dims, tmp_path, **common, **submission)
    assert len(list((tmp_path / "out").glob("*_warped.nii.gz"))) == 2
    for i in range(2 * len(submission)):
        moving, fixed = f"OASIS_000{i + 2}_0000", f"OASIS_000{i + 1}_0000"
        written = nib.load(tmp_path / "submission" / f"disp_000{i + 1}_0000_000{i + 2}_0000.nii.gz")
        field = nib.load(tmp_path / "out" / f"{moving}_to_{fixed}_ddf.nii.gz")
        np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(field.dataobj))


def test_resumed_training_is_the_same_as_an_uninterrupted_one(cohort: Path, tmp_path: Path) -> None:
    settings = {**TINY, "dataset_dir": cohort, "lr_decay_power": 0.0}
    succeed("training", "train", 2, tmp_path, **{**settings, "bundle_root": tmp_path / "a", "max_epochs": 2})
    succeed("training", "train", 2, tmp_path, **{**settings, "bundle_root": tmp_path / "b", "max_epochs": 1})
    fail("--resume true", "training", "train", 2, tmp_path, **{**settings, "bundle_root": tmp_path / "b"})
    succeed(
        "run", "train", 2, tmp_path, **{**settings, "bundle_root": tmp_path / "b", "max_epochs": 2, "resume": "true"}
    )
    states = [torch.load(next((tmp_path / x).glob("models*/**/last.pt")), weights_only=True) for x in "ab"]
    assert states[0]["trainer"] == states[1]["trainer"]
    for a, b in zip(states[0]["network"].values(), states[1]["network"].values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "message, overrides",
    [
        ("does not exist", {"dataset_dir": "nowhere"}),
        ("No OASIS data set", {"dataset_dir": "."}),
        ("unknown solver 'newton'", {"finest_network#solver": "newton", "dataset_dir": "@cohort"}),
        ("7 subjects", {"split_sizes": "[300,30,84]", "dataset_dir": "@cohort"}),
    ],
)
def test_bad_settings_of_training(message: str, overrides: dict[str, str], cohort: Path, tmp_path: Path) -> None:
    overrides = {k: str(cohort) if v == "@cohort" else v for k, v in overrides.items()}
    fail(message, "training", "train", 2, tmp_path, **{**TINY, **overrides})
    assert not list(tmp_path.rglob("*.pt"))


def test_bad_scans_and_checkpoints_of_inference(trained: tuple[int, Path], cohort: Path, tmp_path: Path) -> None:
    spatial_dims, folder = trained
    image = "slice_norm" if spatial_dims == 2 else "aligned_norm"
    good = cohort / "OASIS_OAS1_9001_MR1" / f"{image}.nii.gz"
    truncated = tmp_path / "truncated.nii.gz"
    truncated.write_bytes(good.read_bytes()[:-200])
    for message, arguments in {
        "truncated.nii.gz": {"moving": truncated},
        "does not exist": {"moving": "nowhere.nii.gz"},
        "no checkpoint at": {"moving": good, "ckpt_path": "nowhere.pt"},
    }.items():
        fail(
            message,
            "run",
            "inference",
            spatial_dims,
            tmp_path,
            fixed=good,
            bundle_root=folder,
            output_dir="o",
            **arguments,
        )
    assert not (tmp_path / "o").exists()
    fail("both --fixed and --moving", "run", "inference", spatial_dims, tmp_path, initial_ddf=good, bundle_root=folder)
    # the network of the other number of dimensions
    other = 5 - spatial_dims
    wrong = cohort / "OASIS_OAS1_9001_MR1" / f"{'slice_norm' if other == 2 else 'aligned_norm'}.nii.gz"
    checkpoint = next(folder.glob("models*/**/model.pt"))
    fail("another architecture", "run", "inference", other, tmp_path, fixed=wrong, moving=wrong, ckpt_path=checkpoint)


@pytest.mark.parametrize("name, workflow_type", [("train", "train"), ("evaluate", "infer"), ("inference", "infer")])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_properties_of_the_bundle_specification(
    name: str, workflow_type: str, spatial_dims: int, cohort: Path, tmp_path: Path
) -> None:
    files = [str(BUNDLE / f"{name}.json"), *([str(BUNDLE / "slices.json")] if spatial_dims == 2 else [])]
    workflow = ConfigWorkflow(
        config_file=files,
        workflow_type=workflow_type,
        logging_file=False,
        dataset_dir=str(cohort),
        bundle_root=str(tmp_path),
        split_sizes=[3, 2, 2],
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.network_def is not None
    workflow.finalize()


def test_tensorboard_and_losses_are_reproducible(cohort: Path, tmp_path: Path) -> None:
    outputs = []
    for run in "ab":
        folder = tmp_path / run
        out = succeed("training", "train", 3, tmp_path, **{**TINY, "dataset_dir": cohort, "bundle_root": folder})
        outputs.append([line.split("train_loss:")[1].strip() for line in out.splitlines() if "train_loss:" in line])
        assert outputs[-1]
    assert outputs[0] == outputs[1]
    states = [torch.load(tmp_path / x / "models" / "last.pt", weights_only=True)["network"] for x in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
