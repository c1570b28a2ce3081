# SPDX-License-Identifier: Apache-2.0
"""What comes in by the command line of ``python -m monai.bundle run``."""

from __future__ import annotations

import inspect
import json
import re
import sys
import traceback
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from fire import parser
from monai.bundle import ConfigParser, run
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from .errors import PairsFailedError
from .processes import check_device

__all__ = ["as_flag", "refuse_other_settings", "refuse_unknown_settings"]

#: the last frame of a traceback: the file, and what was said there
_RAISED = re.compile(r'^  File "([^"]*)", line .*\n(?:  (?!File ).*\n)*(\S.*)', re.MULTILINE)
_PACKAGE = Path(__file__).resolve().parents[1]
#: settings that are paths, by the end of their name or the whole of it
_PATHS_END = ("_dir", "_path", "_root", "_folder", "_label", "_keypoints", "_mask")
_PATHS = ("fixed", "moving", "pairs", "initial_ddf", "initial_transform")


def as_flag(value: Any, name: str) -> bool:
    """A flag of a configuration; from the command line it is text, ``"true"`` or ``"false"`` in any case."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"{name} must be true or false, got {value!r}.")


def refuse_other_settings(file: Path, said: Any, now: Mapping[str, Any]) -> None:
    """Refuse (ValueError) to go on from a file that was made with other settings, nested, as JSON has them, than these.

    Args:
        file: what to call it.
        said: its settings; anything but a mapping is none.
        now: the settings of this run.
    """
    advice = "replace it with --overwrite, or name another folder of results."
    if not isinstance(said, Mapping):
        raise ValueError(f"{file} does not say with what settings it was made: {advice}")
    before, after = _flat(said), _flat(now)
    other = [k for k in {**after, **before} if (k in before, before.get(k)) != (k in after, after.get(k))]
    if other:
        words = [f"{k} {before.get(k)!r} (now {after.get(k)!r})" for k in other[:5]]
        words += [f"and {len(other) - 5} more"] if len(other) > 5 else []
        raise ValueError(f"{file} was made with other settings, {', '.join(words)}: {advice}")


def _flat(content: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """What is in nested mappings, by the names joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{name}{key}.") if isinstance(value, Mapping) and value else {f"{name}{key}": value}
    return flat


def refuse_unknown_settings(argv: Sequence[str] | None = None) -> None:
    """Refuse settings on the command line of ``python -m monai.bundle run`` that would do nothing (ValueError).

    Those are settings that the configuration does not have, which MONAI adds as new entries, and settings to which
    nothing refers that is run, such as one of another method; what another setting of the command line refers to
    (``--my_update "{...}" --update @my_update``) is neither. Nothing happens in any other program.

    From then on an error that ends this process is followed by its reason on the last line: MONAI raises errors of its
    own for each of a configuration's, and the traceback ends in these.

    Args:
        argv: the words of the command, the program first. Defaults to those of this process.
    """
    words = list(sys.argv if argv is None else argv)
    if Path(words[0]).parts[-3:] != ("monai", "bundle", "__main__.py") or words[1:2] != ["run"]:
        return
    if argv is None and getattr(sys.excepthook, "func", None) is not _report:
        sys.excepthook = partial(_report, sys.excepthook)
    given = _settings(words[2:])
    _refuse_misread(given)
    if "args_file" in given:
        given = {**ConfigParser.load_config_file(given["args_file"]), **given}
    if "config_file" not in given:
        return
    files = _value(given["config_file"])
    config = ConfigParser.load_config_files(files)
    known = set(config) | set(inspect.signature(run).parameters)
    if "tracking" in given:
        tracking = _value(given["tracking"])
        settings: Any = DEFAULT_EXP_MGMT_SETTINGS.get(tracking) if isinstance(tracking, str) else None
        known |= set((settings or ConfigParser.load_config_files(tracking)).get("configs", {}))
    names = {key: key.split("#")[0].split("::")[0].removeprefix("+") for key in given}
    refers = {name: _references(content) for name, content in config.items()}
    for key, name in names.items():
        refers[name] = refers.get(name, set()) | _references(given[key])
    run_id = given.get("run_id", words[2] if len(words) > 2 and not words[2].startswith("--") else "run")
    used, new = set(), {run_id, given.get("init_id", "initialize"), given.get("final_id", "finalize")}
    while new:
        used |= new
        new = {name for user in new for name in refers.get(user, ())} - used
    # what begins with an underscore is MONAI's own: metadata
    unused = {n for n in names.values() if n not in used and n in config}
    unknown = {n for n in names.values() if n not in used | known and not n.startswith("_")}
    if unknown:
        said = (n + "".join(f" (is it {m}?)" for m in get_close_matches(n, sorted(known), 1)) for n in sorted(unknown))
        raise ValueError(f"{files} has no setting {', '.join(said)}.")
    if "device" in given and not given["device"].startswith(("$", "@", "%")):
        check_device(given["device"])
    if unused:
        user = config.get("method", files)
        raise ValueError(f"{user} has no use for {', '.join(sorted(unused))}: leave it out, or take another method.")


def _refuse_misread(given: Mapping[str, str]) -> None:
    """Refuse paths that do not arrive as they are written: Fire reads a value as Python does, where it can, so that
    ``results#2`` becomes ``results``, ``2024`` a number and ``a,b`` a list; and ``%`` begins a reference of MONAI's.
    """
    for name, text in given.items():
        if not name.endswith(_PATHS_END) and name not in _PATHS:
            continue
        read = parser.DefaultParseValue(text)
        if text.startswith("%") and "::" not in text:
            raise ValueError(f"--{name} {text}: MONAI takes what begins with % for a reference; write ./{text}")
        quoted = text[:1] in ("'", '"') and isinstance(read, str)
        if read == text or quoted or read is None or text[:1] in "[({":
            continue
        advice = f"give it in two pairs of quotes, --{name} '\"{text}\"', or write ./{text}"
        raise ValueError(f"--{name} {text}: the command line reads it as {read!r}; {advice}")


def _report(
    before: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report an error as the hook before does, and its reason on one line behind that."""
    failed: BaseException | None = error
    while failed is not None and not isinstance(failed, PairsFailedError):
        failed = failed.__cause__  # contexts may go round in a circle
    if failed is None:  # else all has been said, and nothing went wrong in the program
        before(kind, error, trace)
    if isinstance(error, Exception):
        print(f"Error: {_reason(error)}", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    """What an error came from, in one line: what this package said, and otherwise what the first of all errors says."""
    # as text: that is all there is of an error in a worker of a data loader
    text = "".join(traceback.format_exception(error))
    raised = _RAISED.findall(text)
    own = [said for file, said in raised if _PACKAGE in Path(file).parents]
    if own:
        reason = own[-1].partition(": ")[2]
        return reason if " " in reason else own[-1]  # a KeyError says no more than the key
    # an error that came up while another one was handled need not be of it
    last = _RAISED.findall(text.rpartition("During handling of the above exception")[2]) or raised
    return last[0][1] if last else " ".join(f"{type(error).__name__}: {error}".split())


def _references(content: Any) -> set[str]:
    """Entries of the configuration that a part of it refers to."""
    return set(re.findall(r"[@%](\w+)", json.dumps(content, default=str)))


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
