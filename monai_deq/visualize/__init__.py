# SPDX-License-Identifier: Apache-2.0
"""Pictures and reports of registrations; they need matplotlib, ``pip install "monai_deq[figures]"``."""

from __future__ import annotations

from . import pages, pairs, panels, reports, style
from .pages import *  # noqa: F403
from .pairs import *  # noqa: F403
from .panels import *  # noqa: F403
from .reports import *  # noqa: F403
from .style import *  # noqa: F403

__all__ = pages.__all__ + pairs.__all__ + panels.__all__ + reports.__all__ + style.__all__
