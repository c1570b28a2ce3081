# SPDX-License-Identifier: Apache-2.0
"""Mean and standard deviation of scores, some of which may be missing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

__all__ = ["MeanStd", "mean_std"]


class MeanStd(NamedTuple):
    """
    Mean and sample standard deviation of the scores that are there.

    Args:
        mean: NaN without any score.
        std: divided by n - 1; NaN with fewer than two scores.
        pairs: over how many scores both were taken.
    """

    mean: float
    std: float
    pairs: int


def mean_std(values: Iterable[float]) -> MeanStd:
    """
    Mean and sample standard deviation.

    Args:
        values: scores; NaN or infinity is no score and is left out.

    Returns:
        mean, standard deviation and number of scores.
    """
    there = np.asarray([v for v in values if math.isfinite(v)], dtype=float)
    if not len(there):
        return MeanStd(math.nan, math.nan, 0)
    return MeanStd(float(there.mean()), float(there.std(ddof=1)) if len(there) > 1 else math.nan, len(there))
