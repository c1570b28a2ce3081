# SPDX-License-Identifier: Apache-2.0
"""All kinds of damage, and their shares."""

from __future__ import annotations

from . import commands, files, lists
from .judging import Kind

KINDS: dict[str, tuple[Kind, float]] = {**files.KINDS, **lists.KINDS, **commands.KINDS}
