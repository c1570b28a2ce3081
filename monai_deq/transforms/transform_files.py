# SPDX-License-Identifier: Apache-2.0
"""Transforms in files of ITK's formats, as ANTs, elastix and Slicer read and write them, and displacement fields."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from monai_deq.data import (
    LPS,
    affine_of,
    check_affine,
    existing_file,
    is_planar,
    load_nibabel,
    load_simpleitk,
    refuse_damaged,
    same_grid,
    simpleitk_affine,
)
from monai_deq.utils import replace_file

from .geometry import ChainPart, compose_ddf, is_field, is_matrix

__all__ = ["FIELD_FORMATS", "TRANSFORM_FORMATS", "check_transform_format", "is_sheared", "load_ddf"]
__all__ += ["load_transform", "save_transform"]

_NIFTI = (".nii", ".nii.gz")
#: endings of displacement fields as images of vectors
FIELD_FORMATS = (*_NIFTI, ".mha", ".nrrd")
#: endings of ITK's transforms of any kind
TRANSFORM_FORMATS = (".h5", ".tfm", ".txt", ".mat")
#: codes of NIfTI: a displacement, whose components ITK turns from RAS itself, and a plain vector, which it does not
_DISPLACEMENT, _VECTOR = 1006, 1007
#: intent name of a slice that is written twice, as ITK takes NIfTI vectors on (H, W, 1) for two-dimensional ones
_SLICE = "slice"
#: classes of SimpleITK that are made with a number of dimensions
_OF_ANY_DIMENSION = ("AffineTransform", "ScaleTransform", "TranslationTransform")


def check_transform_format(path: str | Path, affine: bool = False) -> str:
    """The ending of a transform's file; ``ValueError`` for one that cannot be written, of an affine or of a field."""
    name = Path(path).name.lower()
    allowed = TRANSFORM_FORMATS if affine else (*FIELD_FORMATS, ".h5")
    ending = next((e for e in allowed if name.endswith(e)), None)
    if ending is None:
        what = "an affine transform" if affine else "a displacement field"
        raise ValueError(f"{str(path)!r}: {what} is written as {', '.join(allowed)}; give the file such an ending.")
    return ending


def is_sheared(affine: np.ndarray) -> bool:
    """Whether the axes of a grid are not at right angles, which ITK's images and transforms cannot describe."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(cosines.T @ cosines - np.eye(3)).max() > 2e-3)


def _lps_field(ddf: torch.Tensor, planar: bool) -> tuple[np.ndarray, np.ndarray]:
    """Components ``(*spatial, ndim)`` in LPS mm and the grid's affine in RAS, of a planar slice in two dimensions."""
    affine, field = affine_of(ddf), np.asarray(ddf.cpu() if isinstance(ddf, torch.Tensor) else ddf, dtype=np.float64)
    if is_sheared(affine):
        raise ValueError(
            "the voxel axes of the fixed scan are not at right angles (its affine has shear), which ITK's transforms "
            "cannot describe; resample the scan first."
        )
    millimetres = np.moveaxis(np.tensordot(affine[:3, : len(field)], field, axes=1), 0, -1)
    vectors = (millimetres * np.diag(LPS)[:3]).astype(np.float32)
    if planar:
        return vectors[..., :2], affine
    return (vectors[:, :, None] if vectors.ndim == 3 else vectors), affine


def _sitk_geometry(image: Any, affine: np.ndarray, dims: int) -> None:
    """Give an image of SimpleITK the place that an affine in RAS says."""
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:dims, :dims], axis=0)
    direction = lps[:dims, :dims] / spacing
    # to the next rotation, as headers keep their numbers in single precision
    u, _, v = np.linalg.svd(direction)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:dims, 3].tolist())
    image.SetDirection((u @ v).ravel().tolist())


def to_sitk(part: ChainPart, planar: bool = False) -> Any:
    """A matrix or a displacement field as a transform of SimpleITK, in LPS mm."""
    sitk = load_simpleitk("a transform of ITK")
    if is_field(part):
        vectors, affine = _lps_field(part, planar)
        dims = vectors.shape[-1]
        array = vectors.astype(np.float64).transpose(*reversed(range(dims)), dims)
        image = sitk.GetImageFromArray(array, isVector=True)
        _sitk_geometry(image, affine, dims)
        return sitk.DisplacementFieldTransform(image)
    dims = 2 if planar else 3
    lps = LPS @ np.asarray(part) @ LPS
    matrix = sitk.AffineTransform(dims)
    matrix.SetMatrix(lps[:dims, :dims].ravel().tolist())
    matrix.SetTranslation(lps[:dims, 3].tolist())
    return matrix


