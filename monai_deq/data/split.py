# SPDX-License-Identifier: Apache-2.0
"""What the data sets share: their folder, and the split into training, validation and test."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from monai_deq.utils import expand_user

__all__ = ["dataset_folder", "listing", "part_of", "refuse_lacking", "shorten", "split_items"]

logger = logging.getLogger("monai_deq")

PARTS = ("training", "validation", "test")

Items = list[dict[str, Any]]
Parts = dict[str, Items]
Sizes = Sequence[int | None]
Lists = Mapping[str, Sequence[str | int]]


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list and how many there are more, for messages."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def listing(folder: Path) -> str:
    """What is in a folder, for messages."""
    return shorten(sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())) or "nothing"


def dataset_folder(dataset_dir: str | Path | None, expected: str, write_sample: Callable[[], Path]) -> Path:
    """The folder of a data set, which must exist; where none is given, that which ``write_sample`` writes."""
    if dataset_dir is None or str(dataset_dir) == "":
        root = write_sample()
        message = "no data set given: using the SYNTHETIC sample cohort in %s; for real data give --dataset_dir (%s)"
        logger.info(message, root, expected)
        return root
    root = expand_user(dataset_dir)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"dataset_dir {str(root)!r} {what}; expected the folder of {expected}, or none for the sample cohort."
        )
    return root


def split_items(
    items: Items, thing: str, where: str, sizes: Sizes | Parts, lists: Lists | None, required: tuple[str, ...]
) -> Parts:
    """Split the items of a data set into training, validation and test, and log what is in several of them.

    Args:
        items: subjects or pairs; ``item[thing]`` is the name.
        thing: ``"subject"`` or ``"case"``; several items may be of one case.
        where: what was found in what folder, to follow "the 8" in a message.
        sizes: number of items for each part, taken in order; one may be None: all that remain. Or the parts themselves.
        lists: names for each part instead of sizes, or the four digits in them (``"0001"`` or 1).
        required: what validation and test items need: the key, what to call it, and the option that needs it; or empty.
    """
    if lists is not None:
        split = _by_lists(items, thing, where, lists)
    else:
        split = sizes if isinstance(sizes, dict) else _by_sizes(items, thing, where, sizes)
    if required:
        key, what, option = required
        for part in PARTS[1:]:
            advice = f" Choose other {thing}s by `lists`, or set {option}=False."
            refuse_lacking(split[part], part, key, what, advice)
    for a, b in combinations(PARTS, 2):
        if both := sorted({item[thing] for item in split[a]} & {item[thing] for item in split[b]}):
            logger.warning("%d %s(s) are in both %s and %s: %s", len(both), thing, a, b, shorten(both))
    return split


def _by_sizes(items: Items, thing: str, where: str, sizes: Sizes) -> Parts:
    if isinstance(sizes, str) or len(sizes) != len(PARTS):
        raise ValueError(f"sizes must give {len(PARTS)} numbers {PARTS}, got {sizes!r}.")
    if any(size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0) for size in sizes):
        raise ValueError(f"sizes must be non-negative integers or None, got {list(sizes)}.")
    if sum(size is None for size in sizes) > 1:
        raise ValueError(f"at most one of sizes may be None (all that remain), got {list(sizes)}.")
    remain = len(items) - sum(size for size in sizes if size is not None)
    if remain < 0 or (remain == 0 and None in sizes):
        raise ValueError(
            f"sizes {list(sizes)} (training, validation, test) need more {thing}s than the {len(items)} {where}. Name "
            "sizes that fit, in the order training, validation, test; one may be None (null in JSON) for all that "
            f"remain; or name the {thing}s by `lists`."
        )
    if None in sizes or remain:
        took = f"{PARTS[list(sizes).index(None)]} takes the remaining" if None in sizes else "not used are the last"
        logger.info("sizes %s of %d %ss: %s %d", list(sizes), len(items), thing, took, remain)
    rest = iter(items)
    return {part: list(islice(rest, remain if n is None else n)) for part, n in zip(PARTS, sizes, strict=True)}


def _by_lists(items: Items, thing: str, where: str, lists: Lists) -> Parts:
    if unknown := sorted(set(lists) - set(PARTS)):
        raise ValueError(f"lists has unknown part(s) {unknown}; expected {PARTS}.")
    by_name: dict[str, Items] = {}
    for item in items:
        digits = re.search(r"_(\d{4})(?:_MR1)?$", item[thing])
        for name in (item[thing], *([digits[1]] if digits else [])):
            by_name.setdefault(name, []).append(item)
    split: Parts = {}
    for part in PARTS:
        wanted = [f"{i:04d}" if isinstance(i, int) else str(i) for i in lists.get(part, ())]
        if absent := [name for name in wanted if name not in by_name]:
            raise ValueError(
                f"lists[{part!r}] names {len(absent)} {thing}(s) that are not among the {len(items)} {where}: "
                f"{shorten(absent)}. Found {shorten([item[thing] for item in items])}."
            )
        split[part] = [item for name in wanted for item in by_name[name]]
        times = Counter(map(id, split[part]))
        if twice := [item[thing] for item in items if times[id(item)] > 1]:
            raise ValueError(f"lists[{part!r}] names a {thing} twice: {shorten(twice)}.")
    return split


def refuse_lacking(
    items: Sequence[Mapping[str, Any]], part: str, key: str, what: str | None = None, advice: str = ""
) -> None:
    """Refuse a part whose items do not all have a ``key``, called ``what`` in the message; ``advice`` ends it."""
    if lacking := [item for item in items if item.get(key) is None]:
        things, name = ("pairs", "case") if "case" in lacking[0] else ("subjects", "subject")
        raise ValueError(
            f"The {part} part needs {what or repr(key)}, but {len(lacking)} of its {len(items)} {things} have none: "
            f"{shorten([str(item[name]) for item in lacking])}.{advice}"
        )


def part_of(parts: Mapping[str, Items], name: str, required: str | None = None) -> Items:
    """The part ``"training"``, ``"validation"`` or ``"test"`` of a split, whose items must have ``required``."""
    if name not in parts:
        raise ValueError(f"split must be one of {', '.join(map(repr, parts))}, got {name!r}.")
    if required:
        advice = " Choose another split, or name subjects by split_lists."
        refuse_lacking(parts[name], name, required, f"a {required} of each subject", advice)
    return parts[name]
