# SPDX-License-Identifier: Apache-2.0
"""Image files: what is read, what is refused, and which numbers are written."""

from __future__ import annotations

import gzip
import io
import locale
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from scans import blobs, grid, world

from monai_deq.data import affine_of, image_dims, image_stem, read_image, save_nifti


def truncated(folder: Path, name: str = "cut.nii.gz") -> str:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((12, 10, 8)), np.eye(4)), folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    return str(folder / name)


@pytest.mark.parametrize("make", [truncated, lambda folder: truncated(folder, "cut.nii")])
def test_damaged_files(tmp_path: Path, make: Callable[[Path], str]) -> None:
    file = make(tmp_path)
    with pytest.raises(RuntimeError, match="download it again") as caught:
        read_image(file, "fixed")
    assert str(caught.value).startswith(f"fixed: cannot read {file!r}")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"moving: the file .*absent.nii.gz' does not exist"):
        read_image(tmp_path / "absent.nii.gz", "moving")


def test_folder_without_a_series(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    with pytest.raises(ValueError, match=rf"fixed: the folder '{tmp_path}' holds no DICOM series"):
        read_image(tmp_path, "fixed")


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


def test_other_shapes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"channel-first 3-D image.*\(1, 4, 5\)"):
        save_nifti(tmp_path / "x.nii", np.zeros((1, 4, 5)), None, 3)
    assert not list(tmp_path.iterdir())


SHAPE = (7, 6, 5)
AFFINE = grid(SHAPE, (1.5, 2.0, 3.0), "LPI", (10, -20, 30), (3, -2, 5))
VALUES = blobs(world(AFFINE, SHAPE)).astype(np.float32)


def as_sitk(array: np.ndarray = VALUES, affine: np.ndarray = AFFINE) -> sitk.Image:
    result = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    lps, dims = np.diag([-1, -1, 1, 1]) @ affine, array.ndim
    spacing = np.linalg.norm(lps[:dims, :dims], axis=0)
    result.SetSpacing(spacing.tolist())
    result.SetDirection((lps[:dims, :dims] / spacing).ravel().tolist())
    result.SetOrigin(lps[:dims, 3].tolist())
    return result


def write_series(folder: Path, uid: str, values: np.ndarray = VALUES) -> Path:
    """A DICOM series of axial slices."""
    folder.mkdir(exist_ok=True)
    before = locale.setlocale(locale.LC_ALL)
    image = sitk.Cast(as_sitk(values), sitk.sitkInt16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for i in range(image.GetDepth()):
        piece = image[:, :, i]
        tags = {
            "0008|0060": "MR",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",
            "0008|0018": f"{uid}.{i + 1}",
            "0020|000e": uid,
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|0013": str(i + 1),
            "0020|0032": "\\".join(f"{v:.6f}" for v in image.TransformIndexToPhysicalPoint((0, 0, i))),
            "0020|0037": "\\".join(f"{v:.6f}" for v in np.reshape(image.GetDirection(), (3, 3)).T[:2].ravel()),
        }
        for key, value in tags.items():
            piece.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}.{i + 1}.dcm"))
        writer.Execute(piece)
    locale.setlocale(locale.LC_ALL, before)  # GDCM sets it to "C" where it writes, and Python would read ASCII
    return folder


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd", ".NII.GZ"])
def test_volume(ending, tmp_path):
    path = tmp_path / f"a.b{ending}"
    if ending.startswith(".mg"):
        nib.save(nib.freesurfer.MGHImage(VALUES, AFFINE), path)
    elif ending.lower().startswith(".nii"):
        nib.save(nib.Nifti1Image(VALUES, AFFINE), path)
    else:
        sitk.WriteImage(as_sitk(), str(path))
    image = read_image(path, "fixed")
    assert image.dtype == torch.float32 and image.shape == (1, *SHAPE)
    np.testing.assert_allclose(image[0], VALUES, rtol=1e-6)
    np.testing.assert_allclose(affine_of(image), AFFINE, atol=1e-5)
    assert image.meta["filename_or_obj"] == str(path) and image.meta["spatial_shape"] == [*SHAPE]
    assert image_dims(path, "fixed") == 3
    assert image_stem(path) == "a.b"


