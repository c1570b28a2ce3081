# SPDX-License-Identifier: Apache-2.0
"""Files of the pairs to register, given one by one or in a list, and the names of what is made of them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_deq.data.images import image_stem
from monai_deq.utils import expand_user, read_json

__all__ = ["PAIR_FILES", "pair_items", "pairs_to_register", "read_pair_list", "scan_names"]

#: what a pair may have files of
PAIR_FILES: tuple[str, ...] = ("fixed", "moving", "fixed_label", "moving_label", "fixed_mask")
PAIR_FILES += ("fixed_keypoints", "moving_keypoints", "initial_transform", "initial_ddf")
_SCANS = PAIR_FILES[:2]


def scan_names(files: Sequence[str | Path]) -> list[str]:
    """
    A name for each scan, the same for the same file and another for another: that of the file without its ending,
    behind as many folders that tell it from others of that name as are needed: ``bert_norm`` of ``bert/mri/norm.mgz``.
    """
    paths = [expand_user(file).resolve() for file in files]
    names: dict[Path, str] = {}
    for stem in {image_stem(path) for path in paths}:
        group = sorted({path for path in paths if image_stem(path) == stem})
        found: dict[Path, tuple[str, ...]] = {path: (stem,) for path in group}
        depth = 0
        while len(set(found.values())) < len(group):
            folders = {path: path.parent.parts[-1 - depth] if depth < len(path.parent.parts) else "" for path in group}
            if not any(folders.values()):
                found = {path: (*name[:-1], path.name) for path, name in found.items()}  # scan.nii beside scan.mgz
                break
            if len(set(folders.values())) > 1:
                found = {path: (folders[path].strip("/"), *name) for path, name in found.items()}
            depth += 1
        names.update({path: "_".join(filter(None, name)) for path, name in found.items()})
    taken: set[str] = set()
    for path in sorted(names):  # a_s.nii beside a/s.nii and b/s.nii
        name, number = names[path], 1
        while names[path] in taken:
            number += 1
            names[path] = f"{name}_{number}"
        taken.add(names[path])
    return [names[path] for path in paths]


def pair_items(
    pairs: Sequence[Mapping[str, Any]], where: Sequence[str] = (), missing: list[str] | None = None
) -> list[dict[str, Any]]:
    """
    Items of the files of pairs, with names for the results: ``"fixed_subject"`` and ``"moving_subject"``, and
    ``"name"`` where one was given.

    Args:
        pairs: files by their kind, one of :py:data:`PAIR_FILES`, and perhaps ``"name"``; None is no file.
        where: how to call each pair in messages. Defaults to ``"pair"``.
        missing: filled with the files that are not there. Defaults to None: these are refused.

    Raises:
        ValueError: When a name is no name of a file, or two pairs would write the same files.
        FileNotFoundError: When a file does not exist.
    """
    where = where or ["pair"] * len(pairs)
    items = [{key: value for key, value in pair.items() if value is not None} for pair in pairs]
    for item, place in zip(items, where, strict=True):
        for key in filter(item.__contains__, PAIR_FILES):
            files = [expand_user(file) for file in _several(item[key])]
            for file in files:
                # a DICOM series is a folder
                if not (_is(file.is_file) or (_is(file.is_dir) and key in (*_SCANS, *PAIR_FILES[2:5]) and file.name)):
                    if missing is None:
                        raise FileNotFoundError(f"{place}: the file {key} {str(file)!r} does not exist.")
                    missing.append(str(file))
            item[key] = [str(file) for file in files] if isinstance(item[key], (list, tuple)) else str(files[0])
    names = iter(scan_names([item[key] for item in items for key in _SCANS]))
    made: dict[str, str] = {}
    for item, place in zip(items, where, strict=True):
        item["fixed_subject"], item["moving_subject"] = next(names), next(names)
        name = item.get("name", f"{item['moving_subject']}_to_{item['fixed_subject']}")
        if not name or name != Path(name).name or name.startswith("."):
            raise ValueError(f"{place}: expected a name for files, without folders, got {name!r}.")
        if name in made:
            raise ValueError(
                f"{place}: two pairs are called {name} ({made[name]} is the other) and would write the same files; "
                "give different file names, or each pair a 'name'."
            )
        made[name] = place
    return items


def _is(there: Callable[[], bool]) -> bool:
    """Whether a file is there; a name that no file can have is not."""
    try:
        return there()
    except (OSError, ValueError):
        return False


def _several(files: Any) -> list[Any]:
    return list(files) if isinstance(files, (list, tuple)) else [files]


def _csv_rows(path: Path) -> list[dict[str, str | None]]:
    """The lines of a CSV file by the names in its first one. pandas takes what is in front for an index where all lines
    have more cells than names, and so shifts the columns.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file, skipinitialspace=True, strict=True) if row]
    if not rows:
        raise ValueError("it is empty")
    names = rows[0]
    if len(set(names)) < len(names):
        raise ValueError(f"a column is there twice in {names}")
    for i, row in enumerate(rows[1:]):
        if len(row) != len(names):
            raise ValueError(f"pair {i} has {len(row)} cells, the first line has {len(names)}: {names}")
    return [{name: cell or None for name, cell in zip(names, row, strict=True)} for row in rows[1:]]


