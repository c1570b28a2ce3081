# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["refuse_existing", "replace_file"]


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """
    Write a file under a temporary name beside it and move it into place when the block ends without an exception.

    Args:
        path: where the file goes; its folder is made. The temporary name keeps the suffixes.

    Yields:
        The temporary path to write to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:]) if path.name.endswith(".gz") else path.suffix
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[: -len(suffix) or None]}-", suffix=suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp lets the owner alone read; give what a plain open() would have given
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(paths: Iterable[str | Path], advice: str) -> None:
    """
    Raise when a file that would be written is there already.

    Args:
        paths: files about to be written.
        advice: what the user can do, put at the end of the message.

    Raises:
        FileExistsError: When one of them exists.
    """
    there = [str(p) for p in paths if Path(p).exists()]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise FileExistsError(f"{there[0]}{more} exists already and is not overwritten. {advice}")
