# SPDX-License-Identifier: Apache-2.0
"""Transforms in files: read and written as SimpleITK and nibabel do it, else refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from scans import bent, blobs, grid, world, write

from monai_deq.data import affine_of, read_image, save_nifti
from monai_deq.transforms import ChainPart, load_ddf, load_transform, map_points, pull_image, save_transform
from monai_deq.transforms.transform_files import check_transform_format, is_sheared

SHAPE = (9, 8, 7)
AFFINE = grid(SHAPE, (2.0, 2.5, 3.0), "LPI", (10, -20, 30), (3, -2, 5))
FLIP = np.array([-1.0, -1.0, 1.0])


def field(shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE, axes: int = 3) -> MetaTensor:
    """A smooth field in voxels, ``(ndim, *shape)``, as of a file of so many axes."""
    places = world(affine, shape)
    voxels = (bent(places) - places) @ np.linalg.inv(affine)[:3, :3].T
    tensor = torch.from_numpy(np.moveaxis(voxels, -1, 0)[: len(shape)].astype(np.float32).copy())
    meta = {"spatial_shape": [*shape, 1][:axes]}
    return MetaTensor(tensor, affine=torch.from_numpy(affine), meta=meta, spatial_ndim=len(shape))


def matrix() -> np.ndarray:
    """An affine map in RAS mm, with scale and shear."""
    found = grid((1, 1, 1), (1.1, 0.9, 1.05), "RAS", (5, 12, -8), (4.0, -3.0, 2.0))
    found[0, 1] += 0.1
    return found


def points(n: int = 12, width: float = 6.0) -> np.ndarray:
    return np.random.default_rng(1).uniform(-width, width, (n, 3)) + [3, -2, 5]


def by_itk(transform: sitk.Transform, at: np.ndarray) -> np.ndarray:
    """Points in RAS through a transform of ITK."""
    dims = transform.GetDimension()
    moved = at.copy()
    moved[:, :dims] = [transform.TransformPoint(p.tolist()) for p in (at * FLIP)[:, :dims]]
    moved[:, :dims] *= FLIP[:dims]
    return moved


def by_us(chain: list[ChainPart], at: np.ndarray) -> np.ndarray:
    return map_points(torch.from_numpy(at.T.copy()), chain).T.numpy()


def read_itk(path: Path) -> sitk.Transform:
    if path.name.endswith((".h5", ".tfm", ".txt", ".mat")):
        return sitk.ReadTransform(str(path))
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".nrrd", ".h5", ".NII.GZ"])
def test_field_there_and_back(ending, tmp_path):
    path, ddf = tmp_path / f"f{ending}", field()
    save_transform(path, ddf)
    [found] = load_transform(path)
    np.testing.assert_allclose(found, ddf, atol=1e-5)
    np.testing.assert_allclose(affine_of(found), AFFINE, atol=1e-4)
    np.testing.assert_allclose(load_ddf(path, 3), ddf, atol=1e-5)
    if ending != ".NII.GZ":
        np.testing.assert_allclose(by_itk(read_itk(path), points()), by_us([ddf], points()), atol=1e-4)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", [".tfm", ".txt", ".mat", ".h5"])
def test_matrix_there_and_back(ending, tmp_path):
    path = tmp_path / f"a{ending}"
    save_transform(path, matrix())
    [found] = load_transform(path)
    np.testing.assert_allclose(found, matrix(), atol=1e-6)
    expected = points() @ matrix()[:3, :3].T + matrix()[:3, 3]
    np.testing.assert_allclose(by_itk(read_itk(path), points()), expected, atol=1e-5)
    save_transform(path, torch.from_numpy(matrix()))  # as a DataLoader gives it
    np.testing.assert_allclose(load_transform(path)[0], matrix(), atol=1e-6)


@pytest.mark.parametrize("chain", [[field(), matrix()], [matrix(), field()], [matrix(), field(), matrix()]])
def test_chain_is_a_composite_transform_in_the_same_order(chain, tmp_path):
    path = tmp_path / "chain.h5"
    save_transform(path, chain)
    composite = read_itk(path)
    assert composite.GetName() == "CompositeTransform"
    np.testing.assert_allclose(by_itk(composite, points()), by_us(chain, points()), atol=1e-4)
    found = load_transform(path)
    assert [part.ndim for part in found] == [part.ndim for part in chain]
    np.testing.assert_allclose(by_us(found, points()), by_us(chain, points()), atol=1e-4)
    with pytest.raises(ValueError, match=r"chain.nii.gz.*a chain of \d transforms is written as .h5"):
        save_transform(tmp_path / "chain.nii.gz", chain)


def test_composite_of_simpleitk_read_and_applied(tmp_path):
    affine = sitk.AffineTransform(3)
    affine.SetMatrix((FLIP[:, None] * matrix()[:3, :3] * FLIP).ravel().tolist())
    affine.SetCenter((5.0, 4.0, -3.0))
    affine.SetTranslation((2.0, -1.0, 1.5))
    save_transform(tmp_path / "f.mha", field())
    composite = sitk.CompositeTransform([affine, read_itk(tmp_path / "f.mha")])
    sitk.WriteTransform(composite, str(tmp_path / "c.h5"))
    found = load_transform(tmp_path / "c.h5")
    assert [part.ndim for part in found] == [4, 2]  # of a composite the last one takes a point first
    np.testing.assert_allclose(by_us(found, points()), by_itk(composite, points()), atol=1e-4)
    fixed = write(tmp_path / "fixed.nii.gz", grid((14, 13, 12), centre=(3, -2, 5)), (14, 13, 12))
    moving = write(tmp_path / "moving.nii.gz", grid((22, 20, 24), (1.5, 1.7, 1.4), "ASL"), (22, 20, 24))
    ours = pull_image(read_image(moving, "m"), read_image(fixed, "f"), found)[0]
    image = sitk.ReadImage(str(moving), sitk.sitkFloat64)
    outside = float(sitk.GetArrayFromImage(image).min())
    expected = sitk.Resample(image, sitk.ReadImage(str(fixed)), composite, sitk.sitkLinear, outside)
    np.testing.assert_allclose(ours.numpy().T, sitk.GetArrayFromImage(expected), atol=1e-4 * 130)


TRANSFORMS = {
    "rigid": sitk.Euler3DTransform((3.0, 2.0, 1.0), 0.2, -0.1, 0.3, (4.0, 5.0, -6.0)),
    "quaternion": sitk.VersorRigid3DTransform((0.0, 0.0, 1.0), 0.4, (1.0, 2.0, 3.0), (-3.0, 2.0, 1.0)),
    "similarity": sitk.Similarity3DTransform(1.2, (0.0, 1.0, 0.0), 0.3, (1.0, 2.0, 3.0), (-3.0, 2.0, 1.0)),
    "translation": sitk.TranslationTransform(3, (1.0, -2.0, 3.0)),
    "scale": sitk.ScaleTransform(3, (1.1, 0.9, 1.3)),
    "identity": sitk.Transform(3, sitk.sitkIdentity),
    "plane": sitk.Euler2DTransform((3.0, 2.0), 0.3, (4.0, -5.0)),
}


@pytest.mark.parametrize("ending", [".tfm", ".mat", ".h5", ".txt"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_linear_transform_of_itk(name, ending, tmp_path):
    sitk.WriteTransform(TRANSFORMS[name], str(tmp_path / f"t{ending}"))
    [found] = load_transform(tmp_path / f"t{ending}")
    np.testing.assert_allclose(by_us([found], points()), by_itk(TRANSFORMS[name], points()), atol=1e-5)


def test_affine_of_ants_with_a_centre_of_rotation(tmp_path):
    """``0GenericAffine.mat``: MATLAB's level 4, float64 parameters and the centre apart, LPS."""
    scipy_io = pytest.importorskip("scipy.io")
    turn = grid((1, 1, 1), (1.02, 0.97, 1.0), "RAS", (3, -5, 8))[:3, :3]
    translation, centre = np.array([3.0, -4.0, 5.0]), np.array([10.0, 20.0, -15.0])
    content = {
        "AffineTransform_double_3_3": np.concatenate([turn.ravel(), translation])[:, None],
        "fixed": centre[:, None],
    }
    scipy_io.savemat(tmp_path / "0GenericAffine.mat", content, format="4")
    [found] = load_transform(tmp_path / "0GenericAffine.mat")
    lps = points() * FLIP
    expected = ((lps - centre) @ turn.T + centre + translation) * FLIP
    np.testing.assert_allclose(by_us([found], points()), expected, atol=1e-6)


