# SPDX-License-Identifier: Apache-2.0
"""Scores of methods, pair by pair: how metrics are shown, what an evaluation gave, and tests between methods."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

__all__ = [
    "METRIC_COLUMNS",
    "MethodResult",
    "MetricColumn",
    "PairedTest",
    "holm_correction",
    "paired_wilcoxon",
    "read_pair_results",
]

PAIR = ["fixed", "moving"]


@dataclass(frozen=True)
class MetricColumn:
    """
    How a metric is shown.

    Args:
        key, heading: its name in the results of the evaluation, and for the reader.
        higher_is_better: whether the larger score is the better one.
        unit, scale, decimals: of the number shown: its unit, its factor, as 100 for a fraction in %, its digits.
        note: what the number is, put below the table.
    """

    key: str
    heading: str
    higher_is_better: bool
    unit: str = ""
    scale: float = 1.0
    decimals: int = 2
    note: str = ""

    @property
    def title(self) -> str:
        """Heading with unit and an arrow towards the better."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.heading}{unit} {'↑' if self.higher_is_better else '↓'}"


_DICE = (
    "labels warped with nearest neighbour; mean over the labels of the set that both images of a pair have, one that "
    "the warp made vanish counts 0"
)
_HD = "symmetric Hausdorff distance between label surfaces, mean over the labels"
_HD95 = "the larger of the two directed 95th percentiles of the surface distances, mean over the labels"
_TRE = "target registration error, mean distance of corresponding landmarks after registration"
_FOLDED = "share of voxels with |J| ≤ 0, by central differences"
_STD_LOG = "standard deviation over the voxels of log(clip(|J|, 1e-9, 1e9))"
_SDLOGJ = (
    "Learn2Reg's form: standard deviation of log(clip(|J| + 3, 1e-9, 1e9)) without the outer 2 voxels; not comparable "
    "with std log|J|"
)
_NDV = "non-diffeomorphic volume (in 2-D: area) by ten (four) finite-difference Jacobians, Liu et al., IJCV 2024"
_COLUMNS = (
    MetricColumn("dice", "Dice", True, "%", 100.0, 2, _DICE),
    MetricColumn("hd", "HD", False, "mm", note=_HD),
    MetricColumn("hd95", "HD95", False, "mm", note=_HD95),
    MetricColumn("tre", "TRE", False, "mm", note=_TRE),
    MetricColumn("folded_percent", "Folded", False, "%", 1.0, 3, _FOLDED),
    MetricColumn("std_log_jacobian", "std log|J|", False, "", 1.0, 3, _STD_LOG),
    MetricColumn("sdlogj_learn2reg", "SDlogJ", False, "", 1.0, 3, _SDLOGJ),
    MetricColumn("ndv_percent", "NDV", False, "%", 1.0, 3, _NDV),
)
#: metrics of the evaluation, by their name in its results
METRIC_COLUMNS: dict[str, MetricColumn] = {column.key: column for column in _COLUMNS}

#: entries of a method's ``cost`` and their headings
COST_HEADINGS: dict[str, str] = {
    "training_pairs": "Training pairs",
    "smoothness_weight": "λ",
    "parameters": "Parameters",
    "saved_memory_mb": "Saved for backward (MB)",
    "training_memory_mb": "Training memory (MB)",
    "memory_kind": "Training memory is",
    "training_seconds": "Training (s/pair)",
    "inference_seconds": "Inference (s/pair)",
    "steps": "Steps (finest level)",
}


def metric_columns(metrics: Sequence[str | MetricColumn]) -> list[MetricColumn]:
    """How metrics are shown, keys of :py:data:`METRIC_COLUMNS` or own columns; one or more, each once."""
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics: expected a list of one metric or more, got {metrics!r}.")
    for metric in metrics:
        if isinstance(metric, str) and metric not in METRIC_COLUMNS:
            raise ValueError(
                f"metrics: expected names among {', '.join(METRIC_COLUMNS)}, got {metric!r}. Give a MetricColumn to "
                "show another one."
            )
    columns = [METRIC_COLUMNS[metric] if isinstance(metric, str) else metric for metric in metrics]
    keys = [column.key for column in columns]
    if len(set(keys)) != len(keys):
        raise ValueError(f"metrics: expected each metric once, got {', '.join(keys)}.")
    return columns


