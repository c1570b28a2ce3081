# SPDX-License-Identifier: Apache-2.0
"""The inverse of a displacement field, a fixed point too."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import product
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import Transform
from monai.utils import TransformBackends, convert_to_tensor, ensure_tuple_rep

from monai_deq.networks.blocks import determinant, identity_grid, points_outside, warp_by_ddf
from monai_deq.solvers import SolverRecord, SolverSettings, solve_fixed_point

from .items import PerKeyd, on_grid_of, require_keys

__all__ = ["InvertDDF", "InvertDDFD", "InvertDDFDict", "InvertDDFd", "inversion_failures", "invert_ddf"]

#: how often a Newton step is halved where it makes the residual larger
_HALVINGS = 4
#: determinant of the Jacobian nearer to zero than this: the plain step is taken
_SINGULAR = 1e-3
#: the last steps find few voxels open and cost little; at 1e-3, one in millions stays open
_SETTINGS = SolverSettings(tolerance=1e-5)
#: voxels treated at a time, that memory stays bounded
_CHUNK = 2**17


def _check_fields(**fields: torch.Tensor) -> None:
    """Refuse what are not finite batches of fields of one shape."""
    first, reference = next(iter(fields.items()))
    for name, field in fields.items():
        ndim = field.ndim - 2
        if ndim not in (2, 3) or field.shape[1] != ndim or not field.is_floating_point():
            came = f"{tuple(field.shape)} of {field.dtype}"
            raise ValueError(f"{name} must be floats (B, 2, H, W) or (B, 3, H, W, D), got {came}: reshape or convert.")
        if field.shape != reference.shape:
            came = f"{tuple(reference.shape)} and {tuple(field.shape)}"
            raise ValueError(f"{first} and {name} must have one shape, got {came}: give two fields of one grid.")
        if not torch.isfinite(field).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity: repair the field first.")


def _check_tolerance(tolerance: float) -> None:
    if not tolerance >= 0:  # nor NaN
        raise ValueError(f"tolerance must not be negative, got {tolerance}: give voxels.")


class _Interpolated:
    """A field ``(ndim, *spatial)`` between its voxels, linear as in :py:func:`warp_by_ddf`, constant beyond them."""

    def __init__(self, ddf: torch.Tensor, points: torch.Tensor) -> None:
        """At ``points`` ``(ndim, N)``."""
        size = ddf.shape[1:]
        last = points.new_tensor([n - 1 for n in size])[:, None]
        inside = torch.minimum(points.clamp(min=0), last)
        lower = torch.minimum(inside.floor(), (last - 1).clamp(min=0))
        self.fraction = inside - lower
        self.varies = ((points >= 0) & (points < last)).to(points.dtype)
        start, upper = lower.long(), last.long()
        indices = []
        for corner in product((0, 1), repeat=len(size)):
            index = torch.zeros_like(start[0])
            for axis, step in enumerate(corner):
                index = index * size[axis] + torch.minimum(start[axis] + step, upper[axis])
            indices.append(index)
        corners = ddf.flatten(1)[:, torch.stack(indices)]
        #: (ndim, 2, ..., 2, N)
        self.corners = corners.view(len(size), *[2] * len(size), -1)

    def displacement(self, along: int | None = None) -> torch.Tensor:
        """The displacement ``(ndim, N)``, or its derivative along an axis."""
        values = self.corners
        for axis, fraction in enumerate(self.fraction):
            lower, upper = values.unbind(1)
            values = (upper - lower) * self.varies[axis] if axis == along else torch.lerp(lower, upper, fraction)
        return values

    def jacobian(self) -> list[torch.Tensor]:
        """Columns of the Jacobian of ``x + ddf(x)``: what an axis does to the components, ``(ndim, N)`` each."""
        columns = [self.displacement(along=axis) for axis in range(len(self.corners))]
        for axis, column in enumerate(columns):
            column[axis] += 1
        return columns


def _solve(columns: list[torch.Tensor], right: torch.Tensor) -> torch.Tensor:
    """Point by point, ``columns @ x = right`` by Cramer's rule; ``right`` itself where the matrix is singular."""
    det = determinant(columns)
    replaced = [determinant([*columns[:i], right, *columns[i + 1 :]]) for i in range(len(columns))]
    regular = det.abs() > _SINGULAR
    return torch.where(regular, torch.stack(replaced) / torch.where(regular, det, 1.0), right)


