# SPDX-License-Identifier: Apache-2.0
"""What can be said of a solution of a fixed-point iteration: whether it is at rest, attracts, and is the only one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any, Protocol

import torch

from monai_deq.solvers.random_start import random_smooth_ddf
from monai_deq.solvers.record import SolverRecord
from monai_deq.solvers.spectral_radius import spectral_radius

__all__ = [
    "Certificate",
    "Verdict",
    "certified_solve",
    "certify",
    "check_certificate",
    "residual_at",
    "starting_point",
    "verdict",
]

Map = Callable[[torch.Tensor], torch.Tensor]

#: a residual that falls by less than this over a quarter of the steps does not fall
_FALLING = 0.95
#: a residual that grows by more than this over a quarter of the steps grows
_GROWING = 1.5
#: with fewer steps the residuals say nothing of where they go
_LEAST_STEPS = 8


class Verdict:
    """What became of an iteration."""

    CONVERGED = "converged"
    CYCLING = "cycling"
    DIVERGING = "diverging"
    STEP_LIMIT = "step limit"


@dataclass(frozen=True)
class Certificate:
    """
    What was measured at the solution of one pair.

    Args:
        verdict: one of the values of :py:class:`Verdict`, see :py:func:`verdict`.
        residual: RMS over voxels of ``|g(x) - x|`` at the solution ``x`` itself, in voxels.
        relative_residual: ``|g(x) - x| / |g(x)|`` there.
        steps: evaluations of the map that led to the solution.
        spectral_radius: of the Jacobian of ``g`` at the solution, see :py:func:`spectral_radius`. Below 1 the solution
            attracts all states near it, and the radius is the factor by which a step shrinks their distance in the
            long run. ``None`` where it was not asked for.
        start_distance: RMS distance in voxels between the solution and that reached from a random smooth start; the
            largest, with several starts. ``None`` where it was not asked for.
    """

    verdict: str
    residual: float
    relative_residual: float
    steps: int
    spectral_radius: float | None = None
    start_distance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, fit for JSON: a number that is not finite becomes ``None``."""
        return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in asdict(self).items()}


def _per_item_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.flatten(1).double(), dim=1)


