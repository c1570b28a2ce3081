# SPDX-License-Identifier: Apache-2.0
"""What becomes of damaged files and command lines: a clear error, a correct result, or anything else."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Check = Callable[[Any], bool]

#: lines that a case may print or log, characters of an error, seconds
_LINES, _CHARACTERS, _SECONDS = 40, 1500, 60
_ERRORS = (OSError, RuntimeError, ValueError, ImportError)


@dataclass(frozen=True)
class Case:
    """One damage.

    Args:
        what: the damage, in words.
        run: reads the damaged thing, and gives what was read.
        named: an error must have one of these: the file, the argument, its value.
        right: whether what was read is right. Defaults to ``None``: nothing is, it must be refused.
        strict: it must not be refused.
        made: patterns of the files that may be there afterwards.
    """

    what: str
    run: Callable[[], Any]
    named: Sequence[str | Path] = ()
    right: Check | None = None
    strict: bool = False
    made: Sequence[str] = ()


#: makes a case in an empty folder
Kind = Callable[[np.random.Generator, Path], Case]


class Outcome(NamedTuple):
    """Of a case: ``"clear error"``, ``"correct"`` or ``"other"``, and what was said."""

    kind: str
    number: int
    what: str
    outcome: str
    said: str


class CommandError(RuntimeError):
    """What a command said on stderr that ended with an exit code of bad input."""


@dataclass
class _Heard:
    """What is printed and logged meanwhile."""

    lines: list[str] = field(default_factory=list)


class _Handler(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _raise_timeout(number: int, frame: Any) -> None:
    raise TimeoutError("no end within a minute")


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What is said on the file descriptors of stdout and stderr, by libraries too, and to the loggers."""
    lines: list[str] = []
    logger, root = logging.getLogger("monai_deq"), logging.getLogger()
    handler, before = _Handler(lines), (logger.level, list(root.handlers))
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as file, ExitStack() as stack:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        root.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        try:
            text = stack.enter_context(open(file.fileno(), "w", closefd=False, encoding="utf-8"))
            stack.enter_context(redirect_stdout(text))
            stack.enter_context(redirect_stderr(text))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                warnings.simplefilter("ignore", DeprecationWarning)
                yield lines
        finally:
            stack.close()
            logger.setLevel(before[0])
            root.handlers[:] = before[1]
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, number in zip(kept, (1, 2), strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
            lines += [f"{w.category.__name__}: {w.message}" for w in caught]


def judge(kind: str, number: int, case: Case, folder: Path) -> Outcome:
    """Run a case whose files are in ``folder``."""
    before = _files(folder)
    said, outcome = "", "other"
    numerics = np.geterr()
    handler = signal.signal(signal.SIGALRM, _raise_timeout)
    with _heard() as lines:
        signal.alarm(_SECONDS)
        try:
            got = case.run()
        except TimeoutError:
            said = "hangs"
        except _ERRORS as e:
            said = f"{type(e).__name__}: {' '.join(str(e).split())}"
            outcome = _of_error(case, e)
        except BaseException as e:
            said = "".join(traceback.format_exception(e))[-1500:]
            if isinstance(e, KeyboardInterrupt):
                raise
        else:
            right = _is_right(case, got)
            outcome, said = "correct" if right else "other", "" if right else f"taken in silence: {str(got)[:300]}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
            np.seterr(**numerics)  # type: ignore[arg-type]
    new = _files(folder) - before
    left = [f for f in new if _is_temporary(f) or not any(Path(f).match(p) for p in case.made)]
    if left:
        outcome, said = "other", f"left {left}; {said}"
    if len(lines) > _LINES:
        outcome, said = "other", f"{len(lines)} lines, e.g. {lines[0][:200]!r}; {said}"
    return Outcome(kind, number, case.what, outcome, said)


def _is_right(case: Case, got: Any) -> bool:
    try:
        return case.right is not None and case.right(got)
    except Exception:  # it is something that has no meaning
        return False


def _of_error(case: Case, error: Exception) -> str:
    text = str(error)
    named = any(str(name) in text or Path(name).name in text for name in case.named)
    return "clear error" if named and len(text) < _CHARACTERS and not case.strict else "other"


def _is_temporary(file: str) -> bool:
    """Whether a file, or a folder it is in, has the name of a temporary one."""
    return any(part.startswith(".") and part != ".lock" for part in Path(file).parts)


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def run_cases(kinds: Mapping[str, tuple[Kind, float]], cases: int, seed: int, one: int | None = None) -> list[Outcome]:
    """
    Run so many cases, of each kind by its share. A case depends on the seed, its kind and its number alone.

    Args:
        kinds: by name, and their shares.
        cases: number of cases.
        seed: of the damages.
        one: the number of the only case to run of each kind. Defaults to ``None``: all.
    """
    total = sum(share for _, share in kinds.values())
    outcomes = []
    for name, (kind, share) in kinds.items():
        count = max(round(cases * share / total), 1)
        for number in range(count) if one is None else [one]:
            rng = np.random.default_rng([seed, *name.encode(), number])
            folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
            here = Path.cwd()
            try:
                torch.manual_seed(0)
                outcomes.append(judge(name, number, kind(rng, folder), folder))
            finally:
                os.chdir(here)
                _remove(folder)
    return outcomes


def _remove(folder: Path) -> None:
    for path in folder.rglob("*"):
        with suppress(OSError):
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """Numbers of outcomes by kind."""
    columns = ("clear error", "correct", "other")
    rows = [("damaged", "cases", *columns)]
    for name in (*dict.fromkeys(o.kind for o in outcomes), "all"):
        of = [o.outcome for o in outcomes if name in (o.kind, "all")]
        rows.append((name, str(len(of)), *(str(of.count(column)) for column in columns)))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- | ---: | ---: | ---: | ---: |", *lines[1:]])


# -- what is compared


def same(expected: Any, close: float = 0.0) -> Check:
    """Whether what was read is this; arrays bit by bit, or numbers up to a share and as much of one."""

    def check(got: Any, want: Any = expected) -> bool:
        if isinstance(want, Mapping):
            return isinstance(got, Mapping) and got.keys() == want.keys() and all(check(got[k], want[k]) for k in want)
        if isinstance(want, (list, tuple)):
            return isinstance(got, (list, tuple)) and len(got) == len(want) and all(map(check, got, want))
        if isinstance(want, (torch.Tensor, np.ndarray)):
            if not isinstance(got, (torch.Tensor, np.ndarray)):
                return False
            a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (got, want))
            if close:
                return a.shape == b.shape and np.allclose(a, b, rtol=close, atol=close)
            return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
        if isinstance(want, float) and want != want:
            return isinstance(got, float) and got != got
        return bool(type(got) is type(want) and got == want)

    return check