def test_dicom(tmp_path):
    folder = write_series(tmp_path / "series", "1.2.826.0.1.3680043.2.1125.7")
    before = locale.setlocale(locale.LC_ALL)
    image = read_image(folder, "fixed")
    assert image_dims(folder / sorted(os.listdir(folder))[0], "fixed") == 2
    assert locale.setlocale(locale.LC_ALL) == before
    # GDCM puts the slices in the order of their normal, which a left-handed grid has the other way round
    affine, values = AFFINE, np.trunc(VALUES)
    if np.linalg.det(AFFINE[:3, :3]) * -1 * -1 < 0 or not np.allclose(affine_of(image), AFFINE, atol=1e-3):
        turn = np.eye(4)
        turn[2, 2], turn[2, 3] = -1, SHAPE[2] - 1
        affine, values = AFFINE @ turn, values[:, :, ::-1]
    np.testing.assert_allclose(affine_of(image), affine, atol=1e-3)
    np.testing.assert_allclose(image[0], values, atol=1)
    assert image_dims(folder, "fixed") == 3
    single = sorted(folder.iterdir())[0]
    slice_ = read_image(single, "fixed")
    assert slice_.shape == (1, *SHAPE[:2], 1) and image_dims(single, "fixed") == 2
    np.testing.assert_allclose(affine_of(slice_)[:3, :2], AFFINE[:3, :2], atol=1e-4)
    other = "1.2.826.0.1.3680043.2.1125.8"
    write_series(folder, other)
    with pytest.raises(ValueError, match="holds 2 DICOM series") as error:
        read_image(folder, "fixed")
    assert other in str(error.value) and "1125.7" in str(error.value) and "5 files" in str(error.value)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="^fixed: the folder .*empty.* holds no DICOM series"):
        read_image(tmp_path / "empty", "fixed")


