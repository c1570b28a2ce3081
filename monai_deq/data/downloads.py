# SPDX-License-Identifier: Apache-2.0
"""The public data sets: where they are, under which terms, their checksums, and how they come to this machine.

The addresses are those of the publisher's page (https://github.com/adalca/medical-datasets) and, for NLST, of projects
that use it. The publishers give no checksums: that of neurite-oasis is given by two projects that use it, that of
neurite-oasis-2d by one. None of it was tried against the servers when it was written.
"""

from __future__ import annotations

import errno
import gzip
import logging
import os
import re
import shutil
import tarfile
import uuid
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from monai.apps.utils import HashCheckError, extractall

from monai_deq.utils import expand_user

__all__ = ["PUBLIC_DATASETS", "PublicDataset", "download_dataset"]

logger = logging.getLogger("monai_deq")

_NEURITE_PAGE = "https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md"
_NEURITE_TERMS = f"""\
The scans come from OASIS-1. Its Data Use Agreement applies: https://www.oasis-brains.org/#access
Cite: Marcus et al., Open Access Series of Imaging Studies (OASIS): Cross-Sectional MRI Data in Young, Middle Aged,
Nondemented, and Demented Older Adults, Journal of Cognitive Neuroscience 19, 1498-1507, 2007
and: Hoopes et al., HyperMorph: Amortized Hyperparameter Learning for Image Registration, IPMI 2021
({_NEURITE_PAGE})."""
_LEARN2REG_PAGE = "https://learn2reg.grand-challenge.org/Datasets/"
_LEARN2REG_TERMS = f"""The terms of the Learn2Reg challenge apply: {_LEARN2REG_PAGE}
Cite: Hering et al., Learn2Reg: Comprehensive Multi-Task Medical Image Registration Challenge, Dataset and Evaluation in
the Era of Deep Learning, IEEE Transactions on Medical Imaging, 2023."""
_NLST_TERMS = f"""\
The scans come from the National Lung Screening Trial. The terms of its collection in The Cancer Imaging Archive apply:
https://doi.org/10.7937/TCIA.HMQ8-J677
Cite: National Lung Screening Trial Research Team, Data from the National Lung Screening Trial (NLST), The Cancer
Imaging Archive, 2013, https://doi.org/10.7937/TCIA.HMQ8-J677
and: National Lung Screening Trial Research Team, Reduced Lung-Cancer Mortality with Low-Dose Computed Tomographic
Screening, New England Journal of Medicine 365(5), 395-409, 2011.
{_LEARN2REG_TERMS}"""


@dataclass(frozen=True)
class PublicDataset:
    """A data set that can be downloaded."""

    url: str | None  # address of the archive; None: not known
    checksum: str | None  # of the archive, "<kind>:<digits>"; None: not known
    page: str  # of the publisher
    terms: str  # terms of use and what to cite
    holds: str  # pattern of a file or folder by which the unpacked data are known


_NEURITE = "https://surfer.nmr.mgh.harvard.edu/ftp/data/neurite/data/"
_SUBJECTS, _TASK = "OASIS_OAS1_*_MR*/", "*_dataset.json"
PUBLIC_DATASETS: dict[str, PublicDataset] = {
    "neurite-oasis": PublicDataset(  # 6.6 GB
        url=f"{_NEURITE}neurite-oasis.v1.0.tar",
        checksum="md5:081392a8150ff99ab7a64a9ded377835",
        page=_NEURITE_PAGE,
        terms=_NEURITE_TERMS,
        holds=_SUBJECTS,
    ),
    "neurite-oasis-2d": PublicDataset(  # 24 MB
        url=f"{_NEURITE}neurite-oasis.2d.v1.0.tar",
        checksum="md5:c9ae5864f250c7e4b8d83a104e51ae8e",
        page=_NEURITE_PAGE,
        terms=_NEURITE_TERMS,
        holds=_SUBJECTS,
    ),
    "learn2reg-nlst": PublicDataset(
        url="https://cloud.imi.uni-luebeck.de/s/pERQBNyEFNLY8gR/download/NLST2023.zip",
        checksum=None,
        page=_LEARN2REG_PAGE,
        terms=_NLST_TERMS,
        holds=_TASK,
    ),
    "learn2reg-oasis": PublicDataset(None, None, _LEARN2REG_PAGE, f"{_NEURITE_TERMS}\n{_LEARN2REG_TERMS}", _TASK),
}
"""By name, what :py:func:`download_dataset` knows."""

