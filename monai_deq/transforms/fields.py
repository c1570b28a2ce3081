# SPDX-License-Identifier: Apache-2.0
"""Displacement fields read, resampled, and written with what else a registration gives; the files of Learn2Reg."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_numpy, convert_to_tensor

from monai_deq.data import check_same_grid, source_of
from monai_deq.solvers import MEASURES
from monai_deq.utils import refuse_existing, replace_file, write_json

from .warping import PerKeyd, on_grid_of, require_keys

__all__ = ["LoadDDFD", "LoadDDFDict", "LoadDDFd", "learn2reg_ddf_name", "load_ddf", "load_learn2reg_ddf"]
__all__ += ["ResampleDDF", "ResampleDDFD", "ResampleDDFDict", "ResampleDDFd"]
__all__ += ["SaveLearn2RegDDFD", "SaveLearn2RegDDFDict", "SaveLearn2RegDDFd", "save_learn2reg_ddf", "save_nifti"]
__all__ += ["SaveRegistrationD", "SaveRegistrationDict", "SaveRegistrationd"]

_ADVICE = "Replace it with --overwrite true, or name another --output_dir."


def existing_file(path: str | Path, name: str) -> Path:
    """The path, its ``~`` resolved; ``FileNotFoundError``, in which it is called ``name``, where there is no file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{name}: the file {str(path)!r} does not exist.")
    return path


def load_ddf(path: str | Path, spatial_dims: int) -> MetaTensor:
    """
    Read a displacement field as :py:class:`SaveRegistrationd` and :py:func:`save_learn2reg_ddf` write it, from a NIfTI
    file ``(H, W, D, 3)``, or ``(H, W, 1, 2)`` of a slice, voxels of its own grid, to ``(ndim, *spatial)``, float32,
    with the affine of the file.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: When there is no such file, it cannot be read, or holds no finite
            displacement field of so many dimensions.
    """
    path = existing_file(path, "displacement field")
    try:
        image: Any = nib.load(path)
        array = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as e:  # readers raise whatever their file format's library does
        raise RuntimeError(f"cannot read the displacement field {str(path)!r} ({type(e).__name__}: {e}).") from e
    form, last = ("(H, W, 1, 2)", (1, 2)) if spatial_dims == 2 else ("(H, W, D, 3)", (3,))
    if array.ndim != 4 or array.shape[-len(last) :] != last:
        raise ValueError(f"{path}: expected a {spatial_dims}-D displacement field {form}, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: the displacement field must be finite, it has NaN or infinity.")
    field = np.moveaxis(array[:, :, 0] if spatial_dims == 2 else array, -1, 0)
    tensor = MetaTensor(torch.from_numpy(np.ascontiguousarray(field)), affine=torch.from_numpy(image.affine))
    tensor.meta["filename_or_obj"] = str(path)
    return tensor


class LoadDDFd(PerKeyd):
    """
    Dictionary-based wrapper of :py:func:`load_ddf`, from the file name under ``ddf_key``, if any with
    ``allow_missing_keys``. Raises ``ValueError`` when the field lies on another grid than the image ``(C, *spatial)``
    under ``reference_key``.
    """

    def __init__(self, ddf_key: str, reference_key: str, spatial_dims: int, allow_missing_keys: bool = False) -> None:
        super().__init__((ddf_key,), allow_missing_keys)
        self.reference_key, self.spatial_dims = reference_key, spatial_dims

    def treat(self, item: dict[Hashable, Any], key: Hashable) -> None:
        reference, file = item[self.reference_key], item[key]
        item[key] = load_ddf(file, self.spatial_dims)
        try:
            check_same_grid(reference, item[key], source_of(reference, self.reference_key), str(file))
        except ValueError as e:
            raise ValueError(
                f"{file}: the displacement field to start from must lie on the grid of the fixed scan. {e}"
            ) from e


class ResampleDDF(Transform):
    """
    Resample a displacement field linearly to another size of the same field of view, as MONAI's ``Resize`` does with
    images, its values scaled with the voxels: it displaces the same points of the body by the same length.
    """

    backend = [TransformBackends.TORCH]

    def __call__(self, ddf: NdarrayOrTensor, spatial_size: Sequence[int]) -> torch.Tensor:  # type: ignore[override]
        """The field ``(ndim, *spatial)``, voxels of its own grid, as ``(ndim, *spatial_size)``, voxels of that grid."""
        field = convert_to_tensor(ddf, track_meta=False)
        if not field.is_floating_point():
            field = field.to(torch.float32)
        old, new = tuple(field.shape[1:]), tuple(int(n) for n in spatial_size)
        if len(old) != len(new) or field.shape[0] != len(old) or len(old) not in (2, 3):
            raise ValueError(f"ddf must be (ndim, *spatial) with {len(new)} axes, got {tuple(field.shape)}.")
        if old == new:
            return field
        # voxel borders, not centres, of the two grids coincide
        mode = "bilinear" if len(old) == 2 else "trilinear"
        field = F.interpolate(field[None], size=new, mode=mode, align_corners=False)[0]
        scale = field.new_tensor([n / o for n, o in zip(new, old, strict=True)])
        return field * scale.view(-1, *[1] * len(new))