def residual_at(func: Map, state: torch.Tensor, ddf_channels: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Residual of a state. Costs one evaluation of the map.

    Args:
        func: the map ``g``, ``(B, C, *spatial) -> (B, C, *spatial)``.
        state: ``(B, C, *spatial)``.
        ddf_channels: number of leading channels that are the displacement. Defaults to ``None``: all.

    Returns:
        ``(B,)`` RMS over voxels of ``|g(x) - x|``, and ``(B,)`` ``|g(x) - x| / |g(x)|``, 0 where nothing moves.
    """
    with torch.no_grad():
        gx = func(state).to(state.dtype)
    fx, gx = (t[:, :ddf_channels] for t in (gx - state, gx))
    norm = _per_item_norm(fx)
    return norm * max(fx[0, 0].numel(), 1) ** -0.5, torch.where(norm == 0, norm, norm / _per_item_norm(gx))


def verdict(residuals: Sequence[float], residual: float, at_rest: bool) -> str:
    """
    What became of an iteration, from its residuals.

    - ``"converged"``: the solution is at rest.
    - ``"diverging"``: a residual is not finite, or the residuals of the last quarter of the steps are more than 1.5
      times those of the quarter before (medians).
    - ``"cycling"``: they do not fall, to less than 0.95 times: a cycle, or a drift that does not slow down.
    - ``"step limit"``: they still fall, or there are fewer than 8 of them.

    Args:
        residuals: residual of each step, in voxels.
        residual: residual at the solution, in voxels.
        at_rest: whether it meets a tolerance.
    """
    if at_rest:
        return Verdict.CONVERGED
    trace = torch.tensor([*residuals, residual], dtype=torch.float64)
    if not bool(torch.isfinite(trace).all()):
        return Verdict.DIVERGING
    n = len(trace)
    if n < _LEAST_STEPS:
        return Verdict.STEP_LIMIT
    before, last = (float(trace[k * n // 4 : (k + 1) * n // 4].median()) for k in (2, 3))
    if last > _GROWING * before:
        return Verdict.DIVERGING
    return Verdict.CYCLING if last > _FALLING * before else Verdict.STEP_LIMIT


def check_certificate(certificate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """
    Check what is to be examined of a solution.

    Args:
        certificate: arguments of :py:func:`certify`, or ``None``.

    Returns:
        A copy.

    Raises:
        TypeError: When there is no such argument.
        ValueError: When a number is out of its range.
    """
    if certificate is None:
        return None
    lowest = {
        "tolerance": 0.0,
        "spectral_iterations": 0,
        "random_starts": 0,
        "start_rms": 0.0,
        "start_smoothness": 1e-6,
        "seed": 0,
    }
    for name, value in certificate.items():
        if name not in lowest:
            raise TypeError(f"certificate takes {', '.join(lowest)}, got {name}.")
        if not value >= lowest[name] or (name == "spectral_iterations" and value == 1):
            raise ValueError(f"certificate: {name} is out of its range, got {value}.")
    return dict(certificate)


class _Iterates(Protocol):
    """A registration network that can be certified."""

    def fixed_point_map(self, moving: torch.Tensor, fixed: torch.Tensor, **kwargs: Any) -> Map: ...

    def solve_state(
        self, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, SolverRecord]: ...


def _given(proximal_center: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """By keyword where there is one: not every network takes it."""
    return {} if proximal_center is None else {"proximal_center": proximal_center}


def starting_point(
    network: Any, moving: torch.Tensor, fixed: torch.Tensor, initial_ddf: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """
    Where the iteration at full size begins, when a displacement is to be forgotten: with a proximal term it enters at
    each size of a network with coarser ones, and without at the coarsest, behind which the others start.

    Args:
        network: the network.
        moving: ``(B, 1, *spatial)``.
        fixed: ``(B, 1, *spatial)``.
        initial_ddf: the displacement, ``(B, ndim, *spatial)``. Defaults to ``None``: zero at the coarsest size.

    Returns:
        The start, for ``solve_state``, and what else ``solve_state`` and ``fixed_point_map`` are to be given by
        keyword: what a proximal term pulls to, solved for from the displacement too.
    """
    if getattr(network, "coarse", None) is None:
        return initial_ddf, {}
    center = network.coarse_solution(moving, fixed, initial_ddf)
    if not network.proximal_weight:
        return center, {}
    return center if initial_ddf is None else initial_ddf, {"proximal_center": center}


def certify(
    network: _Iterates,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    state: torch.Tensor,
    record: SolverRecord,
    tolerance: float,
    spectral_iterations: int = 0,
    random_starts: int = 0,
    start_rms: float = 3.0,
    start_smoothness: float = 8.0,
    seed: int = 0,
    relative_tolerance: float = 0.0,
    solve_settings: Mapping[str, Any] | None = None,
    proximal_center: torch.Tensor | None = None,
) -> list[Certificate]:
    """
    Examine the solutions of a batch of pairs.

    Costs one evaluation of the map; with ``spectral_iterations`` one more that keeps its backward memory (that of one
    training step of a one-step network) and as many backward passes; with ``random_starts`` as many further solves.

    Args:
        network: a network with ``fixed_point_map`` and ``solve_state``.
        moving: ``(B, 1, *spatial)``.
        fixed: ``(B, 1, *spatial)``.
        state: what ``network.solve_state`` returned for them, ``(B, ndim + hidden_channels, *spatial)``.
        record: the record of that solve.
        tolerance: RMS residual in voxels at which a pair has converged; a hidden state must be at rest to the same
            tolerance, in its own units.
        spectral_iterations: iterations of :py:func:`spectral_radius`. Defaults to 0: not computed.
        random_starts: number of random smooth displacements from which the pairs are solved anew, the same ones for
            all pairs. Defaults to 0.
        start_rms: their RMS length in voxels. Defaults to 3.
        start_smoothness: their smoothness, see :py:func:`random_smooth_ddf`. Defaults to 8.
        seed: of all random numbers. Defaults to 0.
        relative_tolerance: relative residual at which a pair has converged. Defaults to 0 (not used).
        solve_settings: settings of the further solves, those of the first. Defaults to the network's own.
        proximal_center: what the proximal term of the map pulls to, ``(B, ndim, *spatial)``. Defaults to what the
            network solves for with its coarser ones, at the price of these solves.

    Returns:
        One certificate a pair.

    Raises:
        ValueError: When a number is out of its range.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}.")
    if min(spectral_iterations, random_starts) < 0:
        raise ValueError(
            "spectral_iterations and random_starts must not be negative, got "
            f"{spectral_iterations} and {random_starts}."
        )
    ndim, batch = fixed.ndim - 2, len(fixed)
    g = network.fixed_point_map(moving, fixed, **_given(proximal_center))
    with torch.no_grad():
        after = g(state)
    residuals, relatives = residual_at(lambda _: after, state, ndim)
    at_rest = (residuals <= tolerance) | (relatives <= relative_tolerance)
    if state.shape[1] > ndim:
        # a hidden state that still moves may move the displacement again
        hidden, hidden_relative = residual_at(lambda _: after[:, ndim:], state[:, ndim:])
        at_rest &= (hidden <= tolerance) | (hidden_relative <= relative_tolerance)
    radii: list[float | None] = [None] * batch
    if spectral_iterations:
        radii = list(spectral_radius(g, state, spectral_iterations, seed).tolist())
    distances: list[float | None] = [None] * batch
    if random_starts:
        shape, largest = (1, ndim, *fixed.shape[2:]), torch.zeros(batch, dtype=torch.float64)
        for i in range(random_starts):
            # each item from the same, whatever its place: a pair's certificate does not depend on its batch
            random = random_smooth_ddf(shape, start_rms, start_smoothness, seed + i, fixed.device)
            random = random.repeat(batch, *[1] * (ndim + 1))
            start, other_center = starting_point(network, moving, fixed, random)
            other, _ = network.solve_state(moving, fixed, start, **other_center, **dict(solve_settings or {}))
            square = (other[:, :ndim] - state[:, :ndim]).double().square().flatten(1).sum(dim=1)
            # torch.maximum keeps a NaN
            largest = torch.maximum(largest, (square / other[0, 0].numel()).sqrt().cpu())
        distances = list(largest.tolist())
    return [
        Certificate(
            verdict=verdict(record.residual[i, : int(record.steps[i])].tolist(), float(residuals[i]), bool(at_rest[i])),
            residual=float(residuals[i]),
            relative_residual=float(relatives[i]),
            steps=int(record.steps[i]),
            spectral_radius=radii[i],
            start_distance=distances[i],
        )
        for i in range(batch)
    ]