def read_pair_list(path: str | Path, missing: list[str] | None = None) -> list[dict[str, Any]]:
    """
    Read a list of pairs: JSON ``[{"fixed": file, "moving": file, ...}, ...]``, or CSV with such columns, each perhaps
    with others of :py:data:`PAIR_FILES` and a ``"name"`` for the results. Relative files are relative to the list.
    Files that are not there are refused, or put into ``missing``.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When the list is malformed, or has one name twice.
    """
    path = expand_user(path)
    if not path.is_file():
        raise FileNotFoundError(f"list of pairs {str(path)!r} does not exist.")
    try:
        entries = _csv_rows(path) if path.suffix.lower() == ".csv" else read_json(path)
    except (ValueError, csv.Error) as e:
        if str(path) in str(e):
            raise
        raise ValueError(f"{path} is not valid CSV: {' '.join(str(e).split())}.") from e
    if not isinstance(entries, list) or not entries:
        came = "an empty one" if isinstance(entries, list) else type(entries).__name__
        raise ValueError(f'{path} must hold a list of {{"fixed": file, "moving": file}}, got {came}.')
    pairs = []
    where = [f"{path}, pair {i}" for i in range(len(entries))]
    for place, entry in zip(where, entries, strict=True):
        if not isinstance(entry, Mapping) or not {*_SCANS} <= set(entry) <= {*PAIR_FILES, "name"}:
            others = ", ".join(map(repr, (*PAIR_FILES[2:], "name")))
            raise ValueError(f"{place}: expected the keys 'fixed', 'moving' and perhaps {others}, got {entry!r}.")
        named = {key: name for key, name in entry.items() if name is not None or key in _SCANS}
        if not all(isinstance(name, str) for name in named.values()):
            raise ValueError(f"{place}: expected the names of files, got {entry!r}.")
        pairs.append({k: v if k == "name" else str(path.parent / expand_user(v)) for k, v in named.items()})
        if empty := [key for key in named if not named[key]]:
            raise FileNotFoundError(f"{place}: the file {empty[0]} '' does not exist.")
    return pair_items(pairs, where, missing)


def pairs_to_register(
    find_dataset: Callable[[], Any],
    fixed: str | Path | None = None,
    moving: str | Path | None = None,
    moving_label: str | Path | None = None,
    initial_ddf: str | Path | None = None,
    pairs: str | Path | None = None,
    split_sizes: Sequence[int | None] | str | None = None,
    split_lists: Mapping[str, Sequence[str | int]] | None = None,
    fixed_label: str | Path | None = None,
    initial_transform: str | Path | Sequence[str | Path] | None = None,
) -> list[dict[str, Any]]:
    """What an inference registers: one pair of scans, else a list of pairs, else the test part of a data set.

    Args:
        find_dataset: gives the data set; called only where neither scans nor a list are given.
        fixed: file of the fixed scan.
        moving: file of the moving scan.
        moving_label: label map of the moving scan, to be warped with it.
        initial_ddf: displacement field for the solver to start from, on the grid of the fixed scan.
        pairs: list of pairs, see :py:func:`read_pair_list`.
        split_sizes: ``sizes`` of the data set's ``split``.
        split_lists: ``lists`` of the same.
        fixed_label: label map of the fixed scan, for the overlap of labels.
        initial_transform: transforms to begin with, see :py:class:`monai_deq.transforms.InitialTransformd`.

    Returns:
        Items of these files, see :py:func:`pair_items`.

    Raises:
        ValueError: When one of two scans is missing, or a list is given besides, is malformed or has one name twice.
        FileNotFoundError: When a file does not exist.
    """
    given: dict[str, Any] = dict(fixed=fixed, moving=moving, fixed_label=fixed_label, moving_label=moving_label)
    given |= dict(initial_transform=initial_transform, initial_ddf=initial_ddf)
    if not any(given.values()):
        return read_pair_list(pairs) if pairs else find_dataset().test_pairs(split_sizes, split_lists)
    if pairs:
        others = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"--pairs {pairs} cannot go with {others}: the list itself names what belongs to each pair.")
    if not fixed or not moving:
        raise ValueError(f"both --fixed and --moving are needed, got fixed={fixed!r} and moving={moving!r}.")
    return pair_items([given])
