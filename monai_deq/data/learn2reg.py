# SPDX-License-Identifier: Apache-2.0
"""Paired tasks of the Learn2Reg challenge, such as NLST lung CT: finds the pairs and what belongs to their scans.

The layout (https://learn2reg.grand-challenge.org; Hering et al., IEEE TMI 2023): ``imagesTr|Ts``, ``masksTr|Ts``,
``keypointsTr|Ts``, ``labelsTr|Ts`` with one file name for all that belongs to a scan, and ``<NAME>_dataset.json`` with
the scans (``training``, ``test``) and the pairs (``training_paired_images``, ``registration_val``,
``registration_test``). Keypoints are ``.csv`` files, also where the JSON file calls them ``.nii.gz``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from monai_deq.data.split import shorten

__all__ = ["Learn2RegDataset", "find_learn2reg"]

logger = logging.getLogger("monai_deq")

_SCAN_LISTS = ("training", "test")
_PAIR_LISTS = ("training_paired_images", "registration_val", "registration_test")
# known and not read: it repeats registration_test
_KNOWN_LISTS = (*_SCAN_LISTS, *_PAIR_LISTS, "test_paired_images")
# what a scan may have beside its image: word in the JSON file: key in a pair; the folder is the word with "s"
_ANNOTATIONS = {"mask": "mask", "keypoint": "keypoints", "label": "label"}
_ROLES = ("fixed", "moving")
#: keys of a pair for what its scans may have beside their images
ANNOTATION_KEYS = tuple(f"{role}_{key}" for key in _ANNOTATIONS.values() for role in _ROLES)


@dataclass(frozen=True)
class Learn2RegDataset:
    """What was found in the folder of a paired task.

    A pair is one flat item: ``"fixed"`` and ``"moving"`` are image files; ``"fixed_mask"``, ``"fixed_keypoints"``,
    ``"fixed_label"`` and the same of ``"moving"`` are files that both scans have (a pair without has no such keys);
    ``"fixed_subject"`` and ``"moving_subject"`` name the scans (``"NLST_0001_0000"``), ``"case"`` the pair
    (``"NLST_0001"``, or ``"<moving>_to_<fixed>"`` where the scans belong to two cases).

    Args:
        name: name of the task, e.g. ``"NLST"``.
        root: the folder.
        training: the official training pairs without those that share a scan with the two lists below (the official
            list names the validation pairs too).
        registration_val: the official validation pairs.
        registration_test: the official test pairs; their keypoints need not be public.
    """

    name: str
    root: Path
    training: list[dict[str, Any]] = field(default_factory=list)
    registration_val: list[dict[str, Any]] = field(default_factory=list)
    registration_test: list[dict[str, Any]] = field(default_factory=list)

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Every pair once: those for training, then for validation, then for test, each in the order of its list."""
        known: dict[tuple[str, str], dict[str, Any]] = {}
        for pair in (*self.training, *self.registration_val, *self.registration_test):
            known.setdefault((pair["fixed"], pair["moving"]), pair)
        return list(known.values())


def find_learn2reg(dataset_dir: str | Path, task: str | None = None) -> Learn2RegDataset:
    """Find the pairs of a paired Learn2Reg task in a folder.

    A mask, keypoint or label file that the JSON file names must exist; one that it does not name is taken where it lies
    in the folder of its kind under the name of the image. Test pairs alone may lack what is named, both scans alike:
    the challenge does not publish all of it, and the log says what is not there.

    Args:
        dataset_dir: folder that holds ``<NAME>_dataset.json``.
        task: the ``<NAME>``, where the folder holds several such files. Defaults to None: the only one.

    Returns:
        The pairs of the official lists.

    Raises:
        FileNotFoundError: When the folder or the JSON file is missing, a file that it names is, or one scan of a pair
            has a file of which the other one has none.
        ValueError: When the JSON file is malformed, lacks a list, has an unknown one, or names no pair.
    """
    root = Path(dataset_dir).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"dataset_dir {str(root)!r} {what}; expected the folder of a Learn2Reg task with <NAME>_dataset.json."
        )
    reader = _Reader(root, _find_json(root, task))
    training, val, test = (reader.pairs(key) for key in _PAIR_LISTS)
    reader.raise_for_missing()
    if not (training or val or test):
        raise ValueError(f"{reader.json_file} names no pair: {', '.join(_PAIR_LISTS)} are empty.")

    held_out = {pair[role] for pair in (*val, *test) for role in _ROLES}
    kept = [pair for pair in training if not held_out & {pair[role] for role in _ROLES}]
    dataset = Learn2RegDataset(reader.json_file.name.removesuffix("_dataset.json"), root, kept, val, test)
    pairs = dataset.pairs
    logger.info(
        "Learn2Reg %s in %s: %d pairs, %d of them with keypoints, %d with masks, %d with labels; %d for training (the "
        "list names %d, less those of the others), %d for validation, %d for test",
        dataset.name,
        root,
        len(pairs),
        *(sum(f"fixed_{key}" in pair for pair in pairs) for key in ("keypoints", "mask", "label")),
        len(kept),
        len(training),
        len(val),
        len(test),
    )
    return dataset


