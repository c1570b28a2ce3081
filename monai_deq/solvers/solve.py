# SPDX-License-Identifier: Apache-2.0
"""Solve for the equilibrium of a map, without gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torchdeq import get_deq

from monai_deq.solvers.fixed_point import SOLVERS, torchdeq_name
from monai_deq.solvers.record import SolverRecord

__all__ = ["build_deq", "check_solver_options", "solve_fixed_point"]

_COMMON = {"func", "x0", "max_iter", "tol", "stop_mode", "indexing", "rel_tol", "ddf_channels"}


def check_solver_options(solver: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """
    Check options for a solver; TorchDEQ would ignore an unknown one silently.

    Args:
        solver: ``"plain"`` or ``"anderson"``.
        options: keyword arguments of the solver beside the tolerances and the step limit.

    Returns:
        The options as a new dict.

    Raises:
        ValueError: When the solver or an option is unknown, or a value is out of its range.
    """
    torchdeq_name(solver)
    known = set(inspect.signature(SOLVERS[solver]).parameters) - _COMMON
    unknown = set(options or {}) - known
    if unknown:
        raise ValueError(f"unknown options {sorted(unknown)} for solver {solver!r}, it takes {sorted(known)}.")
    # the solver itself checks the values, at its door: let it do so now
    SOLVERS[solver](lambda x: x, torch.zeros(1, 1, 1), max_iter=1, **(options or {}))
    return dict(options or {})


def build_deq(solver: str, max_steps: int, tolerance: float, **kwargs: Any) -> torch.nn.Module:
    """
    TorchDEQ's module with one of our solvers, stopping by residual in voxels.

    Args:
        solver: ``"plain"`` or ``"anderson"``.
        max_steps: step limit.
        tolerance: RMS residual in voxels.
        kwargs: further settings of :py:func:`torchdeq.get_deq` (``grad``, ``tau``, ``n_states``, ``ift``, ...).
    """
    # TorchDEQ's default core, "sliced", goes on from the end of each state's phantom steps: these would become a part
    # of the iteration, and its acceleration would start anew at each of them
    return get_deq(
        core="indexing",
        f_solver=torchdeq_name(solver),
        f_max_iter=int(max_steps),
        f_tol=float(tolerance),
        f_stop_mode="abs",
        **kwargs,
    )


def solve_fixed_point(
    func: Callable[[torch.Tensor], torch.Tensor],
    initial: torch.Tensor,
    solver: str = "plain",
    max_steps: int = 48,
    tolerance: float = 1e-3,
    relative_tolerance: float = 0.0,
    solver_options: dict[str, Any] | None = None,
    ddf_channels: int | None = None,
) -> tuple[torch.Tensor, SolverRecord]:
    """
    Solve ``x = g(x)`` without gradients, under TorchDEQ's :py:func:`get_deq`.

    Args:
        func: the map ``g``, ``(B, C, *spatial) -> (B, C, *spatial)``.
        initial: initial state; half precision is raised to float32.
        solver: ``"plain"`` or ``"anderson"``. Defaults to ``"plain"``.
        max_steps: step limit. Defaults to 48.
        tolerance: RMS residual in voxels at which an item stops. Defaults to 1e-3.
        relative_tolerance: relative residual at which an item stops. Defaults to 0 (not used).
        solver_options: further options of the solver.
        ddf_channels: number of leading channels that are the displacement, where the state has a hidden part behind
            it; residuals are then those of the displacement. Defaults to ``None``: all channels.

    Returns:
        The final state and the :py:class:`SolverRecord`.

    Raises:
        ValueError: When the solver or an option is unknown or out of its range, or the map changes the shape.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
    options = check_solver_options(solver, solver_options)
    deq = build_deq(solver, max_steps, tolerance).eval()
    state = initial.to(torch.promote_types(initial.dtype, torch.float32))
    settings = {"rel_tol": relative_tolerance, "ddf_channels": ddf_channels, **options}
    with torch.no_grad():
        out, info = deq(func, state, solver_kwargs=settings)
    return out[-1], info["record"]
