# SPDX-License-Identifier: Apache-2.0
"""How far a fixed point is solved for, and the solve under TorchDEQ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torchdeq import get_deq

from monai_deq.solvers.fixed_point import SOLVERS, torchdeq_name
from monai_deq.solvers.records import SolverRecord

__all__ = ["SolverSettings", "build_deq", "solve_fixed_point"]

_COMMON = {"func", "x0", "max_iter", "tol", "stop_mode", "indexing", "rel_tol", "ddf_channels"}


@dataclass(frozen=True)
class SolverSettings:
    """How far a fixed point is solved for.

    Args:
        name: ``"plain"`` or ``"anderson"``. Defaults to ``"plain"``.
        max_steps: step limit. Defaults to 48 (paper, ``T``).
        tolerance: RMS residual in voxels at which an item stops. Defaults to 1e-3.
        relative_tolerance: relative residual at which an item stops. Defaults to 0 (not used).
        options: further arguments of :py:func:`plain_solver` or :py:func:`anderson_solver`. Defaults to none.

    Raises:
        ValueError: When the solver or an option is unknown, or a number out of its range.
    """

    name: str = "plain"
    max_steps: int = 48
    tolerance: float = 1e-3
    relative_tolerance: float = 0.0
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        steps = self.max_steps
        if not isinstance(steps, Real) or not steps >= 1 or int(steps) != steps:
            raise ValueError(f"max_steps must be a whole number of at least 1, got {steps!r}.")
        for name in ("tolerance", "relative_tolerance"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}.")
            if not getattr(self, name) >= 0:  # nor NaN
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        object.__setattr__(self, "max_steps", int(self.max_steps))
        torchdeq_name(self.name)
        # TorchDEQ would ignore an unknown option silently
        known = set(inspect.signature(SOLVERS[self.name]).parameters) - _COMMON
        unknown = set(self.options or {}) - known
        if unknown:
            raise ValueError(f"unknown options {sorted(unknown)} for solver {self.name!r}, it takes {sorted(known)}.")
        # the solver itself checks the values, at its door: let it do so now
        SOLVERS[self.name](lambda x: x, torch.zeros(1, 1, 1), max_iter=1, **(self.options or {}))

    def changed(self, **changes: Any) -> SolverSettings:
        """The settings with some fields changed; ``None`` leaves one as it is. Options belong to one solver.

        Raises:
            TypeError: When there is no such field.
        """
        unknown = sorted(set(changes) - set(self.__dataclass_fields__))
        if unknown:
            fields = ", ".join(self.__dataclass_fields__)
            raise TypeError(f"the solver has the settings {fields}, got {', '.join(unknown)}.")
        changes = {k: v for k, v in changes.items() if v is not None}
        if changes.get("name", self.name) != self.name:
            changes = {"options": None, **changes}
        return replace(self, **changes)


def build_deq(settings: SolverSettings, **kwargs: Any) -> torch.nn.Module:
    """TorchDEQ's module with one of our solvers, stopping by residual in voxels; ``kwargs`` of
    :py:func:`torchdeq.get_deq` (``grad``, ``tau``, ``n_states``, ``ift``, ...).
    """
    # TorchDEQ's default core, "sliced", goes on from the end of each state's phantom steps: these would become a part
    # of the iteration, and its acceleration would start anew at each of them
    return get_deq(
        core="indexing",
        f_solver=torchdeq_name(settings.name),
        f_max_iter=settings.max_steps,
        f_tol=float(settings.tolerance),
        f_stop_mode="abs",
        **kwargs,
    )


def solve_fixed_point(
    func: Callable[[torch.Tensor], torch.Tensor],
    initial: torch.Tensor,
    settings: SolverSettings | None = None,
    ddf_channels: int | None = None,
) -> tuple[torch.Tensor, SolverRecord]:
    """Solve ``x = g(x)`` without gradients, under TorchDEQ's :py:func:`get_deq`: the final state and the record.

    Args:
        func: the map ``g``, ``(B, C, *spatial) -> (B, C, *spatial)``.
        initial: initial state; half precision is raised to float32.
        settings: of the solver. Defaults to those of :py:class:`SolverSettings`.
        ddf_channels: see :py:func:`plain_solver`. Defaults to ``None``: all channels.

    Raises:
        ValueError: When the map changes the shape.
    """
    settings = settings or SolverSettings()
    deq = build_deq(settings).eval()
    state = initial.to(torch.promote_types(initial.dtype, torch.float32))
    arguments = {"rel_tol": settings.relative_tolerance, "ddf_channels": ddf_channels, **(settings.options or {})}
    with torch.no_grad():
        out, info = deq(func, state, solver_kwargs=arguments)
    return out[-1], info["record"]
