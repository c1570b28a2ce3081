# SPDX-License-Identifier: Apache-2.0
"""Split the pairs of a Learn2Reg task into training, validation and test."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from monai_deq.data.learn2reg import ANNOTATION_KEYS, Learn2RegDataset
from monai_deq.data.split import PARTS, part_sizes, shorten

__all__ = ["keep_annotations", "split_pairs"]

logger = logging.getLogger("monai_deq")

_PAPER = (170, 10, 30)  # of NLST


def split_pairs(
    dataset: Learn2RegDataset,
    sizes: Sequence[int | None] | Literal["default"] | None = _PAPER,
    lists: Mapping[str, Sequence[str | int]] | None = None,
    require_keypoints: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Split the pairs into training, validation and test.

    Args:
        dataset: what :py:func:`monai_deq.data.find_learn2reg` found.
        sizes: number of pairs for training, validation and test, taken in the order of ``dataset.pairs``: the official
            validation and test pairs come last and are never trained on before all others are. One number may be
            None: all that remain. None in place of the three: the official lists. ``"default"``: the paper's for
            NLST with so many pairs, the official lists for all else. Defaults to the paper's (170, 10, 30) for NLST.
        lists: explicit cases instead of sizes, under ``"training"``, ``"validation"`` and ``"test"``: names of cases,
            or the four digits in them (``"0001"`` or 1); each stands for all pairs of the case. A part left out is
            empty.
        require_keypoints: refuse validation and test pairs without keypoints. Defaults to True.

    Returns:
        The pairs under ``"training"``, ``"validation"`` and ``"test"``. That a case is in several parts is logged.

    Raises:
        ValueError: When there are too few pairs, a listed case does not exist, or keypoints are missing.
    """
    if sizes == "default":
        sizes = _PAPER if dataset.name == "NLST" and len(dataset.pairs) >= sum(_PAPER) else None
        if lists is None:
            logger.info("pairs of %s are split by %s", dataset.name, "the official lists" if sizes is None else sizes)
    if lists is not None:
        split = _split_by_lists(dataset, lists)
    elif sizes is None:
        official = (dataset.training, dataset.registration_val, dataset.registration_test)
        split = dict(zip(PARTS, official, strict=True))
    else:
        split, start = {}, 0
        counts = part_sizes(sizes, len(dataset.pairs), "cases", f"of {dataset.name} in {str(dataset.root)!r}")
        for part, count in counts.items():
            split[part] = dataset.pairs[start : start + count]
            start += count
    if require_keypoints:
        for part in PARTS[1:]:
            without = [pair["case"] for pair in split[part] if "fixed_keypoints" not in pair]
            if without:
                raise ValueError(
                    f"The {part} part needs keypoints, but {len(without)} of its {len(split[part])} pairs have none: "
                    f"{shorten(without)}. Choose other cases by `lists`, or set require_keypoints=False."
                )
    for i, a in enumerate(PARTS):
        for b in PARTS[i + 1 :]:
            both = sorted({pair["case"] for pair in split[a]} & {pair["case"] for pair in split[b]})
            if both:
                logger.warning("%d case(s) are in both %s and %s: %s", len(both), a, b, shorten(both))
    return split


def _split_by_lists(
    dataset: Learn2RegDataset, lists: Mapping[str, Sequence[str | int]]
) -> dict[str, list[dict[str, Any]]]:
    unknown = sorted(set(lists) - set(PARTS))
    if unknown:
        raise ValueError(f"lists has unknown part(s) {unknown}; expected {PARTS}.")
    by_id: dict[str, list[dict[str, Any]]] = {}
    for pair in dataset.pairs:
        digits = re.search(r"_(\d{4})$", pair["case"])
        for name in (pair["case"], *([digits.group(1)] if digits else [])):
            by_id.setdefault(name, []).append(pair)
    split = {}
    for part in PARTS:
        wanted = [f"{i:04d}" if isinstance(i, int) else str(i) for i in lists.get(part, ())]
        absent = [i for i in wanted if i not in by_id]
        if absent:
            raise ValueError(
                f"lists[{part!r}] names {len(absent)} case(s) without a pair in {str(dataset.root)!r}: "
                f"{shorten(absent)}. Found {len(dataset.pairs)} pairs: "
                f"{shorten([pair['case'] for pair in dataset.pairs])}."
            )
        split[part] = [pair for i in wanted for pair in by_id[i]]
        files = [(pair["fixed"], pair["moving"]) for pair in split[part]]
        if len(set(files)) < len(files):
            raise ValueError(f"lists[{part!r}] names a case twice: {shorten(wanted)}.")
    return split


def keep_annotations(
    pairs: Sequence[Mapping[str, Any]], keys: Sequence[str] = (), part: str = "training"
) -> list[dict[str, Any]]:
    """The pairs with those of their masks, keypoints and labels that are needed, so that no others are read and kept.

    Args:
        pairs: pairs as of :py:func:`split_pairs`.
        keys: the files needed, such as ``"fixed_mask"``. Defaults to none.
        part: what the pairs are for, for the error. Defaults to ``"training"``.

    Raises:
        ValueError: When a key is no such file, there is no pair, or one has not all of them.
    """
    unknown = sorted(set(keys) - set(ANNOTATION_KEYS))
    if unknown:
        raise ValueError(f"keys has {unknown}; expected some of {list(ANNOTATION_KEYS)}.")
    if not pairs:
        raise ValueError(f"The {part} part has no pairs. Give it some by `sizes` or `lists`.")
    for key in keys:
        without = [pair["case"] for pair in pairs if key not in pair]
        if without:
            raise ValueError(
                f"The {part} part needs {key!r}, but {len(without)} of its {len(pairs)} pairs have none: "
                f"{shorten(without)}."
            )
    return [{k: v for k, v in pair.items() if k in keys or k not in ANNOTATION_KEYS} for pair in pairs]