class ResampleDDFd(MapTransform):
    """
    Dictionary-based wrapper of :py:class:`ResampleDDF`: bring the field, if any with ``allow_missing_keys``, to the
    grid of the image ``(C, *spatial)`` under ``reference_key``; a MetaTensor gives it its affine.
    """

    backend = ResampleDDF.backend

    def __init__(self, reference_key: str, ddf_key: str = "ddf", allow_missing_keys: bool = False) -> None:
        super().__init__((ddf_key, reference_key), allow_missing_keys)
        self.reference_key, self.ddf_key = reference_key, ddf_key
        self.resample = ResampleDDF()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.allow_missing_keys and self.ddf_key not in d:
            return d
        require_keys(d, (self.ddf_key, self.reference_key), "ResampleDDFd")
        reference = d[self.reference_key]
        d[self.ddf_key] = on_grid_of(self.resample(d[self.ddf_key], reference.shape[1:]), reference)
        return d


def _case_and_modality(scan: str | Path) -> tuple[str, str]:
    name = Path(scan).name.removesuffix(".gz").removesuffix(".nii")
    found = re.fullmatch(r"\w+_(\d{4})_(\d{4})", name) or re.fullmatch(r"[A-Za-z][A-Za-z0-9]*_(\d{4})()", name)
    if found is None:
        raise ValueError(
            f"{str(scan)!r} is no name of a Learn2Reg scan: expected TASK_CCCC_MMMM[.nii.gz] (case and modality, four "
            "digits each, e.g. NLST_0001_0000), or TASK_CCCC for modality 0000."
        )
    return found[1], found[2] or "0000"


def _learn2reg_names(fixed: str | Path, moving: str | Path) -> tuple[str, str]:
    """Name of the file that Learn2Reg expects for a pair, and the other one of the short and the long name."""
    (case_f, modality_f), (case_m, modality_m) = _case_and_modality(fixed), _case_and_modality(moving)
    short, long = f"disp_{case_f}_{case_m}.nii.gz", f"disp_{case_f}_{modality_f}_{case_m}_{modality_m}.nii.gz"
    return (short, long) if (modality_f, modality_m) == ("0000", "0001") else (long, short)


def learn2reg_ddf_name(fixed: str | Path, moving: str | Path) -> str:
    """
    Name of the file that the Learn2Reg challenge expects for a pair (Hering et al., IEEE TMI 2023).

    Args:
        fixed, moving: files or names of the scans, ``TASK_CCCC_MMMM`` with the number of the case and of the modality;
            ``TASK_CCCC`` stands for modality 0000; ``ValueError`` for others.

    Returns:
        ``disp_FFFF_MMMM.nii.gz``, the numbers of the cases, where the modalities are 0000 and 0001 (NLST);
        ``disp_FFFF_0000_MMMM_0000.nii.gz``, numbers and modalities, for all others (OASIS).
    """
    return _learn2reg_names(fixed, moving)[0]


def load_learn2reg_ddf(output_dir: str | Path, fixed: str | Path, moving: str | Path) -> MetaTensor:
    """
    Read the displacement field of a pair from the folder of a Learn2Reg submission, ``(3, *spatial)``, float32, voxels
    of the fixed scan. The name that Learn2Reg expects is looked for first, then the other of the short and the long
    one; for scans and errors see :py:func:`learn2reg_ddf_name` and :py:func:`load_ddf`.
    """
    folder, names = Path(output_dir).expanduser(), _learn2reg_names(fixed, moving)
    for name in names:
        if (folder / name).is_file():
            return load_ddf(folder / name, spatial_dims=3)
    raise FileNotFoundError(
        f"{str(folder)!r} has no displacement field of the fixed scan {str(fixed)!r} and the moving scan "
        f"{str(moving)!r}; looked for {names[0]} and {names[1]}."
    )


