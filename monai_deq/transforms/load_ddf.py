# SPDX-License-Identifier: Apache-2.0
"""Read a displacement field that was written before."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.transform import MapTransform

from monai_deq.data.grid import check_same_grid, source_of

__all__ = ["LoadDDFD", "LoadDDFDict", "LoadDDFd", "load_ddf"]


def load_ddf(path: str | Path, spatial_dims: int) -> MetaTensor:
    """
    Read a displacement field as :py:class:`monai_deq.transforms.SaveRegistrationd` writes it.

    Args:
        path: NIfTI file, ``(H, W, D, 3)``, or ``(H, W, 1, 2)`` of a slice; voxels of its own grid.
        spatial_dims: 2 or 3.

    Returns:
        ``(ndim, *spatial)``, float32, with the affine of the file.

    Raises:
        FileNotFoundError: When there is no such file.
        RuntimeError: When it cannot be read.
        ValueError: When it holds no finite displacement field of so many dimensions.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"displacement field: the file {str(path)!r} does not exist.")
    try:
        image = nib.load(path)
        array = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    except Exception as e:  # readers raise whatever their file format's library does
        raise RuntimeError(f"cannot read the displacement field {str(path)!r} ({type(e).__name__}: {e}).") from e
    expected = (*array.shape[:2], 1, 2) if spatial_dims == 2 else (*array.shape[:3], 3)
    if array.ndim != 4 or array.shape != expected:
        form = "(H, W, 1, 2)" if spatial_dims == 2 else "(H, W, D, 3)"
        raise ValueError(f"{path}: expected a {spatial_dims}-D displacement field {form}, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: the displacement field must be finite, it has NaN or infinity.")
    field = np.moveaxis(array[:, :, 0] if spatial_dims == 2 else array, -1, 0)
    tensor = MetaTensor(torch.from_numpy(np.ascontiguousarray(field)), affine=torch.from_numpy(image.affine))  # type: ignore[attr-defined]
    tensor.meta["filename_or_obj"] = str(path)
    return tensor


class LoadDDFd(MapTransform):
    """
    Dictionary-based wrapper of :py:func:`load_ddf`. The field must lie on the grid of an image of the item.

    Args:
        ddf_key: key of the file name, and of the field.
        reference_key: image ``(C, *spatial)``.
        spatial_dims: 2 or 3.
        allow_missing_keys: leave an item without a field as it is. Defaults to ``False``.

    Raises:
        ValueError: When the field lies on another grid.
    """

    def __init__(self, ddf_key: str, reference_key: str, spatial_dims: int, allow_missing_keys: bool = False) -> None:
        super().__init__((ddf_key,), allow_missing_keys)
        self.reference_key = reference_key
        self.spatial_dims = spatial_dims

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the field of the item."""
        d = dict(data)
        for key in self.key_iterator(d):
            reference = d[self.reference_key]
            file, field = d[key], load_ddf(d[key], self.spatial_dims)
            try:
                check_same_grid(reference, field, source_of(reference, self.reference_key), str(file))
            except ValueError as e:
                raise ValueError(
                    f"{file}: the displacement field to start from must lie on the grid of the fixed scan. {e}"
                ) from e
            d[key] = field
        return d


LoadDDFD = LoadDDFDict = LoadDDFd
