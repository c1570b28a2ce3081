# SPDX-License-Identifier: Apache-2.0
"""Transforms: loading and checks, solving, warping, writing."""

from __future__ import annotations

from . import fields, images, loading, saving, warping
from .fields import *  # noqa: F403
from .fixed_point_solver import FixedPointSolver, FixedPointSolverD, FixedPointSolverd, FixedPointSolverDict
from .images import *  # noqa: F403
from .loading import *  # noqa: F403
from .saving import *  # noqa: F403
from .warping import *  # noqa: F403

__all__ = ["FixedPointSolver", "FixedPointSolverD", "FixedPointSolverDict", "FixedPointSolverd"]
__all__ += fields.__all__ + images.__all__ + loading.__all__ + saving.__all__ + warping.__all__
