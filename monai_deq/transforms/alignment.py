# SPDX-License-Identifier: Apache-2.0
"""What comes before a deformable registration: initial transforms, an affine alignment, and whether there is one."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from monai_deq.data import affine_of, load_simpleitk, source_of

from .geometry import ChainPart, chain_matrix, is_matrix
from .items import require_keys
from .transform_files import load_transform

__all__ = ["AffineKind", "AlignAffineD", "AlignAffineDict", "AlignAffined", "InitialTransformD", "align_affine"]
__all__ += ["InitialTransformDict", "InitialTransformd", "foreground_overlap"]

logger = logging.getLogger("monai_deq")

AffineKind = Literal["rigid", "affine"]

#: intensity in [0, 1] above which a voxel is foreground
_FOREGROUND = 0.1
#: cosine between the normals of two slices' planes, below which they are not one plane
_PARALLEL = 0.999


def foreground_overlap(fixed: torch.Tensor, moving: torch.Tensor) -> float:
    """
    Dice overlap of what is brighter than a tenth, or a quarter of the largest value where that is less, in two images
    ``(C, *spatial)`` of one grid, in [0, 1].
    """
    a, b = (image > min(_FOREGROUND, float(image.max()) / 4) for image in (fixed, moving))
    return float(2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1))


class InitialTransformd(MapTransform):
    """
    Read the transforms to begin with, if any, to a chain (see :py:mod:`monai_deq.transforms.geometry`), and for slices
    add what takes the plane of the fixed one to that of the moving one.

    Args:
        fixed_key, moving_key: the scans ``(C, *spatial)``.
        chain_key: files that :py:func:`load_transform` reads, one or several, in the order in which a point of the fixed
            scan passes through them; the chain takes their place, and is left out where it is empty.
    """

    def __init__(
        self, fixed_key: str = "fixed", moving_key: str = "moving", chain_key: str = "initial_transform"
    ) -> None:
        super().__init__((fixed_key, moving_key))
        self.fixed_key, self.moving_key, self.chain_key = fixed_key, moving_key, chain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        require_keys(d, (self.fixed_key, self.moving_key), "InitialTransformd")
        given = d.pop(self.chain_key, None) or []
        given = [given] if isinstance(given, (str, Path, np.ndarray, torch.Tensor)) else given
        chain: list[ChainPart] = []
        for part in given:
            chain += load_transform(part) if isinstance(part, (str, Path)) else [part]
        fixed, moving = d[self.fixed_key], d[self.moving_key]
        if fixed.ndim == 3:
            chain += self._between_planes(fixed, moving, chain)
        if chain:
            d[self.chain_key] = chain
        return d

    def _between_planes(self, fixed: torch.Tensor, moving: torch.Tensor, chain: Sequence[ChainPart]) -> list[ChainPart]:
        """The shift along their normal from the plane of the fixed slice to that of the moving one, if any."""
        names = source_of(fixed, self.fixed_key), source_of(moving, self.moving_key)
        a, b = chain_matrix(chain) @ affine_of(fixed), affine_of(moving)
        normals = [np.cross(m[:3, 0], m[:3, 1]) for m in (a, b)]
        first, second = (n / max(float(np.linalg.norm(n)), 1e-12) for n in normals)
        if abs(float(first @ second)) < _PARALLEL:
            raise ValueError(
                f"the slices {names[0]} and {names[1]} lie in planes that are not parallel; register the volumes, or "
                "take slices of one direction."
            )
        shift = np.eye(4)
        shift[:3, 3] = second * float(second @ (b[:3, 3] - a[:3, 3]))
        return [] if np.abs(shift[:3, 3]).max() < 1e-6 else [shift]


def _frame(fixed: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Axes ``(3, ndim)`` and origin of the space in which the scans are aligned: the world, or the plane of a slice."""
    if fixed.ndim == 4:
        return np.eye(3), np.zeros(3)
    affine = affine_of(fixed)
    u, _, v = np.linalg.svd(affine[:3, :2] / np.linalg.norm(affine[:3, :2], axis=0), full_matrices=False)
    return u @ v, affine[:3, 3]


def _to_sitk(image: torch.Tensor, axes: np.ndarray, origin: np.ndarray, sitk: Any) -> Any:
    affine, ndim = affine_of(image), image.ndim - 1
    plain = image.as_tensor() if isinstance(image, MetaTensor) else image
    result = sitk.GetImageFromArray(np.ascontiguousarray(plain[0].cpu().float().numpy().T))
    columns = axes.T @ affine[:3, :ndim]
    spacing = np.linalg.norm(columns, axis=0)
    u, _, v = np.linalg.svd(columns / spacing)
    result.SetSpacing(spacing.tolist())
    result.SetDirection((u @ v).ravel().tolist())
    result.SetOrigin((axes.T @ (affine[:3, 3] - origin)).tolist())
    return result