def save_transform(path: str | Path, transform: ChainPart | Sequence[ChainPart]) -> None:
    """
    Write a transform as ITK, ANTs, elastix and Slicer take it, in LPS mm, whole or not at all: it maps points of the
    fixed scan to the moving one's, and so resamples the moving scan onto the fixed one.

    Args:
        path: a field ends in ``.nii[.gz]`` (5-D, intent vector; a slice is there twice, or ITK would lose its place),
            ``.mha``, ``.nrrd`` or ``.h5``; a matrix in ``.tfm``, ``.txt``, ``.mat`` or ``.h5``; a chain in ``.h5``
            (ITK's composite transform). All but NIfTI, ``.tfm`` and ``.txt`` need SimpleITK.
        transform: displacement field ``(ndim, *spatial)``, voxels of its grid; matrix ``(4, 4)``, RAS mm; or a chain of
            them, in the order in which a point of the fixed scan passes through. A slice's are three-dimensional,
            unless its file has two axes.

    Raises:
        ValueError: When the ending is another, a field is not finite, or its voxel axes are not at right angles.
        OptionalImportError: When SimpleITK is needed and not installed.
    """
    chain = list(transform) if isinstance(transform, Sequence) else [transform]
    ending = check_transform_format(path, affine=len(chain) == 1 and is_matrix(chain[0]))
    if len(chain) != 1 and ending != ".h5":
        raise ValueError(f"{str(path)!r}: a chain of {len(chain)} transforms is written as .h5; compose it, or end so.")
    if not all(np.isfinite(np.asarray(part)).all() for part in chain):
        raise ValueError(f"{str(path)!r}: a transform must be finite to be written, it has NaN or infinity.")
    planar = any(map(is_planar, chain))
    if ending in _NIFTI:
        vectors, affine = _lps_field(chain[0], planar)  # type: ignore[arg-type]
        dims = vectors.shape[-1]
        flat = dims == 3 and vectors.shape[2] == 1
        vectors = np.repeat(vectors, 2, axis=2) if flat else vectors
        image = nib.Nifti1Image(vectors.reshape(*vectors.shape[:-1], *[1] * (4 - dims), dims), affine)
        image.header.set_intent(_VECTOR, name=_SLICE if flat else "")
        image.header.set_xyzt_units("mm")
        with replace_file(path) as temporary:
            nib.save(image, temporary)
        return
    if ending in (".tfm", ".txt"):  # without SimpleITK, as a slice of another plane has one
        lps = (LPS @ np.asarray(chain[0], dtype=float) @ LPS)[: 2 if planar else 3]
        dims = len(lps)
        numbers = [*lps[:, :dims].ravel().tolist(), *lps[:, 3].tolist()]
        text = f"#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_{dims}_{dims}\n"
        text += f"Parameters: {' '.join(map(repr, numbers))}\nFixedParameters: {' '.join(['0'] * dims)}\n"
        with replace_file(path) as temporary:
            temporary.write_text(text, encoding="ascii")
        return
    sitk = load_simpleitk(f"to write {str(path)!r}")
    with replace_file(path) as temporary:
        if ending in FIELD_FORMATS:
            field = to_sitk(chain[0], planar).GetDisplacementField()
            sitk.WriteImage(sitk.Cast(field, sitk.sitkVectorFloat32), str(temporary), True)
        elif len(chain) == 1:
            sitk.WriteTransform(to_sitk(chain[0], planar), str(temporary))
        else:
            composite = sitk.CompositeTransform(2 if planar else 3)
            for part in reversed(chain):  # of ITK's, the last one takes the point first
                composite.AddTransform(to_sitk(part, planar))
            sitk.WriteTransform(composite, str(temporary))


def _field_from_lps(vectors: np.ndarray, affine: np.ndarray, path: Path, flip: bool = True) -> MetaTensor:
    """Components ``(*spatial, ndim)`` in LPS mm, or RAS, as a field in voxels, ``(ndim, *spatial)``."""
    dims = vectors.shape[-1]
    if not np.isfinite(vectors).all():
        raise ValueError(f"{path}: the displacement field must be finite, it has NaN or infinity.")
    check_affine(affine, dims, str(path))
    millimetres = vectors * np.diag(LPS)[:dims] if flip else vectors
    inverse = np.linalg.inv(affine)[:dims, :dims]
    field = np.moveaxis(millimetres.astype(np.float64) @ inverse.T, -1, 0).astype(np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(field))
    meta = {"filename_or_obj": str(path), "spatial_shape": list(field.shape[1:])}
    return MetaTensor(tensor, affine=torch.from_numpy(affine), meta=meta, spatial_ndim=dims)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of readers, which raise whatever their file format's library does, as ``RuntimeError``."""
    try:
        yield
    except Exception as e:
        reason = next((line for line in reversed(str(e).strip().splitlines()) if line), "")
        raise RuntimeError(f"cannot read the transform {str(path)!r} ({type(e).__name__}: {reason}).") from e


