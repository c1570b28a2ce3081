# SPDX-License-Identifier: Apache-2.0
"""What an evaluation says of one method, pair by pair, and how its metrics are shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from monai_deq.evaluation.statistics import describe_difference

__all__ = [
    "COST_HEADINGS",
    "METRIC_COLUMNS",
    "MethodResult",
    "MetricColumn",
    "PairNames",
    "PairScores",
    "common_pairs",
    "metric_columns",
    "read_pair_results",
]

PairNames = tuple[str, str]
"""Names of the fixed and the moving subject."""

PairScores = Mapping[PairNames, float]
"""Score of each pair; NaN where there is none."""


@dataclass(frozen=True)
class MetricColumn:
    """
    How a metric is shown.

    Args:
        key: its name in the results of the evaluation.
        heading: its name for the reader.
        higher_is_better: whether the larger score is the better one.
        unit: unit of the number shown. Defaults to ``""``: none.
        scale: the score is multiplied by it to be shown, e.g. 100 to show a fraction in %. Defaults to 1.
        decimals: digits after the point. Defaults to 2.
        note: what the number is, put below the table. Defaults to ``""``.
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


METRIC_COLUMNS: dict[str, MetricColumn] = {
    column.key: column
    for column in (
        MetricColumn(
            "dice",
            "Dice",
            True,
            "%",
            100.0,
            2,
            "labels warped with nearest neighbour; mean over the labels of the set that both images of a pair have, "
            "one that the warp made vanish counts 0",
        ),
        MetricColumn(
            "hd", "HD", False, "mm", note="symmetric Hausdorff distance between label surfaces, mean over the labels"
        ),
        MetricColumn(
            "hd95",
            "HD95",
            False,
            "mm",
            note="the larger of the two directed 95th percentiles of the surface distances, mean over the labels",
        ),
        MetricColumn(
            "tre",
            "TRE",
            False,
            "mm",
            note="target registration error, mean distance of corresponding landmarks after registration",
        ),
        MetricColumn(
            "folded_percent", "Folded", False, "%", 1.0, 3, "share of voxels with |J| ≤ 0, by central differences"
        ),
        MetricColumn(
            "std_log_jacobian",
            "std log|J|",
            False,
            "",
            1.0,
            3,
            "standard deviation over the voxels of log(clip(|J|, 1e-9, 1e9))",
        ),
        MetricColumn(
            "sdlogj_learn2reg",
            "SDlogJ",
            False,
            "",
            1.0,
            3,
            "Learn2Reg's form: standard deviation of log(clip(|J| + 3, 1e-9, 1e9)) without the outer 2 voxels; not "
            "comparable with std log|J|",
        ),
        MetricColumn(
            "ndv_percent",
            "NDV",
            False,
            "%",
            1.0,
            3,
            "non-diffeomorphic volume (in 2-D: area) by ten (four) finite-difference Jacobians, Liu et al., IJCV 2024",
        ),
    )
}
"""Metrics of the evaluation, by their name in its results."""

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
"""Entries of a method's ``cost`` and their headings."""


def metric_columns(metrics: Sequence[str | MetricColumn]) -> list[MetricColumn]:
    """
    Look up how metrics are shown.

    Args:
        metrics: keys of :py:data:`METRIC_COLUMNS`, or columns of your own.

    Returns:
        the columns in the order given.

    Raises:
        ValueError: When there is none, or one is unknown or given twice.
    """
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


@dataclass(frozen=True)
class MethodResult:
    """
    What an evaluation says of one method.

    Args:
        name: short name, e.g. ``"deqreg"``; no two methods of a table share it.
        title: name for the reader, e.g. ``"DEQReg"``.
        scores: score of each pair by metric key, as :py:func:`read_pair_results` gives them; NaN where a pair has no
            score. A metric that the method lacks is shown as a dash. Defaults to none, for a method that failed.
        cost: any of ``training_pairs`` (seen in training), ``smoothness_weight``, ``parameters`` (count),
            ``saved_memory_mb`` (peak of what autograd keeps for the backward pass), ``training_memory_mb``,
            ``memory_kind`` (what the latter is, e.g. ``"peak of allocated CPU memory"``; needed beside it),
            ``training_seconds`` and ``inference_seconds`` (seconds a pair) and ``steps``; numbers, or a text that is
            shown as it is, or None. Defaults to ``None``.
        failure: why there are no scores. Defaults to ``None``: there are.
        ranked: whether the method may be marked as best or second best. Say no for a starting point: no displacement
            has no folds either. Defaults to ``True``.

    Raises:
        ValueError: When there are neither scores nor a failure, or the cost has an unknown entry or a memory without
            its kind.
    """

    name: str
    title: str
    scores: Mapping[str, PairScores] = field(default_factory=dict)
    cost: Mapping[str, float | str | None] | None = None
    failure: str | None = None
    ranked: bool = True

    def __post_init__(self) -> None:
        if not self.name or not self.title:
            raise ValueError(f"name, title: expected texts, got {self.name!r} and {self.title!r}.")
        if self.failure is None and not any(self.scores.values()):
            raise ValueError(f"method {self.name!r} has no scores. Give failure=... when it failed.")
        if self.failure is not None and not self.failure.strip():
            raise ValueError(f"method {self.name!r}: expected the reason of the failure, got {self.failure!r}.")
        cost = self.cost or {}
        unknown = [k for k in cost if k not in COST_HEADINGS]
        if unknown:
            raise ValueError(
                f"method {self.name!r}: cost knows {', '.join(COST_HEADINGS)}, got {', '.join(map(repr, unknown))}."
            )
        memory = cost.get("training_memory_mb")
        if memory is not None and not isinstance(memory, str) and not cost.get("memory_kind"):
            raise ValueError(f"method {self.name!r}: say in cost['memory_kind'] how the training memory was measured.")


