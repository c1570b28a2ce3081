# SPDX-License-Identifier: Apache-2.0
"""Displacement fields: read from files, the names of the Learn2Reg challenge included, and carried to another grid."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor

from monai_deq.data import check_same_grid, source_of

from .images import PerKeyd, existing_file
from .warping import on_grid_of, require_keys

__all__ = ["LoadDDFD", "LoadDDFDict", "LoadDDFd", "learn2reg_ddf_name", "load_ddf", "load_learn2reg_ddf"]
__all__ += ["ResampleDDF", "ResampleDDFD", "ResampleDDFDict", "ResampleDDFd"]


def load_ddf(path: str | Path, spatial_dims: int) -> MetaTensor:
    """
    Read a displacement field as :py:class:`SaveRegistrationd` and :py:func:`save_learn2reg_ddf` write it.

    Args:
        path: NIfTI file, ``(H, W, D, 3)``, or ``(H, W, 1, 2)`` of a slice; voxels of its own grid.
        spatial_dims: 2 or 3.

    Returns:
        ``(ndim, *spatial)``, float32, with the affine of the file.

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


LoadDDFD = LoadDDFDict = LoadDDFd
ResampleDDFD = ResampleDDFDict = ResampleDDFd