_TIMEOUT = 60.0  # seconds without an answer after which a connection counts as broken
_DIGITS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError)


def download_dataset(
    name: str,
    output_dir: str | Path,
    accept_terms: bool = False,
    url: str | None = None,
    checksum: str | None = None,
    keep_archive: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Download a public data set and unpack it to ``<output_dir>/<name>``, which is what ``dataset_dir`` takes.

    Needs ``pip install "monai_deq[download]"``. Called again, it takes an archive that is there already (downloaded
    with a browser, say), leaves an unpacked data set as it is, and goes on with a download that was cut off where a
    checksum can tell that the parts fit together.

    Args:
        name: one of ``PUBLIC_DATASETS``.
        output_dir: folder of the archive and of the unpacked data set.
        accept_terms: whether you accept the terms of the data set, which are printed. Defaults to False.
        url: another address of the archive. Defaults to None: the known one.
        checksum: of the archive, ``"<kind>:<digits>"`` or the digits alone (md5, sha1, sha256, sha512); ``"skip"``: it
            is not checked. Defaults to None: the known one; where none is known it is not checked, with a warning.
        keep_archive: keep the archive once it is unpacked. Defaults to True.
        overwrite: fetch again what is there already, and replace it when the new is complete. Defaults to False.
        progress: show a bar. Defaults to True.

    Raises:
        ValueError: When an argument is not valid, the address has to be given, or the archive is not the data set's.
        PermissionError: When the terms are not accepted.
        FileExistsError: When the folder is there and holds something else.
        ImportError: When pooch is not installed.
        HashCheckError: When the archive has another checksum.
        RuntimeError: When the server does not give the archive, or it is damaged.
        OSError: When the connection fails (ConnectionError), or the disk is full or cannot be written to.
    """
    if name not in PUBLIC_DATASETS:
        raise ValueError(f"Unknown data set {name!r}; expected one of {sorted(PUBLIC_DATASETS)}.")
    dataset = PUBLIC_DATASETS[name]
    source = url or dataset.url
    if source and not re.match(r"https?://[^/]", source):
        raise ValueError(f"url must begin with https:// or http:// and name a host, got {source!r}.")
    expected = _parse_checksum(checksum or dataset.checksum) if checksum != "skip" else None
    folder = expand_user(output_dir) / name
    if folder.exists() and not overwrite:
        if not any(folder.glob(dataset.holds)):
            message = f"{folder} is there already and is not {name} (it has no {dataset.holds})."
            raise FileExistsError(f"{message} Name another output_dir, or move it away.")
        logger.info("%s is there already and not downloaded again", folder)
        return folder
    print(f"{name}\n{dataset.terms}")
    if accept_terms is not True:
        words = "is downloaded when you accept its terms, printed above: set accept_terms (--accept-terms)."
        raise PermissionError(f"{name} {words}")

    archive = folder.with_name(_archive_name(url) or _archive_name(dataset.url) or f"{name}.zip")
    by_hand = f"Or download it with a browser, save it as {archive} and run the same again: it is taken from there."
    try:
        if archive.exists() and not overwrite:
            _check(archive, expected, checksum == "skip")
            logger.info("%s is there already and not downloaded again", archive)
        elif source is None:
            raise ValueError(f"The address of {name} is not known: see {dataset.page} and give it by --url. {by_hand}")
        else:
            part = archive.with_name(archive.name + ".part")
            advice = f"See {dataset.page} for the address of today and give it by --url. {by_hand}"
            _fetch(source, part, expected is not None, progress, advice)
            _check(part, expected, checksum == "skip")
            os.replace(part, archive)
        _unpack(archive, folder, dataset.holds)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        raise OSError(errno.ENOSPC, f"The disk of {folder.parent} is full. Make room and run the same again") from e
    if not keep_archive:
        archive.unlink()
    logger.info("%s is in %s; train on it with --dataset_dir %s", name, folder, folder)
    return folder


def _archive_name(url: str | None) -> str | None:
    """The file name at the end of an address, where it is an archive's."""
    file = PurePosixPath(unquote(urlparse(url or "").path)).name
    return file if file.endswith((".zip", ".tar", ".tar.gz")) and not file.startswith(".") else None


def _parse_checksum(checksum: str | None) -> tuple[str, str] | None:
    """Kind and digits of ``"<kind>:<digits>"`` or of the digits alone."""
    if checksum is None:
        return None
    kind, _, digits = checksum.strip().lower().rpartition(":")
    found = _DIGITS.get(len(digits))
    if found is None or kind not in ("", found) or not re.fullmatch("[0-9a-f]+", digits):
        expected = f"<kind>:<hexadecimal digits>, as many as its kind has ({_DIGITS})"
        raise ValueError(f"checksum must be {expected}, got {checksum!r}.")
    return found, digits


def _pooch() -> Any:
    try:
        import pooch
    except ImportError as e:
        raise ImportError('download_dataset needs pooch: pip install "monai_deq[download]"') from e
    return pooch


def _fetch(url: str, part: Path, resume: bool, progress: bool, advice: str) -> None:
    """Download to ``part``, or what is missing of it."""
    pooch = _pooch()
    from requests import RequestException  # comes with pooch

    begun = part.stat().st_size if resume and part.is_file() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={begun}-"} if begun else {})}
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "ab" if begun else "wb") as file:

            def start_anew(response: Any, **_: Any) -> None:
                if response.status_code == 200:  # all of it, from a server that cannot go on
                    file.truncate(0)

            logger.info("%s: downloading from %s, after %d bytes that are there", part.name, url, begun)
            options = {"timeout": _TIMEOUT, "headers": headers, "hooks": {"response": start_anew}}
            pooch.HTTPDownloader(progress, 1 << 14, **options)(url, file, None)
            if not file.tell():
                raise RuntimeError(f"{url}: the server sends nothing. {advice}")
    except RequestException as e:
        if e.response is not None and e.response.status_code == 416:  # nothing is missing
            return
        if e.response is not None:
            raise RuntimeError(f"{url}: the server says {e.response.status_code} {e.response.reason}. {advice}") from e
        kept = f"{part.stat().st_size} bytes are kept: the same again goes on from there. " if resume else ""
        network = "Check the network (a proxy goes into the variables http_proxy and https_proxy), or try later."
        raise ConnectionError(f"{url} could not be downloaded: {e}. {kept}{network} {advice}") from e
    finally:
        if part.is_file() and not part.stat().st_size:
            part.unlink()


