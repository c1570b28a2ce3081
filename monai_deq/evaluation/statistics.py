# SPDX-License-Identifier: Apache-2.0
"""Statistics over the pairs of an evaluation: the paired test and its correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.stats import wilcoxon

__all__ = ["PairedTest", "describe_difference", "holm_correction", "paired_wilcoxon"]

_Pair = TypeVar("_Pair", bound=Hashable)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """
    Adjust the p-values of one family of tests by Holm's step-down method: the i-th smallest of m is multiplied by
    m - i + 1, and none is below the one before it (Holm, "A simple sequentially rejective multiple test procedure",
    Scand. J. Statist. 6, 1979).

    Args:
        p_values: p-values in [0, 1] in any order. NaN stands for a test that could not be made; it stays NaN and does
            not count into the family.

    Returns:
        the adjusted p-values in the order of ``p_values``, 1 at most.

    Raises:
        ValueError: When a p-value is outside [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    made = np.flatnonzero(~np.isnan(p))
    if ((p[made] < 0) | (p[made] > 1)).any():
        raise ValueError(f"p_values: expected numbers in [0, 1] or NaN, got {list(p_values)}.")
    order = made[np.argsort(p[made], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted.tolist()


@dataclass(frozen=True)
class PairedTest:
    """
    Outcome of a paired test of a reference against another method.

    Args:
        p_value: two-sided p-value; NaN when no pair has both scores.
        median_difference: median of reference minus other over the pairs; NaN when no pair has both scores.
        pairs: number of pairs with both scores, those without a difference among them.
        left_out: number of pairs in which one of the two has no score.
    """

    p_value: float
    median_difference: float
    pairs: int
    left_out: int


def describe_difference(expected: Iterable[Hashable], got: Iterable[Hashable], limit: int = 3) -> str:
    """
    Say in words what a set lacks and has too much.

    Args:
        expected: the items expected.
        got: the items that came.
        limit: so many items are named of each. Defaults to 3.

    Returns:
        e.g. ``"lacks (a, b) and 2 more; has besides (c, d)"``, empty when the sets are equal.
    """
    expected, got = dict.fromkeys(expected), dict.fromkeys(got)
    parts = []
    for word, items in (
        ("lacks", [i for i in expected if i not in got]),
        ("has besides", [i for i in got if i not in expected]),
    ):
        if items:
            names = [f"({', '.join(map(str, i))})" if isinstance(i, tuple) else str(i) for i in items[:limit]]
            more = f" and {len(items) - limit} more" if len(items) > limit else ""
            parts.append(f"{word} {', '.join(names)}{more}")
    return "; ".join(parts)


def paired_wilcoxon(reference: Mapping[_Pair, float], other: Mapping[_Pair, float]) -> PairedTest:
    """
    Two-sided Wilcoxon signed-rank test of two methods on the same pairs of images.

    SciPy's :py:func:`scipy.stats.wilcoxon`. Pairs without a difference are dropped from the ranks, as Wilcoxon did;
    when no other is left, p = 1. SciPy takes the exact distribution for up to 50 differences, with ties among them up
    to 13, and the normal approximation beyond.

    Args:
        reference: score of each pair, by anything that identifies the pair, e.g. the names (fixed, moving).
        other: the same of the other method, in any order. A NaN or infinite score leaves the pair out.

    Returns:
        p-value, median of reference minus other, and the numbers of pairs used and left out.

    Raises:
        ValueError: When the two do not have the same pairs.
    """
    if reference.keys() != other.keys():
        raise ValueError(
            f"other: expected the {len(reference)} pairs of reference, got {len(other)}: it "
            f"{describe_difference(reference, other)}. Evaluate both methods on the same pairs."
        )
    differences = np.asarray([float(reference[k]) - float(other[k]) for k in reference])
    # inf - inf is NaN, so a finite difference means two finite scores
    there = differences[np.isfinite(differences)]
    left_out = len(differences) - len(there)
    if not len(there):
        return PairedTest(math.nan, math.nan, 0, left_out)
    # dropped here and not by SciPy, which would give up the exact distribution for one of them
    changed = there[there != 0]
    p_value = float(wilcoxon(changed).pvalue) if len(changed) else 1.0
    return PairedTest(p_value, float(np.median(there)), len(there), left_out)
