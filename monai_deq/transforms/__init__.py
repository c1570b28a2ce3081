# SPDX-License-Identifier: Apache-2.0
"""Transforms: loading and checks, geometry, solving, warping, inverting, files of transforms, writing."""

from __future__ import annotations

from . import (
    alignment,
    contrasts,
    fields,
    fixed_point_solver,
    geometry,
    intensities,
    inversion,
    loading,
    points,
    propagation,
    saving,
    summaries,
    transform_files,
    warping,
)
from .alignment import *  # noqa: F403
from .contrasts import *  # noqa: F403
from .fields import *  # noqa: F403
from .fixed_point_solver import *  # noqa: F403
from .geometry import *  # noqa: F403
from .intensities import *  # noqa: F403
from .inversion import *  # noqa: F403
from .loading import *  # noqa: F403
from .points import *  # noqa: F403
from .propagation import *  # noqa: F403
from .saving import *  # noqa: F403
from .summaries import *  # noqa: F403
from .transform_files import *  # noqa: F403
from .warping import *  # noqa: F403

__all__ = [
    *(alignment.__all__ + contrasts.__all__ + fields.__all__ + fixed_point_solver.__all__ + geometry.__all__),
    *(intensities.__all__ + inversion.__all__ + loading.__all__ + points.__all__),
    *(propagation.__all__ + saving.__all__ + summaries.__all__ + transform_files.__all__ + warping.__all__),
]
