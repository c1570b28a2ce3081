# SPDX-License-Identifier: Apache-2.0
"""Displacement fields as the Learn2Reg challenge takes them (Hering et al., IEEE TMI 2023;
https://learn2reg.grand-challenge.org): one NIfTI file a pair, ``(D, H, W, 3)``, float32, in voxels of the fixed scan,
``warped(x) = moving(x + ddf(x))``, component ``i`` along array axis ``i``.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms.transform import MapTransform
from monai.utils import convert_to_numpy, convert_to_tensor

from monai_deq.transforms.load_ddf import load_ddf
from monai_deq.transforms.save_registration import save_nifti
from monai_deq.utils import as_flag, refuse_existing

__all__ = [
    "SaveLearn2RegDDFD",
    "SaveLearn2RegDDFDict",
    "SaveLearn2RegDDFd",
    "learn2reg_ddf_name",
    "load_learn2reg_ddf",
    "save_learn2reg_ddf",
]

_ADVICE = "Replace it with --overwrite true, or name another --output_dir."


def _case_and_modality(scan: str | Path) -> tuple[str, str]:
    """The two numbers in the name of a Learn2Reg scan."""
    name = Path(scan).name.removesuffix(".gz").removesuffix(".nii")
    found = re.fullmatch(r"\w+_(\d{4})_(\d{4})", name) or re.fullmatch(r"[A-Za-z][A-Za-z0-9]*_(\d{4})()", name)
    if found is None:
        raise ValueError(
            f"{str(scan)!r} is no name of a Learn2Reg scan: expected TASK_CCCC_MMMM[.nii.gz] (case and modality, four "
            "digits each, e.g. NLST_0001_0000), or TASK_CCCC for modality 0000."
        )
    return found[1], found[2] or "0000"


def _names(fixed: str | Path, moving: str | Path) -> tuple[str, str]:
    """Short and long name of the file of a pair."""
    (case_f, modality_f), (case_m, modality_m) = _case_and_modality(fixed), _case_and_modality(moving)
    return f"disp_{case_f}_{case_m}.nii.gz", f"disp_{case_f}_{modality_f}_{case_m}_{modality_m}.nii.gz"


def learn2reg_ddf_name(fixed: str | Path, moving: str | Path) -> str:
    """
    Name of the file that Learn2Reg expects for a pair.

    Args:
        fixed: file or name of the fixed scan, ``TASK_CCCC_MMMM`` with the number of the case and of the modality;
            ``TASK_CCCC`` stands for modality 0000.
        moving: the same of the moving scan.

    Returns:
        ``disp_FFFF_MMMM.nii.gz``, the numbers of the cases, where the modalities are 0000 and 0001 (NLST);
        ``disp_FFFF_0000_MMMM_0000.nii.gz``, numbers and modalities, for all others (OASIS).

    Raises:
        ValueError: When a scan is not named so.
    """
    short, long = _names(fixed, moving)
    return short if (_case_and_modality(fixed)[1], _case_and_modality(moving)[1]) == ("0000", "0001") else long


def save_learn2reg_ddf(
    ddf: NdarrayOrTensor,
    output_dir: str | Path,
    fixed: str | Path,
    moving: str | Path,
    affine: np.ndarray | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Write a displacement field as Learn2Reg takes it, whole or not at all: ``(D, H, W, 3)``, float32. Numbers in half
    precision are kept as they are; those in double precision are rounded by less than 1e-5 voxel for displacements
    below 100 voxels.

    Args:
        ddf: ``(3, *spatial)`` in voxels on the grid of the fixed scan as it lies in the data set: a field of another
            size must be carried there first, see :py:class:`monai_deq.transforms.ResampleDDF`.
        output_dir: folder of the file, which is called by :py:func:`learn2reg_ddf_name`.
        fixed: file or name of the fixed scan, e.g. ``"NLST_0001_0000"``.
        moving: file or name of the moving scan.
        affine: ``(4, 4)`` of the fixed scan. Defaults to ``None``: that of ``ddf`` where it is a ``MetaTensor``, else
            the identity. Learn2Reg does not look at it.
        overwrite: replace an existing file. Defaults to ``False``.

    Returns:
        The file.

    Raises:
        ValueError: When the field is not 3-D or not finite, or a scan is not named as Learn2Reg's are.
        FileExistsError: When the file is there already and ``overwrite`` is not set.
    """
    path = Path(output_dir) / learn2reg_ddf_name(fixed, moving)
    if not as_flag(overwrite, "overwrite"):
        refuse_existing([path], _ADVICE)
    if affine is None and isinstance(ddf, MetaTensor):
        affine = convert_to_numpy(ddf.affine).astype(float)
    field = convert_to_tensor(ddf, track_meta=False, dtype=torch.float32)
    if field.ndim != 4 or field.shape[0] != 3:
        raise ValueError(f"ddf must have shape (3, D, H, W) for a Learn2Reg field, got {tuple(field.shape)}.")
    if not torch.isfinite(field).all():
        raise ValueError(f"ddf must be finite in float32 to be written to {path.name}, it has NaN or infinity.")
    save_nifti(path, field, affine, spatial_dims=3)
    return path


