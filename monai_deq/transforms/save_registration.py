# SPDX-License-Identifier: Apache-2.0
"""Write the result of a registration: warped scan, displacement field, record."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms.transform import MapTransform
from monai.utils import convert_to_numpy

from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["SaveRegistrationD", "SaveRegistrationDict", "SaveRegistrationd", "save_nifti"]


def save_nifti(
    path: str | Path, image: torch.Tensor | np.ndarray, affine: np.ndarray | None, spatial_dims: int
) -> None:
    """
    Write a channel-first image as NIfTI, whole or not at all. Several channels become the last axis; a 2-D image
    keeps the slice axis that NIfTI needs. Number types that NIfTI does not have are written as the nearest one that
    readers know: half precision as float32, 64-bit integers as int32, booleans as uint8.

    Args:
        path: ``.nii`` or ``.nii.gz`` file.
        image: ``(C, *spatial)``.
        affine: ``(4, 4)``, or ``(3, 3)`` of a 2-D image; identity when ``None``.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: When the image has another number of axes.
    """
    if image.ndim != spatial_dims + 1:
        raise ValueError(f"expected a channel-first {spatial_dims}-D image for {path}, got shape {tuple(image.shape)}.")
    if isinstance(image, torch.Tensor) and image.dtype in (torch.float16, torch.bfloat16):
        image = image.float()
    array = convert_to_numpy(image)
    array = array.astype(
        {"float16": np.float32, "int64": np.int32, "bool": np.uint8}.get(array.dtype.name, array.dtype)
    )
    if spatial_dims == 2:
        array = array[..., None]
    array = np.moveaxis(array, 0, -1) if array.shape[0] > 1 else array[0]
    with replace_file(path) as temporary:
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else to_affine_nd(3, affine)), temporary)


class SaveRegistrationd(MapTransform):
    """
    Write ``<name>_warped.nii.gz`` (moving scan on the fixed grid), ``<name>_ddf.nii.gz`` (``(H, W, D, 3)``, of a slice
    ``(H, W, 1, 2)``, voxels of the fixed grid, ``warped(x) = moving(x + ddf(x))``), ``<name>_record.json`` (what the
    solver said) and, where the item has it, ``<name>_warped_label.nii.gz``. ``name`` is ``<moving>_to_<fixed>``.

    All files carry the affine of the field, the identity when the field is no MetaTensor.

    Args:
        output_dir: folder of the files.
        overwrite: replace existing files. Defaults to ``False``.
        warped_key: warped scan. Defaults to ``"warped"``.
        ddf_key: displacement field. Defaults to ``"ddf"``.
        label_key: warped label map, optional in the item. Defaults to ``"warped_label"``.
        name_keys: names of the moving and the fixed scan. Defaults to ``("moving_subject", "fixed_subject")``.
        record_keys: scalars that go into the record, found in the item itself or under ``record_key``.
        record_key: where :py:class:`FixedPointSolverd` puts its record. Defaults to ``"record"``.
        optional_record_keys: scalars that go into the record where they are there.

    Raises:
        KeyError: When the item lacks what is to be written.
        FileExistsError: When a file is there already and ``overwrite`` is not set.
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
        super().__init__((warped_key, ddf_key))
        self.output_dir = Path(output_dir)
        self.overwrite = as_flag(overwrite, "overwrite")
        self.warped_key = warped_key
        self.ddf_key = ddf_key
        self.label_key = label_key
        self.name_keys = tuple(name_keys)
        self.record_keys = tuple(record_keys)
        self.record_key = record_key
        self.optional_record_keys = tuple(optional_record_keys)

    def paths(self, data: Mapping[Hashable, Any]) -> dict[str, Path]:
        """
        Files of an item.

        Args:
            data: item with the names.
        """
        absent = [key for key in self.name_keys if key not in data]
        if absent:
            raise KeyError(f"SaveRegistrationd names files by {self.name_keys}, the item has no {absent}.")
        name = "_to_".join(str(data[key]) for key in self.name_keys)
        return {
            "warped": self.output_dir / f"{name}_warped.nii.gz",
            "ddf": self.output_dir / f"{name}_ddf.nii.gz",
            "label": self.output_dir / f"{name}_warped_label.nii.gz",
            "record": self.output_dir / f"{name}_record.json",
        }

    def refuse_existing(self, data: Mapping[Hashable, Any]) -> None:
        """
        Raise when a file of the item is there already and must not be replaced.

        Args:
            data: item with the names.
        """
        if not self.overwrite:
            refuse_existing(
                self.paths(data).values(), "Replace it with --overwrite true, or name another --output_dir."
            )

    def _record(self, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        """What the solver said of the item, fit for JSON."""
        known = {**data.get(self.record_key, {}), **data}
        absent = [key for key in (self.warped_key, self.ddf_key, *self.record_keys) if key not in known]
        if absent:
            raise KeyError(f"SaveRegistrationd finds no {absent} in the item, which has {sorted(map(str, data))}.")
        record: dict[str, Any] = {key: str(data[key]) for key in self.name_keys}
        for key in (*self.record_keys, *(k for k in self.optional_record_keys if k in known)):
            value = known[key].item() if hasattr(known[key], "item") else known[key]
            record[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        return record

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files of the item."""
        d = dict(data)
        self.refuse_existing(d)
        paths, record = self.paths(d), self._record(d)
        ddf = d[self.ddf_key]
        affine = convert_to_numpy(ddf.affine).astype(float) if isinstance(ddf, MetaTensor) else None
        dims = ddf.ndim - 1
        save_nifti(paths["warped"], d[self.warped_key], affine, dims)
        save_nifti(paths["ddf"], ddf, affine, dims)
        if self.label_key in d:
            label = convert_to_numpy(d[self.label_key])
            save_nifti(paths["label"], label.astype(np.int32), affine, dims)
        # last: where it is, the others are whole
        with replace_file(paths["record"]) as path:
            path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
        return d


SaveRegistrationD = SaveRegistrationDict = SaveRegistrationd
