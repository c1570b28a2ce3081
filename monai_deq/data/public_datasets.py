# SPDX-License-Identifier: Apache-2.0
"""The public data sets that can be downloaded: where they are, under which terms, and their checksums.

=================== ============================================ =====================================================
name                archive                                      checksum
=================== ============================================ =====================================================
neurite-oasis       neurite-oasis.v1.0.tar, 6.6 GB               md5, as two projects that use it give independently of
                                                                 each other; the publisher's page gives none
neurite-oasis-2d    neurite-oasis.2d.v1.0.tar, 24 MB             md5, as one project that uses it gives; the publisher's
                                                                 page gives none
learn2reg-nlst      NLST2023.zip                                 not known
learn2reg-oasis     address not known: give it                   not known
=================== ============================================ =====================================================

Nothing of this could be tried against the servers when it was written; the addresses are those of the publisher's page
(https://github.com/adalca/medical-datasets) and, for NLST, of projects that use it. Where a checksum is not known it
is given by the user, or not checked, with a warning.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from monai_deq.data.resumable_download import check_checksum, parse_checksum, resumable_download
from monai_deq.data.unpack import ARCHIVE_SUFFIXES, check_archive, unpack_archive
from monai_deq.utils import as_flag

__all__ = ["PUBLIC_DATASETS", "PublicDataset", "download_dataset"]

logger = logging.getLogger("monai_deq")

_OASIS_TERMS = """\
The scans come from OASIS-1. Its Data Use Agreement applies: https://www.oasis-brains.org/#access
Cite: Marcus et al., Open Access Series of Imaging Studies (OASIS): Cross-Sectional MRI Data in Young, Middle Aged,
Nondemented, and Demented Older Adults, Journal of Cognitive Neuroscience 19, 1498-1507, 2007"""
_NEURITE_TERMS = f"""{_OASIS_TERMS}
and: Hoopes et al., HyperMorph: Amortized Hyperparameter Learning for Image Registration, IPMI 2021
(https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md)."""
_LEARN2REG_PAGE = "https://learn2reg.grand-challenge.org/Datasets/"
_LEARN2REG_TERMS = f"""The terms of the Learn2Reg challenge apply: {_LEARN2REG_PAGE}
Cite: Hering et al., Learn2Reg: Comprehensive Multi-Task Medical Image Registration Challenge, Dataset and Evaluation in
the Era of Deep Learning, IEEE Transactions on Medical Imaging, 2023."""


@dataclass(frozen=True)
class PublicDataset:
    """A data set that can be downloaded.

    Args:
        url: address of the archive; ``None`` where it is not known.
        archive: file name of the archive.
        checksum: ``"<kind>:<digits>"``; ``None`` where it is not known.
        page: page of the publisher.
        terms: terms of use and what to cite.
        holds: pattern of a file or folder by which the unpacked data are known.
    """

    url: str | None
    archive: str
    checksum: str | None
    page: str
    terms: str
    holds: str


PUBLIC_DATASETS: dict[str, PublicDataset] = {
    "neurite-oasis": PublicDataset(
        url="https://surfer.nmr.mgh.harvard.edu/ftp/data/neurite/data/neurite-oasis.v1.0.tar",
        archive="neurite-oasis.v1.0.tar",
        checksum="md5:081392a8150ff99ab7a64a9ded377835",
        page="https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md",
        terms=_NEURITE_TERMS,
        holds="OASIS_OAS1_*_MR*/",
    ),
    "neurite-oasis-2d": PublicDataset(
        url="https://surfer.nmr.mgh.harvard.edu/ftp/data/neurite/data/neurite-oasis.2d.v1.0.tar",
        archive="neurite-oasis.2d.v1.0.tar",
        checksum="md5:c9ae5864f250c7e4b8d83a104e51ae8e",
        page="https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md",
        terms=_NEURITE_TERMS,
        holds="OASIS_OAS1_*_MR*/",
    ),
    "learn2reg-nlst": PublicDataset(
        url="https://cloud.imi.uni-luebeck.de/s/pERQBNyEFNLY8gR/download/NLST2023.zip",
        archive="NLST2023.zip",
        checksum=None,
        page=_LEARN2REG_PAGE,
        terms="""\