def _find_json(root: Path, task: str | None) -> Path:
    if task is not None:
        if (root / f"{task}_dataset.json").is_file():
            return root / f"{task}_dataset.json"
        there = sorted(path.name for path in root.glob("*_dataset.json"))
        raise FileNotFoundError(
            f"{str(root)!r} holds no {task}_dataset.json; found {shorten(there) if there else 'no *_dataset.json'}."
        )
    candidates = sorted(root.glob("*_dataset.json"))
    if len(candidates) > 1:
        names = shorten([path.name for path in candidates])
        raise ValueError(f"{str(root)!r} holds {len(candidates)} tasks, {names}: choose one by `task`.")
    if not candidates:
        found = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
        raise FileNotFoundError(
            f"{str(root)!r} holds no <NAME>_dataset.json (Learn2Reg layout); found "
            f"{shorten(found) if found else 'nothing'}. Give the folder that directly holds it."
        )
    return candidates[0]


def _scan_name(file: str) -> str:
    """``"NLST_0001_0000"`` of ``"imagesTr/NLST_0001_0000.nii.gz"``."""
    return PurePosixPath(file).name.removesuffix(".gz").removesuffix(".nii")


def _case_name(fixed: str, moving: str) -> str:
    """What the names of the two scans share before the number of the scan."""
    cases = {re.sub(r"_\d{4}$", "", name) for name in (fixed, moving)}
    return cases.pop() if len(cases) == 1 else f"{moving}_to_{fixed}"