def load_learn2reg_ddf(output_dir: str | Path, fixed: str | Path, moving: str | Path) -> MetaTensor:
    """
    Read the displacement field of a pair from the folder of a Learn2Reg submission. Of a single file,
    :py:func:`monai_deq.transforms.load_ddf` does the same.

    Args:
        output_dir: folder of the submission.
        fixed: file or name of the fixed scan, e.g. ``"NLST_0001_0000"``.
        moving: file or name of the moving scan.

    Returns:
        ``(3, *spatial)``, float32, voxels of the fixed scan. The name that Learn2Reg expects is looked for first, then
        the other of the short and the long one.

    Raises:
        FileNotFoundError: When the folder has no field of the pair.
        RuntimeError: When the file cannot be read.
        ValueError: When it holds no finite 3-D displacement field, or a scan is not named as Learn2Reg's are.
    """
    folder = Path(output_dir).expanduser()
    expected = learn2reg_ddf_name(fixed, moving)
    names = sorted(_names(fixed, moving), key=lambda name: name != expected)
    for name in names:
        if (folder / name).is_file():
            return load_ddf(folder / name, spatial_dims=3)
    raise FileNotFoundError(
        f"{str(folder)!r} has no displacement field of the fixed scan {str(fixed)!r} and the moving scan "
        f"{str(moving)!r}; looked for {names[0]} and {names[1]}."
    )


class SaveLearn2RegDDFd(MapTransform):
    """
    Dictionary-based wrapper of :py:func:`save_learn2reg_ddf`.

    Args:
        output_dir: folder of the files.
        overwrite: replace existing files. Defaults to ``False``.
        ddf_key: displacement field ``(3, *spatial)``. Defaults to ``"ddf"``.
        name_keys: files or names of the fixed and the moving scan. Defaults to ``("fixed_subject", "moving_subject")``.
        reference_key: the fixed scan as it lies in the data set, ``(C, *spatial)``, whose size the field must have;
            ``None`` for no check. Defaults to ``"fixed_scan"``.

    Raises:
        KeyError: When the item lacks the field, a name or the scan.
        ValueError: When the field lies on another grid, see also :py:func:`save_learn2reg_ddf`.
        FileExistsError: When a file is there already and ``overwrite`` is not set.
    """

    def __init__(
        self,
        output_dir: str | Path,
        overwrite: bool = False,
        ddf_key: str = "ddf",
        name_keys: Sequence[str] = ("fixed_subject", "moving_subject"),
        reference_key: str | None = "fixed_scan",
    ) -> None:
        super().__init__((ddf_key,))
        if len(name_keys) != 2:
            raise ValueError(f"name_keys must name the fixed and the moving scan, got {name_keys!r}.")
        self.output_dir = Path(output_dir)
        self.overwrite = as_flag(overwrite, "overwrite")
        self.ddf_key = ddf_key
        self.name_keys = tuple(name_keys)
        self.reference_key = reference_key

    def _require(self, data: Mapping[Hashable, Any], keys: Sequence[str]) -> None:
        absent = [key for key in keys if key not in data]
        if absent:
            raise KeyError(f"SaveLearn2RegDDFd finds no {absent} in the item, which has {sorted(map(str, data))}.")

    def path(self, data: Mapping[Hashable, Any]) -> Path:
        """
        File of an item.

        Args:
            data: item with the names.
        """
        self._require(data, self.name_keys)
        return self.output_dir / learn2reg_ddf_name(*(data[key] for key in self.name_keys))

    def refuse_existing(self, data: Mapping[Hashable, Any]) -> None:
        """
        Raise when the file of the item is there already and must not be replaced.

        Args:
            data: item with the names.
        """
        if not self.overwrite:
            refuse_existing([self.path(data)], _ADVICE)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the field of the item."""
        d = dict(data)
        reference = () if self.reference_key is None else (self.reference_key,)
        self._require(d, (self.ddf_key, *self.name_keys, *reference))
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
