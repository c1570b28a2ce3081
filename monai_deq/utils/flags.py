# SPDX-License-Identifier: Apache-2.0
"""Flags as they come from a command line."""

from __future__ import annotations

from typing import Any

__all__ = ["as_flag"]


def as_flag(value: Any, name: str) -> bool:
    """
    A flag from a configuration. On the command line of ``monai.bundle``, ``--resume false`` arrives as the text
    ``"false"``, which Python takes for true.

    Args:
        value: a bool, or the text ``"true"`` or ``"false"`` in any case.
        name: name of the flag, for the error.

    Raises:
        ValueError: When it is something else.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"{name} must be true or false, got {value!r}.")
