# SPDX-License-Identifier: Apache-2.0
"""Settings that a configuration has no use for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["refuse_unused"]


def refuse_unused(method: str, settings: Mapping[str, Sequence[Any]]) -> None:
    """
    Refuse settings that a method does not use: a run in which they do nothing would look as if they did.

    Args:
        method: name of the method, for the error.
        settings: by name what was given, and the only value that is right.

    Raises:
        ValueError: When one of them is another.
    """
    words = {"true": True, "false": False}

    def plain(value: Any) -> Any:
        return words.get(value.lower(), value) if isinstance(value, str) else value

    wrong = [f"{name} {given!r}" for name, (given, right) in settings.items() if plain(given) != right]
    if wrong:
        raise ValueError(f"{method} has no use for {', '.join(wrong)}: leave it out, or take another method.")