def zipped() -> bytes:
    """What a .docx and a .zip are."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    return held.getvalue()


def numpy_file() -> bytes:
    held = io.BytesIO()
    np.save(held, VALUES)
    return held.getvalue()


def nrrd_file() -> bytes:
    return b"NRRD0004\ntype: float\ndimension: 3\nsizes: 1 1 1\nencoding: raw\n\n\0\0\0\0"


HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n" * 8

#: content, and the word that says what it is
OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG": (lambda: b"\x89PNG\r\n\x1a\n" + b"\0" * 500, "PNG"),
    "JPEG": (lambda: b"\xff\xd8\xff\xe0" + b"\0" * 500, "JPEG"),
    "TIFF": (lambda: b"II*\0" + b"\0" * 500, "TIFF"),
    "TIFF of the other end": (lambda: b"MM\0*" + b"\0" * 500, "TIFF"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + b"\0" * 500, "HDF5"),
    "NumPy": (numpy_file, "NumPy"),
    "ZIP": (zipped, "ZIP"),
    "PDF": (lambda: b"%PDF-1.7\n" + b"\0" * 500, "PDF"),
    "NRRD": (nrrd_file, "NRRD"),
    "DICOM": (lambda: b"\0" * 128 + b"DICM" + b"\0" * 500, "DICOM"),
}


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "scan.mgz", "scan.mha", "scan.png", "scan"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_image_is_refused_by_what_it_is(kind, name, tmp_path):
    content, word = OTHERS[kind]
    (tmp_path / name).write_bytes(content())
    for read in (read_image, image_dims):
        with pytest.raises(ValueError) as error:
            read(tmp_path / name, "moving")
        text = str(error.value)
        assert text.startswith("moving: ") and name in text and f"is a file of {word};" in text
        assert "damaged" not in text and len(text.splitlines()) == 1


def test_compressed_by_name_and_not_by_content(tmp_path):
    """PNG inside gzip is still no NIfTI."""
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(b"\x89PNG\r\n\x1a\n" + b"\0" * 500))
    with pytest.raises(ValueError, match="is a file of PNG"):
        read_image(tmp_path / "scan.nii.gz", "moving")


def error_of(path: Path) -> str:
    with pytest.raises((ValueError, RuntimeError)) as error:
        read_image(path, "moving")
    text = str(error.value)
    assert text.startswith("moving: ") and path.name in text and len(text.splitlines()) == 1, text
    return text


def test_page_and_text_and_nothing(tmp_path):
    for name in ("page.nii.gz", "page.nii", "page.nrrd"):
        (tmp_path / name).write_bytes(HTML)
        assert "HTML" in error_of(tmp_path / name)
    for name in ("empty.nii.gz", "empty.mha", "empty.mgz", "empty.nii"):
        (tmp_path / name).write_bytes(b"")
        assert "empty" in error_of(tmp_path / name).replace(name, "")
    (tmp_path / "notes.txt").write_text("some notes")
    text = error_of(tmp_path / "notes.txt")
    assert "of no format that is read" in text and ".nrrd" in text and "damaged" not in text
    with pytest.raises(FileNotFoundError, match="moving: .*absent.nii.gz"):
        read_image(tmp_path / "absent.nii.gz", "moving")


def test_damaged_files_are_called_so(tmp_path):
    whole = tmp_path / "whole.nii.gz"
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.normal(size=(30, 30, 30)).astype(np.float32), AFFINE), whole)
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(whole.read_bytes()[:5000])
    assert "damaged or incomplete" in error_of(cut)
    nib.save(nib.load(whole), tmp_path / "plain.nii")
    (tmp_path / "cut.nii").write_bytes((tmp_path / "plain.nii").read_bytes()[:5000])
    assert "damaged or incomplete" in error_of(tmp_path / "cut.nii")
    sitk.WriteImage(as_sitk(), str(tmp_path / "plain.mha"))
    (tmp_path / "junk.nii.gz").write_bytes(b"\x1f\x8b\x08\0" + b"\xff" * 400)  # which zlib refuses
    assert "damaged or incomplete" in error_of(tmp_path / "junk.nii.gz")
    (tmp_path / "cut.mha").write_bytes((tmp_path / "plain.mha").read_bytes()[:600])
    assert "damaged or incomplete" in error_of(tmp_path / "cut.mha")


def test_names_that_say_another_known_format(tmp_path):
    nib.save(nib.Nifti1Image(VALUES, AFFINE), tmp_path / "a.nii")
    (tmp_path / "plain.nii.gz").write_bytes((tmp_path / "a.nii").read_bytes())  # NIfTI that is not compressed
    text = error_of(tmp_path / "plain.nii.gz")
    assert "download it again" not in text and ".nii" in text
    with gzip.open(tmp_path / "packed.nii", "wb") as file:
        file.write((tmp_path / "a.nii").read_bytes())
    text = error_of(tmp_path / "packed.nii")
    assert "download it again" not in text and ".nii.gz" in text


def test_vectors_and_colours_are_refused(tmp_path):
    colours = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, AFFINE), tmp_path / "rgb.nii.gz")
    assert "colour" in error_of(tmp_path / "rgb.nii.gz")
    nib.save(nib.Nifti1Image(VALUES.astype(np.complex64), AFFINE), tmp_path / "complex.nii.gz")
    assert "complex" in error_of(tmp_path / "complex.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((*SHAPE, 1, 3), np.float32), AFFINE), tmp_path / "field.nii.gz")
    assert "5 axes" in error_of(tmp_path / "field.nii.gz")


@pytest.mark.parametrize(
    "values, dtype, expected",
    [
        ([0, 1, 2**31 - 1], np.uint32, torch.int32),
        ([0, 1, 2**32 - 1], np.uint32, torch.int64),
        ([0, 2**40 + 1, 2**62 + 1], np.int64, torch.int64),
        ([0, 2**63 - 1, 5], np.uint64, torch.int64),
        ([0, -3, 7], np.int16, torch.int32),
        ([0, 200, 255], np.uint8, torch.int32),
        ([0, 3, 1000], np.float32, torch.int32),
        ([0, 2**33, 2**53 - 1], np.float64, torch.int64),
    ],
)
def test_label_numbers(values, dtype, expected, tmp_path):
    array = np.resize(np.array(values, dtype=dtype), SHAPE)
    files = [tmp_path / "seg.nii.gz", tmp_path / "seg.nrrd"]
    nib.save(nib.Nifti1Image(array, AFFINE, dtype=array.dtype), files[0])
    sitk.WriteImage(as_sitk(array), str(files[1]))
    for path in files:
        label = read_image(path, "label", label=True)
        assert label.dtype == expected and np.array_equal(label[0].numpy().astype(object), array.astype(object))


def test_label_numbers_that_are_none(tmp_path):
    array = np.resize(np.array([0, 2**63], dtype=np.uint64), SHAPE)
    nib.save(nib.Nifti1Image(array, AFFINE, dtype=np.uint64), tmp_path / "huge.nii.gz")
    with pytest.raises(ValueError, match=r"^seg: .*huge.nii.gz.* has the label 9223372036854775808"):
        read_image(tmp_path / "huge.nii.gz", "seg", label=True)
    for value in (0.5, float("nan"), float("inf"), 2.0**64):
        nib.save(nib.Nifti1Image(np.full(SHAPE, value), AFFINE), tmp_path / "odd.nii.gz")
        assert read_image(tmp_path / "odd.nii.gz", "seg", label=True).is_floating_point()  # for a check to refuse


def test_scaled_header(tmp_path):
    stored = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    image = nib.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(0.5, 10)
    image.header["scl_slope"], image.header["scl_inter"] = 0.5, 10
    image.to_filename(tmp_path / "scaled.nii.gz")
    raw = bytearray(gzip.decompress((tmp_path / "scaled.nii.gz").read_bytes()))
    raw[112:120] = np.array([0.5, 10], dtype="<f4").tobytes()  # scl_slope and scl_inter
    (tmp_path / "scaled.nii").write_bytes(raw)
    expected = np.asarray(nib.load(tmp_path / "scaled.nii").dataobj)
    assert expected.max() > 100 and float(expected[0, 0, 1] - expected[0, 0, 0]) == 0.5
    np.testing.assert_allclose(read_image(tmp_path / "scaled.nii", "a")[0], expected)
    raw[112:120] = np.array([2, 0], dtype="<f4").tobytes()
    (tmp_path / "labels.nii").write_bytes(raw)
    label = read_image(tmp_path / "labels.nii", "a", label=True)
    assert not label.is_floating_point() and np.array_equal(
        label[0], np.asarray(nib.load(tmp_path / "labels.nii").dataobj)
    )


def test_analyze_without_orientation_is_refused(tmp_path):
    nib.save(nib.AnalyzeImage(VALUES, None), tmp_path / "old.hdr")
    assert "of no format that is read" in error_of(tmp_path / "old.img")
    assert "Analyze" in error_of(tmp_path / "old.hdr")
    # the same header under a name that promises more
    (tmp_path / "old.nii").write_bytes((tmp_path / "old.hdr").read_bytes() + (tmp_path / "old.img").read_bytes())
    text = error_of(tmp_path / "old.nii")
    assert "Analyze" in text and "oriented" in text and "damaged" not in text


def test_series_of_volumes(tmp_path):
    image = nib.Nifti1Image(np.stack([VALUES, VALUES * 2, VALUES * 3], axis=-1), AFFINE)
    image.header.set_zooms((1.5, 2.0, 3.0, 2.5))
    nib.save(image, tmp_path / "time.nii.gz")
    series = read_image(tmp_path / "time.nii.gz", "moving")
    assert series.shape == (3, *SHAPE) and series.meta["frame_spacing"] == pytest.approx(2.5)
    assert image_dims(tmp_path / "time.nii.gz", "moving") == 3
    save_nifti(tmp_path / "again.nii.gz", series, affine_of(series), 3)
    again = nib.load(tmp_path / "again.nii.gz")
    assert again.shape == (*SHAPE, 3) and again.header.get_zooms()[3] == pytest.approx(2.5)
    np.testing.assert_array_equal(again.get_fdata(), image.get_fdata())


@pytest.mark.parametrize(
    "shape, dims", [((7, 6), 2), ((7, 6, 1), 2), ((7, 6, 1, 3), 2), ((7, 6, 5), 3), ((1, 6, 5), 3), ((7, 6, 5, 2), 3)]
)
def test_image_dims(shape, dims, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    assert image_dims(tmp_path / "a.nii.gz", "a") == dims
    if len(shape) < 4:
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros(shape[::-1], np.float32)), str(tmp_path / "a.mha"))
        assert image_dims(tmp_path / "a.mha", "a") == dims


@pytest.mark.parametrize("shape", [(7, 6), (7, 6, 1)])
def test_slices_there_and_back(shape, tmp_path):
    affine = AFFINE.copy()
    if len(shape) == 2:
        affine = grid((7, 6), (1.5, 2, 1), "LPS", centre=(3, 4, 5))
    nib.save(nib.Nifti1Image(VALUES[:, :, 0].reshape(shape), affine), tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz", "a")
    assert image.meta["spatial_shape"] == [*shape]
    flat = MetaTensor(image.reshape(1, 7, 6), meta=dict(image.meta), spatial_ndim=2)
    save_nifti(tmp_path / "b.nii.gz", flat, affine_of(flat), 2)
    again = nib.load(tmp_path / "b.nii.gz")
    assert again.shape == shape
    np.testing.assert_allclose(again.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(again.get_fdata().squeeze(), VALUES[:, :, 0])


@pytest.mark.parametrize(
    "given, written",
    [
        (torch.int64, np.int32),
        (torch.bool, np.uint8),
        (torch.float16, np.float32),
        (torch.bfloat16, np.float32),
        (torch.uint8, np.uint8),
    ],
)
def test_types_that_are_written(given, written, tmp_path):
    image = torch.arange(2 * 3 * 4).reshape(1, 2, 3, 4).to(given)
    save_nifti(tmp_path / "a.nii.gz", image, None, 3)
    again = nib.load(tmp_path / "a.nii.gz")
    assert again.get_data_dtype() == written
    np.testing.assert_array_equal(np.asarray(again.dataobj), image[0].to(torch.float64))


def test_large_labels_are_written_exactly(tmp_path):
    image = torch.tensor([0, 2**40 + 1, 2**62 + 1, -(2**35)]).reshape(1, 2, 2, 1)
    save_nifti(tmp_path / "a.nii.gz", image, None, 3)
    assert torch.equal(read_image(tmp_path / "a.nii.gz", "a", label=True).as_tensor(), image)


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".mha", ".nrrd"])
def test_a_flipped_bit_of_a_compressed_file_is_refused_or_harmless(tmp_path: Path, ending: str) -> None:
    rng = np.random.default_rng(0)
    voxels = rng.random((12, 10, 8)).astype(np.float32)
    file = tmp_path / f"scan{ending}"
    if ending in (".mha", ".nrrd"):
        image = sitk.GetImageFromArray(voxels.T)
        image.SetSpacing((1.0, 2.0, 3.0))
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        sitk.WriteImage(image, file, useCompression=True)
    else:
        kind = nib.Nifti1Image if ending == ".nii.gz" else nib.MGHImage
        nib.save(kind(voxels, np.diag([1.0, 2.0, 3.0, 1.0])), file)
    whole, refused = file.read_bytes(), 0
    headers = {".mha": b"LOCAL\n", ".nrrd": b"\n\n"}  # of text, without a checksum
    start = 8 * (whole.index(headers[ending]) + 20) if ending in headers else 0
    for bit in start + rng.choice(8 * len(whole) - start, 60, replace=False):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            image = read_image(file, "scan")
        except (RuntimeError, ValueError) as e:
            assert str(file) in str(e)
            refused += 1
        else:
            np.testing.assert_array_equal(image.as_tensor()[0], voxels)
            np.testing.assert_array_equal(image.affine, np.diag([1.0, 2.0, 3.0, 1.0]))
    assert refused > 40


@pytest.mark.parametrize(
    ("offset", "number", "reason"),
    [
        (108, np.float32(0), "vox_offset 0 is inside of the header"),  # the header would be read as voxels
        (252, np.int16(64), "qform_code 64 is none of 0 to 5"),  # nibabel drops what it does not know
        (254, np.int16(-1), "sform_code -1 is none of 0 to 5"),
        (280, np.float32("nan"), "does not say where its voxels lie"),
        (292, np.float32("inf"), "does not say where its voxels lie"),
        (42, np.int16(0), "has no voxels, its size is "),
    ],
)
def test_headers_without_a_meaning_are_refused(offset, number, reason, tmp_path):
    nib.save(nib.Nifti1Image(VALUES, AFFINE), tmp_path / "a.nii")
    whole = bytearray((tmp_path / "a.nii").read_bytes())
    whole[offset : offset + number.nbytes] = number.tobytes()
    for name in ("b.nii", "b.nii.gz"):
        (tmp_path / name).write_bytes(gzip.compress(whole) if name.endswith(".gz") else whole)
        assert reason in error_of(tmp_path / name)


@pytest.mark.parametrize("column", [0, 2])
def test_a_grid_without_extent_is_refused(column, tmp_path):
    affine = AFFINE.copy()
    affine[:3, column] = 0
    image = nib.Nifti1Image(VALUES, AFFINE)
    image.set_sform(affine, code=1)
    nib.save(image, tmp_path / "a.nii.gz")
    assert "does not say where its voxels lie" in error_of(tmp_path / "a.nii.gz")


@pytest.mark.parametrize(
    ("line", "changed", "reason"),
    [
        (b"NDims = 3", b"NDims = -3", "'NDims = -3' is none of 2, 3 and 4 axes"),  # ends the process
        (b"DimSize = 7 6 5", b"DimSize = 9 6 5", "its voxels are not as many as its DimSize says"),
        (b"CompressedDataSize = ", b"Comment = ", "its CompressedDataSize is not that of the voxels"),
    ],
)
def test_a_header_of_metaimage_that_does_not_fit_is_refused(line, changed, reason, tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6, 7), np.int16)), tmp_path / "a.mha", useCompression=True)
    whole = (tmp_path / "a.mha").read_bytes()
    assert line in whole
    (tmp_path / "b.mha").write_bytes(whole.replace(line, changed))
    assert reason in error_of(tmp_path / "b.mha")
    if b"NDims" in line:
        with pytest.raises(RuntimeError, match="none of 2, 3 and 4 axes"):
            image_dims(tmp_path / "b.mha", "a")