@pytest.mark.parametrize("intent", [1006, 1007])
def test_components_of_nifti_as_itk_takes_them(intent, tmp_path):
    """A displacement is turned from RAS by ITK's reader, a plain vector is in LPS already."""
    vectors = np.random.default_rng(0).normal(size=(*SHAPE, 1, 3)).astype(np.float32)
    image = nib.Nifti1Image(vectors, AFFINE)
    image.header.set_intent(intent)
    nib.save(image, tmp_path / "f.nii.gz")
    expected = by_itk(read_itk(tmp_path / "f.nii.gz"), points())
    np.testing.assert_allclose(by_us(load_transform(tmp_path / "f.nii.gz"), points()), expected, atol=1e-4)


def test_field_of_nifti_has_the_intent_vector(tmp_path):
    save_transform(tmp_path / "f.nii.gz", field())
    image = nib.load(tmp_path / "f.nii.gz")
    assert image.shape == (*SHAPE, 1, 3) and image.header["intent_code"] == 1007
    assert image.header.get_xyzt_units()[0] == "mm" and image.get_data_dtype() == np.float32


def test_field_in_voxels_as_monai_has_it(tmp_path):
    ddf = field()
    nib.save(nib.Nifti1Image(np.moveaxis(ddf.numpy(), 0, -1), AFFINE), tmp_path / "ddf.nii.gz")
    [found] = load_transform(tmp_path / "ddf.nii.gz")
    assert torch.equal(found.as_tensor(), ddf.as_tensor())  # bit by bit
    flat = field((9, 8))
    nib.save(nib.Nifti1Image(np.moveaxis(flat.numpy(), 0, -1)[:, :, None], AFFINE), tmp_path / "flat.nii.gz")
    found = load_ddf(tmp_path / "flat.nii.gz", 2)
    assert found.shape == (2, 9, 8) and torch.equal(found.as_tensor(), flat.as_tensor())


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd", ".h5"])
def test_slices_with_a_third_axis_are_three_dimensional(ending, tmp_path):
    ddf = field((9, 8))
    save_transform(tmp_path / f"f{ending}", ddf)
    assert read_itk(tmp_path / f"f{ending}").GetDimension() == 3
    [found] = load_transform(tmp_path / f"f{ending}")
    assert found.shape == (3, 9, 8, 1) and found[2].abs().max() < 1e-5
    np.testing.assert_allclose(load_ddf(tmp_path / f"f{ending}", 2), ddf, atol=1e-5)
    np.testing.assert_allclose(affine_of(found), AFFINE, atol=1e-4)
    at = world(AFFINE, (9, 8))[2:6, 3:6].reshape(-1, 3)
    np.testing.assert_allclose(by_itk(read_itk(tmp_path / f"f{ending}"), at), by_us([ddf], at), atol=1e-4)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd", ".h5"])