def _newton(ddf: torch.Tensor, voxels: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """One Newton step for the displacements ``inverse`` ``(ndim, N)`` at ``voxels``, halved where it leads away."""
    at = _Interpolated(ddf, voxels + inverse)
    residual = inverse + at.displacement()
    step, before = _solve(at.jacobian(), residual), residual.norm(dim=0)
    tried = torch.arange(len(before), device=ddf.device)
    for _ in range(_HALVINGS):
        candidate = inverse[:, tried] - step[:, tried]
        after = candidate + _Interpolated(ddf, voxels[:, tried] + candidate).displacement()
        tried = tried[after.norm(dim=0) > before[tried]]
        if not len(tried):
            break
        step[:, tried] /= 2
    return inverse - step


def invert_ddf(
    ddf: torch.Tensor, settings: SolverSettings | None = None, initial: torch.Tensor | None = None
) -> tuple[torch.Tensor, SolverRecord]:
    """
    The inverse ``v`` of a pull-back field ``u``: ``v(x) = -u(x + v(x))``, so that ``x + u(x)`` and ``x + v(x)`` undo
    each other; without gradients.

    The map ``v -> -u(x + v)`` itself contracts only where ``|grad u| < 1``. It is iterated in Newton's form, which has
    the same fixed points, ``v - (1 + grad u)^-1 (v + u)`` with ``u`` and its exact gradient at ``x + v``, each voxel
    for itself; the step is halved, up to four times, where it makes ``|v + u|`` larger. Beyond the grid ``u`` is what
    it is at the border. Nothing is raised where a fold leaves no inverse: see :py:func:`inversion_failures`.

    ``v`` is exact at the voxels. Between them it is interpolated, and bends more than ``u`` where ``u`` compresses: the
    round trip that begins with ``u`` is only as short as the grid is fine.

    Args:
        ddf: ``(B, ndim, *spatial)`` in voxels, 2-D or 3-D, finite.
        settings: of the solver. Defaults to ``SolverSettings(tolerance=1e-5)``.
        initial: inverse to start from. Defaults to zero.

    Returns:
        The inverse ``(B, ndim, *spatial)`` in voxels, float32 at least, and the record, whose residuals are the lengths
        of the Newton steps.

    Raises:
        ValueError: When a field has another shape, or is not finite.
    """
    _check_fields(ddf=ddf, **({} if initial is None else {"initial": initial}))
    ddf = ddf.detach().to(torch.promote_types(ddf.dtype, torch.float32)).contiguous()
    start = torch.zeros_like(ddf) if initial is None else initial.to(ddf)
    voxels = identity_grid(tuple(ddf.shape[2:]), ddf.device, ddf.dtype)[0].flatten(1)
    # a coordinate has no more digits than this
    rounding = 4 * torch.finfo(ddf.dtype).eps * max(ddf.shape[2:])

    def update(inverse: torch.Tensor) -> torch.Tensor:
        far = (inverse + warp_by_ddf(ddf, inverse)).norm(dim=1).flatten(1) > rounding
        out = inverse.clone(memory_format=torch.contiguous_format)
        for item, field, flat in zip(far, ddf, out.flatten(2), strict=True):
            for index in torch.nonzero(item)[:, 0].split(_CHUNK):
                flat[:, index] = _newton(field, voxels[:, index], flat[:, index])
        return out

    return solve_fixed_point(update, start, settings or _SETTINGS)


def inversion_failures(
    ddf: torch.Tensor, inverse: torch.Tensor, tolerance: float = 0.05
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Where the inverse ``v`` of a field ``u`` is none. A voxel ``x`` has failed when its round trip
    ``|v(x) + u(x + v(x))|`` is longer than ``tolerance``, or when it leads into a fold of ``u`` (the Jacobian
    determinant at ``x + v(x)`` is not positive); it is outside when ``x + v(x)`` is, where ``u`` is not known.

    A fold that no voxel leads into is not seen: see :py:func:`monai_deq.metrics.compute_folded_voxels`.

    Args:
        ddf, inverse: ``u`` and ``v``, ``(B, ndim, *spatial)`` in voxels.
        tolerance: longest round trip, in voxels. Defaults to 0.05.

    Returns:
        Booleans ``(B, *spatial)``: failed, and outside.

    Raises:
        ValueError: When the fields have not one shape, are not finite, or the tolerance is negative.
    """
    _check_tolerance(tolerance)
    _check_fields(ddf=ddf, inverse=inverse)
    dtype = torch.promote_types(torch.promote_types(ddf.dtype, inverse.dtype), torch.float32)
    u, v = ddf.detach().to(dtype).contiguous(), inverse.detach().to(dtype).contiguous()
    points = identity_grid(tuple(v.shape[2:]), v.device, v.dtype) + v
    outside = points_outside(points.movedim(1, -1), tuple(v.shape[2:]))
    failed = (v + warp_by_ddf(u, v)).norm(dim=1) > tolerance
    for field, ends, beyond, result in zip(u, points.flatten(2), outside.flatten(1), failed.flatten(1), strict=True):
        for index in torch.nonzero(~beyond)[:, 0].split(_CHUNK):
            result[index] |= determinant(_Interpolated(field, ends[:, index]).jacobian()) <= 0
    return failed, outside


class InvertDDF(Transform):
    """
    The inverse of a displacement field, see :py:func:`invert_ddf`. It pulls the fixed image back onto the grid of the
    moving image, which is here the same as that of the field, whose meta data it takes; and it moves points of the
    moving image to the fixed one (:py:class:`WarpPointsByDDF`).

    Args:
        settings: of the solver. Defaults to ``SolverSettings(tolerance=1e-5)``.
        tolerance: round trip in voxels beyond which a voxel counts as failed. Defaults to 0.05.
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, settings: SolverSettings | None = None, tolerance: float = 0.05) -> None:
        _check_tolerance(tolerance)
        self.settings, self.tolerance = settings, tolerance

    def __call__(  # type: ignore[override]
        self, ddf: NdarrayOrTensor, initial: NdarrayOrTensor | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        Args:
            ddf: ``(ndim, *spatial)`` in voxels, finite.
            initial: inverse to start from. Defaults to zero.

        Returns:
            The inverse ``(ndim, *spatial)`` in voxels, and the record: ``steps``, ``residual``, ``converged``,
            ``reason`` and the traces of the solver, padded with NaN to its step limit; ``failed`` (number of voxels),
            ``failed_percent`` and ``outside_percent``, see :py:func:`inversion_failures`.
        """
        field = convert_to_tensor(ddf, track_meta=False)[None]
        start = None if initial is None else convert_to_tensor(initial, track_meta=False)[None]
        inverse, record = invert_ddf(field, self.settings, start)
        failed, outside = inversion_failures(field, inverse, self.tolerance)
        words = {**record.item(0, (self.settings or _SETTINGS).max_steps), "failed": int(failed.sum())}
        words["failed_percent"], words["outside_percent"] = (
            100 * float(mask.double().mean()) for mask in (failed, outside)
        )
        return on_grid_of(inverse[0], ddf), words


class InvertDDFd(PerKeyd):
    """
    Dictionary-based wrapper of :py:class:`InvertDDF`.

    Args:
        keys, allow_missing_keys: of the fields ``(ndim, *spatial)``; see MONAI's ``MapTransform``.
        output_keys: where the inverses go. Defaults to ``inverse_<key>``.
        record_keys: where the records go. Defaults to ``<output key>_record``.
        settings, tolerance: see :py:class:`InvertDDF`.
    """

    backend = InvertDDF.backend

    def __init__(
        self,
        keys: KeysCollection,
        output_keys: KeysCollection | None = None,
        record_keys: KeysCollection | None = None,
        settings: SolverSettings | None = None,
        tolerance: float = 0.05,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        outputs = tuple(f"inverse_{k}" for k in self.keys) if output_keys is None else output_keys
        outputs = ensure_tuple_rep(outputs, len(self.keys))
        records = tuple(f"{k}_record" for k in outputs) if record_keys is None else record_keys
        self.beside = (outputs, ensure_tuple_rep(records, len(self.keys)))
        self.invert = InvertDDF(settings, tolerance)

    def treat(self, item: dict[Hashable, Any], key: Hashable, output_key: Hashable, record_key: Hashable) -> None:
        require_keys(item, (key,), "InvertDDFd")
        item[output_key], item[record_key] = self.invert(item[key])


InvertDDFD = InvertDDFDict = InvertDDFd