def _read_nifti_field(path: Path) -> MetaTensor:
    with _reading(path):
        image = load_nibabel(path)
        array, affine = np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine, dtype=float)
    if array.ndim == 5 and array.shape[3] == 1 and array.shape[-1] in (2, 3):
        vectors = array[:, :, :, 0] if array.shape[-1] == 3 else array[:, :, 0, 0]
        if image.header.get_intent()[2] == _SLICE and array.shape[2:] == (2, 1, 3):
            vectors = vectors[:, :, :1]
        return _field_from_lps(vectors, affine, path, int(image.header["intent_code"]) != _DISPLACEMENT)
    if array.ndim == 4 and (array.shape[-1] == 3 or array.shape[2:] == (1, 2)):
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: the displacement field must be finite, it has NaN or infinity.")
        field = np.moveaxis(array[:, :, 0] if array.shape[-1] == 2 else array, -1, 0)
        check_affine(affine, field.ndim - 1, str(path))
        tensor = torch.from_numpy(np.ascontiguousarray(field))
        meta = {"filename_or_obj": str(path), "spatial_shape": list(array.shape[:3])}
        return MetaTensor(tensor, affine=torch.from_numpy(affine), meta=meta, spatial_ndim=field.ndim - 1)
    raise ValueError(
        f"{path}: expected a displacement field, in LPS mm as ITK writes it, (H, W, D, 1, 3), or in voxels, "
        f"(H, W, D, 3) or of a slice (H, W, 1, 2), got shape {array.shape}."
    )


def _sitk_field(image: Any, path: Path) -> MetaTensor:
    sitk = load_simpleitk(f"to read {str(path)!r}")
    dims = image.GetDimension()
    if image.GetNumberOfComponentsPerPixel() != dims or dims not in (2, 3):
        raise ValueError(
            f"{path}: expected a displacement field, {dims} components in {dims} dimensions, got "
            f"{image.GetNumberOfComponentsPerPixel()}."
        )
    vectors = sitk.GetArrayFromImage(image).transpose(*reversed(range(dims)), dims)
    return _field_from_lps(vectors, simpleitk_affine(image), path)


def _refuse_incomplete(path: Path, transform: Any) -> None:
    """``ValueError`` for a text file of ITK's whose numbers are not those of its transforms: without a line of them
    SimpleITK takes one for the identity, of too many it takes the first ones, and of ``1,5`` the ``1``.
    """
    blocks = [b for b in path.read_text(encoding="utf-8").split("Transform:")[1:] if "CompositeTransform" not in b[:60]]
    for number, (block, part) in enumerate(zip(blocks, _leaves(transform.Downcast()), strict=True)):
        if not part.IsLinear():
            continue  # refused as such, or of any size
        kind = type(part)
        made = kind(part.GetDimension()) if kind.__name__ in _OF_ANY_DIMENSION else kind()
        of_centre = {made.GetNumberOfFixedParameters(), *([3] if kind.__name__ == "Euler3DTransform" else [])}
        for name, counts in (("Parameters", {made.GetNumberOfParameters()}), ("FixedParameters", of_centre)):
            line = next((line for line in block.splitlines() if line.startswith(f"{name}:")), None)
            if line is None or len([float(text) for text in line.partition(":")[2].split()]) not in counts:
                wanted = f"a line '{name}:' of {max(counts)} numbers"
                raise ValueError(f"transform {number}, {part.GetName()}, needs {wanted}, got {str(line)[:60]!r}")


