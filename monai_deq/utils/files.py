# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and JSON."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from monai.utils import OptionalImportError, optional_import

from .errors import is_disk_full

__all__ = ["check_writable", "expand_user", "json_ready", "lock_folder", "read_json", "refuse_existing"]
__all__ += ["replace_file", "unlock_folder", "write_json"]

fcntl, _ = optional_import("fcntl")  # not on Windows

_LOCKS: dict[Path, IO[str]] = {}


def _lock(folder: Path) -> int | None:
    """A handle that holds the kernel's lock on a folder until it is closed; None where there are no such locks."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except (OSError, OptionalImportError):
        os.close(handle)
        return None
    return handle


def _clean(folder: Path) -> None:
    """Remove what killed processes have left in a folder; the lock tells whether the owner lives."""
    for left in folder.glob(".*-????????.part"):
        with suppress(OSError):
            if (handle := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)


@contextmanager
def _folder_for(path: Path) -> Iterator[Path]:
    """
    A hidden folder beside a file, where it is written before it gets its name. What killed processes have left goes.
    """
    _clean(path.parent)
    handle = None
    while True:
        folder = Path(tempfile.mkdtemp(".part", f".{path.name}-", path.parent))
        with suppress(BlockingIOError, FileNotFoundError):  # another process takes it for one that was left
            handle = _lock(folder)
            if folder.exists():
                break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """
    Write a file of the same name in a hidden folder beside it, and move it into place when the block ends well. What
    goes wrong because the disk is full is an ``OSError`` that says so, whatever the library that wrote made of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _folder_for(path) as folder:
        temporary = folder / path.name
        try:
            yield temporary
            os.replace(temporary, path)
        except Exception as e:
            if not _disk_is_full(e, folder):
                raise
            written = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
            kept = "; the file of that name is as it was" if path.exists() else ""
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: {path} needs more than the {written:.1f} MB that could be written of it{kept}. "
                "Make room, or name a folder on another disk.",
            ) from e


def _disk_is_full(error: Exception, folder: Path) -> bool:
    """Whether an error came of that; libraries raise errors of their own (PyTorch: ``unexpected pos``)."""
    seen: list[BaseException] = [error]
    chain = error.__cause__ or error.__context__
    while chain is not None and chain not in seen:  # they may go round in a circle
        seen.append(chain)
        chain = chain.__cause__ or chain.__context__
    if any(map(is_disk_full, seen)):
        return True
    # what is written last may still have fitted
    return isinstance(error, (OSError, RuntimeError)) and shutil.disk_usage(folder).free < 1 << 16


def expand_user(path: str | Path) -> Path:
    """The path with a ``~`` in front resolved, and as it is where there is no such user."""
    return Path(os.path.expanduser(path))


def check_writable(folder: str | Path) -> None:
    """Make a folder, where it is not there, and a file in it, and remove both again: before hours of work whose results
    could not be written. What stands in the way is an ``OSError`` of its kind. What a killed process was writing there
    goes.
    """
    folder = Path(folder)
    absent = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")  # a full disk may still take an empty file
            file.flush()
    except OSError as e:
        reason = e.strerror or str(e)
        if isinstance(e, (FileExistsError, NotADirectoryError)):
            in_the_way = (p for p in (folder, *folder.parents) if os.path.lexists(p) and not p.is_dir())
            reason = next((f"{p} is there and is no folder" for p in in_the_way), reason)
        raise type(e)(f"cannot write to the folder {folder}: {reason}. Make it writable, or name another one.") from e
    finally:
        with suppress(OSError):  # not there, or in use by now
            for made in absent:
                made.rmdir()


def lock_folder(folder: str | Path, what: str) -> None:
    """
    Let no other process work in a folder until :py:func:`unlock_folder`, or the end of this one, however it ends: it is
    the kernel's lock on the file ``.lock``, which processes forked from this one do not have. Where the file system has
    no locks that is logged.

    Args:
        folder: an existing folder.
        what: how to call the work, for messages.

    Raises:
        RuntimeError: When another process works there.
    """
    path = Path(folder).resolve() / ".lock"
    while path not in _LOCKS:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # open as long as it is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            said = file.read().strip() or "another process"
            file.close()
            words = f"another {what} works in the folder {folder}: {said}"
            raise RuntimeError(f"{words}. Wait for its end, or name another folder.") from None
        except (OSError, OptionalImportError) as e:
            words = "%s has no locks (%s): see to it that one %s at a time works there"
            logging.getLogger("monai_deq").warning(words, folder, e, what)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            _LOCKS[path] = file
        else:  # its owner has removed it meanwhile
            file.close()


def unlock_folder(folder: str | Path) -> None:
    """Let others work in a folder that this process has locked."""
    path = Path(folder).resolve() / ".lock"
    if file := _LOCKS.pop(path, None):
        path.unlink(missing_ok=True)
        file.close()


def refuse_existing(paths: Iterable[str | Path], advice: str) -> None:
    """Raise FileExistsError, whose message ends with the advice, when one of the files about to be written exists."""
    if there := [str(p) for p in paths if Path(p).exists()]:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise FileExistsError(f"{there[0]}{more} exists already and is not overwritten. {advice}")


def json_ready(value: Any) -> Any:
    """Numbers, texts, paths, mappings and sequences as JSON takes them; what else there is raises TypeError.

    NumPy's and PyTorch's numbers and arrays become Python's; NaN and infinity, which JSON does not know, None.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    raise TypeError(f"JSON knows no {type(value).__name__}, got {value!r}.")


def read_json(path: str | Path, advice: str = "correct it") -> Any:
    """What a JSON file holds; ``ValueError``, which names it and ends with the advice, where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON ({' '.join(str(e).split())}): {advice}.") from e


def write_json(path: str | Path, content: Any, indent: int = 2) -> None:
    """Write a JSON file that appears whole or not at all; for the content see :py:func:`json_ready`."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(json_ready(content), indent=indent, allow_nan=False) + "\n", encoding="utf-8")
