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
from monai.transforms.transform import MapTransform
from monai.utils import convert_to_numpy

from monai_deq.utils import as_flag, refuse_existing, replace_file

__all__ = ["SaveRegistrationD", "SaveRegistrationDict", "SaveRegistrationd", "save_nifti"]


def save_nifti(
    path: str | Path, image: torch.Tensor | np.ndarray, affine: np.ndarray | None, spatial_dims: int
) -> None:
    """
    Write a channel-first image as NIfTI, whole or not at all. Several channels become the last axis; a 2-D image
    keeps the slice axis that NIfTI needs.

    Args:
        path: ``.nii`` or ``.nii.gz`` file.
        image: ``(C, *spatial)``.
        affine: ``(4, 4)``; identity when ``None``.
        spatial_dims: 2 or 3.
    """
    array = convert_to_numpy(image)
    if spatial_dims == 2:
        array = array[..., None]
    array = np.moveaxis(array, 0, -1) if array.shape[0] > 1 else array[0]
    with replace_file(path) as temporary:
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), temporary)


class SaveRegistrationd(MapTransform):
    """
    Write ``<name>_warped.nii.gz`` (moving scan on the fixed grid), ``<name>_ddf.nii.gz`` (``(*spatial, ndim)``, voxels
    of the fixed grid, ``warped(x) = moving(x + ddf(x))``), ``<name>_record.json`` (what the solver said) and, where the
    item has it, ``<name>_warped_label.nii.gz``. ``name`` is ``<moving>_to_<fixed>``.

    Args:
        output_dir: folder of the files.
        overwrite: replace existing files. Defaults to ``False``.
        warped_key: warped scan. Defaults to ``"warped"``.
        ddf_key: displacement field. Defaults to ``"ddf"``.
        label_key: warped label map, optional in the item. Defaults to ``"warped_label"``.
        name_keys: names of the moving and the fixed scan. Defaults to ``("moving_subject", "fixed_subject")``.
        record_keys: scalars of the item that go into the record.
    """

    def __init__(
        self,
        output_dir: str | Path,
        overwrite: bool = False,
        warped_key: str = "warped",
        ddf_key: str = "ddf",
        label_key: str = "warped_label",
        name_keys: Sequence[str] = ("moving_subject", "fixed_subject"),
        record_keys: Sequence[str] = ("steps", "residual", "relative_residual", "converged", "reason"),
    ) -> None:
        super().__init__((warped_key, ddf_key))
        self.output_dir = Path(output_dir)
        self.overwrite = as_flag(overwrite, "overwrite")
        self.warped_key = warped_key
        self.ddf_key = ddf_key
        self.label_key = label_key
        self.name_keys = tuple(name_keys)
        self.record_keys = tuple(record_keys)

    def paths(self, data: Mapping[Hashable, Any]) -> dict[str, Path]:
        """
        Files of an item.

        Args:
            data: item with the names.
        """
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

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files of the item."""
        d = dict(data)
        self.refuse_existing(d)
        paths = self.paths(d)
        ddf = d[self.ddf_key]
        affine = convert_to_numpy(ddf.affine).astype(float) if isinstance(ddf, MetaTensor) else None
        dims = ddf.ndim - 1
        save_nifti(paths["warped"], d[self.warped_key], affine, dims)
        save_nifti(paths["ddf"], ddf, affine, dims)
        if self.label_key in d:
            label = convert_to_numpy(d[self.label_key])
            save_nifti(paths["label"], label.astype(np.int32), affine, dims)
        record: dict[str, Any] = {key: str(d[key]) for key in self.name_keys}
        for key in self.record_keys:
            value = d[key].item() if hasattr(d[key], "item") else d[key]
            record[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        # last: where it is, the others are whole
        with replace_file(paths["record"]) as path:
            path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
        return d


SaveRegistrationD = SaveRegistrationDict = SaveRegistrationd
