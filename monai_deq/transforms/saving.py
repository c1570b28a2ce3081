# SPDX-License-Identifier: Apache-2.0
"""What a registration gives, written; the fields of Learn2Reg."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, convert_to_tensor

from monai_deq.certificates import OPTIONAL_RECORDS
from monai_deq.data import affine_of, load_simpleitk, save_nifti
from monai_deq.utils import expand_user, read_json, refuse_existing, refuse_other_settings, write_json

from .geometry import chain_matrix, is_matrix
from .items import require_keys
from .transform_files import check_transform_format, is_sheared, load_ddf, save_transform

__all__ = ["SaveLearn2RegDDFD", "SaveLearn2RegDDFDict", "SaveLearn2RegDDFd", "learn2reg_ddf_name"]
__all__ += ["SaveRegistrationD", "SaveRegistrationDict", "SaveRegistrationd"]
__all__ += ["load_learn2reg_ddf", "save_learn2reg_ddf"]

logger = logging.getLogger("monai_deq")

_ADVICE = "Replace it with --overwrite true, or name another --output_dir."
#: what the record has, and what it may have
_SOLVER = ("steps", "evaluations", "residual", "relative_residual", "converged", "reason")
_MAYBE = (*OPTIONAL_RECORDS, "summary", "intensities", "settings")


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
    folder, names = expand_user(output_dir), _learn2reg_names(fixed, moving)
    for name in names:
        if (folder / name).is_file():
            return load_ddf(folder / name, spatial_dims=3)
    raise FileNotFoundError(
        f"{str(folder)!r} has no displacement field of the fixed scan {str(fixed)!r} and the moving scan "
        f"{str(moving)!r}; looked for {names[0]} and {names[1]}."
    )


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

    def paths(self, data: Mapping[Any, Any]) -> dict[str, Path]:
        """Files of an item with the names, by what is in them."""
        raise NotImplementedError

    def is_done(self, data: Mapping[Any, Any], settings: Mapping[str, Any]) -> bool:
        """Whether the results of an item are there, whole and made with these settings."""
        return all(path.is_file() for path in self.paths(data).values())

    def refuse_existing(self, data: Mapping[Any, Any]) -> None:
        """Raise ``FileExistsError`` when a file of the item is there already and must not be replaced."""
        if not self.overwrite:
            refuse_existing(self.paths(data).values(), _ADVICE)


class SaveRegistrationd(_PairSaver):
    """
    Write what a registration gives, named as the item's ``"name"`` says, else ``<moving>_to_<fixed>``:

    - ``_warped.nii.gz``: the moving scan on the fixed grid, ``"warped_scan"`` or else ``"warped"``;
    - ``_warped_label.nii.gz``: its label map there, where the item has ``"warped_label"``;
    - ``_transform.nii.gz``: the displacement field as ITK, ANTs and Slicer read it, see :py:func:`save_transform`;
    - ``_affine.tfm``: what came before it, where that is affine alone (it is in ``_transform`` too);
    - ``_ddf.nii.gz``: the field in voxels of the fixed grid, ``(H, W, D, 3)``, of a slice ``(H, W, 1, 2)``,
      ``warped(x) = moving(x + ddf(x))``, as MONAI has it;
    - ``_record.json``: what the solver said, and the item's ``"summary"`` and ``"settings"``.

    Their paths come back under ``"files"``, by what is in them. They carry the affine of the field, the identity when
    it is no ``MetaTensor``.

    Args:
        output_dir: folder of the files.
        overwrite: replace existing files, which are ``FileExistsError`` else.
        transform_format: ending of the transform's file. Defaults to ``".nii.gz"``; None: none is written.
        save_ddf: write the field in voxels too.
        name_keys: names of the moving and the fixed scan.
    """

    #: what the results depend on, for the records of items that do not have their own
    settings: Mapping[str, Any] | None = None

    def __init__(
        self,
        output_dir: str | Path,
        overwrite: bool = False,
        transform_format: str | None = ".nii.gz",
        save_ddf: bool = True,
        name_keys: Sequence[str] = ("moving_subject", "fixed_subject"),
    ) -> None:
        super().__init__(("warped", "ddf"), output_dir, overwrite, name_keys)
        ending = ".nii" if transform_format is None else check_transform_format(f"transform{transform_format}")
        if not ending.startswith(".nii"):
            load_simpleitk(f"transform_format {transform_format}")
        self.transform_format, self.save_ddf = transform_format, save_ddf

    def paths(self, data: Mapping[Any, Any]) -> dict[str, Path]:
        require_keys(data, self.name_keys, "SaveRegistrationd")
        name = str(data.get("name") or "_to_".join(str(data[key]) for key in self.name_keys))
        ends = {"warped": "warped.nii.gz", "label": "warped_label.nii.gz", "record": "record.json"}
        ends |= {"ddf": "ddf.nii.gz"} if self.save_ddf else {}
        ends |= {"transform": f"transform{self.transform_format}"} if self.transform_format else {}
        ends |= {"affine": "affine.tfm"} if _affine_alone(data) is not None and self.transform_format else {}
        return {what: self.output_dir / f"{name}_{end}" for what, end in ends.items()}

    def is_done(self, data: Mapping[Any, Any], settings: Mapping[str, Any]) -> bool:
        """Whether an item has all its files, the record last; ``ValueError`` where they were made with other settings
        than these, as JSON has them."""
        paths = self.paths(data)
        file = paths["record"]
        # a label map or an affine not every pair has
        if not all(path.is_file() for what, path in paths.items() if what not in ("label", "affine")):
            return False
        try:
            said = read_json(file)["settings"]
        except (ValueError, KeyError, TypeError):
            said = None
        refuse_other_settings(file, said, settings)
        return True

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.refuse_existing(d)
        paths, known = self.paths(d), {**d.get("record", {}), **d}
        require_keys(known, ("warped", "ddf", *_SOLVER), "SaveRegistrationd")
        warped = d.get("warped_scan", d["warped"])
        record: dict[str, Any] = {key: str(d[key]) for key in self.name_keys}
        record |= {} if self.settings is None else {"settings": self.settings}
        record |= {k: known[k] for k in (*_SOLVER, *_MAYBE) if k in known}
        ddf = d["ddf"]
        affine, dims = _affine_of(ddf), ddf.ndim - 1
        if "transform" in paths and is_sheared(affine_of(ddf)):
            message = "%s: not written: the voxel axes of the fixed scan are not at right angles; see _ddf.nii.gz"
            logger.warning(message, paths.pop("transform"))
            paths["ddf"] = paths["warped"].with_name(paths["warped"].name.replace("_warped.", "_ddf."))
            if not self.overwrite:
                refuse_existing([paths["ddf"]], _ADVICE)
        save_nifti(paths["warped"], warped, affine, dims)
        if "warped_label" in d:
            save_nifti(paths["label"], d["warped_label"], affine, dims)
        else:
            del paths["label"]
        if "ddf" in paths:
            save_nifti(paths["ddf"], ddf, affine, dims)
        if "transform" in paths:
            save_transform(paths["transform"], d.get("transform", ddf))
        if "affine" in paths:
            save_transform(paths["affine"], _affine_alone(d))  # type: ignore[arg-type]
        elif self.overwrite:  # one of an earlier run would be taken for a part of this one
            stale = paths["record"].name.replace("_record.json", "_affine.tfm")
            paths["record"].with_name(stale).unlink(missing_ok=True)
        write_json(paths["record"], record)  # last: where it is, the others are whole
        d["files"] = {what: str(path) for what, path in paths.items()}
        return d


def _affine_alone(data: Mapping[Any, Any]) -> np.ndarray | None:
    """What came before the displacement field as one matrix, where it is that and not the identity."""
    chain = data.get("initial_transform") or ()
    if isinstance(chain, (str, Path)) or not all(
        not isinstance(part, (str, Path)) and is_matrix(part) for part in chain
    ):
        return None
    matrix = chain_matrix(chain)
    return None if np.array_equal(matrix, np.eye(4)) else matrix


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

    def paths(self, data: Mapping[Any, Any]) -> dict[str, Path]:
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
