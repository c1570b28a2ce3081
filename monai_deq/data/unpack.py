# SPDX-License-Identifier: Apache-2.0
"""Archives unpacked into a folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
import uuid
import zipfile
import zlib
from pathlib import Path

from monai.apps import extractall

from monai_deq.data.split import shorten

__all__ = ["ARCHIVE_SUFFIXES", "check_archive", "unpack_archive"]

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz")
"""What ``monai.apps.extractall`` can unpack."""

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError)


def _unpacked_size(archive: Path) -> int:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            return sum(member.file_size for member in file.infolist())
    if not tarfile.is_tarfile(archive):
        raise tarfile.ReadError("no list of members found")
    with tarfile.open(archive) as file:
        return sum(member.size for member in file.getmembers() if member.isfile())


def check_archive(archive: str | Path, advice: str = "") -> None:
    """
    Read the list of an archive's members, which an archive that was cut off does not have or is cut off itself.

    Args:
        archive: zip or tar file, by what is in it, not by its name.
        advice: what the user can do, put at the end of the message. Defaults to nothing.

    Raises:
        RuntimeError: When it cannot be read.
    """
    try:
        _unpacked_size(Path(archive))
    except (*_DAMAGED, OSError) as e:
        raise RuntimeError(f"{archive} is no zip or tar archive, or is damaged ({e}). {advice}".strip()) from e


def unpack_archive(
    archive: str | Path, folder: str | Path, holds: str, overwrite: bool = False, advice: str = ""
) -> Path:
    """
    Unpack an archive with ``monai.apps.extractall``, which refuses links and members that would leave the folder. It
    unpacks into a folder beside, which gets its name at the end: ``extractall`` itself takes any folder that is not
    empty for a finished one.

    Args:
        archive: zip, tar or tar.gz file.
        folder: folder that is going to hold the data. Where everything in the archive is below one folder, this takes
            its place.
        holds: pattern of a file or folder by which the data are known, such as ``"*_dataset.json"``.
        overwrite: replace a folder that is there already. Defaults to ``False``.
        advice: what the user can do with a damaged archive, put at the end of the message. Defaults to nothing.

    Returns:
        ``folder``.

    Raises:
        FileExistsError: When ``folder`` is there and ``overwrite`` is not set.
        RuntimeError: When the archive is damaged or of another kind.
        ValueError: When a member would leave the folder or is a link, or nothing matches ``holds``.
        OSError: When the disk has not enough space.
    """
    archive, folder = Path(archive).expanduser(), Path(folder).expanduser()
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists already and is not overwritten.")
    check_archive(archive, advice)
    folder.parent.mkdir(parents=True, exist_ok=True)
    size, free = _unpacked_size(archive), shutil.disk_usage(folder.parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"Not enough space in {folder.parent}: {archive.name} has {size / 1e9:.2f} GB when unpacked, "
            f"{free / 1e9:.2f} GB are free. Make room and run the same again",
        )
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    old = temporary.with_name(temporary.name + ".old")
    temporary.mkdir()
    try:
        try:
            extractall(archive, temporary, has_base=False)
        except _DAMAGED as e:
            raise RuntimeError(f"{archive} cannot be unpacked ({e}). {advice}".strip()) from e
        except ValueError as e:
            raise ValueError(f"{archive} is not unpacked: {e}. It is not the archive of a data set.") from e
        data = _data_folder(temporary, archive, holds)
        if folder.exists():
            os.replace(folder, old)
        os.replace(data, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def _data_folder(root: Path, archive: Path, holds: str) -> Path:
    """The folder that directly holds the data: ``root``, or the only one in it, and so on."""
    while not any(root.glob(holds)):
        # what a Mac packs beside the data is not looked at
        inside = sorted(p for p in root.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX")
        if len(inside) != 1 or not inside[0].is_dir():
            found = shorten([p.name for p in inside]) if inside else "nothing"
            raise ValueError(f"{archive} does not hold the data set: expected {holds}, found {found}.")
        root = inside[0]
    return root