def test_files_of_two_axes_are_two_dimensional(ending, tmp_path):
    affine = grid((9, 8), (2, 2.5, 1), "LPS", (0, 0, 25))
    ddf = field((9, 8), affine, axes=2)
    save_transform(tmp_path / f"f{ending}", ddf)
    transform = read_itk(tmp_path / f"f{ending}")
    assert transform.GetDimension() == 2
    np.testing.assert_allclose(load_ddf(tmp_path / f"f{ending}", 2), ddf, atol=1e-5)
    at = world(affine, (9, 8))[2:6, 3:6].reshape(-1, 3)
    np.testing.assert_allclose(by_itk(transform, at), by_us([ddf], at), atol=1e-4)
    save_transform(tmp_path / f"a{ending}.h5", [ddf, np.diag([1.1, 0.9, 1.0, 1.0])])
    assert sitk.ReadTransform(str(tmp_path / f"a{ending}.h5")).GetDimension() == 2


def test_two_slices_are_a_volume(tmp_path):
    """Not one slice, however alike they are."""
    ddf = field((9, 8, 1))
    both = MetaTensor(ddf.as_tensor().repeat(1, 1, 1, 2), meta=dict(ddf.meta))
    save_transform(tmp_path / "f.nii.gz", both)
    assert load_transform(tmp_path / "f.nii.gz")[0].shape == (3, 9, 8, 2)


