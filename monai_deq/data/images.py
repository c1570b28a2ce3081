# SPDX-License-Identifier: Apache-2.0
"""Image files as people have them: NIfTI and FreeSurfer's by nibabel, NRRD, MetaImage and DICOM by SimpleITK."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.utils import OptionalImportError, convert_to_numpy, optional_import

from monai_deq.utils import expand_user, replace_file

__all__ = ["IMAGE_FORMATS", "LPS", "check_affine", "existing_file", "image_dims", "image_stem", "is_planar"]
__all__ += ["load_nibabel", "load_simpleitk", "read_image", "refuse_damaged", "save_nifti", "simpleitk_affine"]

_NIBABEL = (".nii", ".nii.gz", ".mgz", ".mgh")
_ITK = (".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".ima")
#: what is read, in words
IMAGE_FORMATS = "NIfTI (.nii, .nii.gz) or .mgz; with SimpleITK also .nrrd, .mha, .dcm or the folder of a DICOM series"
#: beginnings of files whose names may say otherwise
_MAGIC = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"NRRD": "NRRD", b"II*\x00": "TIFF", b"MM\x00*": "TIFF"}
_MAGIC |= {
    b"PK\x03\x04": "ZIP",
    b"\x89HDF": "HDF5",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"%PDF": "PDF",
    b"\x93NUMPY": "NumPy",
}
#: endings that go with what is told by its first bytes, and what to do where the name has another
_FITS: dict[str, tuple[tuple[str, ...], str]] = {
    "NRRD": ((".nrrd", ".nhdr"), "name it .nrrd"),
    "NIfTI": ((".nii",), "name it .nii"),
    "compressed NIfTI": ((".nii.gz",), "name it .nii.gz"),
    "DICOM": ((), "name it .dcm, or give the folder of the series"),
    "Analyze": ((), "it does not say how the scan is oriented; convert it to NIfTI where that is known"),
    "HTML or XML": ((), "it may be the error page of a download"),
}
#: bytes of a number in a MetaImage
_METAIMAGE_BYTES = {b"MET_CHAR": 1, b"MET_UCHAR": 1, b"MET_SHORT": 2, b"MET_USHORT": 2, b"MET_INT": 4, b"MET_UINT": 4}
_METAIMAGE_BYTES |= {b"MET_LONG_LONG": 8, b"MET_ULONG_LONG": 8, b"MET_FLOAT": 4, b"MET_DOUBLE": 8}
#: RAS, of nibabel and MONAI, to LPS, of ITK and DICOM, and back
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def existing_file(path: str | Path, name: str) -> Path:
    """The path, its ``~`` resolved; ``FileNotFoundError``, in which it is called ``name``, where there is no file."""
    path = expand_user(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: the file {str(path)!r} does not exist.")
    return path


def image_stem(path: str | Path) -> str:
    """Name of a file without folder and ending, both of ``.nii.gz``."""
    name = Path(path).name
    ending = next((s for s in sorted((*_NIBABEL, *_ITK), key=len, reverse=True) if name.lower().endswith(s)), "")
    return name[: -len(ending)] if ending and len(ending) < len(name) else name


def load_simpleitk(purpose: str) -> Any:
    """The module ``SimpleITK``; ``OptionalImportError``, which says what for, where it is not installed."""
    module, found = optional_import("SimpleITK")
    if not found:
        raise OptionalImportError(f'{purpose} needs SimpleITK: pip install "monai_deq[itk]".')
    return module


def simpleitk_affine(image: Any) -> np.ndarray:
    """Voxel to RAS mm of an image of SimpleITK, ``(4, 4)``, of four axes the first three."""
    dims = image.GetDimension()
    space, affine = min(dims, 3), np.eye(4)
    direction = np.reshape(image.GetDirection(), (dims, dims))[:space, :space]
    affine[:space, :space] = direction * np.asarray(image.GetSpacing()[:space])
    affine[:space, 3] = image.GetOrigin()[:space]
    return np.asarray(LPS @ affine)


def _content(path: Path) -> str | None:
    """What a file is by its first bytes, where that is known."""
    try:
        with open(path, "rb") as file:
            head = file.read(352)
        if packed := head[:2] == b"\x1f\x8b":
            with gzip.open(path) as unpacked:
                head = unpacked.read(352)
    except (OSError, EOFError, zlib.error):
        return None
    if head[128:132] == b"DICM":
        return "DICOM"
    if head[344:347] == b"n+1" or head[4:7] == b"n+2":
        return "compressed NIfTI" if packed else "NIfTI"
    if head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") and head[344:347] != b"ni1":
        return "Analyze"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "HTML or XML"
    return next((n for m, n in _MAGIC.items() if head.startswith(m)), None)


def load_nibabel(path: Path) -> Any:
    """
    The image of a file that nibabel reads. A compressed one is read to its end, where gzip has the checksum: nibabel
    stops behind the last voxel, and never compares it. ``ValueError`` for a header of NIfTI that nibabel would mend.
    """
    image: Any = nib.load(path)  # type: ignore[attr-defined]
    if isinstance(image, nib.Nifti1Image):
        _refuse_header(image, path)
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if not packed:
        return image
    with gzip.open(path) as unpacked:
        return type(image).from_bytes(unpacked.read())


def _refuse_header(image: nib.Nifti1Image, path: Path) -> None:
    """``ValueError`` where voxels would be read out of the header, or the affine it gives be dropped."""
    with image.file_map["image"].get_prepare_fileobj("rb") as file:
        header = type(image.header).from_fileobj(file, check=False)
    if header["magic"].item()[:2] == b"n+" and header["vox_offset"] < header.single_vox_offset:
        raise ValueError(f"vox_offset {header['vox_offset']:g} is inside of the header")
    if wrong := [f"{name} {header[name]}" for name in ("qform_code", "sform_code") if not 0 <= header[name] <= 5]:
        raise ValueError(f"{wrong[0]} is none of 0 to 5, so that it is not known where the image lies")


def refuse_damaged(path: Path) -> None:
    """
    An error for what is compressed in a MetaImage or NRRD file and does not fit its checksum (``zlib.error``,
    ``gzip.BadGzipFile``, ``EOFError``): SimpleITK's readers do not compare it. ``ValueError`` as of
    :py:func:`_refuse_axes`.
    """
    _refuse_axes(path)
    content = path.read_bytes() if path.name.lower().endswith((".mha", ".nrrd")) else b""
    ends = b"\n\n" if content[:4] == b"NRRD" else b"ElementDataFile = LOCAL\n"
    header, _, body = content.partition(ends)
    if b"encoding: gz" in header:
        gzip.decompress(body)
    elif b"CompressedData = True" in header:
        said = {key: value.split() for key, _, value in (line.partition(b" = ") for line in header.splitlines())}
        if said.get(b"CompressedDataSize") != [str(len(body)).encode()]:
            raise ValueError(f"its CompressedDataSize is not that of the voxels, {len(body)} bytes")
        count = math.prod(map(int, (*said[b"DimSize"], *said.get(b"ElementNumberOfChannels", [b"1"]))))
        size = _METAIMAGE_BYTES.get(said[b"ElementType"][0].removesuffix(b"_ARRAY"))
        if size is not None and len(zlib.decompress(body)) != count * size:
            raise ValueError("its voxels are not as many as its DimSize says")


def _refuse_axes(path: Path) -> None:
    """``ValueError`` for a number of axes in a MetaImage or NRRD file at which SimpleITK's readers end the process."""
    if not path.name.lower().endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
        return
    with open(path, "rb") as file:
        axes = re.search(rb"^(?:NDims *=|dimension:) *(.*?)\s*$", file.read(4096), re.MULTILINE)
    if axes and axes[1] not in (b"2", b"3", b"4"):
        raise ValueError(f"{axes[0].decode(errors='replace').strip()!r} is none of 2, 3 and 4 axes")


