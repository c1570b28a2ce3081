# SPDX-License-Identifier: Apache-2.0
"""Small helpers that several rooms use."""

from __future__ import annotations

from .files import refuse_existing, replace_file
from .flags import as_flag

__all__ = ["as_flag", "refuse_existing", "replace_file"]
