# SPDX-License-Identifier: Apache-2.0
"""Transforms in files applied and inverted, against SimpleITK's resampling of the same files."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from scans import bent, grid, parts, world, write

from monai_deq.apps import apply_transforms, invert_transform
from monai_deq.transforms import save_transform

FIXED = ((24, 22, 20), grid((24, 22, 20), (1.4, 1.5, 1.6), "LPS", (4, -6, 8)))
MOVING = ((26, 20, 23), grid((26, 20, 23), (1.3, 1.7, 1.5), "SAR", (-5, 3, 6), (1, -1, 0.5)))
FLIP = np.array([-1.0, -1.0, 1.0])


def field(affine: np.ndarray, shape: tuple[int, ...], size: float = 1.5, turn: float = 0.0) -> MetaTensor:
    """A smooth field in voxels behind a rotation about the origin in degrees."""
    places = world(affine, shape)
    moved = bent(places, size) @ grid((1, 1, 1), turn=(0, 0, turn))[:3, :3].T
    voxels = (moved - places) @ np.linalg.inv(affine)[:3, :3].T
    tensor = torch.from_numpy(np.moveaxis(voxels, -1, 0)[: len(shape)].astype(np.float32).copy())
    return MetaTensor(tensor, affine=torch.from_numpy(affine), spatial_ndim=len(shape))


def read(path: Path) -> sitk.Transform:
    if path.name.endswith((".h5", ".tfm")):
        return sitk.ReadTransform(str(path))
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


def affine_file(path: Path) -> Path:
    affine = grid((1, 1, 1), (1.05, 0.95, 1.0), "RAS", (4, -6, 9), (2.0, -1.7, 1.4))
    save_transform(path, affine)
    return path


def resampled(moving: Path, onto: Path, transforms: list[Path], nearest: bool = False) -> np.ndarray:
    chain = sitk.CompositeTransform(3)
    for file in reversed(transforms):  # the one that was added last takes a point first
        chain.AddTransform(read(file))
    image = sitk.ReadImage(str(moving), sitk.sitkInt32 if nearest else sitk.sitkFloat64)
    outside = 0.0 if nearest else float(sitk.GetArrayFromImage(image).min())
    how = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    return sitk.GetArrayFromImage(sitk.Resample(image, sitk.ReadImage(str(onto)), chain, how, outside)).T


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    save_transform(tmp_path / "field.nii.gz", field(FIXED[1], FIXED[0]))
    return {
        "fixed": write(tmp_path / "fixed.nii.gz", FIXED[1], FIXED[0]),
        "moving": write(tmp_path / "moving.nii.gz", MOVING[1], MOVING[0]),
        "label": write(tmp_path / "label.nii.gz", MOVING[1], MOVING[0], parts, np.int32),
        "field": tmp_path / "field.nii.gz",
        "affine": affine_file(tmp_path / "affine.tfm"),
        "out": tmp_path / "out.nii.gz",
    }


@pytest.mark.parametrize("names", [["field"], ["affine"], ["field", "affine"], ["affine", "field"]])
def test_image_and_labels(names, files):
    chain = [files[name] for name in names]
    assert apply_transforms(files["moving"], chain, files["out"], files["fixed"]) == files["out"]
    expected = resampled(files["moving"], files["fixed"], chain)
    image = nib.load(files["out"])
    np.testing.assert_allclose(image.get_fdata(), expected, atol=1e-4 * np.ptp(expected))
    np.testing.assert_allclose(image.affine, FIXED[1], atol=1e-5)
    apply_transforms(files["label"], chain, files["out"], files["fixed"], label=True, overwrite=True)
    labels = np.asarray(nib.load(files["out"]).dataobj)
    assert labels.dtype.kind in "iu"
    assert (labels != resampled(files["label"], files["fixed"], chain, nearest=True)).mean() < 1e-3


def test_without_a_reference_it_lies_on_the_grid_of_the_field(files):
    apply_transforms(files["moving"], [files["affine"], files["field"]], files["out"])
    expected = resampled(files["moving"], files["fixed"], [files["affine"], files["field"]])
    np.testing.assert_allclose(nib.load(files["out"]).get_fdata(), expected, atol=1e-4 * np.ptp(expected))
    with pytest.raises(ValueError, match="--reference"):
        apply_transforms(files["moving"], [files["affine"]], files["out"], overwrite=True)


def test_label_numbers_stay_exact(files, tmp_path):
    numbers = np.array([0, 2**24 + 1, 2**40 + 3, 2**62 + 1], dtype=np.int64)
    array = numbers[np.asarray(nib.load(files["label"]).dataobj) % 4]
    nib.save(nib.Nifti1Image(array, MOVING[1], dtype=np.int64), tmp_path / "huge.nii.gz")
    apply_transforms(tmp_path / "huge.nii.gz", [files["field"]], files["out"], label=True)
    found = np.asarray(nib.load(files["out"]).dataobj)
    assert set(np.unique(found)) == set(numbers.tolist())
    apply_transforms(files["label"], [files["field"]], tmp_path / "small.nii.gz", label=True)
    small = np.asarray(nib.load(tmp_path / "small.nii.gz").dataobj)
    assert np.array_equal(found, numbers[small % 4])
    with pytest.raises(ValueError, match="moving.nii.gz.*label numbers"):
        apply_transforms(files["moving"], [files["field"]], tmp_path / "no.nii.gz", label=True)


def test_every_volume_of_a_series(files, tmp_path):
    first = np.asarray(nib.load(files["moving"]).dataobj)
    image = nib.Nifti1Image(np.stack([first, 200 - first, first * 0 + 3 + first / 50], axis=-1), MOVING[1])
    image.header.set_zooms((*image.header.get_zooms()[:3], 2.25))
    nib.save(image, tmp_path / "time.nii.gz")
    apply_transforms(tmp_path / "time.nii.gz", [files["field"]], files["out"])
    found = nib.load(files["out"])
    assert found.shape == (*FIXED[0], 3) and found.header.get_zooms()[3] == pytest.approx(2.25)
    whole = resampled(files["moving"], files["fixed"], [files["field"]])
    inside = found.get_fdata()[..., 1] > 10
    assert inside.mean() > 0.3
    np.testing.assert_allclose(found.get_fdata()[..., 0][inside], whole[inside], atol=0.02)
    np.testing.assert_allclose(found.get_fdata()[..., 1][inside], 200 - whole[inside], atol=0.02)


def test_slices(tmp_path):
    affine = grid((24, 22), (1.4, 1.5, 1), "LI", (4, 0, 0))
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) / np.linalg.norm(np.cross(affine[:3, 0], affine[:3, 1]))
    moving = write(tmp_path / "moving.nii.gz", affine @ np.diag([1.1, 0.9, 1, 1]), (24, 26, 1))
    ddf = field(affine, (24, 22))
    for ending in (".nii.gz", ".mha", ".h5"):
        save_transform(tmp_path / f"t{ending}", ddf)
        out = apply_transforms(moving, [tmp_path / f"t{ending}"], tmp_path / f"out{ending[1:3]}.nii.gz")
        fixed = write(tmp_path / "fixed.nii.gz", affine, (24, 22, 1))
        expected = resampled(moving, fixed, [tmp_path / f"t{ending}"])
        assert nib.load(out).shape == (24, 22, 1)
        np.testing.assert_allclose(nib.load(out).get_fdata(), expected, atol=1e-4 * np.ptp(expected))
    with pytest.raises(ValueError, match="is 3-D, the grid of the result is 2-D"):
        volume = write(tmp_path / "volume.nii.gz", *reversed(MOVING))
        apply_transforms(volume, [tmp_path / "t.h5"], tmp_path / "no.nii.gz", tmp_path / "fixed.nii.gz")


def by_itk(transforms: list[Path], points: np.ndarray) -> np.ndarray:
    """LPS points through files, in order."""
    for file in transforms:
        transform = read(file)
        points = np.array([transform.TransformPoint(p) for p in points.tolist()])
    return points


def test_points_in_world_coordinates(files, tmp_path):
    points = np.random.default_rng(0).uniform(-10, 10, (9, 3))
    chain = [files["field"], files["affine"]]
    expected = by_itk(chain, points)
    rows = "\n".join(",".join(f"{v:.9f}" for v in p) for p in points)
    (tmp_path / "ants.csv").write_text(f"x,y,z,t,label\n{rows.replace(chr(10), ',0,1' + chr(10))},0,1\n")
    markers = "\n".join(f"vtk_{i},{p[0]:.9f},{p[1]:.9f},{p[2]:.9f},0,0,0,1,1,1,0,F-{i},," for i, p in enumerate(points))
    (tmp_path / "lps.fcsv").write_text(f"# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n{markers}\n")
    flipped = "\n".join(
        f"vtk_{i},{-p[0]:.9f},{-p[1]:.9f},{p[2]:.9f},0,0,0,1,1,1,0,F-{i},," for i, p in enumerate(points)
    )
    (tmp_path / "ras.fcsv").write_text(f"# Markups fiducial file version = 4.10\n# CoordinateSystem = 0\n{flipped}\n")
    for name in ("ants.csv", "lps.fcsv", "ras.fcsv"):
        out = apply_transforms(tmp_path / name, chain, tmp_path / f"{name[:3]}_out.csv")
        frame = pd.read_csv(out)
        assert list(frame.columns) == ["x", "y", "z"]
        np.testing.assert_allclose(frame.to_numpy(), expected, atol=1e-5, err_msg=name)
    # what was written is read again: two steps are as one
    apply_transforms(tmp_path / "ants.csv", chain[:1], tmp_path / "one.csv")
    apply_transforms(tmp_path / "one.csv", chain[1:], tmp_path / "two.csv")
    np.testing.assert_allclose(pd.read_csv(tmp_path / "two.csv").to_numpy(), expected, atol=1e-5)


def test_points_in_voxels_of_the_reference(files, tmp_path):
    voxels = np.random.default_rng(0).uniform(4, 16, (5, 3))
    np.savetxt(tmp_path / "voxels.csv", voxels, delimiter=",")
    lps = (voxels @ FIXED[1][:3, :3].T + FIXED[1][:3, 3]) * FLIP
    expected = by_itk([files["field"]], lps)
    for reference in (files["fixed"], None):  # the field has the same grid
        apply_transforms(tmp_path / "voxels.csv", [files["field"]], tmp_path / "out.csv", reference, overwrite=True)
        np.testing.assert_allclose(pd.read_csv(tmp_path / "out.csv").to_numpy(), expected, atol=1e-4)
    with pytest.raises(ValueError, match="voxels.csv.*--reference"):
        apply_transforms(tmp_path / "voxels.csv", [files["affine"]], tmp_path / "no.csv")


def test_what_cannot_be_applied_is_refused(files, tmp_path):
    files["out"].write_text("mine")
    with pytest.raises(FileExistsError, match="out.nii.gz.*--overwrite"):
        apply_transforms(files["moving"], [tmp_path / "absent.h5"], files["out"])  # before anything is read
    assert files["out"].read_text() == "mine"
    for moving, output in ((files["moving"], "out.png"), (files["moving"], "out.csv"), (tmp_path / "p.csv", "o.nii")):
        with pytest.raises(ValueError, match="^output: expected a file ending in"):
            apply_transforms(moving, [files["field"]], tmp_path / output)
    with pytest.raises(FileNotFoundError, match="absent.h5"):
        apply_transforms(files["moving"], [tmp_path / "absent.h5"], tmp_path / "no.nii.gz")
    with pytest.raises(FileNotFoundError, match="p.csv"):
        apply_transforms(tmp_path / "p.csv", [files["field"]], tmp_path / "no.csv")
    for text in ("x,y,z\n", "x,y,z\n1,2,nan\n", "x,y,z\n1,2\n", "x,y,z\na,b,c\n"):
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(ValueError, match="p.csv: expected lines of x, y, z"):
            apply_transforms(tmp_path / "p.csv", [files["field"]], tmp_path / "no.csv")


def there_and_back(chain: list[Path], inverse: Path, shape: tuple[int, ...], affine: np.ndarray, rim: int) -> float:
    """How far points of a grid, its rim apart, are led astray by the inverse and then the chain, in its voxels."""
    at = world(affine, shape)[(slice(rim, -rim),) * len(shape)].reshape(-1, 3)[::7] * FLIP
    apart = by_itk([inverse, *chain], at) - at
    return float(np.linalg.norm(apart, axis=1).max() / np.linalg.norm(affine[:3, :3], axis=0).min())


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".h5"])
@pytest.mark.parametrize("turn", [0.0, 20.0])
def test_inverse_of_a_field(turn, ending, tmp_path):
    save_transform(tmp_path / "t.nii.gz", field(FIXED[1], FIXED[0], turn=turn))
    invert_transform([tmp_path / "t.nii.gz"], tmp_path / f"back{ending}")
    # a rotation leads the corners out of the grid
    error = there_and_back([tmp_path / "t.nii.gz"], tmp_path / f"back{ending}", *FIXED, rim=3 if turn == 0 else 6)
    assert error < 0.1


def test_inverse_on_the_grid_of_the_moving_scan(files, tmp_path):
    chain, back = [files["field"], files["affine"]], tmp_path / "back.nii.gz"
    invert_transform(chain, back, files["moving"])
    image = nib.load(back)
    assert image.shape == (*MOVING[0], 1, 3)
    np.testing.assert_allclose(image.affine, MOVING[1], atol=1e-5)
    assert there_and_back(chain, back, *MOVING, rim=5) < 0.1
    # and images come back
    apply_transforms(files["moving"], chain, files["out"])
    again = apply_transforms(files["out"], [back], tmp_path / "again.nii.gz")
    inner = (slice(6, -6),) * 3
    first, second = (nib.load(f).get_fdata()[inner] for f in (files["moving"], again))
    assert np.abs(first - second).mean() < 0.03 * np.ptp(first)


def test_inverse_of_matrices_alone(files, tmp_path):
    other = tmp_path / "other.tfm"
    save_transform(other, grid((1, 1, 1), (1, 1.2, 1), "RAS", (10, 0, 5), (0, 4, 0)))
    for ending in (".tfm", ".mat", ".txt", ".h5"):
        invert_transform([files["affine"], other], tmp_path / f"back{ending}")
        points = np.random.default_rng(0).uniform(-30, 30, (5, 3))
        found = [sitk.ReadTransform(str(tmp_path / f"back{ending}")).TransformPoint(p) for p in points.tolist()]
        np.testing.assert_allclose(by_itk([files["affine"], other], np.array(found)), points, atol=1e-6)
    with pytest.raises(ValueError, match="back.nii.gz.*affine"):
        invert_transform([files["affine"]], tmp_path / "back.nii.gz")


@pytest.mark.parametrize("axes", ["LP", "LI"])
def test_inverse_of_slices(axes, tmp_path):
    affine = grid((24, 22), (1.4, 1.5, 1), axes, (4, 0, 0), (0, 0, 5))
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) / np.linalg.norm(np.cross(affine[:3, 0], affine[:3, 1]))
    for ending in (".nii.gz", ".mha"):
        save_transform(tmp_path / f"t{ending}", field(affine, (24, 22)))
        invert_transform([tmp_path / f"t{ending}"], tmp_path / f"back{ending}", overwrite=True)
        chain, back = [tmp_path / f"t{ending}"], tmp_path / f"back{ending}"
        at = world(affine, (24, 22))[4:-4, 4:-4].reshape(-1, 3) * FLIP
        assert np.linalg.norm(by_itk([back, *chain], at) - at, axis=1).max() < 0.1 * 1.4


def test_inverse_of_a_field_of_two_axes(tmp_path):
    affine = grid((24, 22), (1.4, 1.5, 1), "LPS")
    ddf = field(affine, (24, 22))
    ddf.meta["spatial_shape"] = [24, 22]
    save_transform(tmp_path / "t.nii.gz", ddf)
    invert_transform([tmp_path / "t.nii.gz"], tmp_path / "back.nii.gz")
    there, back = read(tmp_path / "t.nii.gz"), read(tmp_path / "back.nii.gz")
    assert there.GetDimension() == back.GetDimension() == 2
    at = (world(affine, (24, 22))[4:-4, 4:-4].reshape(-1, 3) * FLIP)[:, :2]
    apart = [np.subtract(there.TransformPoint(back.TransformPoint(p)), p) for p in at.tolist()]
    assert np.linalg.norm(apart, axis=1).max() < 0.1 * 1.4


def test_folds_are_said(tmp_path, caplog):
    ddf = field(FIXED[1], FIXED[0], size=25.0)
    save_transform(tmp_path / "t.nii.gz", ddf)
    invert_transform([tmp_path / "t.nii.gz"], tmp_path / "back.nii.gz")
    assert "have no inverse: the field folds" in caplog.text
    assert np.isfinite(nib.load(tmp_path / "back.nii.gz").get_fdata()).all()


def test_what_cannot_be_inverted_is_refused(files, tmp_path):
    files["out"].write_text("mine")
    with pytest.raises(FileExistsError, match="out.nii.gz"):
        invert_transform([files["field"]], files["out"])
    with pytest.raises(ValueError, match="back.tfm.*displacement field"):
        invert_transform([files["field"]], tmp_path / "back.tfm")
    assert files["out"].read_text() == "mine" and not (tmp_path / "back.tfm").exists()
    save_transform(tmp_path / "flat.tfm", np.diag([1.0, 1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="flat.tfm.*no inverse"):
        invert_transform([tmp_path / "flat.tfm"], tmp_path / "back.tfm")