def _by_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Array, affine, and time between the volumes of a 4-D file."""
    image: Any = load_nibabel(path)
    array = np.asarray(image.dataobj)  # whole numbers stay as they are, unless the header scales them
    return array, np.asarray(image.affine, dtype=float), float(([*image.header.get_zooms(), 1.0, 1.0])[3])


def _by_simpleitk(path: Path, name: str) -> tuple[np.ndarray, np.ndarray, float]:
    sitk = load_simpleitk(f"{name}: to read {str(path)!r}")
    if path.is_dir():
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
        if not series:
            raise ValueError(
                f"{name}: the folder {str(path)!r} holds no DICOM series; expected a file, {IMAGE_FORMATS}."
            )
        files = {uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), uid) for uid in series}
        if len(files) > 1:
            found = ", ".join(f"{uid} ({len(names)} files)" for uid, names in files.items())
            raise ValueError(f"{name}: {str(path)!r} holds {len(files)} DICOM series, {found}; give a folder of one.")
        image = sitk.ReadImage(files[series[0]])
    else:
        refuse_damaged(path)
        image = sitk.ReadImage(str(path))
    array, dims = sitk.GetArrayFromImage(image), image.GetDimension()
    components = image.GetNumberOfComponentsPerPixel() > 1
    array = array.transpose(*reversed(range(dims)), *([dims] if components else []))
    return array, simpleitk_affine(image), float((*image.GetSpacing(), 1.0, 1.0)[3])


def _refuse_unreadable(path: Path, name: str) -> None:
    """``ValueError`` for what is no image of a format that is read, by what it is."""
    lower = path.name.lower()
    if path.is_dir() or lower.endswith((".dcm", ".ima")):
        return
    content, known = _content(path), lower.endswith((*_NIBABEL, *_ITK))
    # the endings that go with it, and what to do about another one
    fits, advice = _FITS.get(content or "", ((), "export the scan from where it was made"))
    if content and not lower.endswith(fits or "\n"):
        raise ValueError(f"{name}: {str(path)!r} is a file of {content}; expected {IMAGE_FORMATS}: {advice}.")
    if not path.stat().st_size:
        raise ValueError(f"{name}: {str(path)!r} is empty, it has no bytes; copy or download it again.")
    if not known:
        raise ValueError(f"{name}: {str(path)!r} is of no format that is read; expected {IMAGE_FORMATS}.")


def read_image(path: str | Path, name: str, label: bool = False) -> MetaTensor:
    """
    Read an image to channel-first ``(C, *spatial)`` with its affine, voxel to RAS mm, ``(4, 4)``. The last axis of a
    4-D file are the channels. ``meta["spatial_shape"]`` is the shape in the file: of a slice two numbers or three.

    Args:
        path: file, or folder of one DICOM series; for the formats see :py:data:`IMAGE_FORMATS`.
        name: how to call it in messages.
        label: whole numbers stay exact, as int32 or int64. Defaults to False: float32.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is not of a known format, holds a vector image, or label numbers above ``2**63 - 1``.
        RuntimeError: When it cannot be read.
        OptionalImportError: When SimpleITK is needed and not installed.
    """
    path = expand_user(path)
    path = path if path.is_dir() else existing_file(path, name)
    _refuse_unreadable(path, name)
    try:
        nibabel = not path.is_dir() and path.name.lower().endswith(_NIBABEL)
        array, affine, between = _by_nibabel(path) if nibabel else _by_simpleitk(path, name)
    except (OptionalImportError, ValueError) as e:
        if str(e).startswith(f"{name}:"):
            raise
        raise RuntimeError(_damaged(path, name, e)) from e
    except Exception as e:  # readers raise whatever their file format's library does: EOFError, zlib.error, ...
        raise RuntimeError(_damaged(path, name, e)) from e
    if not array.size:
        raise ValueError(f"{name}: {str(path)!r} has no voxels, its size is {array.shape}; export it again.")
    if array.dtype.names or array.dtype.kind == "c" or array.ndim not in (2, 3, 4):
        what = "colour or complex voxels" if array.dtype.names or array.dtype.kind == "c" else f"{array.ndim} axes"
        raise ValueError(f"{name}: {str(path)!r} has {what}; expected one image of plain numbers.")
    array = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
    shape = array.shape[1:]
    check_affine(affine, len(shape), f"{name}: {str(path)!r}")
    tensor = torch.from_numpy(np.ascontiguousarray(_whole(array, path, name) if label else array.astype(np.float32)))
    meta: dict[str, Any] = {"filename_or_obj": str(path), "spatial_shape": list(shape)}
    meta |= {"original_affine": affine, "space": "RAS"}
    if len(array) > 1:
        meta["frame_spacing"] = between
    # MetaTensor takes the number of axes from the affine's rows
    return MetaTensor(tensor, affine=torch.from_numpy(affine), meta=meta, spatial_ndim=len(shape))


def check_affine(affine: np.ndarray, spatial_dims: int, name: str) -> None:
    """``ValueError`` where an affine ``(4, 4)`` is not finite, or gives an axis of so many no room of its own."""
    columns = affine[:3, :spatial_dims]
    sides = np.abs(columns).max(axis=0)
    if not (np.isfinite(affine).all() and sides.all() and np.linalg.matrix_rank(columns / sides) == spatial_dims):
        raise ValueError(
            f"{name} does not say where its voxels lie: the affine of its header is {affine[:3].round(4).tolist()}. "
            "Correct the header, or export it again."
        )


def image_dims(path: str | Path, name: str) -> int:
    """Whether a file is of slices, 2, or of volumes, 3, by its header; errors as of :py:func:`read_image`."""
    path = expand_user(path)
    path = path if path.is_dir() else existing_file(path, name)
    _refuse_unreadable(path, name)
    if path.is_dir():
        return 3
    try:
        if path.name.lower().endswith(_NIBABEL):
            shape = nib.load(path).shape  # type: ignore[attr-defined]
        else:
            _refuse_axes(path)
            reader = load_simpleitk(f"{name}: to read {str(path)!r}").ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            shape = reader.GetSize()
    except OptionalImportError:
        raise
    except Exception as e:
        raise RuntimeError(_damaged(path, name, e)) from e
    return 3 if len([n for n in shape[2:3] if n > 1]) else 2


def _damaged(path: Path, name: str, error: BaseException) -> str:
    reason = next(iter(str(error).strip().splitlines()), "")
    said = f"{name}: cannot read {str(path)!r} ({type(error).__name__}: {reason})."
    return f"{said} The file is damaged or incomplete; download it again."


def _whole(array: np.ndarray, path: Path, name: str) -> np.ndarray:
    """Label numbers as int32 where they fit, else int64; what is not whole stays, for a check to refuse."""
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or (array != np.round(array)).any() or np.abs(array).max(initial=0) >= 2.0**63:
            return array.astype(np.float32)
        array = array.astype(np.int64)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if high > 2**63 - 1:
        raise ValueError(f"{name}: {str(path)!r} has the label {high}; expected numbers up to {2**63 - 1}.")
    return array.astype(np.int32 if low >= -(2**31) and high < 2**31 else np.int64)


def is_planar(image: Any) -> bool:
    """Whether an image comes from a file of two axes, not of slices with a third one of one voxel."""
    return isinstance(image, MetaTensor) and len(image.meta.get("spatial_shape", ())) == 2


def save_nifti(path: str | Path, image: NdarrayOrTensor, affine: np.ndarray | None, spatial_dims: int) -> None:
    """
    Write a channel-first image as NIfTI, whole or not at all. Several channels become the last axis; a 2-D image gets
    the slice axis that NIfTI needs, unless its ``meta["spatial_shape"]`` has two numbers; half precision becomes
    float32, whole numbers of 64 bits those of 32 where they fit, booleans uint8.

    Args:
        path: ``.nii`` or ``.nii.gz`` file.
        image: ``(C, *spatial)``, with as many spatial axes as ``spatial_dims`` says, 2 or 3.
        affine: ``(4, 4)``, or ``(3, 3)`` of a 2-D image; identity when None.
    """
    if image.ndim != spatial_dims + 1:
        raise ValueError(f"expected a channel-first {spatial_dims}-D image for {path}, got shape {tuple(image.shape)}.")
    planar = is_planar(image) and len(image) == 1
    if isinstance(image, torch.Tensor) and image.dtype == torch.bfloat16:  # which NumPy does not have
        image = image.float()
    array = convert_to_numpy(image)
    known = {"float16": np.float32, "bool": np.uint8}
    if array.dtype == np.int64 and np.abs(array).max(initial=0) < 2**31:
        array = array.astype(np.int32)
    array = array.astype(known.get(array.dtype.name, array.dtype))
    if spatial_dims == 2 and not planar:
        array = array[..., None]
    array = np.moveaxis(array, 0, -1) if array.shape[0] > 1 else array[0]
    with replace_file(path) as temporary:
        affine = np.eye(4) if affine is None else to_affine_nd(3, affine)
        written = nib.Nifti1Image(array, affine, dtype=array.dtype)
        if isinstance(image, MetaTensor) and "frame_spacing" in image.meta and array.ndim == 4:
            written.header.set_zooms((*written.header.get_zooms()[:3], image.meta["frame_spacing"]))
        nib.save(written, temporary)
