# SPDX-License-Identifier: Apache-2.0
"""What is written of a registered pair, against SimpleITK's resampling of the files by the transform in its file."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scans import bent, blobs, grid, parts, world, write

from monai_deq.apps import RegistrationSettings, register_pairs

SHAPE = (26, 24, 22)
QUICK: dict[str, Any] = {"steps": (5, 5), "device": "cpu"}

#: shape and affine of the fixed scan, and of the moving one
GRIDS: dict[str, tuple[tuple[int, ...], np.ndarray, tuple[int, ...], np.ndarray]] = {
    "identity": (SHAPE, np.eye(4), SHAPE, np.eye(4)),
    "las": (SHAPE, grid(SHAPE, axes="LAS"), SHAPE, grid(SHAPE, axes="LAS")),
    "lps": (SHAPE, grid(SHAPE, axes="LPS"), SHAPE, grid(SHAPE, axes="LPS")),
    "lia": (SHAPE, grid(SHAPE, axes="LIA"), SHAPE, grid(SHAPE, axes="LIA")),
    "permuted": (SHAPE, grid(SHAPE, (1, 1.2, 0.9), "SRA"), SHAPE, grid(SHAPE, (1, 1.2, 0.9), "SRA")),
    "oblique": (SHAPE, grid(SHAPE, turn=(20, -15, 30)), SHAPE, grid(SHAPE, turn=(20, -15, 30))),
    "thick": ((26, 24, 9), grid((26, 24, 9), (1, 1, 3)), (26, 24, 9), grid((26, 24, 9), (1, 1, 3))),
    "other": (SHAPE, grid(SHAPE, axes="LPS"), (18, 30, 25), grid((18, 30, 25), (1.5, 0.8, 1.1), "ARS")),
    "oblique moving": (
        SHAPE,
        grid(SHAPE, (1, 1.1, 1.3), "LPI"),
        (24, 20, 27),
        grid((24, 20, 27), (1.2, 1.3, 1.0), "PSR", (12, -25, 8), (1, -2, 1.5)),
    ),
    "thick moving": (SHAPE, grid(SHAPE), (25, 27, 9), grid((25, 27, 9), (1, 1, 3), "LAS", (0, 9, 0))),
}


def at_origin(points: np.ndarray) -> np.ndarray:
    """The blobs for a grid whose affine is the identity."""
    return blobs(points - [12.5, 11.5, 10.5])


def pair(folder: Path, name: str, **more: Any) -> tuple[Path, Path]:
    shape, affine, moving_shape, moving_affine = GRIDS[name]
    of = at_origin if name == "identity" else blobs
    fixed = write(folder / "fixed.nii.gz", affine, shape, of)
    return fixed, write(folder / "moving.nii.gz", moving_affine, moving_shape, lambda p: of(bent(p)))


def read_transform(path: str | Path) -> sitk.Transform:
    if str(path).endswith((".h5", ".tfm")):
        return sitk.ReadTransform(str(path))
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


def resampled(fixed: Path, moving: Path, transform: str | Path, nearest: bool = False) -> np.ndarray:
    """The moving file on the grid of the fixed file by SimpleITK."""
    kind = sitk.sitkInt32 if nearest else sitk.sitkFloat64
    onto, image = sitk.ReadImage(str(fixed)), sitk.ReadImage(str(moving), kind)
    outside = 0.0 if nearest else float(sitk.GetArrayFromImage(image).min())
    how = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    return sitk.GetArrayFromImage(sitk.Resample(image, onto, read_transform(transform), how, outside, kind))


def assert_contract(fixed: Path, moving: Path, files: dict[str, str], moved: float = 1.0) -> None:
    """The transform, applied by SimpleITK to the moving file, gives what was written, on the grid of the fixed one."""
    ours = sitk.ReadImage(files["warped"], sitk.sitkFloat64)
    onto = sitk.ReadImage(str(fixed))
    assert ours.GetSize() == onto.GetSize()
    for of in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(ours, of)(), getattr(onto, of)(), atol=1e-4, err_msg=of)
    values, expected = sitk.GetArrayFromImage(ours), resampled(fixed, moving, files["transform"])
    extent = np.ptp(expected)
    assert extent > 20  # there is something to see
    np.testing.assert_allclose(values, expected, atol=1e-4 * extent)
    # and something was moved
    still = sitk.Resample(sitk.ReadImage(str(moving), sitk.sitkFloat64), onto, sitk.Transform(onto.GetDimension(), 1))
    assert np.abs(sitk.GetArrayFromImage(still) - values).max() > moved


@pytest.mark.parametrize("name", GRIDS)
def test_transform_in_the_hands_of_simpleitk(name, tmp_path):
    fixed, moving = pair(tmp_path, name)
    [result] = register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", RegistrationSettings(**QUICK))
    assert_contract(fixed, moving, result["files"])
    assert result["summary"]["similarity_after"] > result["summary"]["similarity_before"]


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".h5", ".nii"])
def test_every_format_of_the_transform(ending, tmp_path):
    fixed, moving = pair(tmp_path, "oblique moving")
    settings = RegistrationSettings(**QUICK, transform_format=ending)
    [result] = register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", settings)
    assert result["files"]["transform"].endswith(f"_transform{ending}")
    assert_contract(fixed, moving, result["files"])


def test_cropped_moving_scan_with_the_right_header(tmp_path):
    shape, affine = (30, 28, 26), grid((30, 28, 26), axes="LPS", turn=(5, 8, -6))
    fixed = write(tmp_path / "fixed.nii.gz", affine, shape)
    whole = write(tmp_path / "whole.nii.gz", affine, shape, lambda p: blobs(bent(p)))
    cropped = tmp_path / "cropped.nii.gz"
    nib.save(nib.load(whole).slicer[12:], cropped)
    results = register_pairs(
        [{"fixed": fixed, "moving": m} for m in (whole, cropped)], tmp_path / "out", RegistrationSettings(**QUICK)
    )
    assert_contract(fixed, cropped, results[1]["files"])
    # where it has something to say it lies where the whole one lies, not twelve voxels beside
    a, b = (nib.load(r["files"]["warped"]).get_fdata()[16:] for r in results)
    assert np.abs(a - b).mean() < 0.05 * np.ptp(a)


PLANES = {
    "axial": grid((30, 26), (1, 1.2, 1), "LP"),
    "coronal": grid((30, 26), (1, 1.2, 1), "LI"),
    "sagittal": grid((30, 26), (1, 1, 1), "PS"),
    "oblique": grid((30, 26), (1, 1, 1), "RA", (25, 10, -20)),
}


def slice_affine(affine: np.ndarray) -> np.ndarray:
    """With the third column of a slice, at right angles to the plane."""
    full = affine.copy()
    full[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) / np.linalg.norm(np.cross(affine[:3, 0], affine[:3, 1]))
    return full


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".h5"])
@pytest.mark.parametrize("name", PLANES)
def test_slices_with_a_third_axis(name, ending, tmp_path):
    affine = slice_affine(PLANES[name])
    fixed = write(tmp_path / "fixed.nii.gz", affine, (30, 26, 1))
    other = affine @ np.diag([1.1, 0.95, 1.0, 1.0])
    moving = write(tmp_path / "moving.nii.gz", other, (28, 27, 1), lambda p: blobs(bent(p)))
    settings = RegistrationSettings(**QUICK, transform_format=ending)
    [result] = register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", settings)
    assert nib.load(result["files"]["warped"]).shape == (30, 26, 1)
    assert_contract(fixed, moving, result["files"])


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".h5"])
@pytest.mark.parametrize("name", ["axial", "oblique"])
def test_slices_in_two_parallel_planes(name, ending, tmp_path):
    affine = slice_affine(PLANES[name])
    away = affine.copy()
    away[:3, 3] += 7.3 * affine[:3, 2] + [0.4, 0.3, 0.0]
    fixed = write(tmp_path / "fixed.nii.gz", affine, (30, 26, 1))
    # as if it were a slice of the same place: the content of the fixed plane, bent
    moving = write(
        tmp_path / "moving.nii.gz", away, (30, 26, 1), lambda p: blobs(bent(p - 7.3 * affine[:3, 2] - [0.4, 0.3, 0]))
    )
    settings = RegistrationSettings(**QUICK, transform_format=ending)
    [result] = register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", settings)
    assert_contract(fixed, moving, result["files"])
    assert result["summary"]["overlap"] > 0.8


def test_slices_that_are_not_parallel_are_refused(tmp_path):
    fixed = write(tmp_path / "fixed.nii.gz", slice_affine(PLANES["axial"]), (30, 26, 1))
    moving = write(tmp_path / "moving.nii.gz", slice_affine(PLANES["coronal"]), (30, 26, 1))
    with pytest.raises(ValueError, match="fixed.nii.gz.*moving.nii.gz.*not parallel"):
        register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", RegistrationSettings(**QUICK))


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd", ".h5"])
def test_files_of_two_axes(ending, tmp_path):
    affine = grid((30, 26), (1, 1.2, 1), "LP")
    affine[2, 2] = 1.0
    fixed = write(tmp_path / "fixed.nii.gz", affine, (30, 26))
    shifted = affine.copy()
    shifted[:2, 3] += [1.3, -0.8]
    moving = write(tmp_path / "moving.nii.gz", shifted, (28, 27), lambda p: blobs(bent(p)))
    assert sitk.ReadImage(str(fixed)).GetDimension() == 2
    settings = RegistrationSettings(**QUICK, transform_format=ending)
    [result] = register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", settings)
    assert nib.load(result["files"]["warped"]).shape == (30, 26)
    if ending == ".nii.gz":
        assert nib.load(result["files"]["transform"]).shape == (30, 26, 1, 1, 2)
    assert read_transform(result["files"]["transform"]).GetDimension() == 2
    assert_contract(fixed, moving, result["files"])


def rigid_lps(angle: float = 0.15, shift: tuple[float, ...] = (6.0, -4.0, 3.0)) -> sitk.AffineTransform:
    affine = sitk.AffineTransform(3)
    turn = sitk.Euler3DTransform((1.0, 2.0, -1.0), angle, -0.1, 0.2, shift)
    affine.SetMatrix(turn.GetMatrix())
    affine.SetCenter(turn.GetCenter())
    affine.SetTranslation(turn.GetTranslation())
    return affine


def through(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """RAS points through a transform of ITK."""
    flip = np.array([-1, -1, 1.0])
    moved = [transform.TransformPoint((p * flip).tolist()) for p in points.reshape(-1, 3)]
    return np.reshape(moved, points.shape) * flip


def displaced_pair(folder: Path, transform: sitk.Transform) -> tuple[Path, Path]:
    """A pair in which a fixed point is found, bent, where the transform leads, on another grid."""
    fixed = write(folder / "fixed.nii.gz", grid(SHAPE, (1.1, 1.0, 1.2), "LPS"), SHAPE)
    back = transform.GetInverse()
    moving = grid((30, 28, 26), (1.0, 1.1, 1.2), "SAR", (4, -6, 5), (-6, 4, 3))
    return fixed, write(folder / "moving.nii.gz", moving, (30, 28, 26), lambda p: blobs(bent(through(back, p))))


def test_affine_in_a_file_comes_first(tmp_path):
    known = rigid_lps()
    fixed, moving = displaced_pair(tmp_path, known)
    sitk.WriteTransform(known, str(tmp_path / "known.tfm"))
    item = {"fixed": fixed, "moving": moving, "initial_transform": tmp_path / "known.tfm"}
    [result] = register_pairs([item], tmp_path / "out", RegistrationSettings(**QUICK))
    assert_contract(fixed, moving, result["files"])
    written = sitk.ReadTransform(result["files"]["affine"])
    for point in ((0.0, 0.0, 0.0), (10.0, -7.0, 5.0)):
        np.testing.assert_allclose(written.TransformPoint(point), known.TransformPoint(point), atol=1e-6)
    summary = result["summary"]
    assert summary["overlap"] > 0.8 and summary["similarity_after"] > 0.9 > summary["similarity_before"]
    # before: where the files place the scans, with no transform
    [plain] = register_pairs([{**item, "initial_transform": None}], tmp_path / "plain", RegistrationSettings(**QUICK))
    assert summary["similarity_before"] == pytest.approx(plain["summary"]["similarity_before"])


def test_field_and_affine_in_files_come_first(tmp_path):
    known = rigid_lps()
    fixed, moving = displaced_pair(tmp_path, known)
    field = sitk.TransformToDisplacementField(
        sitk.TranslationTransform(3, (1.0, 0.5, -0.5)), sitk.sitkVectorFloat64, (16, 16, 16), (-24, -24, -24), (3, 3, 3)
    )
    sitk.WriteImage(field, str(tmp_path / "field.nrrd"))
    sitk.WriteTransform(known, str(tmp_path / "known.mat"))
    files = [tmp_path / "field.nrrd", tmp_path / "known.mat"]
    item = {"fixed": fixed, "moving": moving, "initial_transform": files}
    [result] = register_pairs([item], tmp_path / "out", RegistrationSettings(**QUICK))
    assert_contract(fixed, moving, result["files"])
    assert "affine" not in result["files"]


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_alignment_comes_first(kind, tmp_path):
    known = rigid_lps()
    fixed, moving = displaced_pair(tmp_path, known)
    settings = RegistrationSettings(**QUICK, affine=kind)
    [result] = register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", settings)
    assert_contract(fixed, moving, result["files"])
    assert result["summary"]["overlap"] > 0.8
    found = sitk.ReadTransform(result["files"]["affine"])
    for point in ((0.0, 0.0, 0.0), (10.0, -7.0, 5.0)):
        np.testing.assert_allclose(found.TransformPoint(point), known.TransformPoint(point), atol=2.0)


def test_alignment_of_slices_in_two_planes(tmp_path):
    affine = slice_affine(PLANES["coronal"])
    away = affine.copy()
    away[:3, 3] += 5.0 * affine[:3, 2] + [3.0, 0.0, -4.0]

    def of(points: np.ndarray) -> np.ndarray:
        back = points - 5.0 * affine[:3, 2]
        turn = np.array([[np.cos(0.2), 0, -np.sin(0.2)], [0, 1, 0], [np.sin(0.2), 0, np.cos(0.2)]])
        return blobs(back @ turn.T + [3.0, 0.0, 2.0])

    fixed = write(tmp_path / "fixed.nii.gz", affine, (30, 26, 1))
    moving = write(tmp_path / "moving.nii.gz", away, (30, 26, 1), of)
    settings = RegistrationSettings(**QUICK, affine="rigid")
    [result] = register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", settings)
    assert_contract(fixed, moving, result["files"])
    assert result["summary"]["similarity_after"] > 0.8


@pytest.mark.parametrize("name", ["identity", "oblique moving"])
def test_labels_are_those_of_the_nearest_voxel(name, tmp_path):
    fixed, moving = pair(tmp_path, name)
    shape, affine, moving_shape, moving_affine = GRIDS[name]
    away = np.array([12.5, 11.5, 10.5]) if name == "identity" else 0.0
    labels = [
        write(tmp_path / "fixed_seg.nii.gz", affine, shape, lambda p: parts(p - away), np.int32),
        write(tmp_path / "moving_seg.nii.gz", moving_affine, moving_shape, lambda p: parts(bent(p) - away), np.int32),
    ]
    item = {"fixed": fixed, "moving": moving, "fixed_label": labels[0], "moving_label": labels[1]}
    [result] = register_pairs([item], tmp_path / "out", RegistrationSettings(**QUICK))
    ours = sitk.GetArrayFromImage(sitk.ReadImage(result["files"]["label"]))
    expected = resampled(fixed, labels[1], result["files"]["transform"], nearest=True)
    assert ours.dtype.kind in "iu" and len(np.unique(expected)) > 5
    assert (ours != expected).mean() < 1e-3  # voxels of which two are nearest
    mine = sitk.GetArrayFromImage(sitk.ReadImage(str(labels[0])))
    dice = [
        2 * ((expected == k) & (mine == k)).sum() / ((expected == k).sum() + (mine == k).sum()) for k in range(1, 10)
    ]
    assert result["summary"]["dice_after"] == pytest.approx(float(np.mean(dice)), abs=0.01)
    assert result["summary"]["dice_after"] > result["summary"]["dice_before"]


def test_labels_on_another_grid_are_taken_by_their_header(tmp_path, caplog):
    fixed, moving = pair(tmp_path, "las")
    finer = grid((36, 32, 30), (0.7, 0.7, 0.7), "RAS")
    seg = write(tmp_path / "fixed_seg.nii.gz", finer, (36, 32, 30), parts, np.int16)
    moved = write(tmp_path / "moving_seg.nii.gz", GRIDS["las"][1], SHAPE, lambda p: parts(bent(p)), np.int16)
    item = {"fixed": fixed, "moving": moving, "fixed_label": seg, "moving_label": moved}
    with caplog.at_level(logging.INFO, logger="monai_deq"):
        [result] = register_pairs([item], tmp_path / "out", RegistrationSettings(**QUICK))
    assert "fixed_seg.nii.gz: resampled onto the grid" in caplog.text
    assert result["summary"]["dice_after"] > 0.7
    far = grid(SHAPE, centre=(60, 0, 0))
    item["fixed_label"] = write(tmp_path / "far.nii.gz", far, SHAPE, lambda p: parts(p - [60, 0, 0]), np.int16)
    with pytest.raises(ValueError, match="far.nii.gz: .* lie outside of the image .*fixed.nii.gz"):
        register_pairs([item], tmp_path / "far", RegistrationSettings(**QUICK))


def test_landmarks_in_world_coordinates(tmp_path):
    fixed, moving = pair(tmp_path, "oblique moving")
    rng = np.random.default_rng(0)
    source = rng.uniform(-6, 6, (20, 3))  # in the moving scan; bent, they are the same place in the fixed one
    for name, points in (("fixed", bent(source)), ("moving", source)):
        text = "\n".join(",".join(f"{v:.6f}" for v in p) for p in points * [-1, -1, 1])
        (tmp_path / f"{name}.csv").write_text(f"x,y,z\n{text}\n")
    item = {"fixed": fixed, "moving": moving}
    item |= {f"{k}_keypoints": tmp_path / f"{k}.csv" for k in ("fixed", "moving")}
    [result] = register_pairs([item], tmp_path / "out", RegistrationSettings(**QUICK))
    before = np.linalg.norm(bent(source) - source, axis=1).mean()
    assert result["summary"]["tre_before"] == pytest.approx(before, rel=1e-3)
    field = read_transform(result["files"]["transform"])
    after = np.linalg.norm(through(field, bent(source)) - source, axis=1).mean()
    assert result["summary"]["tre_after"] == pytest.approx(after, rel=1e-2)
    assert after < before


def test_field_in_voxels_and_record(tmp_path):
    fixed, moving = pair(tmp_path, "other")
    settings = RegistrationSettings(**QUICK, save_ddf=True)
    [result] = register_pairs([{"fixed": fixed, "moving": moving, "name": "a b"}], tmp_path / "out", settings)
    assert {Path(f).name for f in result["files"].values()} == {
        f"a b_{end}" for end in ("warped.nii.gz", "transform.nii.gz", "ddf.nii.gz", "record.json")
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        Path(f).name for f in result["files"].values()
    )
    ddf, vectors = (nib.load(result["files"][k]) for k in ("ddf", "transform"))
    assert ddf.shape == (*SHAPE, 3) and vectors.shape == (*SHAPE, 1, 3)
    affine = nib.load(fixed).affine
    lps = np.diag([-1, -1, 1]) @ affine[:3, :3]
    np.testing.assert_allclose(ddf.get_fdata() @ lps.T, vectors.get_fdata()[:, :, :, 0], atol=1e-4)
    record = json.loads(Path(result["files"]["record"]).read_text())
    assert record["summary"] == pytest.approx(result["summary"]) and record["steps"] == 5
    assert set(record["intensities"]) == {"fixed", "moving"}


def energy_field(folder: Path, fixed: Path, moving: Path, name: str) -> np.ndarray:
    settings = RegistrationSettings(**QUICK)
    [result] = register_pairs([{"fixed": fixed, "moving": moving, "name": name}], folder, settings)
    return np.asarray(nib.load(result["files"]["transform"]).dataobj)


@pytest.mark.parametrize("what", ["hot", "negative", "units", "offset"])
def test_field_whatever_the_units_and_with_a_hot_voxel(what, tmp_path):
    fixed, moving = pair(tmp_path, "las")
    expected = energy_field(tmp_path / "out", fixed, moving, "expected")
    image = nib.load(moving)
    array = image.get_fdata().astype(np.float32)
    if what in ("hot", "negative"):
        array[3, 3, 3] = {"hot": 3e5, "negative": -3e5}[what]
    else:
        array = array * 500 - {"units": 0, "offset": 90000}[what]
    nib.save(nib.Nifti1Image(array, image.affine), moving)
    found = energy_field(tmp_path / "out", fixed, moving, what)
    assert np.abs(expected).max() > 0.8
    apart = np.abs(found - expected)
    if what in ("hot", "negative"):  # away from the voxel itself
        apart = apart[9:, 9:, 9:]
    assert apart.mean() < 0.005 and apart.max() < 0.12


def test_what_cannot_be_registered_is_said_before_any_work(tmp_path, monkeypatch):
    fixed, moving = pair(tmp_path, "las")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no pair"):
        register_pairs([], out)
    for wrong, words in (
        ({"preset": "liver"}, "brain, lung.*'liver'"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"weights": "w.pt", "steps": (1, 2)}, "one step limit"),
    ):
        with pytest.raises(ValueError, match=words):
            RegistrationSettings(**wrong)
    with pytest.raises(ValueError, match="rigid.*similarity"):
        register_pairs([{"fixed": fixed, "moving": moving}], out, RegistrationSettings(affine="similarity"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=".zip"):
        register_pairs([{"fixed": fixed, "moving": moving}], out, RegistrationSettings(transform_format=".zip"))
    with pytest.raises(FileNotFoundError, match="absent.nii.gz"):
        register_pairs([{"fixed": fixed, "moving": tmp_path / "absent.nii.gz"}], out)
    assert not out.exists()


def refuse_to_solve(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("it was solved")


@pytest.mark.parametrize("there", ["_warped.nii.gz", "_transform.nii.gz", "_record.json", "_report.html"])
def test_existing_results_are_found_before_any_work(there, tmp_path, monkeypatch):
    fixed, moving = pair(tmp_path, "las")
    others = [write(tmp_path / f"m{i}.nii.gz", GRIDS["las"][1], SHAPE) for i in range(2)]
    pairs = [{"fixed": fixed, "moving": scan} for scan in (moving, *others)]
    out = tmp_path / "out"
    out.mkdir()
    (out / f"m1_to_fixed{there}").write_text("mine")
    settings = RegistrationSettings(**QUICK, report=True)
    monkeypatch.setattr("monai_deq.apps.registration.FixedPointSolverd.__call__", refuse_to_solve)
    with pytest.raises(FileExistsError, match=f"m1_to_fixed{there}"):
        register_pairs(pairs, out, settings)
    assert (out / f"m1_to_fixed{there}").read_text() == "mine" and len(list(out.iterdir())) == 1


def test_existing_affine_is_found_before_any_work(tmp_path, monkeypatch):
    fixed, moving = pair(tmp_path, "las")
    out = tmp_path / "out"
    out.mkdir()
    (out / "moving_to_fixed_affine.tfm").write_text("mine")
    monkeypatch.setattr("monai_deq.apps.registration.FixedPointSolverd.__call__", refuse_to_solve)
    with pytest.raises(FileExistsError, match="_affine.tfm"):
        settings = RegistrationSettings(**QUICK, affine="rigid")
        register_pairs([{"fixed": fixed, "moving": moving}], out, settings)


def test_folder_that_cannot_be_written_is_found_before_any_work(tmp_path, monkeypatch):
    fixed, moving = pair(tmp_path, "las")
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr("monai_deq.apps.registration.FixedPointSolverd.__call__", refuse_to_solve)
    with pytest.raises(OSError, match="cannot write to the folder .*out"):
        register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out" / "deep", RegistrationSettings(**QUICK))


def test_sheared_grid_gets_a_field_in_voxels(tmp_path, caplog):
    affine = grid(SHAPE)
    affine[0, 1] = 0.2
    fixed = write(tmp_path / "fixed.nii.gz", affine, SHAPE)
    moving = write(tmp_path / "moving.nii.gz", affine, SHAPE, lambda p: blobs(bent(p)))
    image = nib.load(fixed)
    for path in (fixed, moving):
        image = nib.Nifti1Image(np.asarray(nib.load(path).dataobj), affine)
        image.set_qform(None, 0)
        nib.save(image, path)
    [result] = register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", RegistrationSettings(**QUICK))
    assert "transform" not in result["files"] and "not at right angles" in caplog.text
    ddf = nib.load(result["files"]["ddf"]).get_fdata()
    assert ddf.shape == (*SHAPE, 3) and np.isfinite(ddf).all() and np.abs(ddf).max() > 0.5


def test_dimensions_that_do_not_fit_are_refused(tmp_path):
    fixed, _ = pair(tmp_path, "las")
    single = write(tmp_path / "single.nii.gz", slice_affine(PLANES["axial"]), (30, 26, 1))
    for a, b in ((fixed, single), (single, fixed)):
        with pytest.raises(ValueError, match="expected a [23]-D image"):
            register_pairs([{"fixed": a, "moving": b}], tmp_path / "out", RegistrationSettings(**QUICK))


def test_world_of_the_helpers():
    affine = grid((5, 6, 7), (1, 2, 3), "LIA", (10, 20, 30), (4, 5, 6))
    np.testing.assert_allclose(world(affine, (5, 6, 7))[2, 2, 3], affine[:3] @ [2, 2, 3, 1])
    assert nib.aff2axcodes(grid((5, 6, 7), axes="LIA")) == ("L", "I", "A")
    assert torch.allclose(torch.tensor(nib.affines.voxel_sizes(affine)), torch.tensor([1.0, 2.0, 3.0]).double())


@pytest.mark.parametrize(
    "missing, more, words",
    [
        (("SimpleITK",), {"affine": "rigid"}, r"affine alignment needs SimpleITK: pip install .*itk"),
        (("SimpleITK",), {"transform_format": ".mha"}, r"\.mha needs SimpleITK: pip install .*itk"),
        (("matplotlib", "matplotlib.figure"), {"report": True}, r"need matplotlib: pip install .*figures"),
    ],
)
def test_missing_extras_are_said_before_any_work(missing, more, words, tmp_path, monkeypatch):
    fixed, moving = pair(tmp_path, "identity")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=words):
        register_pairs([{"fixed": fixed, "moving": moving}], tmp_path / "out", RegistrationSettings(**QUICK, **more))
    assert not (tmp_path / "out").exists()


def test_slices_in_two_planes_need_no_extra(tmp_path, monkeypatch):
    affine = grid((26, 24), (1, 1.2, 1), "LI")
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
    away = affine.copy()
    away[:3, 3] += 7.5 * affine[:3, 2]
    for name, place in (("fixed", affine), ("moving", away)):
        values = blobs(world(affine, (26, 24)) - [0, 0, 1.0 * (name == "moving")])
        nib.save(nib.Nifti1Image(values[..., None].astype(np.float32), place), tmp_path / f"{name}.nii.gz")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    files = {name: tmp_path / f"{name}.nii.gz" for name in ("fixed", "moving")}
    (result,) = register_pairs([files], tmp_path / "out", RegistrationSettings(**QUICK))
    monkeypatch.undo()
    between = sitk.ReadTransform(result["files"]["affine"])
    shift = 7.5 * affine[:3, 2] * [-1, -1, 1]
    np.testing.assert_allclose(between.TransformPoint([1.0, 2.0, 3.0]), shift + [1, 2, 3], atol=1e-5)


def test_weights_see_the_scan_as_they_were_trained(tmp_path):
    """A pair stored in another orientation than that of the training is registered the same."""
    weights = Path(__file__).parents[2] / "bundles" / "oasis" / "models" / "slices" / "model.pt"
    affine = grid((40, 48), (1, 1, 1), "LI")
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
    warped = {}
    for name in ("trained", "turned"):
        files = {}
        for scan, of in (("fixed", blobs), ("moving", lambda p: blobs(bent(p)))):
            image = nib.Nifti1Image((of(world(affine, (40, 48))) / 300)[..., None].astype(np.float32), affine)
            if name == "turned":  # up before right, the other way round
                image = image.as_reoriented([[1, -1], [0, -1], [2, 1]])
            files[scan] = tmp_path / f"{name}_{scan}.nii.gz"
            nib.save(image, files[scan])
        settings = RegistrationSettings(weights=weights, steps=(3,), device="cpu")
        (result,) = register_pairs([{**files, "name": name}], tmp_path / "out", settings)
        image = nib.load(result["files"]["warped"])
        warped[name] = (
            image.get_fdata() if name == "trained" else image.as_reoriented([[1, -1], [0, -1], [2, 1]]).get_fdata()
        )
    np.testing.assert_allclose(warped["turned"], warped["trained"], atol=2e-4)
    before = nib.load(tmp_path / "trained_moving.nii.gz").get_fdata()
    assert np.abs(warped["trained"] - before).max() > 0.05


def test_one_bad_pair_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed, moving = pair(tmp_path, "las")
    scans = [moving]
    for name in ("b", "c"):
        scans.append(tmp_path / f"{name}.nii.gz")
        scans[-1].write_bytes(moving.read_bytes())
    scans[1].write_bytes(moving.read_bytes()[:-200])
    pairs = [{"fixed": fixed, "moving": scan} for scan in scans]
    with pytest.raises(RuntimeError, match="b.nii.gz"):
        register_pairs(pairs, tmp_path / "stopped", RegistrationSettings(**QUICK))
    results = register_pairs(pairs, tmp_path / "out", RegistrationSettings(**QUICK), on_error="skip")
    assert ["error" in result for result in results] == [False, True, False] and "b.nii.gz" in results[1]["error"]
    said = capsys.readouterr().out
    assert "1 of 3 pairs failed" in said and "b to fixed: RuntimeError: 'moving': cannot read" in said
    assert not list((tmp_path / "out").glob("b_to*")) and len(list((tmp_path / "out").glob("*_record.json"))) == 2

    # again: the missing one alone, and what has no record is not whole
    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    scans[1].write_bytes(moving.read_bytes())
    (tmp_path / "out" / "b_to_fixed_warped.nii.gz").write_bytes(b"half")
    again = register_pairs(pairs, tmp_path / "out", RegistrationSettings(**QUICK), resume=True)
    assert [result["moving_subject"] for result in again] == ["b"]
    assert {path: path.stat().st_mtime_ns for path in dates} == dates
    assert_contract(fixed, scans[1], again[0]["files"])
    with pytest.raises(ValueError, match=r"made with other settings, steps \[5, 5\] \(now \[4, 4\]"):
        register_pairs(pairs, tmp_path / "out", RegistrationSettings(steps=(4, 4), device="cpu"), resume=True)
    assert register_pairs(pairs, tmp_path / "out", RegistrationSettings(**QUICK), resume=True) == []
    lost = next((tmp_path / "out").glob("*_transform.nii.gz"))
    lost.unlink()
    assert len(register_pairs(pairs, tmp_path / "out", RegistrationSettings(**QUICK), resume=True)) == 1
    assert lost.is_file()


def test_ways_that_do_not_go(tmp_path: Path) -> None:
    fixed, moving = pair(tmp_path, "las")
    pairs = [{"fixed": fixed, "moving": moving}]
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        register_pairs(pairs, tmp_path / "out", RegistrationSettings(overwrite=True), resume=True)
    with pytest.raises(ValueError, match="on_error: expected stop or skip, got 'go on'"):
        register_pairs(pairs, tmp_path / "out", on_error="go on")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    fixed, moving = pair(tmp_path, "las")
    program = "import os, nibabel, monai_deq.cli as cli; save = nibabel.save\n"
    program += "def killed(image, path):\n    save(image, path)\n"
    program += f"    os.kill(os.getpid(), {int(number)})\nnibabel.save = killed; cli.main()"
    words = ["register", str(fixed), str(moving), "-o", str(tmp_path / "out"), "--device", "cpu", "--steps", "2,2"]
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number, done.stderr
    assert f"stopped by {number.name}: what was written before is whole; register goes on with --resume" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"affine": ""}, "affine: expected 'rigid' or 'affine', or None, got ''"),
        ({"transform_format": ""}, "transform_format: expected one of .nii, .nii.gz, .mha, .nrrd, .h5, got ''"),
        ({"transform_format": ".tfm"}, "transform_format: expected one of"),
    ],
)
def test_settings_that_are_none(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        RegistrationSettings(**changes)
