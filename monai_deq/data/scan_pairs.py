# SPDX-License-Identifier: Apache-2.0
"""Pairs of scan files to register."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from monai_deq.data.learn2reg import find_learn2reg
from monai_deq.data.learn2reg_split import split_pairs
from monai_deq.data.oasis import find_oasis, split_subjects
from monai_deq.data.pairs import fixed_pairs
from monai_deq.data.sample_cohorts import (
    sample_dataset_dir,
    sample_lung_dataset_dir,
    write_sample_cohort,
    write_sample_lung_cohort,
)

__all__ = ["learn2reg_scan_pairs", "listed_pairs", "scan_pairs", "split_scan_pairs"]

_KEYS = ("fixed", "moving", "moving_label", "initial_ddf")


def _name(path: str | Path) -> str:
    """File name without its suffixes."""
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def _pair(
    fixed: str | Path, moving: str | Path, moving_label: str | Path | None, initial_ddf: str | Path | None, where: str
) -> dict[str, Any]:
    fixed, moving = Path(fixed).expanduser(), Path(moving).expanduser()
    optional = [None if path is None else Path(path).expanduser() for path in (moving_label, initial_ddf)]
    for key, path in zip(_KEYS, (fixed, moving, *optional), strict=True):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"{where}: the file {key} {str(path)!r} does not exist.")
    names = _name(fixed), _name(moving)
    if names[0] == names[1]:
        # neurite-OASIS: one folder a subject, the same file name in each
        names = f"{Path(fixed).resolve().parent.name}_{names[0]}", f"{Path(moving).resolve().parent.name}_{names[1]}"
    item = {"fixed": str(fixed), "moving": str(moving), "fixed_subject": names[0], "moving_subject": names[1]}
    item.update({key: str(path) for key, path in zip(_KEYS[2:], optional, strict=True) if path is not None})
    return item


def scan_pairs(
    fixed: str | Path | None,
    moving: str | Path | None,
    moving_label: str | Path | None = None,
    initial_ddf: str | Path | None = None,
    pairs: str | Path | None = None,
) -> list[dict[str, Any]]:
    """
    One pair of scans as a list of one item.

    Args:
        fixed: file of the fixed scan.
        moving: file of the moving scan.
        moving_label: label map of the moving scan, to be warped with it. Defaults to none.
        initial_ddf: displacement field to start from, on the grid of the fixed scan, as inference writes it. Defaults
            to none.
        pairs: list of pairs, which cannot be given besides. Defaults to none.

    Raises:
        ValueError: When one of the two scans is not given, or a list of pairs besides.
        FileNotFoundError: When a file does not exist.
    """
    if pairs:
        raise ValueError(
            f"--pairs {pairs} cannot go with --fixed, --moving, --moving_label or --initial_ddf: the list itself names "
            "what belongs to each pair."
        )
    if not fixed or not moving:
        raise ValueError(f"both --fixed and --moving are needed, got fixed={fixed!r} and moving={moving!r}.")
    return [_pair(fixed, moving, moving_label, initial_ddf, "pair")]


def listed_pairs(path: str | Path) -> list[dict[str, Any]]:
    """
    Pairs named in a JSON file: ``[{"fixed": file, "moving": file}, ...]``, each perhaps with ``"moving_label"`` and
    ``"initial_ddf"``. Relative files are relative to the list.

    Args:
        path: the JSON file.

    Raises:
        FileNotFoundError: When the list or a file in it does not exist.
        ValueError: When the list is malformed, or two pairs would write the same files.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"list of pairs {str(path)!r} does not exist.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}.") from e
    if not isinstance(entries, list) or not entries:
        came = "an empty one" if isinstance(entries, list) else type(entries).__name__
        raise ValueError(f'{path} must hold a list of {{"fixed": file, "moving": file}}, got {came}.')
    items = []
    for i, entry in enumerate(entries):
        where = f"{path}, pair {i}"
        if not isinstance(entry, Mapping) or not {"fixed", "moving"} <= set(entry) <= set(_KEYS):
            raise ValueError(
                f"{where}: expected the keys 'fixed', 'moving' and perhaps 'moving_label' and 'initial_ddf', "
                f"got {entry!r}."
            )
        names = [entry.get(key) for key in _KEYS]
        if not all(isinstance(name, (str, *([] if i < 2 else [type(None)]))) for i, name in enumerate(names)):
            raise ValueError(f"{where}: expected the names of files, got {entry!r}.")
        files = [None if name is None else path.parent / Path(name).expanduser() for name in names]
        fixed, moving, moving_label, initial_ddf = files
        items.append(_pair(fixed, moving, moving_label, initial_ddf, where))  # type: ignore[arg-type]
    _check_names(items, str(path))
    return items