def test_load_ddf_on_another_grid(tmp_path):
    save_transform(tmp_path / "f.nii.gz", field())
    other = grid((6, 5, 4), (2.2, 2.0, 2.0), "SAR", (0, 5, 0), (3, -2, 5))
    reference = MetaTensor(torch.zeros(1, 6, 5, 4), affine=torch.from_numpy(other))
    found = load_ddf(tmp_path / "f.nii.gz", 3, reference)
    assert found.shape == (3, 6, 5, 4)
    at = world(other, (6, 5, 4))
    moved = by_itk(read_itk(tmp_path / "f.nii.gz"), at.reshape(-1, 3)).reshape(at.shape) - at
    expected = np.moveaxis(moved @ np.linalg.inv(other)[:3, :3].T, -1, 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    save_transform(tmp_path / "a.tfm", matrix())
    moved = at @ matrix()[:3, :3].T + matrix()[:3, 3] - at
    expected = np.moveaxis(moved @ np.linalg.inv(other)[:3, :3].T, -1, 0)
    np.testing.assert_allclose(load_ddf(tmp_path / "a.tfm", 3, reference), expected, atol=1e-4)
    with pytest.raises(ValueError, match="a.tfm: the transform is no single displacement field"):
        load_ddf(tmp_path / "a.tfm", 3)
    with pytest.raises(ValueError, match="f.nii.gz: expected a 2-D displacement field"):
        load_ddf(tmp_path / "f.nii.gz", 2)


def nifti(path: Path, array: np.ndarray, **intent: Any) -> Path:
    image = nib.Nifti1Image(array.astype(np.float32), AFFINE)
    image.header.set_intent(intent.get("intent", 1007))
    nib.save(image, path)
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError)) as error:
        load_transform(path)
    text = str(error.value)
    assert path.name in text and len(text.splitlines()) == 1, text
    assert all(word in text for word in words), text


