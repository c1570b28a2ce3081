# SPDX-License-Identifier: Apache-2.0
"""Fixed-point solvers under TorchDEQ, their record, and what can be said of a solution."""

from __future__ import annotations

from .certificate import (
    Certificate,
    Verdict,
    certified_solve,
    certify,
    check_certificate,
    residual_at,
    starting_point,
    verdict,
)
from .fixed_point import SOLVERS, anderson_solver, plain_solver, torchdeq_name
from .random_start import random_smooth_ddf
from .record import SolverRecord, StopReason
from .solve import build_deq, check_solver_options, solve_fixed_point
from .spectral_radius import spectral_radius

__all__ = [
    "Certificate",
    "SOLVERS",
    "SolverRecord",
    "StopReason",
    "Verdict",
    "anderson_solver",
    "build_deq",
    "certified_solve",
    "certify",
    "check_certificate",
    "check_solver_options",
    "plain_solver",
    "random_smooth_ddf",
    "residual_at",
    "solve_fixed_point",
    "spectral_radius",
    "starting_point",
    "torchdeq_name",
    "verdict",
]
