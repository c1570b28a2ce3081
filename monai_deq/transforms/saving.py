# SPDX-License-Identifier: Apache-2.0
"""Results of a registration written to files: warped scan, displacement field, record, and the field for Learn2Reg."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, convert_to_tensor

from monai_deq.utils import refuse_existing, replace_file, write_json

from .fields import learn2reg_ddf_name
from .warping import require_keys

__all__ = ["SaveLearn2RegDDFD", "SaveLearn2RegDDFDict", "SaveLearn2RegDDFd", "save_learn2reg_ddf", "save_nifti"]
__all__ += ["SaveRegistrationD", "SaveRegistrationDict", "SaveRegistrationd"]

_ADVICE = "Replace it with --overwrite true, or name another --output_dir."


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
        ddf: ``(3, *spatial)`` in voxels on the grid of the fixed scan as it lies in the data set.
        output_dir: folder of the file that is written and returned, called by :py:func:`learn2reg_ddf_name`.
        fixed, moving: files or names of the scans, e.g. ``"NLST_0001_0000"``.
        affine: ``(4, 4)`` of the fixed scan. Defaults to that of ``ddf``, or the identity.
        overwrite: replace an existing file, which is ``FileExistsError`` else.

    Raises:
        ValueError: When the field is not 3-D or not finite, or a scan is not named as Learn2Reg's are.
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
        overwrite: replace existing files.
        warped_key, ddf_key, label_key: warped scan, displacement field, and warped label map, optional in the item.
        name_keys: names of the moving and the fixed scan.
        record_keys, optional_record_keys: scalars that go into the record, found in the item or under ``record_key``.
        record_key: where :py:class:`FixedPointSolverd` puts its record.

    Raises:
        KeyError, FileExistsError: When the item lacks what is to be written, or a file is there already.
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
        optional_record_keys: Sequence[str] = ("verdict", "spectral_radius", "start_distance"),
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
        output_dir, overwrite: see :py:func:`save_learn2reg_ddf`.
        ddf_key: displacement field ``(3, *spatial)``.
        name_keys: files or names of the fixed and the moving scan.
        reference_key: the fixed scan as it lies in the data set, ``(C, *spatial)``, whose size the field must have;
            None for no check.

    Raises:
        KeyError, ValueError, FileExistsError: see :py:func:`save_learn2reg_ddf`; also when the item lacks something.
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


SaveLearn2RegDDFD = SaveLearn2RegDDFDict = SaveLearn2RegDDFd
SaveRegistrationD = SaveRegistrationDict = SaveRegistrationd