def test_what_is_no_transform_is_refused_in_one_line(tmp_path):
    bspline = sitk.BSplineTransform(3, 3)
    sitk.WriteTransform(bspline, str(tmp_path / "b.tfm"))
    refused(tmp_path / "b.tfm", "BSplineTransform", "TransformToDisplacementField")
    sitk.WriteTransform(sitk.CompositeTransform([bspline]), str(tmp_path / "b.h5"))
    refused(tmp_path / "b.h5", "BSplineTransform")
    bad = np.zeros((*SHAPE, 1, 3))
    bad[1, 2, 3] = np.nan
    refused(nifti(tmp_path / "nan.nii.gz", bad), "NaN or infinity")
    refused(nifti(tmp_path / "nan4.nii.gz", bad[:, :, :, 0]), "NaN or infinity")
    refused(nifti(tmp_path / "scalar.nii.gz", bad[..., 0, 0]), "shape (9, 8, 7)")
    refused(nifti(tmp_path / "four.nii.gz", np.zeros((*SHAPE, 1, 4))), "(9, 8, 7, 1, 4)")
    refused(nifti(tmp_path / "time.nii.gz", np.zeros((*SHAPE, 2, 3))), "(9, 8, 7, 2, 3)")
    sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkFloat32), str(tmp_path / "scalar.mha"))
    refused(tmp_path / "scalar.mha", "3 components in 3 dimensions, got 1")
    sitk.WriteImage(sitk.Image((4, 4, 4), sitk.sitkVectorFloat32, 2), str(tmp_path / "two.nrrd"))
    refused(tmp_path / "two.nrrd", "got 2")
    refused(tmp_path / "absent.h5", "does not exist")
    for name in ("damaged.h5", "damaged.tfm", "damaged.mat", "damaged.nii.gz", "damaged.nrrd", "damaged.mha"):
        (tmp_path / name).write_bytes(b"no transform at all\n" * 3)
        refused(tmp_path / name, "cannot read the transform")
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "cannot read the transform")
    save_transform(tmp_path / "whole.nii.gz", field())
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "whole.nii.gz").read_bytes()[:1500])
    refused(tmp_path / "cut.nii.gz", "cannot read the transform")
    (tmp_path / "t.png").write_bytes(b"x")
    refused(tmp_path / "t.png", ".nii.gz", ".h5")
    refused(tmp_path, "does not exist")


def test_what_cannot_be_written_is_refused(tmp_path):
    ddf = field()
    bad = MetaTensor(ddf.as_tensor().clone(), meta=dict(ddf.meta))
    bad[0, 0, 0, 0] = float("nan")
    sheared = AFFINE.copy()
    sheared[:3, 1] += 0.3 * sheared[:3, 0]
    assert is_sheared(sheared) and not is_sheared(AFFINE)
    of_shear = MetaTensor(ddf.as_tensor(), affine=torch.from_numpy(sheared))
    for name, what, words in (
        ("t.nii.gz", bad, "t.nii.gz.*NaN or infinity"),
        ("t.h5", [matrix() * np.inf, ddf], "t.h5.*NaN or infinity"),
        ("t.nii.gz", of_shear, "shear"),
        ("t.mha", of_shear, "shear"),
        ("t.tfm", ddf, "t.tfm.*displacement field.*.nii.gz"),
        ("t.png", ddf, "t.png"),
        ("t.nii.gz", matrix(), "t.nii.gz.*affine.*.tfm"),
        ("t.tfm", [matrix(), matrix()], "t.tfm.*.h5"),
    ):
        with pytest.raises(ValueError, match=words):
            save_transform(tmp_path / name, what)
    assert not list(tmp_path.iterdir())
    assert check_transform_format("a/b.NII.GZ") == ".nii.gz" and check_transform_format("x.mat", affine=True) == ".mat"


def test_blobs():
    """The function that the other tests sample is no symmetric one."""
    at = points(30, 12)
    assert all(np.abs(blobs(at) - blobs(at * flip)).max() > 5 for flip in ([-1, 1, 1], [1, -1, 1], [1, 1, -1]))


