# SPDX-License-Identifier: Apache-2.0
"""A download that goes on where it was cut off, and a file that has its name only when it is complete and right.

``monai.apps.download_url`` starts anew each time, collects the file in the system's temporary folder, and takes no
notice of a target it may not write to; what is needed here is done beside it.
"""

from __future__ import annotations

import errno
import http.client
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from monai.apps.utils import SUPPORTED_HASH_TYPES, HashCheckError
from monai.utils import optional_import

__all__ = ["check_checksum", "parse_checksum", "resumable_download"]

logger = logging.getLogger("monai_deq")

tqdm, has_tqdm = optional_import("tqdm", name="tqdm")

_CHUNK = 1 << 20
_FIRST_WAIT = 1.0  # seconds before a broken connection is taken up again; doubled each time without progress
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_GONE = " There is no such file any more, or the address is mistyped."
_CLOSED = " The server wants a login, or does not serve programs."


def parse_checksum(checksum: str) -> tuple[str, str]:
    """
    The kind and the digits of a checksum.

    Args:
        checksum: ``"<kind>:<digits>"`` or the digits alone, whose number tells the kind: md5, sha1, sha256, sha512.

    Raises:
        ValueError: When it is none of these.
    """
    lengths = {name: make(usedforsecurity=False).digest_size * 2 for name, make in SUPPORTED_HASH_TYPES.items()}
    kind, _, digits = str(checksum).strip().lower().rpartition(":")
    if not kind:
        kind = next((name for name, length in lengths.items() if length == len(digits)), "")
    if lengths.get(kind) != len(digits) or not re.fullmatch("[0-9a-f]+", digits):
        raise ValueError(
            f"checksum must be <kind>:<hexadecimal digits> with one of {sorted(lengths)} and as many digits as it has "
            f"({lengths}), got {checksum!r}."
        )
    return kind, digits


