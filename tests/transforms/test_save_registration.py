# SPDX-License-Identifier: Apache-2.0
"""SaveRegistrationd: the files, read back with nibabel, say what was computed; nothing is lost or left half-written."""

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
from monai_deq.networks.nets import DEQRegistrationNet
from monai_deq.transforms import FixedPointSolverd, SaveRegistrationd, WarpByDDFd, save_nifti

SIZES = [(7, 9), (5, 7, 6)]
# a coronal slice or an oblique volume: neither diagonal nor of one spacing
AFFINE = np.array([[0.8, 0, 0.1, 3], [0, 0.2, -1.5, 7], [0.1, 2.5, 0, -4], [0, 0, 0, 1.0]])
SAID = {"steps": 7, "evaluations": 9.5, "residual": 5e-4, "relative_residual": 1e-3, "converged": True}
SAID |= {"reason": "tolerance"}
NAMES = ("m_to_f_warped.nii.gz", "m_to_f_ddf.nii.gz", "m_to_f_warped_label.nii.gz", "m_to_f_record.json")


def make_item(size: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    meta = {"affine": torch.from_numpy(AFFINE)}
    item = {
        "moving_subject": "m",
        "fixed_subject": "f",
        "moving_scan": torch.from_numpy(rng.normal(size=(1, *size)).astype(np.float32) * 1000),
        "moving_label": torch.from_numpy(rng.integers(0, 36, (1, *size)).astype(np.float32)),
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
    assert out.keys() == item.keys() and files(folder) == set(NAMES)
    warped, ddf, label = (nib.load(folder / name) for name in NAMES[:3])
    grid = size if len(size) == 3 else (*size, 1)
    assert warped.shape == label.shape == grid and ddf.shape == (*grid, len(size))
    assert (warped.get_data_dtype(), ddf.get_data_dtype(), label.get_data_dtype()) == ("<f4", "<f4", "<i4")
    for image in (warped, ddf, label):
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    field = np.asarray(ddf.dataobj)
    for axis in range(len(size)):
        np.testing.assert_array_equal(field[..., axis].reshape(size), item["ddf"][axis].numpy())
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
    record = json.loads((folder / NAMES[3]).read_text())
    assert record == {"moving_subject": "m", "fixed_subject": "f", **SAID}


def test_label_is_optional_and_field_without_affine_gets_the_identity(tmp_path: Path) -> None:
    item = make_item((4, 5))
    del item["warped_label"]
    item["ddf"] = item["ddf"].as_tensor()
    SaveRegistrationd(tmp_path)(item)
    assert files(tmp_path) == {NAMES[0], NAMES[1], NAMES[3]}
    np.testing.assert_array_equal(nib.load(tmp_path / NAMES[1]).affine, np.eye(4))


def test_record_is_valid_json_of_plain_values(tmp_path: Path) -> None:
    item = {**make_item((4, 5)), "steps": torch.tensor(3), "residual": torch.tensor(float("nan"))}
    item |= {"relative_residual": np.float32(np.inf), "converged": torch.tensor(False), "reason": "non-finite"}
    SaveRegistrationd(tmp_path)(item)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads((tmp_path / NAMES[3]).read_text(), parse_constant=refuse)
    assert record["steps"] == 3 and record["residual"] is None and record["relative_residual"] is None
    assert record["converged"] is False and record["reason"] == "non-finite"
    assert "verdict" not in record
    examined = {**item, "verdict": "diverging", "spectral_radius": torch.tensor(1.5)}
    SaveRegistrationd(tmp_path, overwrite=True)(examined)
    record = json.loads((tmp_path / NAMES[3]).read_text(), parse_constant=refuse)
    assert record["verdict"] == "diverging" and record["spectral_radius"] == 1.5 and "start_distance" not in record


class Half(torch.nn.Module):
    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1.0 - ddf)


@pytest.mark.parametrize("size", SIZES)
def test_takes_what_the_solver_transform_gives(tmp_path: Path, size: tuple[int, ...]) -> None:
    network = DEQRegistrationNet(Half(), num_states=0)
    fixed = MetaTensor(torch.rand(1, *size), affine=AFFINE)
    item = {"moving": torch.rand(1, *size), "fixed": fixed, "moving_subject": "m", "fixed_subject": "f"}
    Compose([FixedPointSolverd(network, tolerance=0.1), SaveRegistrationd(tmp_path)])(item)
    # residual of step k: 0.5^k * sqrt(ndim)
    steps = next(k for k in range(1, 20) if 0.5**k * len(size) ** 0.5 <= 0.1)
    record = json.loads((tmp_path / NAMES[3]).read_text())
    assert record["steps"] == steps and record["converged"] is True and record["reason"] == "tolerance"
    assert record["residual"] == pytest.approx(0.5**steps * len(size) ** 0.5)
    np.testing.assert_allclose(read(tmp_path / NAMES[1]), 1 - 0.5**steps)
    np.testing.assert_allclose(nib.load(tmp_path / NAMES[0]).affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize("existing", NAMES)
def test_existing_result_is_refused(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    for overwrite in (False, "false", "False"):
        saver = SaveRegistrationd(tmp_path, overwrite=overwrite)  # type: ignore[arg-type]
        for call in (saver, saver.refuse_existing):
            with pytest.raises(FileExistsError, match=rf"{existing}.*--overwrite true"):
                call(make_item((4, 5)))
    assert files(tmp_path) == {existing} and (tmp_path / existing).read_text() == "precious"


@pytest.mark.parametrize("overwrite", [True, "true", "True"])
def test_overwrite(tmp_path: Path, overwrite: Any) -> None:
    SaveRegistrationd(tmp_path)(make_item((4, 5), seed=0))
    item = {**make_item((4, 5), seed=1), "steps": 99}
    SaveRegistrationd(tmp_path, overwrite=overwrite)(item)
    assert files(tmp_path) == set(NAMES)
    np.testing.assert_array_equal(read(tmp_path / NAMES[0])[..., 0], item["warped"][0].numpy())
    assert json.loads((tmp_path / NAMES[3]).read_text())["steps"] == 99


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_overwrite_must_be_a_flag(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="overwrite must be true or false"):
        SaveRegistrationd(tmp_path, overwrite=value)


@pytest.mark.parametrize("failing", [0, 1, 2])
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


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.rand(1, 4, 5, 3, dtype=torch.float64), "<f8"),
        (torch.rand(3, 4, 5, 3).half(), "<f4"),
        (torch.rand(1, 4, 5, 3).bfloat16(), "<f4"),
        (np.random.default_rng(0).random((1, 4, 5, 3)).astype(np.float16), "<f4"),
        (torch.arange(60).reshape(1, 4, 5, 3), "<i4"),
        (torch.arange(60).reshape(1, 4, 5, 3) > 30, "|u1"),
        (torch.arange(60, dtype=torch.int16).reshape(1, 4, 5, 3), "<i2"),
    ],
)
def test_number_types(tmp_path: Path, image: Any, expected: str) -> None:
    save_nifti(tmp_path / "x.nii.gz", image, None, 3)
    back = nib.load(tmp_path / "x.nii.gz")
    assert back.get_data_dtype() == expected
    values = np.asarray(image.double() if isinstance(image, torch.Tensor) else image)
    expected_values = values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)
    np.testing.assert_array_equal(np.asarray(back.dataobj), expected_values)


def test_affine_of_a_plane(tmp_path: Path) -> None:
    save_nifti(tmp_path / "x.nii", np.zeros((1, 4, 5), np.float32), np.diag([2.0, 3.0, 1.0]), 2)
    back = nib.load(tmp_path / "x.nii")
    assert back.shape == (4, 5, 1)
    np.testing.assert_array_equal(back.affine, np.diag([2.0, 3.0, 1.0, 1.0]))


def test_errors_and_aliases(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"channel-first 3-D image.*\(1, 4, 5\)"):
        save_nifti(tmp_path / "x.nii", np.zeros((1, 4, 5)), None, 3)
    assert not files(tmp_path)
    assert transforms.SaveRegistrationD is transforms.SaveRegistrationd is transforms.SaveRegistrationDict