def make_ddf(size: tuple[int, ...] = (5, 7, 6), seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn((len(size), *size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(6, 8), (6, 8, 10)])
def test_reads_what_was_written(size: tuple[int, ...], tmp_path: Path) -> None:
    affine, ddf = np.diag([2.0, 1.5, 3.0, 1.0]), make_ddf(size)
    save_nifti(tmp_path / "ddf.nii.gz", ddf, affine, len(size))
    field = load_ddf(tmp_path / "ddf.nii.gz", len(size))
    torch.testing.assert_close(field.as_tensor(), ddf, rtol=0, atol=0)
    np.testing.assert_allclose(field.affine, affine)


def test_refuses(tmp_path: Path) -> None:
    affine, path = np.eye(4), tmp_path / "ddf.nii.gz"
    save_nifti(path, make_ddf((6, 8, 10)), affine, 3)
    with pytest.raises(FileNotFoundError, match="absent.nii.gz' does not exist"):
        load_ddf(tmp_path / "absent.nii.gz", 3)
    with pytest.raises(ValueError, match=r"ddf.nii.gz: expected a 2-D displacement field, got \(3, 6, 8, 10\)"):
        load_ddf(path, 2)
    save_nifti(tmp_path / "scan.nii.gz", torch.rand(1, 6, 8, 10), affine, 3)
    with pytest.raises(
        ValueError, match=r"scan.nii.gz: expected a displacement field.* \(H, W, D, 3\).* got shape \(6, 8, 10\)"
    ):
        load_ddf(tmp_path / "scan.nii.gz", 3)
    (tmp_path / "half.nii.gz").write_bytes(path.read_bytes()[:200])
    with pytest.raises(RuntimeError, match="cannot read the transform .*half.nii.gz"):
        load_ddf(tmp_path / "half.nii.gz", 3)
    array = np.zeros((6, 8, 10, 3), np.float32)
    array[1, 2, 3, 0] = np.nan
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "nan.nii.gz")
    with pytest.raises(ValueError, match="nan.nii.gz: the displacement field must be finite"):
        load_ddf(tmp_path / "nan.nii.gz", 3)


@pytest.mark.parametrize(
    ("line", "changed", "reason"),
    [
        ("FixedParameters: 0 0 0", "", "needs a line 'FixedParameters:' of 3 numbers, got 'None'"),  # the identity
        ("FixedParameters: 0 0 0", "FixedParameters: 0 0 1,5", "could not convert string to float: '1,5'"),
        ("FixedParameters: 0 0 0", "FixedParameters: 0 7 0 0", "needs a line 'FixedParameters:' of 3 numbers"),
        ("Parameters: ", "Parameters: 5 ", "needs a line 'Parameters:' of 12 numbers"),
        ("double_3_3", "double_2_2", "needs a line 'Parameters:' of 6 numbers"),
    ],
)
def test_texts_that_itk_takes_for_another_transform(line, changed, reason, tmp_path):
    save_transform(tmp_path / "a.tfm", matrix())
    text = (tmp_path / "a.tfm").read_text()
    assert line in text
    for name in ("b.tfm", "b.txt"):
        (tmp_path / name).write_text(text.replace(line, changed, 1))
        refused(tmp_path / name, reason)


def test_matrices_and_grids_that_are_not_finite(tmp_path):
    for ending in (".h5", ".mat"):
        sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, float("nan"), 2.0)), str(tmp_path / f"a{ending}"))
        refused(tmp_path / f"a{ending}", "must be finite")
    for shape in ((*SHAPE, 3), (*SHAPE, 1, 3)):
        image = nib.Nifti1Image(np.zeros(shape, np.float32), AFFINE)
        image.set_sform(AFFINE * [0, 1, 1, 1], code=1)
        nib.save(image, tmp_path / "flat.nii.gz")
        refused(tmp_path / "flat.nii.gz", "does not say where its voxels lie")


@pytest.mark.parametrize("lost", [1, 8, 30])
def test_a_matrix_of_matlab_that_is_cut(lost, tmp_path):
    """SimpleITK takes what is in its memory for the numbers that are lost."""
    turned = sitk.AffineTransform(3)
    turned.SetCenter((11.0, 12.0, 13.0))
    turned.Rotate(0, 1, 0.3)
    sitk.WriteTransform(turned, str(tmp_path / "a.mat"))
    whole = (tmp_path / "a.mat").read_bytes()
    load_transform(tmp_path / "a.mat")
    (tmp_path / "b.mat").write_bytes(whole[:-lost])
    refused(tmp_path / "b.mat", "cannot read the transform")