def certified_solve(
    network: Any,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    initial_ddf: torch.Tensor | None = None,
    certificate: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, SolverRecord, list[Certificate] | None]:
    """
    Solve a batch of pairs without gradients and examine the solutions.

    Args:
        network: module with ``solve``, and to be examined with ``fixed_point_map`` and ``solve_state``.
        moving: ``(B, 1, *spatial)``.
        fixed: ``(B, 1, *spatial)``.
        initial_ddf: warm start ``(B, ndim, *spatial)``. Defaults to zero.
        certificate: what to examine: arguments of :py:func:`certify` (``spectral_iterations``, ``random_starts``,
            ``start_rms``, ``start_smoothness``, ``seed``); ``tolerance`` defaults to that of the solve. Defaults to
            ``None``: nothing.
        settings: settings of the solve.

    Returns:
        The displacement ``(B, ndim, *spatial)``, the record, and a certificate a pair: ``None`` when none is asked for
        or the network, a classical method, is not iterated.
    """
    with torch.no_grad():
        if certificate is None or not hasattr(network, "fixed_point_map"):
            ddf, record = network.solve(moving, fixed, initial_ddf, **settings)
            return ddf, record, None
        center, coarse_steps = None, None
        if getattr(network, "coarse", None) is not None and network.proximal_weight:
            # once, for the solve and for the map that is examined
            center, coarse_steps = network.coarse_start(moving, fixed)
        state, record = network.solve_state(moving, fixed, initial_ddf, **_given(center), **settings)
        if coarse_steps is not None:
            record = replace(record, coarse_steps=coarse_steps)
        own = {k: getattr(network, k, 0.0) for k in ("tolerance", "relative_tolerance")}
        judged = {**own, **{k: v for k, v in settings.items() if k in own}, **certificate}
        # the further solves are those of the first, whatever the certificate takes for converged
        judged = {**judged, "solve_settings": settings, "proximal_center": center}
        certificates = certify(network, moving, fixed, state, record, **judged)
        ndim = fixed.ndim - 2
        # without the hidden state, which a view would keep in memory
        return state if state.shape[1] == ndim else state[:, :ndim].clone(), record, certificates
