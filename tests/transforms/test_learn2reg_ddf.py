# SPDX-License-Identifier: Apache-2.0
"""Learn2Reg fields: name, shape, axes, units and type as the challenge's evaluation reads them, and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from monai_deq.data import write_sample_lung_cohort
from monai_deq.handlers import OutputGuard
from monai_deq.transforms import (
    ResampleDDFd,
    SaveLearn2RegDDFd,
    learn2reg_ddf_name,
    load_ddf,
    load_learn2reg_ddf,
    save_learn2reg_ddf,
)

SIZE = (5, 7, 6)
NLST = ("NLST_0101_0000", "NLST_0101_0001")
OASIS = ("OASIS_0438_0000", "OASIS_0439_0000")
AFFINE = np.array([[0.8, 0, 0.1, 3], [0, 0.2, -1.5, 7], [0.1, 2.5, 0, -4], [0, 0, 0, 1.0]])


def make_ddf(size: tuple[int, ...] = SIZE, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn((3, *size), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("fixed", "moving", "name"),
    [
        (*NLST, "disp_0101_0101.nii.gz"),
        ("./imagesTs/NLST_0001_0000.nii.gz", Path("imagesTs/NLST_0001_0001.nii.gz"), "disp_0001_0001.nii.gz"),
        (*OASIS, "disp_0438_0000_0439_0000.nii.gz"),
        # as find_oasis names its subjects
        ("OASIS_0438", "OASIS_0439", "disp_0438_0000_0439_0000.nii.gz"),
        ("ThoraxCBCT_0011_0001", "ThoraxCBCT_0011_0000", "disp_0011_0001_0011_0000.nii.gz"),
        ("L2R_Task_1_0011_0002.nii", "L2R_Task_1_0012_0000.nii", "disp_0011_0002_0012_0000.nii.gz"),
    ],
)
def test_names(fixed: str | Path, moving: str | Path, name: str) -> None:
    assert learn2reg_ddf_name(fixed, moving) == name


@pytest.mark.parametrize("name", ["scan.nii.gz", "OASIS_OAS1_0001_MR1", "NLST_1_0000", "NLST_00001_0000", "0001", ""])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    for pair in ((name, NLST[1]), (NLST[0], name)):
        with pytest.raises(ValueError, match="no name of a Learn2Reg scan: expected TASK_CCCC_MMMM"):
            save_learn2reg_ddf(make_ddf(), tmp_path / "out", *pair)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pair", [NLST, OASIS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_file_as_the_challenge_reads_it(pair: tuple[str, str], dtype: torch.dtype, tmp_path: Path) -> None:
    ddf = make_ddf().to(dtype)
    path = save_learn2reg_ddf(ddf, tmp_path / "not" / "yet", *pair)
    assert path == tmp_path / "not" / "yet" / learn2reg_ddf_name(*pair) and path.is_file()
    file = nib.load(path)
    assert isinstance(file, nib.Nifti1Image) and file.shape == (*SIZE, 3)
    assert file.get_data_dtype() == np.dtype("<f4")
    field = file.get_fdata()
    for axis in range(3):
        np.testing.assert_array_equal(field[..., axis], ddf[axis].float().double().numpy())
    # Learn2Reg's way: identity + field, component i along axis i
    image = np.random.default_rng(0).random(SIZE)
    identity = np.meshgrid(*map(np.arange, SIZE), indexing="ij")
    warped = ndimage.map_coordinates(image, identity + field.transpose(3, 0, 1, 2), order=1, mode="nearest")
    coordinates = np.stack(identity) + ddf.double().numpy()
    np.testing.assert_allclose(warped, ndimage.map_coordinates(image, coordinates, order=1, mode="nearest"), atol=1e-5)


@pytest.mark.parametrize("pair", [NLST, OASIS])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 40.0])
def test_read_back_gives_the_same_warp(pair: tuple[str, str], scale: float, tmp_path: Path) -> None:
    ddf = make_ddf(scale=scale)
    save_learn2reg_ddf(ddf, tmp_path, *pair)
    field = load_learn2reg_ddf(tmp_path, *pair)
    assert field.dtype == torch.float32 and field.shape == ddf.shape
    assert float((field.as_tensor().double() - ddf).abs().max()) < min(1e-4, 1e-6 * scale)


def test_numpy_numbers_and_affine(tmp_path: Path) -> None:
    ddf = MetaTensor(make_ddf(), affine=torch.from_numpy(AFFINE))
    path = save_learn2reg_ddf(ddf, tmp_path, *NLST)
    np.testing.assert_allclose(nib.load(path).affine, AFFINE, atol=1e-6)
    path = save_learn2reg_ddf(ddf.numpy(), tmp_path, *OASIS, affine=np.diag([2.0, 3, 4, 1]))
    np.testing.assert_allclose(nib.load(path).affine, np.diag([2.0, 3, 4, 1]))
    np.testing.assert_allclose(load_learn2reg_ddf(tmp_path, *OASIS), ddf.float(), rtol=0, atol=0)
    path = save_learn2reg_ddf(np.zeros((3, *SIZE), dtype=np.int64), tmp_path, *NLST, overwrite=True)
    assert nib.load(path).get_data_dtype() == np.dtype("<f4") and not nib.load(path).get_fdata().any()
    np.testing.assert_array_equal(nib.load(path).affine, np.eye(4))


def test_either_name_is_read_and_the_expected_one_first(tmp_path: Path) -> None:
    short, long = "disp_0438_0439.nii.gz", "disp_0438_0000_0439_0000.nii.gz"
    save_learn2reg_ddf(make_ddf(seed=1), tmp_path, *OASIS).rename(tmp_path / short)
    torch.testing.assert_close(load_learn2reg_ddf(tmp_path, *OASIS).as_tensor(), make_ddf(seed=1).float())
    save_learn2reg_ddf(make_ddf(seed=2), tmp_path, *OASIS)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([short, long])
    torch.testing.assert_close(load_learn2reg_ddf(tmp_path, *OASIS).as_tensor(), make_ddf(seed=2).float())
    nlst = tmp_path / "nlst"
    save_learn2reg_ddf(make_ddf(seed=3), nlst, *NLST).rename(nlst / "disp_0101_0000_0101_0001.nii.gz")
    torch.testing.assert_close(load_learn2reg_ddf(nlst, *NLST).as_tensor(), make_ddf(seed=3).float())
    save_learn2reg_ddf(make_ddf(seed=4), nlst, *NLST)
    torch.testing.assert_close(load_learn2reg_ddf(nlst, *NLST).as_tensor(), make_ddf(seed=4).float())


def test_absent_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"NLST_0101_0001.*looked for disp_0101_0101.nii.gz and disp_0101_0000_"
    ):
        load_learn2reg_ddf(tmp_path, *NLST)
    path = save_learn2reg_ddf(make_ddf(), tmp_path, *NLST)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RuntimeError, match="cannot read .*disp_0101_0101"):
        load_learn2reg_ddf(tmp_path, *NLST)
    # channels first, as networks have them
    nib.save(nib.Nifti1Image(np.zeros((3, *SIZE), np.float32), np.eye(4)), path)
    with pytest.raises(ValueError, match=r"disp_0101_0101.* \(H, W, D, 3\), got shape \(3, 5, 7, 6\)"):
        load_learn2reg_ddf(tmp_path, *NLST)


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 5, 7), (1, 3, 5, 7, 6), (5, 7, 6, 3), (2, 5, 7, 6)])
def test_other_shapes_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ddf must have shape \(3, D, H, W\) .* got \("):
        save_learn2reg_ddf(torch.zeros(shape), tmp_path, *NLST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_other_numbers_are_refused(value: float, tmp_path: Path) -> None:
    ddf = make_ddf()
    ddf[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="ddf must be finite in float32 .*disp_0101_0101"):
        save_learn2reg_ddf(ddf, tmp_path, *NLST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [False, True])
def test_whole_or_not_at_all(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save_learn2reg_ddf(make_ddf(seed=1), tmp_path, *NLST).read_bytes() if existing else None
    save = nib.save

    def break_down(image: Any, path: Any) -> None:
        save(image, path)
        Path(path).write_bytes(Path(path).read_bytes()[:20])
        raise OSError("no space left on device")

    monkeypatch.setattr(nib, "save", break_down)
    with pytest.raises(OSError, match="no space left"):
        save_learn2reg_ddf(make_ddf(), tmp_path, *NLST, overwrite=True)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if existing else [])


def make_item(pair: tuple[str, str] = NLST, seed: int = 0) -> dict[str, Any]:
    scan = MetaTensor(torch.zeros(1, *SIZE), affine=AFFINE)
    ddf = MetaTensor(make_ddf(seed=seed).float(), affine=torch.from_numpy(AFFINE))
    return {"fixed_subject": pair[0], "moving_subject": pair[1], "fixed_scan": scan, "ddf": ddf}


@pytest.mark.parametrize("pair", [NLST, OASIS])
def test_transform(pair: tuple[str, str], tmp_path: Path) -> None:
    item = make_item(pair)
    saver = SaveLearn2RegDDFd(tmp_path)
    assert saver(item).keys() == item.keys() and "fixed_subject" in item
    assert [p.name for p in tmp_path.iterdir()] == [learn2reg_ddf_name(*pair)] == [saver.path(item).name]
    field = load_learn2reg_ddf(tmp_path, *pair)
    torch.testing.assert_close(field.as_tensor(), item["ddf"].as_tensor())
    np.testing.assert_allclose(field.affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, "false"])
def test_existing_file_is_refused_unasked(overwrite: Any, tmp_path: Path) -> None:
    item = make_item()
    saver = SaveLearn2RegDDFd(tmp_path, overwrite=overwrite)
    saver.refuse_existing(item)
    path = saver.path(item)
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="disp_0101_0101.*--overwrite true"):
        saver(item)
    with pytest.raises(FileExistsError, match="disp_0101_0101"):
        OutputGuard(saver, [item])(None)  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="disp_0101_0101"):
        save_learn2reg_ddf(make_ddf(), tmp_path, *NLST)
    assert path.read_text() == "precious"
    replacing = SaveLearn2RegDDFd(tmp_path, overwrite="true")  # type: ignore[arg-type]
    replacing.refuse_existing(item)
    replacing(item)
    torch.testing.assert_close(load_ddf(path, 3).as_tensor(), item["ddf"].as_tensor())


def test_field_of_the_networks_grid_is_refused(tmp_path: Path) -> None:
    item = make_item()
    item["ddf"] = make_ddf((4, 4, 4))
    with pytest.raises(
        ValueError, match=r"size \(4, 4, 4\) is not on the grid of fixed_scan.*\(5, 7, 6\).*ResampleDDFd"
    ):
        SaveLearn2RegDDFd(tmp_path)(item)
    assert not list(tmp_path.iterdir())
    SaveLearn2RegDDFd(tmp_path)(ResampleDDFd("fixed_scan")(item))
    assert load_learn2reg_ddf(tmp_path, *NLST).shape == (3, *SIZE)
    SaveLearn2RegDDFd(tmp_path / "any", reference_key=None)(item)
    assert load_learn2reg_ddf(tmp_path / "any", *NLST).shape == (3, 4, 4, 4)


@pytest.mark.parametrize("absent", ["ddf", "fixed_subject", "moving_subject", "fixed_scan"])
def test_incomplete_items_are_refused(absent: str, tmp_path: Path) -> None:
    item = make_item()
    del item[absent]
    with pytest.raises(KeyError, match=absent):
        SaveLearn2RegDDFd(tmp_path)(item)
    assert not list(tmp_path.iterdir())


def test_reads_the_truth_of_the_sample(tmp_path: Path) -> None:
    root = write_sample_lung_cohort(tmp_path / "s", num_pairs=(0, 0, 1), spatial_size=(16, 20, 24))
    names = [f"NLST_0001_000{i}" for i in range(2)]
    field = load_learn2reg_ddf(root / "true_ddf", *names)
    fixed, moving = (np.loadtxt(root / "keypointsTs" / f"{n}.csv", delimiter=",") for n in names)
    found = fixed + np.stack(
        [ndimage.map_coordinates(u.astype(float), fixed.T, order=1) for u in field.numpy()], axis=1
    )
    np.testing.assert_allclose(found, moving, atol=1e-5)
    np.testing.assert_allclose(field.affine, nib.load(root / "imagesTs" / f"{names[0]}.nii.gz").affine)
    # written again it is the same field
    save_learn2reg_ddf(field, tmp_path / "again", *names)
    np.testing.assert_array_equal(load_learn2reg_ddf(tmp_path / "again", *names), field)


def test_name_keys_are_two() -> None:
    with pytest.raises(ValueError, match="name_keys must name the fixed and the moving scan"):
        SaveLearn2RegDDFd("out", name_keys=("a",))