def check_checksum(path: str | Path, checksum: str, advice: str = "") -> None:
    """
    Compare a file with its checksum. ``monai.apps.check_hash`` does not say what it got, and takes capitals for wrong.

    Args:
        path: the file.
        checksum: as :py:func:`parse_checksum` takes it.
        advice: what the user can do, put at the end of the message. Defaults to nothing.

    Raises:
        HashCheckError: When the file has another one.
    """
    kind, expected = parse_checksum(checksum)
    digest = SUPPORTED_HASH_TYPES[kind](usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise HashCheckError(
            f"{path} has another checksum: expected {kind} {expected}, got {digest.hexdigest()}. {advice}".strip()
        )
    logger.info("%s: %s %s is right", path, kind, expected)


class _BrokenOff(Exception):
    """The server may give the rest when it is asked again."""


class _NoConnection(_BrokenOff):
    """There was no answer at all."""


@dataclass
class _Note:
    """What has to be known of a part to go on with it; kept in a file beside it."""

    url: str
    total: int | None
    etag: str | None
    last_modified: str | None

    @property
    def validator(self) -> str | None:
        """For the header If-Range, which takes no weak tags."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


class _Transfer:
    """One file on its way: the part that has arrived, and the requests for the rest."""

    def __init__(self, url: str, path: Path, copies: int, timeout: float, progress: bool, advice: str) -> None:
        self.url, self.path, self.copies, self.timeout, self.progress = url, path, copies, timeout, progress
        self.advice = f" {advice}" if advice else ""
        self.part = path.with_name(path.name + ".part")
        self.note_file = path.with_name(path.name + ".part.json")

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return self.part.stat().st_size if self.part.is_file() else 0

    def fetch(self) -> None:
        """Ask for what is missing and write it to the part."""
        note = self._known()
        if note and self.size == note.total:
            return
        response = self._ask(note)
        if response is None:
            note = None
            response = self._ask(note)
        with response:
            self._receive(response, note)

    def _known(self) -> _Note | None:
        """The note of a part that can be gone on with."""
        try:
            note = _Note(**json.loads(self.note_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        tells_files_apart = note.total is not None or note.validator
        return note if self.size and note.url == self.url and tells_files_apart else None

    def _ask(self, note: _Note | None) -> Any:
        """The answer to a request for the rest, or for the whole; ``None`` where the server has no such rest."""
        headers = {"User-Agent": "monai_deq", "Accept-Encoding": "identity"}
        if note:
            headers["Range"] = f"bytes={self.size}-"
            if note.validator:
                headers["If-Range"] = note.validator
        try:
            response = urlopen(Request(self.url, headers=headers), timeout=self.timeout)
        except HTTPError as e:
            if e.code == 416 and note:
                return None
            if e.code in _BUSY:
                raise _BrokenOff(f"the server says {e.code} {e.reason}") from e
            why = {404: _GONE, 410: _GONE, 401: _CLOSED, 403: _CLOSED}.get(e.code, "")
            raise RuntimeError(f"{self.url}: the server says {e.code} {e.reason}.{why}{self.advice}") from e
        except (OSError, http.client.HTTPException) as e:
            raise _NoConnection(f"no answer ({e.reason if isinstance(e, URLError) else repr(e)})") from e
        if note and response.status == 206 and not self._is_rest(response, note):
            response.close()
            return None
        return response

    def _is_rest(self, response: Any, note: _Note) -> bool:
        """Whether an answer is the missing part of the same file."""
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        return bool(span and int(span[1]) == self.size and (note.total is None or span[2] in ("*", str(note.total))))

    def _receive(self, response: Any, note: _Note | None) -> None:
        if response.headers.get_content_type() == "text/html":
            raise RuntimeError(f"{self.url}: the server sends a web page instead of the file.{self.advice}")
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        if note and response.status == 206:
            logger.info("%s: going on after %s", self.path.name, _bytes(self.size))
            total = note.total if total is None else self.size + total
        elif response.status == 200:
            if self.size:
                logger.info("%s: another file, or a server that cannot go on: from the start", self.path.name)
            self.note_file.unlink(missing_ok=True)
            self.part.unlink(missing_ok=True)
        else:
            raise RuntimeError(f"{self.url}: unexpected answer {response.status} {response.reason}.{self.advice}")
        self._check_space(total)
        if not self.size:
            note = _Note(self.url, total, response.headers.get("ETag"), response.headers.get("Last-Modified"))
            self.note_file.write_text(json.dumps(asdict(note)), encoding="utf-8")
        self._write(response, total)
        if total is None:
            logger.warning("%s does not tell the size: a file that was cut off may pass unnoticed", self.url)
        elif self.size < total:
            raise _BrokenOff(f"the connection was closed after {_bytes(self.size)} of {_bytes(total)}")

    def _check_space(self, total: int | None) -> None:
        free = shutil.disk_usage(self.part.parent).free
        needed = 0 if total is None else total * self.copies - self.size
        if needed > free:
            what = "download and unpack" if self.copies > 1 else "download"
            raise OSError(
                errno.ENOSPC,
                f"Not enough space in {self.part.parent}: to {what} {self.path.name}, {_bytes(needed)} are needed and "
                f"{_bytes(free)} are free. Make room, or name another folder",
            )

    def _write(self, response: Any, total: int | None) -> None:
        show = self.progress and has_tqdm
        bar = tqdm(total=total, initial=self.size, unit="B", unit_scale=True, desc=self.path.name) if show else None
        try:
            with open(self.part, "ab") as file:
                while chunk := self._read(response):
                    file.write(chunk)
                    if bar is not None:
                        bar.update(len(chunk))
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"The disk of {self.part.parent} is full after {_bytes(self.size)} of {self.path.name}. Make room and "
                "run the same again: it goes on from there",
            ) from e
        finally:
            if bar is not None:
                bar.close()

    @staticmethod
    def _read(response: Any) -> bytes:
        # what goes wrong here is the connection's fault, not the disk's
        try:
            return response.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as e:
            raise _BrokenOff(f"the connection broke: {e!r}") from e


def resumable_download(
    url: str,
    path: str | Path,
    check: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    copies: int = 1,
    retries: int = 5,
    timeout: float = 60.0,
    progress: bool = True,
    advice: str = "",
) -> Path:
    """
    Download a file. It is collected as ``<name>.part`` beside its place, with ``<name>.part.json`` that says whose part
    it is, and gets its name when it is complete and has passed ``check``. What was cut off, by this call or an earlier
    one, is gone on with where the server can do that (HTTP ranges, the file unchanged), and started anew where not.

    Args:
        url: ``http`` or ``https`` address.
        path: where the file goes; its folder is made.
        check: called with the complete file before it gets its name, and with a file that is there already; raises
            when it is not the right one. Such a file stays where it is. Defaults to ``None``: any file is right.
        overwrite: download a file that is there already, which is replaced when the new one is complete. Defaults to
            ``False``.
        copies: how many times the file must fit on the disk, 2 where it is going to be unpacked. Defaults to 1.
        retries: how often a broken connection is taken up again without a byte more arriving. Defaults to 5.
        timeout: seconds without an answer after which a connection counts as broken. Defaults to 60.
        progress: show a bar. Defaults to ``True``.
        advice: what the user can do when the server does not give the file, put at the end of the messages. Defaults
            to nothing.

    Returns:
        ``path``.

    Raises:
        ValueError: When the address is of another kind, or ``retries`` negative.
        RuntimeError: When the server does not give the file: no such address, a login wanted, a web page instead.
        ConnectionError: When there is no connection, or it breaks again and again.
        OSError: When the disk has not enough space, or the folder cannot be written to.
    """
    if urlparse(url).scheme not in ("http", "https") or not urlparse(url).hostname:
        raise ValueError(f"url must begin with https:// or http:// and name a host, got {url!r}.")
    if retries < 0:
        raise ValueError(f"retries must not be negative, got {retries}.")
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        if check is not None:
            check(path)
        logger.info("%s is there already and not downloaded again", path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    transfer = _Transfer(url, path, copies, timeout, progress, advice)
    most, failures = transfer.size, 0
    for attempt in itertools.count():
        try:
            transfer.fetch()
            break
        except _BrokenOff as e:
            failures = 1 if transfer.size > most else failures + 1
            most = max(most, transfer.size)
            # no network from the first is not waited for; a download that was running may get over it
            if failures > retries or (attempt == 0 and isinstance(e, _NoConnection)):
                kept = f" {_bytes(transfer.size)} are kept: the same again goes on from there." if transfer.size else ""
                raise ConnectionError(
                    f"{url} could not be downloaded: {e}.{kept} Check the network (a proxy goes into the variables "
                    f"http_proxy and https_proxy), or try later.{transfer.advice}"
                ) from e
            wait = _FIRST_WAIT * 2 ** (failures - 1)
            logger.warning("%s: %s; again in %.0f s (%d of %d)", path.name, e, wait, failures, retries)
            time.sleep(wait)
    if check is not None:
        check(transfer.part)
    os.replace(transfer.part, path)
    transfer.note_file.unlink(missing_ok=True)
    return path


def _bytes(number: int) -> str:
    value, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
