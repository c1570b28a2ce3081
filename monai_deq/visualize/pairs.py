# SPDX-License-Identifier: Apache-2.0
"""A registered pair as arrays, and how it is turned to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
import torch

from monai_deq.data import affine_of
from monai_deq.metrics import jacobian_determinant

__all__ = ["RegisteredPair"]

#: by name of a plane the axis of an :py:class:`OrientedPair` across it, and letters left, right, top, bottom
PLANES: dict[str, tuple[int, str]] = {"axial": (2, "RLAP"), "coronal": (1, "RLSI"), "sagittal": (0, "APSI")}
_OPTIONAL = ("fixed_label", "moving_label", "warped_label", "mask")


@dataclass(frozen=True, eq=False)
class RegisteredPair:
    """What there is to see of one registration, all on the grid of the fixed scan, 2-D or 3-D.

    Args:
        fixed: ``(*spatial)``, as the next two, in any unit.
        moving: the moving scan on that grid, before the registration.
        warped: ``moving(x + ddf(x))``.
        ddf: ``(ndim, *spatial)``, voxels.
        affine: ``(4, 4)``, voxel to world (RAS, mm): spacing and orientation. Of a slice the third column is not read.
        fixed_label, moving_label, warped_label: label maps of whole numbers up to 64 bits, 0 for the background.
            Default to ``None``.
        mask: where the fixed scan is to be looked at. Defaults to ``None``: its foreground.
        names: of the moving and the fixed scan.

    Raises:
        ValueError: When an array has another shape, or is not finite; when the affine is singular.
    """

    fixed: np.ndarray
    moving: np.ndarray
    warped: np.ndarray
    ddf: np.ndarray
    affine: np.ndarray
    fixed_label: np.ndarray | None = None
    moving_label: np.ndarray | None = None
    warped_label: np.ndarray | None = None
    mask: np.ndarray | None = None
    names: tuple[str, str] = ("moving", "fixed")

    def __post_init__(self) -> None:
        size = np.shape(self.fixed)
        if len(size) not in (2, 3) or min(size) < 2:
            raise ValueError(f"fixed: expected 2 or 3 axes of at least 2 voxels, got shape {size}.")
        shapes = {name: size for name in ("moving", "warped", *_OPTIONAL)} | {"ddf": (len(size), *size)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if np.shape(value) != shape:
                raise ValueError(f"{name}: expected shape {shape} on the grid of fixed, got {np.shape(value)}.")
        for name in ("fixed", "moving", "warped", "ddf"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity.")
        affine = np.asarray(self.affine, dtype=float)
        if affine.shape != (4, 4) or np.linalg.matrix_rank(affine[:3, : len(size)]) < len(size):
            raise ValueError(
                f"affine: expected (4, 4) from voxels to mm, one direction an axis, got {affine.tolist()}."
            )

    @classmethod
    def from_item(cls, item: Mapping[str, Any]) -> RegisteredPair:
        """From one item of an engine's output: tensors ``(C, *spatial)`` by the names of the arguments, with the affine
        of ``fixed``; the mask is called ``fixed_mask``, the names ``moving_subject`` and ``fixed_subject``.
        """
        arrays = {name: _array(item[name])[0] for name in ("fixed", "moving", "warped")}
        for name, key in (*((n, n) for n in _OPTIONAL[:3]), ("mask", "fixed_mask")):
            if item.get(key) is not None and item[key].shape[1:] == item["fixed"].shape[1:]:
                arrays[name] = _array(item[key])[0]
        names = (str(item.get("moving_subject", "moving")), str(item.get("fixed_subject", "fixed")))
        return cls(**arrays, ddf=_array(item["ddf"]), affine=affine_of(item["fixed"]), names=names)

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size along each axis, mm."""
        return np.linalg.norm(np.asarray(self.affine, dtype=float)[:3, : np.ndim(self.fixed)], axis=0)

    @cached_property
    def jacobian(self) -> np.ndarray:
        """Jacobian determinant ``(*spatial)``, see :py:func:`monai_deq.metrics.jacobian_determinant`."""
        ddf = torch.from_numpy(np.ascontiguousarray(self.ddf, dtype=np.float32))
        return np.asarray(jacobian_determinant(ddf[None])[0, 0])


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    return np.asarray(value)


@dataclass(frozen=True, eq=False)
class OrientedPair:
    """A pair turned so that its axes go to the patient's left, back and feet, three of them also for a slice.

    Args:
        arrays: by name ``(x, y, z)``; the ``ddf`` is ``(3, x, y, z)``.
        spacing: along each axis, mm.
        planes: names of the planes that there are.
        position, voxel: where they are cut, one index an axis, turned and as in the fixed scan.
        box: where there is something to be seen, one slice an axis.
        window: intensities shown black and white.
        own_windows: whether the images had other units and were each brought to 0 to 1.
    """

    arrays: dict[str, np.ndarray]
    spacing: np.ndarray
    planes: tuple[str, ...]
    position: tuple[int, ...]
    voxel: tuple[int, ...]
    box: tuple[slice, ...]
    window: tuple[float, float]
    own_windows: bool

    def cut(self, name: str, plane: str, index: int | None = None) -> np.ndarray:
        """A plane of an array inside the box, rows from top to bottom; through the position, or at another index."""
        axis = PLANES[plane][0]
        where: list[Any] = list(self.box)
        where[axis] = self.position[axis] if index is None else index
        return self.arrays[name][tuple(where)].T

    def in_plane(self, plane: str) -> tuple[int, int]:
        """The axes across and down a plane."""
        across, down = (axis for axis in range(3) if axis != PLANES[plane][0])
        return across, down

    def extent(self, plane: str) -> tuple[float, float]:
        """Width and height of a plane inside the box, mm."""
        width, height = ((self.box[a].stop - self.box[a].start) * self.spacing[a] for a in self.in_plane(plane))
        return float(width), float(height)


