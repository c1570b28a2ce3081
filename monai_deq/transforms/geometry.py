# SPDX-License-Identifier: Apache-2.0
"""Points and images taken from one scan's space to another's by world coordinates (RAS mm), any grid to any grid.

A map from the fixed scan's space to the moving one's is a chain: affine matrices ``(4, 4)`` and displacement fields
``(ndim, *spatial)``, in voxels of the grid that their own affine places, in the order in which a point of the fixed
scan passes through them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from monai_deq.data import affine_of, is_planar, same_grid
from monai_deq.networks.blocks import gaussian_smooth, identity_grid, sample_at

from .items import on_grid_of, require_keys
from .warping import WarpByDDFd

__all__ = ["ChainPart", "ComposeDDFD", "ComposeDDFDict", "ComposeDDFd", "chain_matrix", "compose_ddf", "is_field"]
__all__ += [
    "is_matrix",
    "ResampleByDDFD",
    "ResampleByDDFDict",
    "ResampleByDDFd",
    "map_points",
    "pull_image",
    "smooth_for",
]

ChainPart = np.ndarray | torch.Tensor

#: voxels that are treated at once
_AT_ONCE = 2**22


def _plain(image: torch.Tensor) -> torch.Tensor:
    return image.as_subclass(torch.Tensor).detach().cpu()


def is_field(part: ChainPart) -> TypeGuard[torch.Tensor]:
    """Whether a part of a chain is a displacement field; a matrix is a tensor too where a DataLoader made it one."""
    return part.ndim > 2


def is_matrix(part: ChainPart) -> bool:
    """Whether a part of a chain is a matrix."""
    return not is_field(part)


def chain_matrix(chain: Sequence[ChainPart]) -> np.ndarray:
    """The matrices of a chain as one, ``(4, 4)``; displacement fields are left out."""
    matrix = np.eye(4)
    for part in filter(is_matrix, chain):
        matrix = np.asarray(part) @ matrix
    return matrix


def _through(matrix: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """Points ``(3, ...)`` through a matrix ``(4, 4)``, float64 where they are."""
    turned = torch.from_numpy(matrix).to(points)
    return (turned[:3, :3] @ points.flatten(1) + turned[:3, 3:]).unflatten(1, points.shape[1:])


def _at(image: torch.Tensor, positions: torch.Tensor, mode: str, outside: float | None) -> torch.Tensor:
    """Values ``(C, ...)`` of an image at positions ``(3, ...)`` in its voxels; more than half a voxel beyond the
    outermost centres the value ``outside``, as in ITK, or with ``None`` that of the border.
    """
    ndim, shape = image.ndim - 1, positions.shape[1:]
    inner = positions[:ndim].reshape(ndim, -1, *[1] * (ndim - 1))
    values = sample_at(image[None], inner[None], mode)[0].reshape(len(image), *shape)
    if outside is not None:
        size = positions.new_tensor(image.shape[1:]).view(-1, *[1] * len(shape))
        beyond = ((positions[:ndim] < -0.5) | (positions[:ndim] > size - 0.5)).any(dim=0)
        values.masked_fill_(beyond, outside)
    return values


def map_points(points: torch.Tensor, chain: Sequence[ChainPart]) -> torch.Tensor:
    """
    Take points of the fixed scan to where a chain finds them in the moving one. Outside of the grid of a displacement
    field nothing is displaced, as in ITK.

    Args:
        points: ``(3, ...)``, RAS mm.
        chain: matrices and fields, see above.

    Returns:
        ``(3, ...)``, RAS mm.
    """
    for part in chain:
        if is_field(part):
            affine, field = affine_of(part), _plain(part).to(points.dtype)
            displacement = _at(field, _through(np.linalg.inv(affine), points), "bilinear", 0.0)
            turned = torch.from_numpy(affine[:3, : len(field)]).to(points)
            points = points + (turned @ displacement.flatten(1)).unflatten(1, points.shape[1:])
        else:
            points = _through(np.asarray(part, dtype=float), points)
    return points


def _slabs(reference: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Voxels of an image in parts along the first axis, and their world points ``(3, ...)``."""
    size = tuple(reference.shape[1:])
    each = max(_AT_ONCE * size[0] // max(int(np.prod(size)), 1), 1)
    for begin in range(0, size[0], each):
        part = slice(begin, min(begin + each, size[0]))
        voxels = identity_grid((part.stop - begin, *size[1:]), torch.device("cpu"), torch.float32)[0].clone()
        voxels[0] += begin
        if len(size) == 2:
            voxels = torch.cat([voxels, torch.zeros_like(voxels[:1])])
        yield part, _through(affine_of(reference), voxels)


def pull_image(
    image: torch.Tensor,
    reference: torch.Tensor,
    chain: Sequence[ChainPart] = (),
    mode: str = "bilinear",
    outside: float | None = None,
) -> MetaTensor:
    """
    Pull an image onto the grid of another one, with one interpolation, as ITK's resampling does.

    Args:
        image: ``(C, *spatial)``; of a whole-number type with ``"nearest"`` only.
        reference: ``(C, *spatial)``, whose grid the result has.
        chain: map from the space of ``reference`` to that of ``image``. Defaults to none: where it lies in the world.
        mode: ``"bilinear"`` (linear in 3-D too) or ``"nearest"``.
        outside: value outside of the image. Defaults to ``None``: its least one for an image, 0 for label maps.

    Returns:
        ``(C, *spatial of reference)`` with the affine of ``reference`` and the file name of ``image``.
    """
    plain = _plain(image)
    if mode != "nearest" and not plain.is_floating_point():
        plain = plain.to(torch.float32)
    if outside is None:
        outside = 0.0 if mode == "nearest" else float(plain.min())
    back = np.linalg.inv(affine_of(image))
    result = plain.new_empty((len(plain), *reference.shape[1:]))
    for part, points in _slabs(reference):
        result[:, part] = _at(plain, _through(back, map_points(points, chain)), mode, outside)
    return on_grid_of(result, _with_affine(reference), image)  # type: ignore[return-value]


def _with_affine(image: torch.Tensor) -> MetaTensor:
    if isinstance(image, MetaTensor):
        return image
    return MetaTensor(image, affine=torch.from_numpy(affine_of(image)), spatial_ndim=image.ndim - 1)


def compose_ddf(chain: Sequence[ChainPart], reference: torch.Tensor) -> MetaTensor:
    """
    A chain as one displacement field ``(3, *spatial)``, of slices ``(2, *spatial)``, float32, in voxels on the grid of
    ``reference``. What a chain does at right angles to a slice is left out.
    """
    ndim = reference.ndim - 1
    back = np.linalg.inv(affine_of(reference))
    field = torch.empty((ndim, *reference.shape[1:]))
    for part, points in _slabs(reference):
        moved = map_points(points, chain) - points
        turned = torch.from_numpy(back[:ndim, :3]).to(points)
        field[:, part] = (turned @ moved.flatten(1)).unflatten(1, points.shape[1:])
    return on_grid_of(field, _with_affine(reference))  # type: ignore[return-value]


def smooth_for(image: torch.Tensor, reference: torch.Tensor, chain: Sequence[ChainPart] = ()) -> torch.Tensor:
    """The image smoothed along each axis where the voxels of ``reference`` are larger than its own, so that none of it
    is skipped; standard deviations as of MONAI's ``Resize``.
    """
    ndim, matrix = image.ndim - 1, chain_matrix(chain) @ affine_of(reference)
    ratio = np.abs(np.linalg.solve(affine_of(image), matrix)[:ndim, :ndim]).max(axis=1)
    sigma = [max((float(r) - 1.0) / 2.0, 0.0) if r > 1.01 else 0.0 for r in ratio]
    if not any(sigma):
        return image
    plain = _plain(image)[None]
    smooth = gaussian_smooth(plain, sigma) / gaussian_smooth(torch.ones_like(plain[:, :1]), sigma)
    return on_grid_of(smooth[0], image)


class ResampleByDDFd(WarpByDDFd):
    """
    Pull images or label maps back through a displacement field from where their own affine places them in the world,
    any grid to that of the field, with one interpolation, as ITK's resampling does: outside of an image, half a voxel
    beyond the outermost centres, is its least value, in label maps 0. For the arguments see :py:class:`WarpByDDFd`.
    """

    def treat(self, item: dict[Hashable, Any], key: Hashable, output_key: Hashable, mode: str) -> None:
        require_keys(item, (self.ddf_key,), type(self).__name__)
        item[output_key] = pull_image(item[key], item[self.ddf_key], [item[self.ddf_key]], mode)


class ComposeDDFd(MapTransform):
    """
    Make one displacement field of what was found on the grid a method works on and what was known before it, on the
    grid of the fixed scan: ``warped(x) = moving(x + ddf(x))`` for a moving scan that lies where its affine places it.

    Of slices in two planes ``"transform"`` has what leads from one to the other too, ``(3, H, W, 1)``.

    Args:
        ddf_key: the field ``(ndim, *spatial)`` that a method found.
        fixed_key: the fixed image on the grid that the method works on, which the field has.
        reference_key: the fixed scan ``(C, *spatial)``.
        chain_key: the chain behind the field, optional in the item.
    """

    def __init__(
        self,
        ddf_key: str = "ddf",
        fixed_key: str = "fixed",
        reference_key: str = "fixed_scan",
        chain_key: str = "initial_transform",
    ) -> None:
        super().__init__((ddf_key, fixed_key, reference_key))
        self.ddf_key, self.fixed_key = ddf_key, fixed_key
        self.reference_key, self.chain_key = reference_key, chain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        require_keys(d, self.keys, "ComposeDDFd")
        reference, chain = d[self.reference_key], d.get(self.chain_key) or []
        # what comes out of an engine has lost its affine
        d[self.ddf_key] = ddf = on_grid_of(_plain(d[self.ddf_key]), d[self.fixed_key])
        if chain or not same_grid(ddf, reference):
            d[self.ddf_key] = compose_ddf([ddf, *chain], reference)
            if chain and reference.ndim == 3 and not is_planar(reference):
                # the other slice may lie in another plane
                volume = MetaTensor(_plain(reference)[..., None], affine=torch.from_numpy(affine_of(reference)))
                d["transform"] = compose_ddf([ddf, *chain], volume)
        return d


ComposeDDFD = ComposeDDFDict = ComposeDDFd
ResampleByDDFD = ResampleByDDFDict = ResampleByDDFd
