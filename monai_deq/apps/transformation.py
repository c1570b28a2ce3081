# SPDX-License-Identifier: Apache-2.0
"""Transforms in files applied to images, label maps and points in files, and inverted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor

from monai_deq.data import affine_of, is_planar, read_image, save_nifti
from monai_deq.transforms import (
    ChainPart,
    CheckLabeld,
    DropSliceAxisd,
    InvertDDF,
    chain_matrix,
    check_transform_format,
    compose_ddf,
    is_field,
    is_matrix,
    load_transform,
    map_points,
    pull_image,
    read_world_points,
    save_transform,
)
from monai_deq.utils import expand_user, refuse_existing, replace_file

__all__ = ["apply_transforms", "invert_transform"]

logger = logging.getLogger("monai_deq")

_POINTS = (".csv", ".fcsv")
#: points that the affine part of a field is fitted to
_FITTED = 20000


def _chain(transforms: Sequence[str | Path]) -> list[ChainPart]:
    return [part for file in transforms for part in load_transform(file)]


def _read(path: str | Path, name: str, label: bool = False) -> MetaTensor:
    return DropSliceAxisd("image")({"image": read_image(path, name, label)})["image"]  # type: ignore[no-any-return]


def apply_transforms(
    moving: str | Path,
    transforms: Sequence[str | Path],
    output: str | Path,
    reference: str | Path | None = None,
    label: bool = False,
    overwrite: bool = False,
) -> Path:
    """
    Take an image, each volume of a 4-D series, a label map or points through one or more transforms, with one
    interpolation.

    Args:
        moving: the image, in the space of the moving scan; or points of the FIXED scan, ``.csv`` or ``.fcsv``, see
            :py:func:`monai_deq.transforms.read_world_points`: they go to the moving one's space, as in ITK.
        transforms: files that :py:func:`monai_deq.transforms.load_transform` reads, in the order in which a point of
            the fixed scan passes through them, as ANTs has it.
        output: ``.nii`` or ``.nii.gz``; of points ``.csv``: x, y and z in LPS mm.
        reference: image on whose grid the result lies, the fixed scan; of points without a header, whose voxels they
            are. Defaults to ``None``: the grid of the first displacement field.
        label: a label map: each voxel from the nearest, numbers exact. Defaults to False: linear interpolation.
        overwrite: replace an existing file, which is ``FileExistsError`` else.

    Returns:
        ``output``.
    """
    output = expand_user(output)
    points = str(moving).lower().endswith(_POINTS)
    endings = (".csv",) if points else (".nii", ".nii.gz")
    if not output.name.lower().endswith(endings):
        raise ValueError(f"output: expected a file ending in {' or '.join(endings)}, got {str(output)!r}.")
    if not overwrite:
        refuse_existing([output], "Replace it with --overwrite, or name another file.")
    chain = _chain(transforms)
    field = next(filter(is_field, chain), None)
    grid: torch.Tensor | None = field if reference is None else _read(reference, "reference")
    if points:
        world = read_world_points(moving, None if grid is None else affine_of(grid), _axes(grid))
        found = map_points(world.T, chain).T * world.new_tensor([-1.0, -1.0, 1.0])
        with replace_file(output) as temporary:
            pd.DataFrame(found.numpy(), columns=["x", "y", "z"]).to_csv(temporary, index=False, lineterminator="\n")
        return output
    if grid is None:
        raise ValueError("reference: an affine transform has no grid of its own; name the fixed scan with --reference.")
    image = _read(moving, "moving", label)
    if image.ndim != grid.ndim:
        if not (image.ndim == 3 and grid.ndim == 4 and grid.shape[-1] == 1):
            raise ValueError(
                f"moving {str(moving)!r} is {image.ndim - 1}-D, the grid of the result is {grid.ndim - 1}-D; name "
                "another --reference."
            )
        plain = grid.as_subclass(torch.Tensor)[..., 0]
        grid = MetaTensor(plain, affine=torch.from_numpy(affine_of(grid)), spatial_ndim=2)
    if label:
        for volume in image:
            CheckLabeld("label", "label")({"label": MetaTensor(volume[None], meta=dict(image.meta))})
    result = pull_image(image, grid, chain, "nearest" if label else "bilinear")
    if "frame_spacing" in image.meta:
        result.meta["frame_spacing"] = image.meta["frame_spacing"]
    save_nifti(output, result, affine_of(grid), grid.ndim - 1)
    return output


def _axes(grid: torch.Tensor | None) -> int | None:
    return None if grid is None else grid.ndim - 1


def _inverse(part: ChainPart) -> list[ChainPart]:
    """The inverse of a matrix or a field as a chain."""
    if not is_field(part):
        return [np.linalg.inv(np.asarray(part, dtype=float))]
    # what a field has of an affine map would lead far beyond its grid
    affine, plain = affine_of(part), part.as_subclass(torch.Tensor)
    plain = plain[..., None] if plain.ndim == 3 else plain
    if len(plain) == 2:
        plain = torch.cat([plain, torch.zeros_like(plain[:1])])
    field = MetaTensor(plain, affine=torch.from_numpy(affine))
    voxels = torch.stack(
        [axis.flatten() for axis in torch.meshgrid(*map(torch.arange, field.shape[1:]), indexing="ij")]
    )
    voxels = voxels[:, :: max(voxels.shape[1] // _FITTED, 1)].double()
    points = torch.from_numpy(affine[:3, :3]) @ voxels + torch.from_numpy(affine[:3, 3:])
    moved = (map_points(points, [field]) - points).T.numpy()
    centre = points.mean(dim=1, keepdim=True)
    sides = np.hstack([(points - centre).T.numpy(), np.ones((points.shape[1], 1))])
    fitted = np.linalg.lstsq(sides, moved, rcond=None)[0].T  # of a slice the least one
    matrix = np.eye(4)
    matrix[:3, :3] += fitted[:, :3]
    matrix[:3, 3] = fitted[:, 3] - fitted[:, :3] @ centre[:, 0].numpy()
    rest = compose_ddf([field, np.linalg.inv(matrix)], field)
    inverse, record = InvertDDF()(rest)
    if record["failed"]:
        logger.warning(
            "%d voxels (%.3g %%) have no inverse: the field folds", record["failed"], record["failed_percent"]
        )
    return [np.linalg.inv(matrix), inverse]


def invert_transform(
    transforms: Sequence[str | Path], output: str | Path, reference: str | Path | None = None, overwrite: bool = False
) -> Path:
    """
    Invert one or more transforms: what is written takes the fixed scan to the moving one's space, and points of the
    moving scan to the fixed one's.

    Args:
        transforms: as in :py:func:`apply_transforms`.
        output: see :py:func:`monai_deq.transforms.save_transform`.
        reference: image on whose grid a displacement field is written, the moving scan. Defaults to ``None``: the grid
            of the transform's own field.
        overwrite: replace an existing file, which is ``FileExistsError`` else.

    Returns:
        ``output``.
    """
    output, chain = expand_user(output), _chain(transforms)
    affine = all(map(is_matrix, chain))
    check_transform_format(output, affine)
    if not overwrite:
        refuse_existing([output], "Replace it with --overwrite, or name another file.")
    if any(is_matrix(part) and abs(np.linalg.det(np.asarray(part)[:3, :3])) < 1e-9 for part in chain):
        raise ValueError(f"{', '.join(map(str, transforms))}: an affine transform that flattens space has no inverse.")
    inverse = [found for part in reversed(chain) for found in _inverse(part)]
    if affine:
        save_transform(output, chain_matrix(inverse))
        return output
    grid = next(filter(is_field, chain)) if reference is None else _read(reference, "reference")
    if grid.ndim == 3 and not is_planar(grid):
        grid = MetaTensor(grid.as_subclass(torch.Tensor)[..., None], affine=torch.from_numpy(affine_of(grid)))
    save_transform(output, compose_ddf(inverse, grid))
    return output