@dataclass(frozen=True, eq=False)
class MethodResult:
    """
    What an evaluation says of one method.

    Args:
        name, title: short name that no other method of a table has, e.g. ``"deqreg"``, and that for the reader.
        scores: as :py:func:`read_pair_results` gives them, none for a method that failed.
        cost: numbers or texts by keys of ``COST_HEADINGS``; ``training_memory_mb`` needs ``memory_kind``.
        failure: why there are no scores.
        ranked: whether it may be best: a starting point has no folds either.
    """

    name: str
    title: str
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    cost: Mapping[str, float | str | None] | None = None
    failure: str | None = None
    ranked: bool = True

    def __post_init__(self) -> None:
        if not self.name or not self.title:
            raise ValueError(f"name, title: expected texts, got {self.name!r} and {self.title!r}.")
        if self.failure is None and self.scores.empty:
            raise ValueError(f"method {self.name!r} has no scores. Give failure=... when it failed.")
        if self.failure is not None and not self.failure.strip():
            raise ValueError(f"method {self.name!r}: expected the reason of the failure, got {self.failure!r}.")
        cost = self.cost or {}
        if unknown := [k for k in cost if k not in COST_HEADINGS]:
            raise ValueError(
                f"method {self.name!r}: cost knows {', '.join(COST_HEADINGS)}, got {', '.join(map(repr, unknown))}."
            )
        if not isinstance(cost.get("training_memory_mb"), (str, type(None))) and not cost.get("memory_kind"):
            raise ValueError(f"method {self.name!r}: say in cost['memory_kind'] how the training memory was measured.")


def _describe_difference(expected: Iterable[Hashable], got: Iterable[Hashable], limit: int = 3) -> str:
    """What ``got`` lacks and has too much, ``"lacks (a, b) and 2 more; has besides (c, d)"``; ``limit`` are named."""
    expected, got = dict.fromkeys(expected), dict.fromkeys(got)
    lacking, besides = [i for i in expected if i not in got], [i for i in got if i not in expected]
    parts = []
    for word, items in (("lacks", lacking), ("has besides", besides)):
        if items:
            names = [f"({', '.join(map(str, i))})" if isinstance(i, tuple) else str(i) for i in items[:limit]]
            parts.append(f"{word} {', '.join(names)}" + (f" and {len(items) - limit} more" if items[limit:] else ""))
    return "; ".join(parts)


def common_pairs(results: Sequence[MethodResult], reference: str | None = None) -> list[tuple[str, str]]:
    """
    The pairs (fixed, moving) that all methods that did not fail were scored on: means and tests over different pairs
    do not compare. ``ValueError`` names what a method has otherwise than the reference, or else the first.
    """
    names = [result.name for result in results]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"results: expected one method or more, each name once, got {names}.")
    if reference is not None and reference not in names:
        raise ValueError(f"reference: expected a name among {', '.join(names)}, got {reference!r}.")
    scored = {result.name: result.scores.index.to_list() for result in results if result.failure is None}
    if not scored:
        return []
    first = reference if reference in scored else next(iter(scored))
    for name, pairs in scored.items():
        if set(pairs) != set(scored[first]):
            raise ValueError(
                f"method {name!r}: expected the {len(scored[first])} pairs (fixed, moving) of {first!r}, got "
                f"{len(pairs)}: it {_describe_difference(scored[first], pairs)}. Evaluate every method on the same "
                "pairs."
            )
    return scored[first]


def _number(text: str) -> float | None:
    """The number that a cell holds, NaN for an empty one, ``None`` for another text."""
    try:
        return float(text.strip() or "nan")
    except ValueError:
        return None