def oriented(pair: RegisteredPair, position: Sequence[int] | None = None) -> OrientedPair:
    """
    Turn a pair the radiological way (right of the patient on the left) and choose window, planes and position.

    Args:
        pair: the pair.
        position: voxel of the fixed scan that the planes go through. Defaults to ``None``: along each axis, of the
            planes with nearly the largest share of the mask, or else of the foreground, the one nearest its middle.

    Raises:
        ValueError: When the position lies outside.
    """
    size = pair.fixed.shape
    ndim = len(size)
    if position is not None and (
        len(position) != ndim or not all(0 <= p < n for p, n in zip(position, size, strict=True))
    ):
        raise ValueError(f"position: expected a voxel inside {size}, got {tuple(position)}.")
    affine = np.eye(4)
    affine[:3, :ndim] = np.asarray(pair.affine, dtype=float)[:3, :ndim]
    if ndim == 2:
        affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(("L", "P", "I"))
    )
    to, flip = turn[:, 0].astype(int), turn[:, 1]

    def turned(array: np.ndarray) -> np.ndarray:
        return nib.orientations.apply_orientation(array.reshape(*size, *[1] * (3 - ndim)), turn)

    names = ("fixed", "moving", "warped", *_OPTIONAL)
    arrays = {name: turned(np.asarray(getattr(pair, name))) for name in names if getattr(pair, name) is not None}
    arrays["jacobian"] = turned(pair.jacobian)
    ddf = np.zeros((3, *arrays["fixed"].shape), dtype=np.float32)
    for axis in range(ndim):
        ddf[to[axis]] = flip[axis] * turned(pair.ddf[axis])
    arrays["ddf"] = ddf
    spacing = np.ones(3)
    spacing[to[:ndim]] = pair.spacing
    shape = arrays["fixed"].shape
    planes = tuple(name for name, (axis, _) in PLANES.items() if ndim == 3 or axis == to[2])

    windows = {name: _window(arrays[name]) for name in ("fixed", "moving")}
    window, own = _common(*windows.values()), False
    seen = np.zeros(shape, dtype=bool)
    for name, (low, high) in windows.items():
        seen |= arrays[name] > low + 0.1 * (high - low)
    if window is None:
        window, own = (0.0, 1.0), True
        for name in ("fixed", "moving", "warped"):
            low, high = windows["fixed" if name == "fixed" else "moving"]
            arrays[name] = (arrays[name].astype(np.float32) - low) / (high - low)
    mask = arrays["mask"] > 0 if "mask" in arrays else seen
    if position is None:
        at = [_middle(mask, axis) for axis in range(3)]
        voxel = tuple(at[to[a]] if flip[a] > 0 else n - 1 - at[to[a]] for a, n in enumerate(size))
    else:
        at, voxel = [0, 0, 0], tuple(int(p) for p in position)
        for axis, n in enumerate(size):
            at[to[axis]] = voxel[axis] if flip[axis] > 0 else n - 1 - voxel[axis]
    box = tuple(_span(seen, axis, at[axis], spacing) for axis in range(3))
    return OrientedPair(arrays, spacing, planes, tuple(at), voxel, box, window, own)


def _sparse(image: np.ndarray) -> np.ndarray:
    """Some hundred thousand of the values, which percentiles do not tell from all."""
    step = max(1, round((image.size / 4e5) ** (1 / 3)))
    return image[tuple(slice(None, None, step if n > step else 1) for n in image.shape)]


def _window(image: np.ndarray) -> tuple[float, float]:
    """From a low to a high percentile; some width also for an image without contrast."""
    low, high = (float(v) for v in np.percentile(_sparse(image), (0.5, 99.7)))
    if high <= low:
        low, high = float(image.min()), float(image.max())
    return low, high if high > low else low + 1.0


def _common(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float] | None:
    """One window for two images that seem to be in the same unit, ``None`` for others."""
    low, high = min(a[0], b[0]), max(a[1], b[1])
    overlap = min(a[1], b[1]) - max(a[0], b[0])
    return (low, high) if overlap > 0.5 * (high - low) else None


def _middle(mask: np.ndarray, axis: int) -> int:
    """Of the planes with nearly the largest share of the mask the one nearest its middle."""
    areas = mask.sum(axis=tuple(a for a in range(3) if a != axis))
    if not areas.any():
        return len(areas) // 2
    centre = float((areas * np.arange(len(areas))).sum() / areas.sum())
    large = np.flatnonzero(areas >= 0.95 * areas.max())
    return int(large[np.abs(large - centre).argmin()])


def _span(seen: np.ndarray, axis: int, at: int, spacing: np.ndarray) -> slice:
    """Where something is seen along an axis, and 5 % of the longest side around it."""
    n = seen.shape[axis]
    there = np.flatnonzero(seen.any(axis=tuple(a for a in range(3) if a != axis)))
    if not len(there):
        return slice(0, n)
    margin = int(np.ceil(0.05 * max(np.array(seen.shape) * spacing * (np.array(seen.shape) > 1)) / spacing[axis]))
    return slice(max(min(there[0], at) - margin, 0), min(max(there[-1], at) + margin + 1, n))
