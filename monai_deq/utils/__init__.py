# SPDX-License-Identifier: Apache-2.0
"""Small helpers that several rooms use."""

from __future__ import annotations

from .files import refuse_existing, replace_file
from .flags import as_flag
from .mean_std import MeanStd, mean_std

__all__ = ["MeanStd", "as_flag", "mean_std", "refuse_existing", "replace_file"]
