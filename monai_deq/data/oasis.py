# SPDX-License-Identifier: Apache-2.0
"""OASIS brain MRI (Marcus et al., J. Cogn. Neurosci. 2007): finds the data set in a folder and splits its subjects.

- neurite-OASIS (Hoopes et al., IPMI 2021; https://github.com/adalca/medical-datasets): one folder for each,
  ``OASIS_OAS1_NNNN_MR1/{aligned_norm,aligned_seg35,slice_norm,slice_seg24}.nii.gz``, order in ``subjects.txt``.
- Learn2Reg OASIS (https://learn2reg.grand-challenge.org): ``imagesTr|Ts``, ``labelsTr|Ts``, ``OASIS_dataset.json``.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from monai_deq.data.labels import SEG24_LABELS, SEG35_LABELS, check_spatial_dims, label_set
from monai_deq.data.learn2reg import Learn2RegLists, find_json, scan_name
from monai_deq.data.pairs import pair_indices
from monai_deq.data.sample_cohorts import is_sample, sample_dataset_dir, write_sample_cohort
from monai_deq.data.split import Items, Lists, Parts, Sizes, dataset_folder, listing, shorten, split_items

__all__ = ["OasisDataset", "find_oasis"]

logger = logging.getLogger("monai_deq")

_FILES = {2: ("slice_norm.nii.gz", "slice_seg24.nii.gz"), 3: ("aligned_norm.nii.gz", "aligned_seg35.nii.gz")}
_PAPER = {2: (300, 30, None), 3: (300, 30, 84)}
_SAMPLE = (10, 2, None)


@dataclass(frozen=True)
class OasisDataset:
    """What was found in a data set folder. A subject is ``{"subject": name, "image": path, "label": path or None}``.

    Args:
        layout: ``"neurite-OASIS"`` or ``"Learn2Reg OASIS"``.
        spatial_dims: 2 or 3.
        root: the folder.
        subjects: every subject, in the order of the data set's own list.
        label_names: names of the label numbers.
    """

    layout: str
    spatial_dims: int
    root: Path
    subjects: Items
    label_names: dict[int, str]

    @property
    def is_sample(self) -> bool:
        """Whether this is a synthetic sample cohort."""
        return is_sample(self.root)

    @property
    def title(self) -> str:
        """Name for tables."""
        return self.layout + (" (synthetic sample)" if self.is_sample else "")

    def label_set(self, name: str = "all") -> list[int]:
        """The labels of a set, see :py:func:`monai_deq.data.label_set`."""
        return label_set(name, self.spatial_dims)

    def split(self, sizes: Sizes | None = None, lists: Lists | None = None, require_labels: bool = True) -> Parts:
        """Split the subjects into training, validation and test. That one is in several parts is logged.

        Args:
            sizes: number of subjects for each part, taken in the data set's order; one may be None: all that remain.
                Defaults to None: the paper's (300, 30, 84), of slices (300, 30, None), of the sample (10, 2, None).
            lists: subjects instead of sizes, under ``"training"``, ``"validation"`` and ``"test"``: names, or the four
                digits in them (``"0001"`` or 1). A part left out is empty.
            require_labels: refuse validation and test subjects without a segmentation. Defaults to True.

        Raises:
            ValueError: When there are too few subjects, a listed one does not exist, or a segmentation is missing.
        """
        if sizes is None:
            sizes = _SAMPLE if self.is_sample else _PAPER[self.spatial_dims]
        where = f"with {self.spatial_dims}-D images in {str(self.root)!r}"
        required = ("label", "segmentations", "require_labels") if require_labels else ()
        return split_items(self.subjects, "subject", where, sizes, lists, required)

    def test_pairs(self, sizes: Sizes | None = None, lists: Lists | None = None) -> Items:
        """The test part's cyclic pairs for :py:func:`monai_deq.data.pairs_to_register`; arguments as in ``split``."""
        subjects = self.split(sizes, lists, require_labels=False)["test"]
        items = []
        for fixed, moving in ((subjects[i], subjects[j]) for i, j in pair_indices(len(subjects))):
            names = {"fixed_subject": fixed["subject"], "moving_subject": moving["subject"]}
            item = {"fixed": fixed["image"], "moving": moving["image"], **names}
            items.append(item if moving["label"] is None else {**item, "moving_label": moving["label"]})
        return items


