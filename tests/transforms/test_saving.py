# SPDX-License-Identifier: Apache-2.0
"""The files, read back with nibabel, say what was computed, in Learn2Reg's form too; none is lost or half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from scipy import ndimage

import monai_deq.transforms as transforms
from monai_deq.handlers import OutputGuard
from monai_deq.networks.nets import DEQRegistrationNet
from monai_deq.transforms import (
    FixedPointSolverd,
    ResampleDDFd,
    SaveLearn2RegDDFd,
    SaveRegistrationd,
    WarpByDDFd,
    learn2reg_ddf_name,
    load_ddf,
    load_learn2reg_ddf,
    save_learn2reg_ddf,
)

SIZES = [(7, 9), (5, 7, 6)]
# a coronal slice or an oblique volume: neither diagonal nor of one spacing
AFFINE = np.array([[0.768, -0.7, 0, 3], [0, 0, -1.5, 7], [0.224, 2.4, 0, -4], [0, 0, 0, 1.0]])
SAID = {"steps": 7, "evaluations": 9.5, "residual": 5e-4, "relative_residual": 1e-3, "converged": True}
SAID |= {"reason": "tolerance"}
# in the order in which they are written
NAMES = [f"m_to_f_{end}.nii.gz" for end in ("warped", "warped_label", "ddf", "transform")] + ["m_to_f_record.json"]
WARPED, LABEL, DDF, TRANSFORM, RECORD = NAMES


def make_item(size: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    meta = {"affine": torch.from_numpy(AFFINE)}
    item = {
        "moving_subject": "m",
        "fixed_subject": "f",
        "moving_scan": torch.from_numpy(rng.normal(size=(1, *size)).astype(np.float32) * 1000),
        "moving_label": torch.from_numpy(rng.integers(0, 36, (1, *size)).astype(np.int32)),
        "ddf": MetaTensor(torch.from_numpy(rng.normal(size=(len(size), *size)).astype(np.float32)), meta=meta),
        **SAID,
    }
    warp = WarpByDDFd(("moving_scan", "moving_label"), "ddf", ("warped", "warped_label"), ("bilinear", "nearest"))
    return warp(item)


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("size", SIZES)
def test_files_read_back(tmp_path: Path, size: tuple[int, ...]) -> None:
    item = make_item(size)
    folder = tmp_path / "not" / "yet" / "there"
    out = SaveRegistrationd(folder)(item)
    assert out.keys() == {*item, "files"} and files(folder) == set(NAMES)
    assert {Path(path).name for path in out["files"].values()} == set(NAMES)
    assert all(Path(path).is_file() for path in out["files"].values())
    warped, label, ddf = (nib.load(folder / name) for name in NAMES[:3])
    grid = size if len(size) == 3 else (*size, 1)
    assert warped.shape == label.shape == grid and ddf.shape == (*grid, len(size))
    assert (warped.get_data_dtype(), ddf.get_data_dtype(), label.get_data_dtype()) == ("<f4", "<f4", "<i4")
    for image in (warped, ddf, label):
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    torch.testing.assert_close(load_ddf(folder / DDF, len(size)).as_tensor(), item["ddf"].as_tensor())
    field = np.asarray(ddf.dataobj)
    for axis in range(len(size)):
        np.testing.assert_array_equal(field[..., axis].reshape(size), item["ddf"][axis].numpy())
    # of a slice in its plane in the world: to the left, to the back, up, in mm
    transform = nib.load(folder / TRANSFORM)
    layers = 2 if len(size) == 2 else grid[2]  # a slice is there twice, or ITK would take it for two-dimensional
    assert transform.shape == (*grid[:2], layers, 1, 3) and transform.get_data_dtype() == "<f4"
    assert int(transform.header["intent_code"]) == 1007  # NIFTI_INTENT_VECTOR
    np.testing.assert_allclose(transform.affine, AFFINE, atol=1e-6)
    world = field.reshape(*grid, -1) @ AFFINE[:3, : len(size)].T
    for layer in np.moveaxis(np.asarray(transform.dataobj)[:, :, :, 0], 2, 0)[None if len(size) == 3 else slice(None)]:
        expected = (world * [-1, -1, 1])[:, :, 0] if len(size) == 2 else np.moveaxis(world * [-1, -1, 1], 2, 0)
        np.testing.assert_allclose(layer, expected, atol=1e-5)
    # whoever has the moving scan and the field file gets the warped file
    coordinates = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1) + field.reshape(*size, -1)
    moved = [
        ndimage.map_coordinates(
            item[key][0].numpy().astype(float), np.moveaxis(coordinates, -1, 0), order=order, mode="nearest"
        )
        for key, order in (("moving_scan", 1), ("moving_label", 0))
    ]
    np.testing.assert_allclose(np.asarray(warped.dataobj).reshape(size), moved[0], atol=2e-2)
    np.testing.assert_array_equal(np.asarray(label.dataobj).reshape(size), moved[1])
    record = json.loads((folder / RECORD).read_text())
    assert record == {"moving_subject": "m", "fixed_subject": "f", **SAID}


def test_label_is_optional_and_field_without_affine_gets_the_identity(tmp_path: Path) -> None:
    item = make_item((4, 5))
    del item["warped_label"]
    item["ddf"] = item["ddf"].as_tensor()
    SaveRegistrationd(tmp_path)(item)
    assert files(tmp_path) == {WARPED, DDF, TRANSFORM, RECORD}
    np.testing.assert_array_equal(nib.load(tmp_path / DDF).affine, np.eye(4))


def test_record_is_valid_json_of_plain_values(tmp_path: Path) -> None:
    item = {**make_item((4, 5)), "steps": torch.tensor(3), "residual": torch.tensor(float("nan"))}
    item |= {"relative_residual": np.float32(np.inf), "converged": torch.tensor(False), "reason": "non-finite"}
    SaveRegistrationd(tmp_path)(item)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads((tmp_path / RECORD).read_text(), parse_constant=refuse)
    assert record["steps"] == 3 and record["residual"] is None and record["relative_residual"] is None
    assert record["converged"] is False and record["reason"] == "non-finite"
    assert "verdict" not in record
    examined = {**item, "verdict": "diverging", "spectral_radius": torch.tensor(1.5)}
    SaveRegistrationd(tmp_path, overwrite=True)(examined)
    record = json.loads((tmp_path / RECORD).read_text(), parse_constant=refuse)
    assert record["verdict"] == "diverging" and record["spectral_radius"] == 1.5 and "start_distance" not in record


def test_energies_in_the_file_where_there_are_some(tmp_path: Path) -> None:
    measured = {"energy": -0.75, "slope": 0.5, "unfolded": 3, "finish_steps": 7, "energy_before_finish": -0.5}
    item = make_item((4, 5))
    SaveRegistrationd(tmp_path)({**item, **{k: torch.tensor(v) for k, v in measured.items()}})
    record = json.loads((tmp_path / RECORD).read_text())
    assert {k: record.pop(k) for k in measured} == measured
    SaveRegistrationd(tmp_path, overwrite=True)({**item, "energy": torch.tensor(float("nan"))})
    again = json.loads((tmp_path / RECORD).read_text())
    assert again.pop("energy") is None and again == record


class Half(torch.nn.Module):
    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1.0 - ddf)


@pytest.mark.parametrize("size", SIZES)
def test_takes_what_the_solver_transform_gives(tmp_path: Path, size: tuple[int, ...]) -> None:
    network = DEQRegistrationNet(Half())
    fixed = MetaTensor(torch.rand(1, *size), affine=AFFINE)
    item = {"moving": torch.rand(1, *size), "fixed": fixed, "moving_subject": "m", "fixed_subject": "f"}
    Compose([FixedPointSolverd(network, tolerance=0.1), SaveRegistrationd(tmp_path)])(item)
    # residual of step k: 0.5^k * sqrt(ndim)
    steps = next(k for k in range(1, 20) if 0.5**k * len(size) ** 0.5 <= 0.1)
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["steps"] == steps and record["converged"] is True and record["reason"] == "tolerance"
    assert record["residual"] == pytest.approx(0.5**steps * len(size) ** 0.5)
    np.testing.assert_allclose(read(tmp_path / DDF), 1 - 0.5**steps)
    np.testing.assert_allclose(nib.load(tmp_path / WARPED).affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize("existing", NAMES)
def test_existing_result_is_refused(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    saver = SaveRegistrationd(tmp_path)
    for call in (saver, saver.refuse_existing):
        with pytest.raises(FileExistsError, match=rf"{existing}.*--overwrite true"):
            call(make_item((4, 5)))
    assert files(tmp_path) == {existing} and (tmp_path / existing).read_text() == "precious"


def test_overwrite(tmp_path: Path) -> None:
    SaveRegistrationd(tmp_path)(make_item((4, 5), seed=0))
    item = {**make_item((4, 5), seed=1), "steps": 99}
    SaveRegistrationd(tmp_path, overwrite=True)(item)
    assert files(tmp_path) == set(NAMES)
    np.testing.assert_array_equal(read(tmp_path / WARPED)[..., 0], item["warped"][0].numpy())
    assert json.loads((tmp_path / RECORD).read_text())["steps"] == 99


@pytest.mark.parametrize("saver", [SaveRegistrationd, SaveLearn2RegDDFd])
def test_overwrite_must_be_a_flag(tmp_path: Path, saver: Any) -> None:
    for value in ("false", "true", 1, None):
        with pytest.raises(ValueError, match="overwrite must be true or false"):
            saver(tmp_path, overwrite=value)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, existing: bool
) -> None:
    old = make_item((4, 5), seed=0)
    if existing:
        SaveRegistrationd(tmp_path)(old)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    save, calls = nib.save, []

    def break_down(image: Any, path: Any) -> None:
        calls.append(path)
        save(image, path)
        if len(calls) == failing + 1:
            Path(path).write_bytes(Path(path).read_bytes()[:20])
            raise OSError("no space left on device")

    monkeypatch.setattr(nib, "save", break_down)
    with pytest.raises(OSError, match="no space left"):
        SaveRegistrationd(tmp_path, overwrite=existing)(make_item((4, 5), seed=1))
    assert len(calls) == failing + 1
    assert files(tmp_path) == (set(NAMES) if existing else set(NAMES[:failing]))
    for name in NAMES[failing:]:
        if existing:
            assert (tmp_path / name).read_bytes() == before[name]
    for name in NAMES[:failing]:
        assert read(tmp_path / name).shape[:2] == (4, 5)


@pytest.mark.parametrize("absent", ["warped", "ddf", "steps", "moving_subject"])
def test_incomplete_items_are_refused_before_anything_is_written(tmp_path: Path, absent: str) -> None:
    item = make_item((4, 5))
    del item[absent]
    with pytest.raises(KeyError, match=absent):
        SaveRegistrationd(tmp_path)(item)
    assert not files(tmp_path)


def test_aliases() -> None:
    assert transforms.SaveRegistrationD is transforms.SaveRegistrationd is transforms.SaveRegistrationDict


# ---- Learn2Reg

GRID = (5, 7, 6)
NLST = ("NLST_0101_0000", "NLST_0101_0001")
OASIS = ("OASIS_0438_0000", "OASIS_0439_0000")


def make_ddf(size: tuple[int, ...] = GRID, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
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
def test_learn2reg_names(fixed: str | Path, moving: str | Path, name: str) -> None:
    assert learn2reg_ddf_name(fixed, moving) == name


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
    nib.save(nib.Nifti1Image(np.zeros((3, 5, 7, 6), np.float32), np.eye(4)), path)
    with pytest.raises(ValueError, match=r"disp_0101_0101.* \(H, W, D, 3\).* got shape \(3, 5, 7, 6\)"):
        load_learn2reg_ddf(tmp_path, *NLST)


def test_reads_the_truth_of_the_sample(tmp_path: Path, lung_cohort: Path) -> None:
    root = lung_cohort
    names = [f"NLST_0001_000{i}" for i in range(2)]
    field = load_learn2reg_ddf(root / "true_ddf", *names)
    fixed, moving = (np.loadtxt(root / "keypointsTr" / f"{n}.csv", delimiter=",") for n in names)
    found = fixed + np.stack(
        [ndimage.map_coordinates(u.astype(float), fixed.T, order=1) for u in field.numpy()], axis=1
    )
    np.testing.assert_allclose(found, moving, atol=1e-5)
    np.testing.assert_allclose(field.affine, nib.load(root / "imagesTr" / f"{names[0]}.nii.gz").affine)
    # written again it is the same field
    save_learn2reg_ddf(field, tmp_path / "again", *names)
    np.testing.assert_array_equal(load_learn2reg_ddf(tmp_path / "again", *names), field)


@pytest.mark.parametrize("name", ["scan.nii.gz", "OASIS_OAS1_0001_MR1", "NLST_1_0000", "NLST_00001_0000", "0001", ""])
def test_names_not_of_learn2reg_are_refused(name: str, tmp_path: Path) -> None:
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
    assert isinstance(file, nib.Nifti1Image) and file.shape == (*GRID, 3)
    assert file.get_data_dtype() == np.dtype("<f4")
    field = file.get_fdata()
    for axis in range(3):
        np.testing.assert_array_equal(field[..., axis], ddf[axis].float().double().numpy())
    # Learn2Reg's way: identity + field, component i along axis i
    image = np.random.default_rng(0).random(GRID)
    identity = np.meshgrid(*map(np.arange, GRID), indexing="ij")
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


def test_learn2reg_numpy_numbers_and_affine(tmp_path: Path) -> None:
    ddf = MetaTensor(make_ddf(), affine=torch.from_numpy(AFFINE))
    path = save_learn2reg_ddf(ddf, tmp_path, *NLST)
    np.testing.assert_allclose(nib.load(path).affine, AFFINE, atol=1e-6)
    path = save_learn2reg_ddf(ddf.numpy(), tmp_path, *OASIS, affine=np.diag([2.0, 3, 4, 1]))
    np.testing.assert_allclose(nib.load(path).affine, np.diag([2.0, 3, 4, 1]))
    np.testing.assert_allclose(load_learn2reg_ddf(tmp_path, *OASIS), ddf.float(), rtol=0, atol=0)
    path = save_learn2reg_ddf(np.zeros((3, *GRID), dtype=np.int64), tmp_path, *NLST, overwrite=True)
    assert nib.load(path).get_data_dtype() == np.dtype("<f4") and not nib.load(path).get_fdata().any()
    np.testing.assert_array_equal(nib.load(path).affine, np.eye(4))


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 5, 7), (1, 3, 5, 7, 6), (5, 7, 6, 3), (2, 5, 7, 6)])
def test_learn2reg_other_shapes_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ddf must have shape \(3, D, H, W\) .* got \("):
        save_learn2reg_ddf(torch.zeros(shape), tmp_path, *NLST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_learn2reg_other_numbers_are_refused(value: float, tmp_path: Path) -> None:
    ddf = make_ddf()
    ddf[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="ddf must be finite in float32 .*disp_0101_0101"):
        save_learn2reg_ddf(ddf, tmp_path, *NLST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [False, True])
def test_learn2reg_whole_or_not_at_all(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def learn2reg_item(pair: tuple[str, str] = NLST, seed: int = 0) -> dict[str, Any]:
    scan = MetaTensor(torch.zeros(1, *GRID), affine=AFFINE)
    ddf = MetaTensor(make_ddf(seed=seed).float(), affine=torch.from_numpy(AFFINE))
    return {"fixed_subject": pair[0], "moving_subject": pair[1], "fixed_scan": scan, "ddf": ddf}


@pytest.mark.parametrize("pair", [NLST, OASIS])
def test_learn2reg_transform(pair: tuple[str, str], tmp_path: Path) -> None:
    item = learn2reg_item(pair)
    saver = SaveLearn2RegDDFd(tmp_path)
    assert saver(item).keys() == item.keys() and "fixed_subject" in item
    assert [p.name for p in tmp_path.iterdir()] == [learn2reg_ddf_name(*pair)] == [saver.paths(item)["ddf"].name]
    field = load_learn2reg_ddf(tmp_path, *pair)
    torch.testing.assert_close(field.as_tensor(), item["ddf"].as_tensor())
    np.testing.assert_allclose(field.affine, AFFINE, atol=1e-6)


def test_learn2reg_existing_file_is_refused_unasked(tmp_path: Path) -> None:
    item = learn2reg_item()
    saver = SaveLearn2RegDDFd(tmp_path)
    saver.refuse_existing(item)
    path = saver.paths(item)["ddf"]
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="disp_0101_0101.*--overwrite true"):
        saver(item)
    with pytest.raises(FileExistsError, match="disp_0101_0101"):
        OutputGuard([saver], [item])(None)  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="disp_0101_0101"):
        save_learn2reg_ddf(make_ddf(), tmp_path, *NLST)
    assert path.read_text() == "precious"
    replacing = SaveLearn2RegDDFd(tmp_path, overwrite=True)
    replacing.refuse_existing(item)
    replacing(item)
    torch.testing.assert_close(load_ddf(path, 3).as_tensor(), item["ddf"].as_tensor())


def test_field_of_the_networks_grid_is_refused(tmp_path: Path) -> None:
    item = learn2reg_item()
    item["ddf"] = make_ddf((4, 4, 4))
    with pytest.raises(
        ValueError, match=r"size \(4, 4, 4\) is not on the grid of fixed_scan.*\(5, 7, 6\).*ResampleDDFd"
    ):
        SaveLearn2RegDDFd(tmp_path)(item)
    assert not list(tmp_path.iterdir())
    SaveLearn2RegDDFd(tmp_path)(ResampleDDFd("fixed_scan")(item))
    assert load_learn2reg_ddf(tmp_path, *NLST).shape == (3, *GRID)
    SaveLearn2RegDDFd(tmp_path / "any", reference_key=None)(item)
    assert load_learn2reg_ddf(tmp_path / "any", *NLST).shape == (3, 4, 4, 4)


@pytest.mark.parametrize("absent", ["ddf", "fixed_subject", "moving_subject", "fixed_scan"])
def test_learn2reg_incomplete_items_are_refused(absent: str, tmp_path: Path) -> None:
    item = learn2reg_item()
    del item[absent]
    with pytest.raises(KeyError, match=absent):
        SaveLearn2RegDDFd(tmp_path)(item)
    assert not list(tmp_path.iterdir())


def test_name_keys_are_two() -> None:
    with pytest.raises(ValueError, match="name_keys must name the fixed and the moving scan"):
        SaveLearn2RegDDFd("out", name_keys=("a",))


def test_alignment_of_an_earlier_run_does_not_stay(tmp_path: Path) -> None:
    item = make_item((4, 5, 6))
    aligned = {**item, "initial_transform": [np.diag([1.0, 1.0, 1.0, 1.0]) + np.eye(4, k=3)]}
    files = SaveRegistrationd(tmp_path)(aligned)["files"]
    assert Path(files["affine"]).is_file()
    # without overwrite it may be somebody's own
    (tmp_path / "c_to_d_affine.tfm").write_text("own")
    SaveRegistrationd(tmp_path)({**item, "moving_subject": "c", "fixed_subject": "d"})
    assert (tmp_path / "c_to_d_affine.tfm").read_text() == "own"
    SaveRegistrationd(tmp_path, overwrite=True)(item)
    assert not Path(files["affine"]).exists()


def test_sheared_scans_have_a_field_in_voxels_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item = make_item((4, 5, 6))
    shear = np.eye(4)
    shear[0, 1] = 0.3
    item["ddf"] = MetaTensor(item["ddf"], affine=torch.from_numpy(shear))
    files = SaveRegistrationd(tmp_path, save_ddf=False)(item)["files"]
    assert "transform" not in files and Path(files["ddf"]).is_file() and "not at right angles" in caplog.text
    for file in set(files) - {"ddf"}:
        Path(files[file]).unlink()
    with pytest.raises(FileExistsError, match="_ddf.nii.gz"):
        SaveRegistrationd(tmp_path, save_ddf=False)(item)
    assert [path.name for path in tmp_path.iterdir()] == [Path(files["ddf"]).name]
