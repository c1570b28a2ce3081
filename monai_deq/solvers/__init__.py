# SPDX-License-Identifier: Apache-2.0
"""Fixed-point solvers under TorchDEQ and their record."""

from __future__ import annotations

from .fixed_point import SOLVERS, anderson_solver, plain_solver, torchdeq_name
from .record import SolverRecord, StopReason
from .solve import build_deq, check_solver_options, solve_fixed_point

__all__ = [
    "SOLVERS",
    "SolverRecord",
    "StopReason",
    "anderson_solver",
    "build_deq",
    "check_solver_options",
    "plain_solver",
    "solve_fixed_point",
    "torchdeq_name",
]