class _Reader:
    """Reads the lists of one JSON file and gathers the names of the files that are missing."""

    def __init__(self, root: Path, json_file: Path) -> None:
        self.root = root
        self.json_file = json_file
        self.content = self._load()
        self.missing: list[str] = []
        # by the normalised name of the image: the files that the JSON file names beside it
        self.named: dict[str, dict[str, str]] = {}
        for key in _SCAN_LISTS:
            self._add_scans(key)

    def _load(self) -> Mapping[str, Any]:
        try:
            content = json.loads(self.json_file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"{self.json_file} is not valid JSON ({e}); download it again.") from e
        if not isinstance(content, dict):
            raise ValueError(
                f"{self.json_file} must hold an object with the lists {_PAIR_LISTS}, got {type(content).__name__}."
            )
        for key in _KNOWN_LISTS:
            if not isinstance(content.get(key, []), list):
                raise ValueError(f"{self.json_file}: {key!r} must be a list, got {type(content[key]).__name__}.")
        unknown = sorted(
            key
            for key, value in content.items()
            if key not in _KNOWN_LISTS and isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
        )
        if unknown:
            raise ValueError(
                f"{self.json_file} has the unknown list(s) {unknown}; expected {_KNOWN_LISTS}. Correct the name or "
                "remove the list."
            )
        required = [key for key in _PAIR_LISTS if key in content]
        if not required or (content.get("training") and "training_paired_images" not in content):
            raise ValueError(
                f"{self.json_file} lacks a list of pairs: expected 'training_paired_images' where there is 'training', "
                f"'registration_val', 'registration_test'; it holds {sorted(content)}. An unpaired task has no such "
                "lists and cannot be read here."
            )
        return content

    def _entries(self, key: str) -> list[tuple[str, dict[str, str]]]:
        """The entries of a list with their places, for messages."""
        entries = []
        for i, entry in enumerate(self.content.get(key, [])):
            where = f"{self.json_file}: {key}[{i}]"
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError(f"{where} must be an object of file names, got {entry!r}.")
            entries.append((where, entry))
        return entries

    def _add_scans(self, key: str) -> None:
        for where, entry in self._entries(key):
            if "image" not in entry:
                raise ValueError(f"{where} must have the key 'image', it has {sorted(entry)}.")
            unknown = sorted(set(entry) - {"image", *_ANNOTATIONS})
            if unknown:
                raise ValueError(
                    f"{where} has the unknown key(s) {unknown}; expected 'image' and perhaps {list(_ANNOTATIONS)}. "
                    "Correct the name or remove the key."
                )
            files = {word: entry[word] for word in _ANNOTATIONS if word in entry}
            self.named.setdefault(str(PurePosixPath(entry["image"])), {}).update(files)

    def pairs(self, key: str) -> list[dict[str, Any]]:
        """The pairs of a list."""
        pairs: list[dict[str, Any]] = []
        for where, entry in self._entries(key):
            if set(entry) != set(_ROLES):
                raise ValueError(f"{where} must have the keys 'fixed' and 'moving' and no other, got {entry!r}.")
            images = {role: str(PurePosixPath(entry[role])) for role in _ROLES}
            if images["fixed"] == images["moving"]:
                raise ValueError(f"{where} pairs the image {entry['fixed']!r} with itself.")
            pair: dict[str, Any] = {role: self._existing(images[role]) for role in _ROLES}
            for word, name in _ANNOTATIONS.items():
                files = self._annotations(images, word, may_lack=key == "registration_test")
                pair.update({f"{role}_{name}": file for role, file in files.items()})
            subjects = [_scan_name(images[role]) for role in _ROLES]
            pair.update({f"{role}_subject": subject for role, subject in zip(_ROLES, subjects, strict=True)})
            pair["case"] = _case_name(*subjects)
            if any(all(other[role] == pair[role] for role in _ROLES) for other in pairs):
                raise ValueError(f"{where} names a pair that {key} has already: {pair['case']}.")
            pairs.append(pair)
        return pairs

    def _existing(self, entry: str) -> str:
        file = str(self.root / entry)
        if not Path(file).is_file() and file not in self.missing:
            self.missing.append(file)
        return file

    def _annotations(self, images: Mapping[str, str], word: str, may_lack: bool) -> dict[str, str]:
        """The mask, keypoint or label files of both scans of a pair; none where neither has one."""
        named = any(word in self.named.get(image, {}) for image in images.values())
        entries = {}
        for role, image in images.items():
            in_folder = re.sub(r"^images(Tr|Ts)/", rf"{word}s\1/", image)
            entry = self.named.get(image, {}).get(word, in_folder if in_folder != image else None)
            if entry is not None:
                name = (
                    _scan_name(entry).removesuffix(".csv") + ".csv" if word == "keypoint" else PurePosixPath(entry).name
                )
                entries[role] = str(PurePosixPath(entry).with_name(name))
        there = {role: (self.root / entry).is_file() for role, entry in entries.items()}
        if not any(there.values()) and (may_lack or not named):
            if named:
                logger.warning("%s of %s are named but not there", word, " and ".join(map(_scan_name, images.values())))
            return {}
        absent = [role for role in _ROLES if role not in entries]
        if absent:
            raise ValueError(
                f"{self.json_file}: {images[absent[0]]!r} has no {word!r} although the other scan of its pair has one; "
                "name it in the list of scans."
            )
        return {role: self._existing(entry) for role, entry in entries.items()}

    def raise_for_missing(self) -> None:
        """Name the files that are missing, if any."""
        if self.missing:
            raise FileNotFoundError(
                f"{len(self.missing)} file(s) of the pairs in {self.json_file} are missing: {shorten(self.missing)}. "
                "Both scans of a pair need the same kinds of files; unpack the data set whole."
            )