The scans come from the National Lung Screening Trial. The terms of its collection in The Cancer Imaging Archive apply:
https://doi.org/10.7937/TCIA.HMQ8-J677
Cite: National Lung Screening Trial Research Team, Data from the National Lung Screening Trial (NLST), The Cancer
Imaging Archive, 2013, https://doi.org/10.7937/TCIA.HMQ8-J677
and: National Lung Screening Trial Research Team, Reduced Lung-Cancer Mortality with Low-Dose Computed Tomographic
Screening, New England Journal of Medicine 365(5), 395-409, 2011.
"""
        + _LEARN2REG_TERMS,
        holds="*_dataset.json",
    ),
    "learn2reg-oasis": PublicDataset(
        url=None,
        archive="learn2reg-oasis.zip",
        checksum=None,
        page=_LEARN2REG_PAGE,
        terms=f"{_NEURITE_TERMS}\n{_LEARN2REG_TERMS}",
        holds="*_dataset.json",
    ),
}
"""By name, what :py:func:`download_dataset` knows."""


def download_dataset(
    name: str,
    output_dir: str | Path,
    accept_terms: bool = False,
    url: str | None = None,
    checksum: str | None = None,
    unpack: bool = True,
    keep_archive: bool = True,
    overwrite: bool = False,
    retries: int = 5,
    timeout: float = 60.0,
    progress: bool = True,
) -> Path:
    """
    Download a public data set and unpack it to ``<output_dir>/<name>``, which is what ``dataset_dir`` takes.

    Called again, it goes on with a download that was cut off, takes an archive that is there already (downloaded with a
    browser, say) and leaves an unpacked data set as it is.

    Args:
        name: one of ``PUBLIC_DATASETS``.
        output_dir: folder of the archive and of the unpacked data set.
        accept_terms: whether you accept the terms of the data set, which are printed. Defaults to ``False``.
        url: another address of the archive. Defaults to ``None``: the known one.
        checksum: of the archive, ``"<kind>:<digits>"`` or the digits alone (md5, sha1, sha256, sha512); ``"skip"``: it
            is not checked. Defaults to ``None``: the known one; where none is known it is not checked, with a warning.
        unpack: unpack the archive. Defaults to ``True``.
        keep_archive: keep the archive once it is unpacked. Defaults to ``True``.
        overwrite: download and unpack again what is there already; it is replaced when the new is complete. Defaults
            to ``False``.
        retries: how often a broken connection is taken up again without a byte more arriving. Defaults to 5.
        timeout: seconds without an answer after which a connection counts as broken. Defaults to 60.
        progress: show a bar. Defaults to ``True``.

    Returns:
        the folder; without ``unpack`` the archive.

    Raises:
        ValueError: When an argument is not valid, the address has to be given, or the archive is not the data set's.
        PermissionError: When the terms are not accepted.
        FileExistsError: When the folder is there and holds something else.
        HashCheckError: When the archive has another checksum.
        RuntimeError: When the server does not give the archive, or it is damaged.
        ConnectionError: When there is no connection, or it breaks again and again.
        OSError: When the disk has not enough space, or a folder cannot be written to.
    """
    if name not in PUBLIC_DATASETS:
        raise ValueError(f"Unknown data set {name!r}; expected one of {sorted(PUBLIC_DATASETS)}.")
    dataset = PUBLIC_DATASETS[name]
    unpack, overwrite = as_flag(unpack, "unpack"), as_flag(overwrite, "overwrite")
    keep_archive = as_flag(keep_archive, "keep_archive")
    skipped = checksum == "skip"
    expected = None if skipped else checksum if checksum is not None else dataset.checksum
    if expected is not None:
        parse_checksum(expected)
    folder = Path(output_dir).expanduser() / name
    if unpack and folder.exists() and not overwrite:
        if not any(folder.glob(dataset.holds)):
            raise FileExistsError(
                f"{folder} is there already and is not {name} (it has no {dataset.holds}). Name another output_dir, or "
                "move it away."
            )
        logger.info("%s is there already and not downloaded again", folder)
        return folder
    print(f"{name}\n{dataset.terms}")
    if not as_flag(accept_terms, "accept_terms"):
        raise PermissionError(
            f"{name} is downloaded when you accept its terms, printed above: set accept_terms (--accept_terms true)."
        )

    archive = folder.with_name(_archive_name(url) or dataset.archive)

    def check(path: Path) -> None:
        again = f"Delete {path} and run the same again to download it anew"
        if expected is not None:
            check_checksum(path, expected, f"{again}, or correct the checksum (--checksum).")
            return
        why = "as asked for" if skipped else "none is known; give it with --checksum"
        logger.warning("the checksum of %s is not checked: %s", path, why)
        check_archive(path, f"{again}.")

    source = url or dataset.url
    by_hand = f"Or download it with a browser, save it as {archive} and run the same again: it is taken from there."
    if archive.exists() and not overwrite:
        check(archive)
        logger.info("%s is there already and not downloaded again", archive)
    elif source is None:
        raise ValueError(f"The address of {name} is not known: see {dataset.page} and give it with --url. {by_hand}")
    else:
        resumable_download(
            source,
            archive,
            check,
            overwrite=overwrite,
            copies=2 if unpack else 1,
            retries=retries,
            timeout=timeout,
            progress=as_flag(progress, "progress"),
            advice=f"See {dataset.page} for the address of today and give it with --url. {by_hand}",
        )
    if not unpack:
        return archive
    again = f"Delete {archive} and run the same again to download it anew."
    unpack_archive(archive, folder, dataset.holds, overwrite=overwrite, advice=again)
    if not keep_archive:
        archive.unlink()
    logger.info("%s is in %s; train on it with --dataset_dir %s", name, folder, folder)
    return folder


def _archive_name(url: str | None) -> str | None:
    """The file name at the end of a given address, where it is an archive's."""
    file = PurePosixPath(unquote(urlparse(url or "").path)).name
    return file if file.endswith(ARCHIVE_SUFFIXES) and not file.startswith(".") else None