def common_pairs(results: Sequence[MethodResult], reference: str | None = None) -> list[PairNames]:
    """
    The pairs that all methods were scored on: means and tests over different pairs do not compare.

    Args:
        results: the methods; one that failed is passed over.
        reference: name of the method that the others are compared with in the error. Defaults to ``None``: the first.

    Returns:
        the pairs, none when every method failed.

    Raises:
        ValueError: When there is no method, two share a name, ``reference`` is not among them, or one was scored on
            other pairs.
    """
    names = [result.name for result in results]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"results: expected one method or more, each name once, got {names}.")
    if reference is not None and reference not in names:
        raise ValueError(f"reference: expected a name among {', '.join(names)}, got {reference!r}.")
    scored = [result for result in results if result.failure is None]
    if not scored:
        return []
    first = next((result for result in scored if result.name == reference), scored[0])
    expected = next(scores for scores in first.scores.values() if scores)
    for result in scored:
        for key, scores in result.scores.items():
            if scores.keys() != expected.keys():
                raise ValueError(
                    f"method {result.name!r}, metric {key!r}: expected the {len(expected)} pairs (fixed, moving) of "
                    f"{first.name!r}, got {len(scores)}: it {describe_difference(expected, scores)}. Evaluate every "
                    "method on the same pairs."
                )
    return list(expected)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_pair_results(csv_path: str | Path, columns: Sequence[str] | None = None) -> dict[str, dict[PairNames, float]]:
    """
    Read the ``<prefix>_pairs.csv`` of :py:class:`monai_deq.handlers.PairResultsSaver`.

    Args:
        csv_path: a CSV file with the columns ``fixed``, ``moving`` and any number of scores.
        columns: names of the columns to read. Defaults to ``None``: all that hold numbers.

    Returns:
        for each column the score of each pair (fixed, moving); NaN where the cell says nan or nothing.

    Raises:
        FileNotFoundError: When the file is not there.
        ValueError: When it is empty or cut off, a column is missing, a pair is there twice, or a score is no number.
    """
    path = Path(csv_path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. Run the evaluation first, it writes <prefix>_pairs.csv.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        numbered = [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path} is no CSV text, or is cut off ({e}). Evaluate again.") from e
    if not numbered:
        raise ValueError(f"{path} is empty. Evaluate again.")
    # a number that lost its last digits is still a number: the line break is what shows that the file is whole
    if not text.endswith("\n"):
        raise ValueError(f"{path} does not end with a line break and may be cut off. Evaluate again.")
    header = numbered[0][1]
    missing = [name for name in ("fixed", "moving", *(columns or ())) if name not in header]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}. It has {', '.join(header)}.")
    rows: dict[PairNames, dict[str, str]] = {}
    for number, cells in numbered[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number}: expected {len(header)} cells as in the header, got {len(cells)}. The file may "
                "be damaged: evaluate again."
            )
        row = dict(zip(header, cells, strict=True))
        pair = (row["fixed"], row["moving"])
        if pair in rows:
            raise ValueError(f"{path}, line {number}: the pair fixed {pair[0]!r}, moving {pair[1]!r} is there twice.")
        rows[pair] = row
    if not rows:
        raise ValueError(f"{path} holds no pair. Evaluate again.")
    if columns is None:
        # texts such as the reason why the solver stopped have no number in any row
        others = [name for name in header if name not in ("fixed", "moving")]
        columns = [name for name in others if any(_is_number(row[name]) for row in rows.values())]
    scores: dict[str, dict[PairNames, float]] = {name: {} for name in columns}
    for name in columns:
        for pair, row in rows.items():
            text = row[name].strip() or "nan"
            if not _is_number(text):
                raise ValueError(
                    f"{path}, pair fixed {pair[0]!r}, moving {pair[1]!r}: expected a number in {name!r}, got {text!r}."
                )
            scores[name][pair] = float(text)
    return scores