def _check(archive: Path, expected: tuple[str, str] | None, skipped: bool) -> None:
    """Compare with the checksum; without one read the list of members, which an archive that was cut off lacks."""
    again = f"Delete {archive} and run the same again to download it anew"
    if expected is not None:
        kind, digits = expected
        if (got := _pooch().file_hash(str(archive), alg=kind)) != digits:
            words = f"has another checksum: expected {kind} {digits}, got {got}."
            raise HashCheckError(f"{archive} {words} {again}, or correct the checksum (--checksum).")
        return
    why = "as asked for" if skipped else "none is known; give it by --checksum"
    logger.warning("the checksum of %s is not checked: %s", archive, why)
    try:
        if not zipfile.is_zipfile(archive):
            if not tarfile.is_tarfile(archive):
                raise tarfile.ReadError("no list of members found")
            with tarfile.open(archive) as file:
                file.getmembers()
            if archive.name.endswith(".gz"):  # at whose end is a checksum, behind the last member
                with gzip.open(archive) as unpacked:
                    while unpacked.read(1 << 20):
                        pass
    except (*_DAMAGED, OSError) as e:
        raise RuntimeError(f"{archive} is no zip or tar archive, or is damaged ({str(e)[:200]}). {again}.") from e


def _unpack(archive: Path, folder: Path, holds: str) -> None:
    """Unpack beside ``folder``, whose place what directly holds the data takes at the end; links are refused."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    old = temporary / "old"
    temporary.mkdir()
    try:
        try:
            extractall(archive, temporary / "new", has_base=False)
        except _DAMAGED as e:
            again = f"Delete {archive} and run the same again to download it anew."
            raise RuntimeError(f"{archive} cannot be unpacked ({str(e)[:200]}). {again}") from e
        except ValueError as e:
            raise ValueError(f"{archive} is not unpacked: {e}. It is not the archive of a data set.") from e
        (temporary / "new").mkdir(exist_ok=True)
        data = _data_folder(temporary / "new", archive, holds)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(data, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _data_folder(root: Path, archive: Path, holds: str) -> Path:
    """The folder that directly holds the data: ``root``, or the only one in it, and so on."""
    while not any(root.glob(holds)):
        # what a Mac packs beside the data is not looked at
        inside = sorted(p for p in root.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX")
        if len(inside) != 1 or not inside[0].is_dir():
            found = ", ".join(p.name for p in inside[:5]) or "nothing"
            raise ValueError(f"{archive} does not hold the data set: expected {holds}, found {found}.")
        root = inside[0]
    return root
