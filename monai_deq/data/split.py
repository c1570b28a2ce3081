# SPDX-License-Identifier: Apache-2.0
"""What the splits of all data sets share: the names of the parts, and how many items each takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PARTS", "part_of", "part_sizes", "shorten"]

logger = logging.getLogger("monai_deq")

PARTS = ("training", "validation", "test")


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list and how many there are more, for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def part_sizes(sizes: Sequence[int | None], found: int, things: str, where: str) -> dict[str, int]:
    """
    Check the sizes of the parts against what there is, and put in the one that takes the rest.

    Args:
        sizes: number of items for training, validation and test; one of them may be None: all that remain.
        found: number of items there are.
        things: what the items are called in messages, e.g. ``"subjects"``.
        where: which of them were counted and in what folder, to follow "than the <found>" in a message.

    Returns:
        number of items under ``"training"``, ``"validation"`` and ``"test"``.

    Raises:
        ValueError: When the sizes are no such numbers, or there are too few items.
    """
    if len(sizes) != len(PARTS):
        raise ValueError(f"sizes must give {len(PARTS)} numbers {PARTS}, got {list(sizes)}.")
    for size in sizes:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
            raise ValueError(f"sizes must be non-negative integers or None, got {list(sizes)}.")
    if sum(size is None for size in sizes) > 1:
        raise ValueError(f"at most one of sizes may be None (all that remain), got {list(sizes)}.")
    remain = found - sum(size for size in sizes if size is not None)
    if remain < 0 or (remain == 0 and None in sizes):
        raise ValueError(
            f"sizes {list(sizes)} (training, validation, test) need more {things} than the {found} {where}. "
            "Name sizes that fit, in the order training, "
            f"validation, test; one may be None (null in JSON) for all that remain; or name the {things} by `lists`."
        )
    if None in sizes:
        logger.info(
            "sizes %s of %d %s: %s takes the remaining %d",
            list(sizes),
            found,
            things,
            PARTS[list(sizes).index(None)],
            remain,
        )
    elif remain:
        logger.info("sizes %s of %d %s: the last %d are not used", list(sizes), found, things, remain)
    return {part: remain if size is None else size for part, size in zip(PARTS, sizes, strict=True)}


def part_of(parts: Mapping[str, list[dict[str, Any]]], name: str, required: str | None = None) -> list[dict[str, Any]]:
    """
    One part of a split.

    Args:
        parts: what :py:func:`monai_deq.data.split_subjects` or :py:func:`monai_deq.data.split_pairs` returned.
        name: ``"training"``, ``"validation"`` or ``"test"``.
        required: what each of its subjects must have, e.g. ``"label"``. Defaults to ``None``: nothing.

    Raises:
        ValueError: When there is no such part, or a subject lacks what is required.
    """
    if name not in parts:
        raise ValueError(f"split must be one of {', '.join(map(repr, parts))}, got {name!r}.")
    lacking = [str(item["subject"]) for item in parts[name] if required and item.get(required) is None]
    if lacking:
        raise ValueError(
            f"The {name} part needs a {required} of each subject, but {len(lacking)} of its {len(parts[name])} "
            f"subjects have none: {shorten(lacking)}. Choose another split, or name subjects by split_lists."
        )
    return parts[name]