def _refuse_cut(content: bytes) -> None:
    """``ValueError`` for a MATLAB file, version 4, that ends before its numbers do: SimpleITK makes up the rest."""
    at = 0
    while at < len(content):
        kind, rows, columns, imaginary, name = struct.unpack_from("<5i", content, at)
        if not 0 <= kind < 1000:
            return  # of another byte order, or none: SimpleITK has read it
        at += 20 + name + rows * columns * (1 + imaginary) * (8, 4, 4, 2, 2, 1)[kind // 10 % 10]
    if at != len(content):
        raise ValueError(f"it has {len(content)} of {at} bytes")


def _leaves(transform: Any) -> list[Any]:
    """A transform of SimpleITK, or those of a composite one."""
    if transform.GetName() != "CompositeTransform":
        return [transform]
    parts = (transform.GetNthTransform(i).Downcast() for i in range(transform.GetNumberOfTransforms()))
    return [leaf for part in parts for leaf in _leaves(part)]


def _from_sitk(transform: Any, path: Path) -> list[ChainPart]:
    sitk = load_simpleitk(f"to read {str(path)!r}")
    kind, dims = transform.GetName(), transform.GetDimension()
    if kind == "CompositeTransform":
        composite = sitk.CompositeTransform(transform)
        parts = [composite.GetNthTransform(i) for i in reversed(range(composite.GetNumberOfTransforms()))]
        return [found for part in parts for found in _from_sitk(part, path)]
    if kind == "DisplacementFieldTransform":
        return [_sitk_field(sitk.DisplacementFieldTransform(transform).GetDisplacementField(), path)]
    if not transform.IsLinear() and kind != "IdentityTransform":
        raise ValueError(
            f"{path}: a {kind} is neither affine nor a displacement field; write it as a field first, e.g. with "
            "SimpleITK's TransformToDisplacementField."
        )
    origin = np.asarray(transform.TransformPoint([0.0] * dims))
    lps = np.eye(4)
    lps[:dims, 3] = origin
    for axis in range(dims):
        lps[:dims, axis] = np.asarray(transform.TransformPoint(np.eye(dims)[axis].tolist())) - origin
    if not np.isfinite(lps).all():
        raise ValueError(f"{path}: a transform must be finite, it has NaN or infinity.")
    return [LPS @ lps @ LPS]


def load_transform(path: str | Path) -> list[ChainPart]:
    """
    Read a transform as :py:func:`save_transform` and ITK, ANTs, elastix or Slicer write it, or a displacement field in
    voxels as :py:class:`SaveRegistrationd` does: a chain, in the order in which a point of the fixed scan passes.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: When there is no such file, it cannot be read, or holds no affine
            matrix and no finite displacement field.
        OptionalImportError: When SimpleITK is needed, for all but NIfTI, and not installed.
    """
    path = existing_file(path, "transform")
    name = path.name.lower()
    if name.endswith(_NIFTI):
        return [_read_nifti_field(path)]
    image = name.endswith((*FIELD_FORMATS, ".nhdr", ".mhd"))
    if not image and not name.endswith((*TRANSFORM_FORMATS, ".hdf5", ".xfm")):
        formats = ", ".join((*FIELD_FORMATS, *TRANSFORM_FORMATS))
        raise ValueError(f"{path}: a transform is read from {formats}.")
    sitk = load_simpleitk(f"to read {str(path)!r}")
    with _reading(path):
        refuse_damaged(path)
        content = sitk.ReadImage(str(path)) if image else sitk.ReadTransform(str(path))
        if name.endswith((".tfm", ".txt", ".xfm")):
            _refuse_incomplete(path, content)
        elif name.endswith(".mat"):
            _refuse_cut(path.read_bytes())
    return [_sitk_field(content, path)] if image else _from_sitk(content, path)


def load_ddf(path: str | Path, spatial_dims: int, reference: torch.Tensor | None = None) -> MetaTensor:
    """
    Read a transform, of any file that :py:func:`load_transform` reads, as one displacement field in voxels,
    ``(ndim, *spatial)``, float32.

    Args:
        path: the file.
        spatial_dims: 2 or 3. A slice's field is taken in its plane.
        reference: image ``(C, *spatial)`` on whose grid it is wanted. Defaults to ``None``: that of the field.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: When there is no such file, it cannot be read, holds no finite
            displacement field of so many dimensions, or without a reference no field alone.
    """
    chain = load_transform(path)
    if reference is None:
        if len(chain) != 1 or not isinstance(chain[0], MetaTensor):
            raise ValueError(f"{path}: the transform is no single displacement field; name the image it is wanted for.")
        field = chain[0]
        if spatial_dims == 2 and field.ndim == 4 and field.shape[-1] == 1:
            # of a slice; a plane is left through its normal alone
            field = MetaTensor(field[:2, ..., 0], meta=dict(field.meta), spatial_ndim=2)
        if field.ndim != spatial_dims + 1:
            raise ValueError(f"{path}: expected a {spatial_dims}-D displacement field, got {tuple(field.shape)}.")
        return field
    alone = chain[0] if len(chain) == 1 else None
    same = isinstance(alone, MetaTensor) and len(alone) == reference.ndim - 1 and same_grid(alone, reference)
    return alone if same else compose_ddf(chain, reference)  # type: ignore[return-value]