def read_pair_results(csv_path: str | Path) -> pd.DataFrame:
    """
    Read the ``<prefix>_pairs.csv`` of :py:class:`monai_deq.handlers.PairResultsSaver`.

    Args:
        csv_path: a CSV file with the columns ``fixed``, ``moving`` and any number of scores; other texts are left out.

    Returns:
        one row a pair, indexed by ``(fixed, moving)``, one column a score; NaN where the cell says nan or nothing.

    Raises:
        ValueError: When it is empty or cut off, a column is missing, a pair is there twice, or a score is no number.
    """
    path = Path(csv_path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. Run the evaluation first, it writes <prefix>_pairs.csv.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        # pandas would fill a row that was cut off with NaN
        lines = [cells for cells in csv.reader(io.StringIO(text, newline=""), strict=True) if cells]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path} is no CSV text, or is cut off ({e}). Evaluate again.") from e
    if not lines:
        raise ValueError(f"{path} is empty. Evaluate again.")
    # a number that lost its last digits is still a number: the line break is what shows that the file is whole
    if not text.endswith("\n"):
        raise ValueError(f"{path} does not end with a line break and may be cut off. Evaluate again.")
    header, *rows = lines
    if missing := [name for name in PAIR if name not in header]:
        raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}. It has {', '.join(header)}.")
    for cells in rows:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, row {','.join(cells)}: expected {len(header)} cells as in the header, got {len(cells)}. The "
                "file may be damaged: evaluate again."
            )
    if not rows:
        raise ValueError(f"{path} holds no pair. Evaluate again.")
    frame = pd.DataFrame(rows, columns=header).set_index(PAIR)
    for fixed, moving in frame.index[frame.index.duplicated()]:
        raise ValueError(f"{path}: the pair fixed {fixed!r}, moving {moving!r} is there twice.")
    scores: dict[str, list[float | None]] = {name: [_number(cell) for cell in frame[name]] for name in frame}
    # texts such as the reason why the solver stopped have no number in any row
    scores = {name: values for name, values in scores.items() if any(v is not None for v in values)}
    for name, values in scores.items():
        if None in values:
            (fixed, moving), cell = frame.index[values.index(None)], frame[name].iloc[values.index(None)]
            raise ValueError(
                f"{path}, pair fixed {fixed!r}, moving {moving!r}: expected a number in {name!r}, got {cell!r}."
            )
    return pd.DataFrame(scores, index=frame.index, dtype=float)


def finite_scores(scores: pd.Series) -> pd.Series:
    """The scores that are there: NaN and infinity are none."""
    return scores[np.isfinite(scores)]


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """
    Adjust the p-values of one family of tests by Holm's step-down method (Holm, "A simple sequentially rejective
    multiple test procedure", Scand. J. Statist. 6, 1979).

    Args:
        p_values: in [0, 1], else ``ValueError``; NaN is a test that could not be made, stays NaN and does not count.
    """
    p = pd.Series(p_values, dtype=float)
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"p_values: expected numbers in [0, 1] or NaN, got {list(p_values)}.")
    ordered = p.dropna().sort_values(kind="stable")
    adjusted = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0)
    return adjusted.reindex(p.index).to_list()


@dataclass(frozen=True)
class PairedTest:
    """
    Paired test of a reference against another method: two-sided p-value, median over the pairs of reference minus
    other (both NaN without a pair that has both scores), number of pairs with both scores, and of those left out.
    """

    p_value: float
    median_difference: float
    pairs: int
    left_out: int


def paired_wilcoxon(
    reference: Mapping[Hashable, float] | pd.Series, other: Mapping[Hashable, float] | pd.Series
) -> PairedTest:
    """
    Two-sided Wilcoxon signed-rank test of two methods on the same pairs, :py:func:`scipy.stats.wilcoxon`: exact for up
    to 50 differences, with ties up to 13. Pairs without a difference are dropped from the ranks; p = 1 without others.

    Args:
        reference, other: score of each pair, the same ones, by its names. NaN or infinity leaves the pair out.
    """
    reference, other = dict(reference.items()), dict(other.items())
    if reference.keys() != other.keys():
        raise ValueError(
            f"other: expected the {len(reference)} pairs of reference, got {len(other)}: it "
            f"{_describe_difference(reference, other)}. Evaluate both methods on the same pairs."
        )
    differences = np.asarray([float(reference[pair]) - float(other[pair]) for pair in reference])
    # inf - inf is NaN, so a finite difference means two finite scores
    there = differences[np.isfinite(differences)]
    left_out = len(differences) - len(there)
    if not len(there):
        return PairedTest(math.nan, math.nan, 0, left_out)
    # dropped here and not by SciPy, which would give up the exact distribution for one of them
    changed = there[there != 0]
    p_value = float(wilcoxon(changed).pvalue) if len(changed) else 1.0
    return PairedTest(p_value, float(np.median(there)), len(there), left_out)