def save_nifti(path: str | Path, image: NdarrayOrTensor, affine: np.ndarray | None, spatial_dims: int) -> None:
    """
    Write a channel-first image as NIfTI, whole or not at all. Several channels become the last axis; a 2-D image gets
    the slice axis that NIfTI needs; half precision becomes float32, 64-bit integers int32, booleans uint8.

    Args:
        path: ``.nii`` or ``.nii.gz`` file.
        image: ``(C, *spatial)``, with as many spatial axes as ``spatial_dims`` says, 2 or 3.
        affine: ``(4, 4)``, or ``(3, 3)`` of a 2-D image; identity when None.
    """
    if image.ndim != spatial_dims + 1:
        raise ValueError(f"expected a channel-first {spatial_dims}-D image for {path}, got shape {tuple(image.shape)}.")
    if isinstance(image, torch.Tensor) and image.dtype == torch.bfloat16:  # which NumPy does not have
        image = image.float()
    array = convert_to_numpy(image)
    known = {"float16": np.float32, "int64": np.int32, "bool": np.uint8}
    array = array.astype(known.get(array.dtype.name, array.dtype))
    if spatial_dims == 2:
        array = array[..., None]
    array = np.moveaxis(array, 0, -1) if array.shape[0] > 1 else array[0]
    with replace_file(path) as temporary:
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else to_affine_nd(3, affine)), temporary)


def _affine_of(ddf: Any) -> np.ndarray | None:
    return convert_to_numpy(ddf.affine).astype(float) if isinstance(ddf, MetaTensor) else None