def align_affine(
    fixed: torch.Tensor, moving: torch.Tensor, kind: AffineKind = "rigid", initial: np.ndarray | None = None
) -> np.ndarray:
    """
    Align two scans by SimpleITK: mutual information (Mattes), from their centres of mass, from coarse to fine, rigidly,
    and then with all of an affine map where asked for.

    Args:
        fixed, moving: ``(1, *spatial)``, each where its affine places it.
        kind: ``"rigid"`` or ``"affine"``.
        initial: ``(4, 4)`` that a point passes through behind the one sought, RAS mm. Defaults to ``None``: none.

    Returns:
        ``(4, 4)``, RAS mm: points of the fixed scan to those of the moving one, without ``initial``.

    Raises:
        ValueError: When ``kind`` is another.
        RuntimeError: When the scans do not overlap, or the alignment fails.
        OptionalImportError: When SimpleITK is not installed.
    """
    if kind not in get_args(AffineKind):
        raise ValueError(f"affine: expected 'rigid' or 'affine', got {kind!r}.")
    sitk = load_simpleitk("an affine alignment")
    axes, origin = _frame(fixed)
    ndim = fixed.ndim - 1
    a, b = (_to_sitk(image, axes, origin, sitk) for image in (fixed, moving))
    before = np.eye(4) if initial is None else initial
    behind = sitk.AffineTransform(ndim)
    behind.SetMatrix((axes.T @ before[:3, :3] @ axes).ravel().tolist())
    behind.SetTranslation((axes.T @ (before[:3, :3] @ origin + before[:3, 3] - origin)).tolist())
    rigid = sitk.Euler2DTransform() if ndim == 2 else sitk.Euler3DTransform()
    try:
        start = sitk.CenteredTransformInitializer(
            a, _placed(b, behind, sitk), rigid, sitk.CenteredTransformInitializerFilter.MOMENTS
        )
        found = _optimise(a, b, start, behind, sitk)
        if kind == "affine":
            full = sitk.AffineTransform(ndim)
            full.SetMatrix(found.GetMatrix())
            full.SetTranslation(found.GetTranslation())
            full.SetCenter(found.GetCenter())
            found = _optimise(a, b, full, behind, sitk)
    except RuntimeError as e:
        reason = next((line for line in reversed(str(e).strip().splitlines()) if line), "")
        raise RuntimeError(
            f"the {kind} alignment failed: {reason}. Give an initial transform that overlays them."
        ) from e
    point = np.asarray(found.TransformPoint([0.0] * ndim))
    matrix = np.stack([np.asarray(found.TransformPoint(e.tolist())) - point for e in np.eye(ndim)], axis=1)
    result = np.eye(4)
    result[:3, :3] += axes @ (matrix - np.eye(ndim)) @ axes.T
    result[:3, 3] = origin + axes @ point - result[:3, :3] @ origin
    return result


def _placed(moving: Any, behind: Any, sitk: Any) -> Any:
    """The moving image shifted to where the transform behind has its centre, for the centres of mass."""
    size = [(n - 1) / 2 for n in moving.GetSize()]
    centre = moving.TransformContinuousIndexToPhysicalPoint(size)
    image = sitk.Image(moving)
    shift = np.asarray(behind.GetInverse().TransformPoint(centre)) - np.asarray(centre)
    image.SetOrigin((np.asarray(moving.GetOrigin()) + shift).tolist())
    return image


def _optimise(fixed: Any, moving: Any, start: Any, behind: Any, sitk: Any) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    voxels = int(np.prod(fixed.GetSize()))
    # 100,000 voxels at random places, the same in each run, say as much as all
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, 1e5 / voxels), 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 300, 0.6, 1e-6)
    method.SetOptimizerScalesFromPhysicalShift()
    levels = [level for level in (8, 4, 2, 1) if min(fixed.GetSize()) / level >= 12 and voxels / level**3 < 2e6] or [1]
    method.SetShrinkFactorsPerLevel(levels)
    spacing = min(fixed.GetSpacing())
    method.SetSmoothingSigmasPerLevel([level * spacing / 2 if level > 1 else 0.0 for level in levels])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetMovingInitialTransform(behind)
    method.SetInitialTransform(start, inPlace=True)
    method.Execute(fixed, moving)
    return start.Downcast() if hasattr(start, "Downcast") else start


class AlignAffined(MapTransform):
    """
    Put an affine alignment of the item's scans in front of the chain of what is known, see :py:func:`align_affine`.

    Args:
        kind: ``"rigid"`` or ``"affine"``.
        fixed_key, moving_key: the scans ``(1, *spatial)``.
        chain_key: the chain, perhaps absent; matrices alone.
    """

    def __init__(
        self,
        kind: AffineKind = "rigid",
        fixed_key: str = "fixed",
        moving_key: str = "moving",
        chain_key: str = "initial_transform",
    ) -> None:
        super().__init__((fixed_key, moving_key))
        if kind not in get_args(AffineKind):
            raise ValueError(f"affine: expected 'rigid' or 'affine', got {kind!r}.")
        load_simpleitk("an affine alignment")
        self.kind, self.fixed_key, self.moving_key, self.chain_key = kind, fixed_key, moving_key, chain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        require_keys(d, (self.fixed_key, self.moving_key), "AlignAffined")
        chain = d.get(self.chain_key) or []
        if not all(map(is_matrix, chain)):
            raise ValueError(
                "affine: an alignment goes before matrices, but the initial transform has a displacement field; leave one "
                "of the two out."
            )
        logger.info("%s alignment by SimpleITK", self.kind)
        found = align_affine(d[self.fixed_key], d[self.moving_key], self.kind, chain_matrix(chain))
        d[self.chain_key] = [found, *chain]
        return d


AlignAffineD = AlignAffineDict = AlignAffined
InitialTransformD = InitialTransformDict = InitialTransformd
