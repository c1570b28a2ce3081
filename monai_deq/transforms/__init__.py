# SPDX-License-Identifier: Apache-2.0
"""Transforms: loading and checks, solving, warping, inverting, writing."""

from __future__ import annotations

from . import fields, fixed_point_solver, inversion, loading, warping
from .fields import *  # noqa: F403
from .fixed_point_solver import *  # noqa: F403
from .inversion import *  # noqa: F403
from .loading import *  # noqa: F403
from .warping import *  # noqa: F403

__all__ = fields.__all__ + fixed_point_solver.__all__ + inversion.__all__ + loading.__all__ + warping.__all__