def save_learn2reg_ddf(
    ddf: NdarrayOrTensor,
    output_dir: str | Path,
    fixed: str | Path,
    moving: str | Path,
    affine: np.ndarray | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Write a displacement field as the Learn2Reg challenge takes it (Hering et al., IEEE TMI 2023), whole or not at all:
    NIfTI, ``(D, H, W, 3)``, float32, voxels, ``warped(x) = moving(x + ddf(x))``, component ``i`` along axis ``i``.

    Args:
        ddf: ``(3, *spatial)``, finite, in voxels on the grid of the fixed scan as it lies in the data set.
        output_dir: folder of the file that is written and returned, called by :py:func:`learn2reg_ddf_name`.
        fixed, moving: files or names of the scans, e.g. ``"NLST_0001_0000"``.
        affine: ``(4, 4)`` of the fixed scan. Defaults to that of ``ddf``, or the identity.
        overwrite: replace an existing file, which is ``FileExistsError`` else.
    """
    path = Path(output_dir) / learn2reg_ddf_name(fixed, moving)
    if not overwrite:
        refuse_existing([path], _ADVICE)
    field = convert_to_tensor(ddf, track_meta=False, dtype=torch.float32)
    if field.ndim != 4 or field.shape[0] != 3:
        raise ValueError(f"ddf must have shape (3, D, H, W) for a Learn2Reg field, got {tuple(field.shape)}.")
    if not torch.isfinite(field).all():
        raise ValueError(f"ddf must be finite in float32 to be written to {path.name}, it has NaN or infinity.")
    save_nifti(path, field, _affine_of(ddf) if affine is None else affine, spatial_dims=3)
    return path


class _PairSaver(MapTransform):
    """Base of what writes files named after the two scans of an item."""

    def __init__(self, keys: KeysCollection, output_dir: str | Path, overwrite: bool, name_keys: Sequence[str]) -> None:
        super().__init__(keys)
        if not isinstance(overwrite, bool):  # the text "false" would be taken for true
            raise ValueError(f"overwrite must be true or false, got {overwrite!r}.")
        self.output_dir, self.overwrite, self.name_keys = Path(output_dir), overwrite, tuple(name_keys)

    def paths(self, data: Mapping[Hashable, Any]) -> dict[str, Path]:
        """Files of an item with the names, by what is in them."""
        raise NotImplementedError

    def refuse_existing(self, data: Mapping[Hashable, Any]) -> None:
        """Raise ``FileExistsError`` when a file of the item is there already and must not be replaced."""
        if not self.overwrite:
            refuse_existing(self.paths(data).values(), _ADVICE)


class SaveRegistrationd(_PairSaver):
    """
    Write ``<name>_warped.nii.gz`` (moving scan on the fixed grid), ``<name>_ddf.nii.gz`` (``(H, W, D, 3)``, of a slice
    ``(H, W, 1, 2)``, voxels of the fixed grid, ``warped(x) = moving(x + ddf(x))``), ``<name>_record.json`` (what the
    solver said) and, where the item has it, ``<name>_warped_label.nii.gz``. ``name`` is ``<moving>_to_<fixed>``. The
    files carry the affine of the field, the identity when it is no ``MetaTensor``.

    Args:
        output_dir: folder of the files.
        overwrite: replace existing files, which are ``FileExistsError`` else.
        warped_key, ddf_key, label_key: warped scan, displacement field, and warped label map, optional in the item.
        name_keys: names of the moving and the fixed scan.
        record_keys, optional_record_keys: scalars that go into the record, found in the item or under ``record_key``.
        record_key: where :py:class:`FixedPointSolverd` puts its record.
    """

    def __init__(
        self,
        output_dir: str | Path,
        overwrite: bool = False,
        warped_key: str = "warped",
        ddf_key: str = "ddf",
        label_key: str = "warped_label",
        name_keys: Sequence[str] = ("moving_subject", "fixed_subject"),
        record_keys: Sequence[str] = ("steps", "evaluations", "residual", "relative_residual", "converged", "reason"),
        record_key: str = "record",
        optional_record_keys: Sequence[str] = ("verdict", "spectral_radius", "start_distance", *MEASURES),
    ) -> None:
        super().__init__((warped_key, ddf_key), output_dir, overwrite, name_keys)
        self.warped_key, self.ddf_key, self.label_key, self.record_key = warped_key, ddf_key, label_key, record_key
        self.record_keys, self.optional_record_keys = tuple(record_keys), tuple(optional_record_keys)

    def paths(self, data: Mapping[Hashable, Any]) -> dict[str, Path]:
        require_keys(data, self.name_keys, "SaveRegistrationd")
        name = "_to_".join(str(data[key]) for key in self.name_keys)
        ends = {"warped": "warped.nii.gz", "ddf": "ddf.nii.gz", "label": "warped_label.nii.gz", "record": "record.json"}
        return {what: self.output_dir / f"{name}_{end}" for what, end in ends.items()}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.refuse_existing(d)
        paths, known = self.paths(d), {**d.get(self.record_key, {}), **d}
        require_keys(known, (self.warped_key, self.ddf_key, *self.record_keys), "SaveRegistrationd")
        record = {key: str(d[key]) for key in self.name_keys}
        record |= {k: known[k] for k in (*self.record_keys, *self.optional_record_keys) if k in known}
        ddf = d[self.ddf_key]
        affine, dims = _affine_of(ddf), ddf.ndim - 1
        save_nifti(paths["warped"], d[self.warped_key], affine, dims)
        save_nifti(paths["ddf"], ddf, affine, dims)
        if self.label_key in d:
            save_nifti(paths["label"], convert_to_numpy(d[self.label_key]).astype(np.int32), affine, dims)
        write_json(paths["record"], record)  # last: where it is, the others are whole
        return d


class SaveLearn2RegDDFd(_PairSaver):
    """
    Dictionary-based wrapper of :py:func:`save_learn2reg_ddf`.

    Args:
        output_dir, overwrite: see :py:func:`save_learn2reg_ddf`, errors too.
        ddf_key: displacement field ``(3, *spatial)``.
        name_keys: files or names of the fixed and the moving scan.
        reference_key: the fixed scan as it lies in the data set, ``(C, *spatial)``, whose size the field must have;
            None for no check.
    """

    def __init__(
        self,
        output_dir: str | Path,
        overwrite: bool = False,
        ddf_key: str = "ddf",
        name_keys: Sequence[str] = ("fixed_subject", "moving_subject"),
        reference_key: str | None = "fixed_scan",
    ) -> None:
        super().__init__((ddf_key,), output_dir, overwrite, name_keys)
        if len(name_keys) != 2:
            raise ValueError(f"name_keys must name the fixed and the moving scan, got {name_keys!r}.")
        self.ddf_key, self.reference_key = ddf_key, reference_key

    def paths(self, data: Mapping[Hashable, Any]) -> dict[str, Path]:
        require_keys(data, self.name_keys, "SaveLearn2RegDDFd")
        return {"ddf": self.output_dir / learn2reg_ddf_name(*(data[key] for key in self.name_keys))}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        reference = () if self.reference_key is None else (self.reference_key,)
        require_keys(d, (self.ddf_key, *self.name_keys, *reference), "SaveLearn2RegDDFd")
        ddf = d[self.ddf_key]
        for key in reference:
            if tuple(ddf.shape[1:]) != tuple(d[key].shape[1:]):
                raise ValueError(
                    f"{self.ddf_key} of size {tuple(ddf.shape[1:])} is not on the grid of {key}, which has size "
                    f"{tuple(d[key].shape[1:])}; put ResampleDDFd before SaveLearn2RegDDFd."
                )
        fixed, moving = (d[key] for key in self.name_keys)
        save_learn2reg_ddf(ddf, self.output_dir, fixed, moving, overwrite=self.overwrite)
        return d


LoadDDFD = LoadDDFDict = LoadDDFd
ResampleDDFD = ResampleDDFDict = ResampleDDFd
SaveLearn2RegDDFD = SaveLearn2RegDDFDict = SaveLearn2RegDDFd
SaveRegistrationD = SaveRegistrationDict = SaveRegistrationd
