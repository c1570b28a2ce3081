# SPDX-License-Identifier: Apache-2.0
"""Data sets of the Learn2Reg challenge (https://learn2reg.grand-challenge.org; Hering et al., IEEE TMI 2023).

``{images,masks,keypoints,labels}{Tr,Ts}`` have one file name for all that belongs to a scan, ``<NAME>_dataset.json``
the lists of scans and of pairs. Keypoints are ``.csv`` files, also where the JSON file calls them ``.nii.gz``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from monai_deq.data.sample_cohorts import is_sample, sample_lung_dataset_dir, write_sample_lung_cohort
from monai_deq.data.split import Items, Lists, Parts, dataset_folder, listing, refuse_lacking, shorten, split_items
from monai_deq.utils import read_json

__all__ = ["Learn2RegDataset", "Learn2RegLists", "find_json", "find_learn2reg", "keep_annotations", "scan_name"]

logger = logging.getLogger("monai_deq")

_PAIR_LISTS = ("training_paired_images", "registration_val", "registration_test")
# the last one is not read: it repeats registration_test
_KNOWN_LISTS = ("training", "test", *_PAIR_LISTS, "test_paired_images")
# what a scan may have beside its image: word in the JSON file: key in a pair; the folder is the word with "s"
_ANNOTATIONS = {"mask": "mask", "keypoint": "keypoints", "label": "label"}
_ROLES = ("fixed", "moving")
_ANNOTATION_KEYS = tuple(f"{role}_{key}" for key in _ANNOTATIONS.values() for role in _ROLES)
_PAPER = (170, 10, 30)  # of NLST
_Sizes = Sequence[int | None] | Literal["official"] | None


@dataclass(frozen=True)
class Learn2RegDataset:
    """What was found in the folder of a paired task.

    A pair is one flat item: ``"fixed"`` and ``"moving"`` are image files; ``"fixed_mask"``, ``"fixed_keypoints"``,
    ``"fixed_label"`` and the same of ``"moving"`` files, where both scans have them; ``"fixed_subject"`` and
    ``"moving_subject"`` name the scans (``"NLST_0001_0000"``), ``"case"`` the pair (``"NLST_0001"``, or
    ``"<moving>_to_<fixed>"`` where the scans belong to two cases).

    Args:
        name: name of the task, e.g. ``"NLST"``.
        root: the folder.
        training: the official training pairs that share no scan with the two lists below.
        registration_val: the official validation pairs.
        registration_test: the official test pairs; their keypoints need not be public.
    """

    name: str
    root: Path
    training: Items = field(default_factory=list)
    registration_val: Items = field(default_factory=list)
    registration_test: Items = field(default_factory=list)

    @property
    def pairs(self) -> Items:
        """Every pair once: those for training, then for validation, then for test, each in the order of its list."""
        known: dict[tuple[str, str], dict[str, Any]] = {}
        for pair in (*self.training, *self.registration_val, *self.registration_test):
            known.setdefault((pair["fixed"], pair["moving"]), pair)
        return list(known.values())

    @property
    def is_sample(self) -> bool:
        """Whether this is a synthetic sample cohort."""
        return is_sample(self.root)

    @property
    def title(self) -> str:
        """Name for tables."""
        return f"Learn2Reg {self.name}" + (" (synthetic sample)" if self.is_sample else "")

    def split(self, sizes: _Sizes = None, lists: Lists | None = None, require_keypoints: bool = True) -> Parts:
        """Split the pairs into training, validation and test. That a case is in several parts is logged.

        Args:
            sizes: number of pairs for each part, taken in the order of ``pairs``; one may be None: all that remain.
                ``"official"``: the official lists. Defaults to None: the paper's (170, 10, 30) for NLST with so many
                pairs, the official lists for all else.
            lists: cases instead of sizes, under ``"training"``, ``"validation"`` and ``"test"``: names, or the four
                digits in them (``"0001"`` or 1), for all pairs of the case. A part left out is empty.
            require_keypoints: refuse validation and test pairs without keypoints. Defaults to True.

        Raises:
            ValueError: When there are too few pairs, a listed case does not exist, or keypoints are missing.
        """
        pairs = self.pairs
        if sizes is None:
            sizes = _PAPER if self.name == "NLST" and len(pairs) >= sum(_PAPER) else "official"
            if lists is None:
                logger.info(
                    "pairs of %s are split by %s", self.name, "the official lists" if sizes == "official" else sizes
                )
        official = {"training": self.training, "validation": self.registration_val, "test": self.registration_test}
        required = ("fixed_keypoints", "keypoints", "require_keypoints") if require_keypoints else ()
        where = f"of {self.name} in {str(self.root)!r}"
        return split_items(pairs, "case", where, official if sizes == "official" else sizes, lists, required)

    def test_pairs(self, sizes: _Sizes = None, lists: Lists | None = None) -> Items:
        """The test part for :py:func:`monai_deq.data.pairs_to_register`, with the moving scan's label map or mask.

        Arguments as in ``split``; keypoints are not needed, but a pair is (ValueError).
        """
        items = []
        for pair in _not_empty(self.split(sizes, lists, require_keypoints=False)["test"], "test"):
            item = {key: str(pair[key]) for key in ("fixed", "moving", "fixed_subject", "moving_subject")}
            label = pair.get("moving_label", pair.get("moving_mask"))
            items.append(item if label is None else {**item, "moving_label": str(label)})
        return items


def find_learn2reg(
    dataset_dir: str | Path | None = None, task: str | None = None, missing: list[str] | None = None
) -> Learn2RegDataset:
    """Find the pairs of a paired Learn2Reg task in a folder.

    Masks, keypoints and labels that the JSON file names must exist, but for test pairs of which both scans lack them
    (logged: not all are published); others are taken from the folder of their kind, under the name of the image.

    Args:
        dataset_dir: folder that holds ``<NAME>_dataset.json``. Defaults to None: the synthetic sample lung cohort.
        task: the ``<NAME>``, where the folder holds several such files. Defaults to None: the only one.
        missing: filled with the files that the JSON file names and that are not there. Defaults to None: these are
            refused.

    Raises:
        FileNotFoundError: When the folder, the JSON file or a file of a pair is missing, of one scan perhaps.
        ValueError: When the JSON file is malformed, lacks a list, has an unknown one, or names no pair.
    """
    expected = "a Learn2Reg task with <NAME>_dataset.json, such as Learn2Reg NLST"
    root = dataset_folder(dataset_dir, expected, lambda: write_sample_lung_cohort(sample_lung_dataset_dir()))
    found = Learn2RegLists(find_json(root, task), ("training", "test"))
    found.refuse_unknown_lists()
    training, val, test = ([_pair(found, images, key) for images in found.pairs(key)] for key in _PAIR_LISTS)
    found.raise_for_missing(missing)
    if not (training or val or test):
        raise ValueError(f"{found.file} names no pair: {', '.join(_PAIR_LISTS)} are empty.")

    held_out = {pair[role] for pair in (*val, *test) for role in _ROLES}
    kept = [pair for pair in training if not held_out & {pair[role] for role in _ROLES}]
    dataset = Learn2RegDataset(found.file.name.removesuffix("_dataset.json"), root, kept, val, test)
    counts = [sum(f"fixed_{key}" in pair for pair in dataset.pairs) for key in ("keypoints", "mask", "label")]
    logger.info(
        "Learn2Reg %s in %s: %d pairs, %d of them with keypoints, %d with masks, %d with labels; %d for training (the "
        "list names %d, less those of the others), %d for validation, %d for test",
        *(dataset.name, root, len(dataset.pairs), *counts, *map(len, (kept, training, val, test))),
    )
    return dataset


def find_json(root: Path, task: str | None) -> Path:
    """The ``<NAME>_dataset.json`` of a task, or the only one."""
    names = sorted(path.name for path in root.glob("*_dataset.json"))
    if task is not None:
        if (name := f"{task}_dataset.json") not in names:
            raise FileNotFoundError(f"{str(root)!r} holds no {name}; found {shorten(names) or 'no *_dataset.json'}.")
        return root / name
    if len(names) > 1:
        raise ValueError(f"{str(root)!r} holds {len(names)} tasks, {shorten(names)}: choose one by `task`.")
    if not names:
        found = f"found {listing(root)}. Give the folder that directly holds it."
        raise FileNotFoundError(f"{str(root)!r} holds no <NAME>_dataset.json (Learn2Reg layout); {found}")
    return root / names[0]


def scan_name(file: str) -> str:
    """``"NLST_0001_0000"`` of ``"imagesTr/NLST_0001_0000.nii.gz"``."""
    return PurePosixPath(file).name.removesuffix(".gz").removesuffix(".nii")


def _case_name(images: Mapping[str, str]) -> str:
    """What the names of the two scans share before the number of the scan."""
    fixed, moving = (scan_name(images[role]) for role in _ROLES)
    cases = {re.sub(r"_\d{4}$", "", name) for name in (fixed, moving)}
    return cases.pop() if len(cases) == 1 else f"{moving}_to_{fixed}"


def _pair(found: Learn2RegLists, images: Mapping[str, str], key: str) -> dict[str, Any]:
    """The item of a pair of one of the lists."""
    pair: dict[str, Any] = {role: found.existing(images[role]) for role in _ROLES}
    for word, name in _ANNOTATIONS.items():
        files = _annotations(found, images, word, may_lack=key == "registration_test")
        pair.update({f"{role}_{name}": file for role, file in files.items()})
    return {**pair, **{f"{role}_subject": scan_name(images[role]) for role in _ROLES}, "case": _case_name(images)}


def _annotations(found: Learn2RegLists, images: Mapping[str, str], word: str, may_lack: bool) -> dict[str, str]:
    """The mask, keypoint or label files of both scans of a pair; none where neither has one."""
    named = any(word in found.scans.get(image, {}) for image in images.values())
    entries = {role: entry for role, image in images.items() if (entry := found.beside(image, word))}
    if not any((found.root / entry).is_file() for entry in entries.values()) and (may_lack or not named):
        if named:
            logger.warning("%s of %s are named but not there", word, " and ".join(map(scan_name, images.values())))
        return {}
    if absent := [images[role] for role in _ROLES if role not in entries]:
        lacks = f"{absent[0]!r} has no {word!r} although the other scan of its pair has one"
        raise ValueError(f"{found.file}: {lacks}; name it in the list of scans.")
    return {role: found.existing(entry) for role, entry in entries.items()}


class Learn2RegLists:
    """The lists of one JSON file, checked. ``scans`` has, by image, the files named beside each in ``scan_lists``."""

    def __init__(self, file: Path, scan_lists: Sequence[str]) -> None:
        self.file = file
        self.root = file.parent
        self.missing: list[str] = []
        self.content = read_json(file, "download it again")
        if not isinstance(self.content, dict):
            expected = f"an object with the lists {_PAIR_LISTS}"
            raise ValueError(f"{file} must hold {expected}, got {type(self.content).__name__}.")
        for key in _KNOWN_LISTS:
            if not isinstance(self.content.get(key, []), list):
                raise ValueError(f"{file}: {key!r} must be a list, got {type(self.content[key]).__name__}.")
        self.scans: dict[str, dict[str, str]] = {}
        for where, entry in (item for key in scan_lists for item in self._entries(key)):
            if "image" not in entry:
                raise ValueError(f"{where} must have the key 'image', it has {sorted(entry)}.")
            if unknown := sorted(set(entry) - {"image", *_ANNOTATIONS}):
                expected = f"expected 'image' and perhaps {list(_ANNOTATIONS)}. Correct the name or remove the key."
                raise ValueError(f"{where} has the unknown key(s) {unknown}; {expected}")
            beside = self.scans.setdefault(str(PurePosixPath(entry["image"])), {})
            beside.update({word: entry[word] for word in _ANNOTATIONS if word in entry})

    def refuse_unknown_lists(self) -> None:
        """Refuse lists of unknown names, and a task that is not paired."""
        content = self.content
        lists = {key: value for key, value in content.items() if key not in _KNOWN_LISTS and isinstance(value, list)}
        if unknown := sorted(key for key, value in lists.items() if any(isinstance(entry, dict) for entry in value)):
            words = f"has the unknown list(s) {unknown}; expected {_KNOWN_LISTS}."
            raise ValueError(f"{self.file} {words} Correct the name or remove the list.")
        if not set(_PAIR_LISTS) & set(content) or (content.get("training") and _PAIR_LISTS[0] not in content):
            expected = "'training_paired_images' where there is 'training', 'registration_val', 'registration_test'"
            raise ValueError(
                f"{self.file} lacks a list of pairs: expected {expected}; it holds {sorted(content)}. An unpaired task "
                "has no such lists and cannot be read here."
            )

    def _entries(self, key: str) -> Iterator[tuple[str, dict[str, str]]]:
        """The entries of a list with their places, for messages."""
        for i, entry in enumerate(self.content.get(key, [])):
            where = f"{self.file}: {key}[{i}]"
            files = entry.values() if isinstance(entry, dict) else [None]
            if not all(isinstance(file, str) and PurePosixPath(file).name for file in files):
                raise ValueError(f"{where} must be an object of file names, got {entry!r}.")
            yield where, entry

    def pairs(self, key: str) -> list[dict[str, str]]:
        """The fixed and the moving image of each pair of a list."""
        pairs: list[dict[str, str]] = []
        for where, entry in self._entries(key):
            if set(entry) != set(_ROLES):
                raise ValueError(f"{where} must have the keys 'fixed' and 'moving' and no other, got {entry!r}.")
            pair = {role: str(PurePosixPath(entry[role])) for role in _ROLES}
            if pair["fixed"] == pair["moving"]:
                raise ValueError(f"{where} pairs the image {entry['fixed']!r} with itself.")
            if pair in pairs:
                raise ValueError(f"{where} names a pair that {key} has already: {_case_name(pair)}.")
            pairs.append(pair)
        return pairs

    def beside(self, image: str, word: str) -> str | None:
        """The mask, keypoint or label file of an image: as named, or as it lies in the folder of its kind."""
        in_folder = re.sub(r"^images(Tr|Ts)/", rf"{word}s\1/", image)
        entry = self.scans.get(image, {}).get(word, in_folder if in_folder != image else None)
        if entry is not None and word == "keypoint":
            entry = str(PurePosixPath(entry).with_name(scan_name(entry).removesuffix(".csv") + ".csv"))
        return entry and str(PurePosixPath(entry))

    def existing(self, entry: str) -> str:
        """The path of a file, noted where it is missing."""
        file = str(self.root / entry)
        if not Path(file).is_file() and file not in self.missing:
            self.missing.append(file)
        return file

    def raise_for_missing(self, missing: list[str] | None = None) -> None:
        """Name the files that are missing, if any; with a list put them there."""
        if missing is not None:
            missing += self.missing
        elif self.missing:
            advice = "Unpack the data set whole; both scans of a pair need the same kinds of files."
            lost = f"{len(self.missing)} file(s) of {self.file} are missing: {shorten(self.missing)}."
            raise FileNotFoundError(f"{lost} {advice}")


def _not_empty(pairs: Sequence[Any], part: str) -> Sequence[Any]:
    if not pairs:
        raise ValueError(f"The {part} part has no pairs. Give it some by `sizes` or `lists`.")
    return pairs


def keep_annotations(
    pairs: Sequence[Mapping[str, Any]], keys: Sequence[str] | None = None, part: str = "training"
) -> list[dict[str, Any]]:
    """The pairs with only those masks, keypoints and labels that are needed, which all must have.

    Args:
        pairs: a part of :py:meth:`Learn2RegDataset.split`, not empty.
        keys: the files needed, such as ``"fixed_mask"``. Defaults to None: masks and keypoints, which are scored.
        part: what the pairs are for, for the error. Defaults to ``"training"``.
    """
    keys = [k for k in _ANNOTATION_KEYS if not k.endswith("_label")] if keys is None else keys
    if unknown := sorted(set(keys) - set(_ANNOTATION_KEYS)):
        raise ValueError(f"keys has {unknown}; expected some of {list(_ANNOTATION_KEYS)}.")
    _not_empty(pairs, part)
    for key in keys:
        refuse_lacking(pairs, part, key)
    return [{k: v for k, v in pair.items() if k in keys or k not in _ANNOTATION_KEYS} for pair in pairs]