def placed(image: Any) -> dict[str, np.ndarray]:
    """Voxels and affine of a tensor of MONAI."""
    return {"voxels": np.asarray(image.as_subclass(torch.Tensor)), "affine": np.asarray(image.affine, dtype=float)}


# -- commands

_LOG = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


def command(*words: str | Path) -> dict[str, Any]:
    """
    ``monai-deq`` in this process: exit code and what it printed. Exit code 2 is a :py:class:`CommandError` of the line
    on stderr; more than one line, but for the usage, is an ``AssertionError``.
    """
    from monai_deq.cli import main

    argv, handlers = list(sys.argv), {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    out, err, code = StringIO(), StringIO(), 0
    sys.argv[:] = ["monai-deq", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    finally:
        sys.argv[:] = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ended(code, out.getvalue(), err.getvalue())


def ended(code: int, out: str, err: str) -> dict[str, Any]:
    """How a command ended, see :py:func:`command`."""
    lines = [line for line in err.splitlines() if line.strip() and not _LOG.match(line)]
    if code == 2:
        usage = lines and lines[0].startswith("Usage:")
        assert len(lines) == 1 or usage, f"more than one line on stderr: {lines[:5]}"
        assert "Traceback" not in err
        raise CommandError(lines[-1])
    assert code in (0, 1, 3), f"exit code {code}: {err[-500:]}"
    return {"code": code, "out": out, "err": lines}
