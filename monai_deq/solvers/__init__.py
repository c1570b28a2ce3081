# SPDX-License-Identifier: Apache-2.0
"""Fixed-point solvers under TorchDEQ, and their record."""

from __future__ import annotations

from .fixed_point import SOLVERS, anderson_solver, plain_solver, residual_norms, torchdeq_name
from .linear import solve_linear
from .random_fields import random_smooth_ddf
from .records import MEASURES, SolverRecord, StopReason
from .solving import SolverSettings, build_deq, solve_fixed_point

__all__ = [
    "MEASURES",
    "SOLVERS",
    "SolverRecord",
    "SolverSettings",
    "StopReason",
    "anderson_solver",
    "build_deq",
    "plain_solver",
    "random_smooth_ddf",
    "residual_norms",
    "solve_fixed_point",
    "solve_linear",
    "torchdeq_name",
]