def _check_names(items: Sequence[Mapping[str, Any]], where: str) -> None:
    seen: set[tuple[str, str]] = set()
    for item in items:
        names = (item["fixed_subject"], item["moving_subject"])
        if names in seen:
            raise ValueError(
                f"{where}: two pairs are called {names[1]}_to_{names[0]} and would write the same files; "
                "give the scans different file names."
            )
        seen.add(names)


def split_scan_pairs(
    dataset_dir: str | Path | None = None,
    spatial_dims: int = 3,
    sizes: Sequence[int | None] = (300, 30, 84),
    lists: Mapping[str, Sequence[str | int]] | None = None,
    part: str = "test",
) -> list[dict[str, Any]]:
    """
    The cyclic pairs of one part of a data set, as files to register.

    Args:
        dataset_dir: see :py:func:`find_oasis`. Defaults to the synthetic sample cohort.
        spatial_dims: 2 or 3. Defaults to 3.
        sizes: see :py:func:`split_subjects`.
        lists: see :py:func:`split_subjects`.
        part: ``"training"``, ``"validation"`` or ``"test"``. Defaults to ``"test"``.
    """
    subjects = split_subjects(
        find_oasis(dataset_dir or write_sample_cohort(sample_dataset_dir()), spatial_dims),
        sizes,
        lists,
        require_labels=False,
    )[part]
    items = []
    for pair in fixed_pairs(subjects):
        fixed, moving = pair["fixed"], pair["moving"]
        item = {
            "fixed": str(fixed["image"]),
            "moving": str(moving["image"]),
            "fixed_subject": fixed["subject"],
            "moving_subject": moving["subject"],
        }
        if moving["label"] is not None:
            item["moving_label"] = str(moving["label"])
        items.append(item)
    return items


def learn2reg_scan_pairs(
    dataset_dir: str | Path | None = None,
    sizes: Sequence[int | None] | Literal["default"] | None = "default",
    lists: Mapping[str, Sequence[str | int]] | None = None,
    part: str = "test",
    task: str | None = None,
) -> list[dict[str, Any]]:
    """
    The pairs of one part of a paired Learn2Reg task, as files to register. Keypoints are not needed; with the moving
    scan its label map is warped, or its mask where there is no label map.

    Args:
        dataset_dir: see :py:func:`find_learn2reg`. Defaults to the synthetic sample lung cohort.
        sizes: see :py:func:`split_pairs`.
        lists: see :py:func:`split_pairs`.
        part: ``"training"``, ``"validation"`` or ``"test"``. Defaults to ``"test"``.
        task: see :py:func:`find_learn2reg`.

    Raises:
        ValueError: When the part has no pair.
    """
    dataset = find_learn2reg(dataset_dir or write_sample_lung_cohort(sample_lung_dataset_dir()), task)
    pairs = split_pairs(dataset, sizes, lists, require_keypoints=False)[part]
    if not pairs:
        raise ValueError(f"The {part} part has no pairs. Give it some by `sizes` or `lists`.")
    items = []
    for pair in pairs:
        item = {key: str(pair[key]) for key in ("fixed", "moving", "fixed_subject", "moving_subject")}
        label = pair.get("moving_label", pair.get("moving_mask"))
        items.append(item if label is None else {**item, "moving_label": str(label)})
    return items
