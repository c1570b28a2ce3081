# SPDX-License-Identifier: Apache-2.0
"""What comes in by the command line of ``python -m monai.bundle run``."""

from __future__ import annotations

import inspect
import re
import sys
from ast import literal_eval
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, run
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

__all__ = ["as_flag", "refuse_unknown_settings"]


def as_flag(value: Any, name: str) -> bool:
    """
    A flag of a configuration: ``--resume false`` on the command line arrives as the text ``"false"``, which Python
    takes for true.

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


def refuse_unknown_settings(argv: Sequence[str] | None = None) -> None:
    """
    Refuse settings on the command line of ``python -m monai.bundle run`` that the configuration does not have: MONAI
    adds them as new entries, which nothing reads, and a mistyped one does nothing. An entry that another setting of the
    command line refers to (``--my_update "{...}" --update @my_update``) is none of these. Nothing happens in any other
    program.

    Args:
        argv: the words of the command, the program first. Defaults to those of this process.

    Raises:
        ValueError: When there are such settings.
    """
    words = list(sys.argv if argv is None else argv)
    if Path(words[0]).parts[-3:] != ("monai", "bundle", "__main__.py") or words[1:2] != ["run"]:
        return
    given = _settings(words[2:])
    if "args_file" in given:
        given = {**ConfigParser.load_config_file(given["args_file"]), **given}
    if "config_file" not in given:
        return
    files = _value(given["config_file"])
    known = set(ConfigParser.load_config_files(files)) | set(inspect.signature(run).parameters)
    if "tracking" in given:
        tracking = _value(given["tracking"])
        settings: Any = DEFAULT_EXP_MGMT_SETTINGS.get(tracking) if isinstance(tracking, str) else None
        known |= set((settings or ConfigParser.load_config_files(tracking)).get("configs", {}))
    unknown = []
    for key in given:
        name = key.split("#")[0].split("::")[0].removeprefix("+")
        used = any(re.search(rf"@{re.escape(name)}\b", str(value)) for other, value in given.items() if other != key)
        # what begins with an underscore is MONAI's own: metadata
        if name not in known and not used and not name.startswith("_"):
            unknown.append(name + "".join(f" (is it {n}?)" for n in get_close_matches(name, sorted(known), 1)))
    if unknown:
        raise ValueError(f"{files} has no setting {', '.join(unknown)}.")


def _settings(words: Sequence[str]) -> dict[str, str]:
    """The settings as Fire takes them, ``--name value`` and ``--name=value``."""
    given = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            given[name.replace("-", "_")] = value if equals else after
    return given


def _value(text: Any) -> Any:
    """A list where it is one, else the text itself."""
    try:
        return literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError):
        return text