def find_oasis(
    dataset_dir: str | Path | None = None, spatial_dims: int = 3, missing: list[str] | None = None
) -> OasisDataset:
    """Find the OASIS brain data set in a folder, by what is there.

    Args:
        dataset_dir: folder in either layout. Defaults to None: the synthetic sample cohort.
        spatial_dims: 3 for the volumes, 2 for the coronal slices (neurite-OASIS only). Defaults to 3.
        missing: filled with the files that lists name and that are not there. Defaults to None: these are refused.

    Raises:
        FileNotFoundError: When the folder is missing, holds neither layout, or misses files that its lists name.
        ValueError: When ``spatial_dims`` does not fit, or the JSON file of the data set is malformed.
    """
    check_spatial_dims(spatial_dims)
    expected = "neurite-OASIS or Learn2Reg OASIS"
    root = dataset_folder(dataset_dir, expected, lambda: write_sample_cohort(sample_dataset_dir()))
    if any(root.glob("OASIS_OAS1_*_MR*/")):
        return _find_neurite(root, spatial_dims, missing)
    if any((root / name).is_dir() for name in ("imagesTr", "imagesTs")) or any(root.glob("*_dataset.json")):
        return _find_learn2reg(root, spatial_dims, missing)
    raise FileNotFoundError(
        f"No OASIS data set in {str(root)!r}. Looked for folders OASIS_OAS1_NNNN_MR1/ (neurite-OASIS) and for "
        f"imagesTr/ with OASIS_dataset.json (Learn2Reg OASIS); found {listing(root)}. Give the folder that directly "
        "holds these."
    )


def _find_neurite(root: Path, spatial_dims: int, missing: list[str] | None) -> OasisDataset:
    image_name, label_name = _FILES[spatial_dims]
    folders = sorted(p.name for p in root.glob("OASIS_OAS1_*_MR*") if p.is_dir())
    named, source, unlisted = folders, "their folders", 0
    if (list_file := root / "subjects.txt").is_file():
        named = [line.strip() for line in list_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        source, unlisted = "subjects.txt", len(set(folders) - set(named))
        if repeated := sorted(n for n, count in Counter(named).items() if count > 1):
            raise ValueError(f"{list_file} names a subject twice: {shorten(repeated)}.")

    subjects, broken = [], []
    for name in named:
        image, label = root / name / image_name, root / name / label_name
        if image.is_file():
            subjects.append({"subject": name, "image": str(image), "label": str(label) if label.is_file() else None})
        elif label.is_file():
            broken.append(str(image))
    if missing is not None:
        missing += broken
    elif broken:
        lost = f"{len(broken)} subject(s) have {label_name} but no image; missing: {shorten(broken)}."
        raise FileNotFoundError(f"{lost} Download these again, or remove the subjects from subjects.txt.")
    if not subjects:
        other = 5 - spatial_dims
        others = sum((root / name / _FILES[other][0]).is_file() for name in folders)
        raise FileNotFoundError(
            f"No {spatial_dims}-D image in {str(root)!r}: looked for {image_name} of {len(named)} subjects named by "
            f"{source}; {len(folders)} subject folders were found, {others} of them with {_FILES[other][0]}"
            + (f" (spatial_dims={other})." if others else ".")
        )
    labelled = sum(s["label"] is not None for s in subjects)
    left_out = f"; {unlisted} folder(s) not in subjects.txt are left out" if unlisted else ""
    logger.info(
        "neurite-OASIS in %s: %d of %d subjects named by %s have a %d-D image, %d of these a segmentation%s",
        *(root, len(subjects), len(named), source, spatial_dims, labelled, left_out),
    )
    names = SEG35_LABELS if spatial_dims == 3 else SEG24_LABELS
    return OasisDataset("neurite-OASIS", spatial_dims, root, subjects, dict(names))


def _find_learn2reg(root: Path, spatial_dims: int, missing: list[str] | None) -> OasisDataset:
    if spatial_dims != 3:
        raise ValueError(f"{str(root)!r} is in the Learn2Reg layout, which holds 3-D images only; set spatial_dims=3.")
    only_one = len(list(root.glob("*_dataset.json"))) == 1
    found = Learn2RegLists(find_json(root, None if only_one else "OASIS"), ("training",))
    required = ("training", "registration_val")
    if lacking := [key for key in required if key not in found.content]:
        holds = f"missing {lacking}, it holds {sorted(found.content)}"
        raise ValueError(f"{found.file} must hold the lists {required}; {holds}.")
    pairs = [pair for key in ("registration_val", "registration_test") for pair in found.pairs(key)]
    subjects: Items = []
    for image in dict.fromkeys([*found.scans, *(image for pair in pairs for image in pair.values())]):
        label = found.beside(image, "label")
        for file in filter(None, (image, label)):
            if not re.match(r"OASIS_\d", PurePosixPath(file).name):
                raise ValueError(f"{found.file} names {file!r}; expected an OASIS image (OASIS_NNNN_0000.nii.gz).")
        # a pair names images only, and the segmentations of the test images are not public
        if label and "label" not in found.scans.get(image, {}) and not (root / label).is_file():
            label = None
        name = re.sub(r"_0000$", "", scan_name(image))
        subjects.append({"subject": name, "image": found.existing(image), "label": label and found.existing(label)})
    found.raise_for_missing(missing)
    names = [s["subject"] for s in subjects]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(f"{found.file} names two images of one subject: {shorten(twice)}.")
    labelled = sum(s["label"] is not None for s in subjects)
    logger.info("Learn2Reg OASIS in %s: %d subjects, %d with a segmentation", root, len(subjects), labelled)
    return OasisDataset("Learn2Reg OASIS", 3, root, subjects, dict(SEG35_LABELS))
