# SPDX-License-Identifier: Apache-2.0
"""The table that compares registration methods on one data set, after Table 1 of the DEQReg paper (MICCAI 2025)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monai_deq.evaluation.method_results import (
    COST_HEADINGS,
    METRIC_COLUMNS,
    MethodResult,
    MetricColumn,
    common_pairs,
    metric_columns,
    read_pair_results,
)
from monai_deq.evaluation.statistics import PairedTest, holm_correction, paired_wilcoxon
from monai_deq.utils import MeanStd, as_flag, mean_std, refuse_existing, replace_file

__all__ = ["METRIC_COLUMNS", "ComparisonTable", "MethodResult", "MetricColumn", "read_pair_results"]

_DASH = "–"
_TITLE_INFO = ("data_set", "split", "label_set")


def _text(text: str) -> str:
    """Text of others made safe for a cell of a Markdown table."""
    for special in "\\|*_`<[":
        text = text.replace(special, "\\" + special)
    return " ".join(text.split())


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = [":--", *["--:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, align, *rows)]


def _plain(value: Any) -> Any:
    """The same in what JSON knows: plain numbers, null for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):  # a number of NumPy or PyTorch
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _cost_text(key: str, value: float | str | None) -> str:
    if isinstance(value, str):
        return _text(value) or _DASH
    if value is None or not math.isfinite(value):
        return _DASH
    if key in ("parameters", "training_pairs"):
        return f"{value:,.0f}"
    if key in ("steps", "smoothness_weight"):
        return f"{value:.1f}".removesuffix(".0")
    # three digits; from 100 on all before the point
    return f"{value:,.0f}" if value >= 99.95 or value == 0 else f"{value:#.3g}"


class ComparisonTable:
    """
    Methods against metrics: mean and sample standard deviation over the pairs, best and second best, the two-sided
    Wilcoxon signed-rank test of one method against every other on the same pairs with Holm's correction over the
    comparisons of each metric, and what each method costs. After Table 1 of the paper.

    A method that failed is a row with its reason. A pair without a score is left out of the mean and of the tests, and
    the cell says over how many pairs it is. Best and second best go by the means as shown, so that equal numbers have
    equal marks; a metric with fewer than two ranked methods has none.

    Args:
        results: the methods in the order of the rows.
        metrics: the metrics in the order of the columns: keys of
            :py:data:`monai_deq.evaluation.method_results.METRIC_COLUMNS`, or columns of your own.
        reference: name of the method tested against every other, or None for no tests.
        info: what the table should state; ``"data_set"``, ``"split"`` and ``"label_set"`` are needed unless every
            method failed.
        alpha: a method is starred whose adjusted p-value is below. Defaults to 0.05.

    Attributes:
        pairs: names (fixed, moving) of the pairs that all methods were scored on.
        summary: ``summary[name][key]``: mean, standard deviation and number of pairs, in the unit of the results.
        marks: ``marks[name][key]``: ``"best"`` or ``"second"``, where there is one.
        tests: ``tests[name][key]``: the paired test of the reference against that method.
        adjusted_p: ``adjusted_p[name][key]``: its p-value after Holm's correction.

    Raises:
        TypeError: When ``info`` holds what JSON does not know.
        ValueError: When methods were scored on different pairs, names repeat or are unknown, ``info`` lacks an entry,
            no method has one of the metrics, or ``alpha`` is not between 0 and 1.
    """

    def __init__(
        self,
        results: Sequence[MethodResult],
        metrics: Sequence[str | MetricColumn],
        reference: str | None,
        info: Mapping[str, Any],
        alpha: float = 0.05,
    ) -> None:
        self.results = list(results)
        self.columns = metric_columns(metrics)
        self.reference = reference
        self.pairs = common_pairs(self.results, reference)
        self.info = dict(info)
        scored = [result for result in self.results if result.failure is None]
        missing = [key for key in _TITLE_INFO if not self.info.get(key)]
        if missing and scored:
            raise ValueError(f"info: expected {', '.join(_TITLE_INFO)}, which the table states; no {missing} came.")
        try:
            json.dumps(self.info, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise TypeError(f"info must be plain values that JSON knows, got {self.info}.") from e
        if not 0 < alpha < 1:
            raise ValueError(f"alpha: expected a number between 0 and 1, got {alpha}.")
        self.alpha = alpha
        for column in self.columns:
            if scored and not any(column.key in result.scores for result in scored):
                there = sorted({key for result in scored for key in result.scores})
                raise ValueError(f"metrics: no method has {column.key!r}. They have {', '.join(there)}.")

        self.summary: dict[str, dict[str, MeanStd]] = {
            result.name: {
                c.key: mean_std(result.scores[c.key].values()) for c in self.columns if c.key in result.scores
            }
            for result in scored
        }
        self.marks: dict[str, dict[str, str]] = {result.name: {} for result in self.results}
        self.tests: dict[str, dict[str, PairedTest]] = {}
        self.adjusted_p: dict[str, dict[str, float]] = {}
        for column in self.columns:
            self._mark(column)
        for result in scored:
            if result.name == reference:
                self._test(result, [other for other in scored if other is not result])

    def _mark(self, column: MetricColumn) -> None:
        means = {
            result.name: self.summary[result.name][column.key].mean
            for result in self.results
            if result.ranked and column.key in self.summary.get(result.name, {})
        }
        shown = {
            name: float(self._number(mean, column)) * (-1 if column.higher_is_better else 1)
            for name, mean in means.items()
            if math.isfinite(mean)
        }
        if len(shown) < 2:
            return
        for value, mark in zip(sorted(set(shown.values())), ("best", "second"), strict=False):
            for name in shown:
                if shown[name] == value:
                    self.marks[name][column.key] = mark

    def _test(self, reference: MethodResult, others: Sequence[MethodResult]) -> None:
        self.tests = {other.name: {} for other in others}
        self.adjusted_p = {other.name: {} for other in others}
        for column in self.columns:
            if column.key not in reference.scores:
                continue
            family = [other for other in others if column.key in other.scores]
            tests = [paired_wilcoxon(reference.scores[column.key], other.scores[column.key]) for other in family]
            adjusted = holm_correction([test.p_value for test in tests])
            for other, test, p_value in zip(family, tests, adjusted, strict=True):
                self.tests[other.name][column.key] = test
                self.adjusted_p[other.name][column.key] = p_value

    @staticmethod
    def _number(value: float, column: MetricColumn, sign: str = "", extra: int = 0) -> str:
        """The number as shown; adding 0.0 turns a rounded -0.0 into 0.0."""
        decimals = column.decimals + extra
        return f"{round(value * column.scale, decimals) + 0.0:{sign}.{decimals}f}"

    def _count(self, count: int) -> str:
        return "" if count == len(self.pairs) else f" \\[{count}]"

    def _score_cell(self, result: MethodResult, column: MetricColumn) -> str:
        value = self.summary[result.name].get(column.key)
        if value is None or not value.pairs:
            return _DASH
        std = _DASH if math.isnan(value.std) else self._number(value.std, column)
        cell = f"{self._number(value.mean, column)} ({std})"
        mark = self.marks[result.name].get(column.key)
        cell = {"best": f"**{cell}**", "second": f"<u>{cell}</u>"}.get(mark or "", cell)
        star = "\\*" if self.adjusted_p.get(result.name, {}).get(column.key, math.nan) < self.alpha else ""
        return cell + star + self._count(value.pairs)

    def _test_cell(self, result: MethodResult, column: MetricColumn) -> str:
        test = self.tests[result.name].get(column.key)
        if test is None or not test.pairs:
            return _DASH
        difference = self._number(test.median_difference, column, sign="+", extra=1)
        return f"{difference}, {_p_text(self.adjusted_p[result.name][column.key])}{self._count(test.pairs)}"

    def _title_of(self, name: str | None) -> str:
        return _text(next(result.title for result in self.results if result.name == name))

    def to_markdown(self) -> str:
        """
        Returns:
            the table with its heading, the table of tests, the costs, and notes that say what the numbers are.
        """
        data_set, split, label_set = (_text(str(self.info.get(key) or "unknown")) for key in _TITLE_INFO)
        pairs = f"{len(self.pairs)} pair{'' if len(self.pairs) == 1 else 's'}"
        lines = [f"## {data_set}, split {split}: {pairs}, label set {label_set}", ""]
        lines += self._score_lines()
        if self.reference is not None:
            lines += ["", *self._test_lines()]
        if any(result.cost for result in self.results):
            lines += ["", *self._cost_lines()]
        more = {k: v for k, v in self.info.items() if k not in _TITLE_INFO and v is not None}
        if more:
            lines += ["", "### Settings", "", *(f"- {_text(str(k))}: {_text(str(v))}" for k, v in more.items())]
        return "\n".join(lines) + "\n"

    def _score_lines(self) -> list[str]:
        header = ["Method", *(_text(column.title) for column in self.columns)]
        rows = []
        for result in self.results:
            if result.failure is None:
                cells = [self._score_cell(result, column) for column in self.columns]
            else:
                cells = [f"failed: {_text(result.failure)}", *[_DASH] * (len(self.columns) - 1)]
            rows.append([_text(result.title), *cells])
        lines = [*_markdown_table(header, rows), ""]

        note = "Mean (sample standard deviation) over the pairs; ↑ higher is better, ↓ lower is better."
        if any(self.marks.values()):
            note += " Best in **bold**, second best <u>underlined</u>, by the means as shown"
            unranked = [_text(r.title) for r in self.results if not r.ranked and r.failure is None]
            note += f", not counting {', '.join(unranked)}." if unranked else "."
        if self.tests:
            note += f" \\* differs from {self._title_of(self.reference)}, adjusted p < {self.alpha:g} (see the tests)."
        if any(value.pairs != len(self.pairs) for row in self.summary.values() for value in row.values()):
            note += " \\[n]: over n pairs alone, the others have no score."
        return [*lines, note, "", *(f"- {_text(c.heading)}: {_text(c.note)}." for c in self.columns if c.note)]

    def _test_lines(self) -> list[str]:
        reference = self._title_of(self.reference)
        if not self.tests:
            failed = any(r.name == self.reference and r.failure is not None for r in self.results)
            return [f"No tests: {reference} failed." if failed else f"No tests: no other method than {reference}."]
        header = [f"{reference} against", *(_text(column.title) for column in self.columns)]
        rows = [
            [_text(result.title), *(self._test_cell(result, column) for column in self.columns)]
            for result in self.results
            if result.name in self.tests
        ]
        largest = max(
            sum(c.key in tests and tests[c.key].pairs > 0 for tests in self.tests.values()) for c in self.columns
        )
        note = (
            f"Median over the pairs of {reference} minus the other method, and the p-value of the two-sided Wilcoxon "
            f"signed-rank test on the same pairs, adjusted by Holm's method for the comparisons of each metric "
            f"({largest} at most)."
        )
        subjects = [name for pair in self.pairs for name in set(pair)]
        if len(set(subjects)) < len(subjects):
            note += " Some pairs share a subject; the test takes the pairs as independent."
        if any(test.left_out for tests in self.tests.values() for test in tests.values()):
            note += " \\[n]: n pairs have both scores, the others are left out."
        return [f"### {reference} against the other methods", "", *_markdown_table(header, rows), "", note]

    def _cost_lines(self) -> list[str]:
        costs = [(result, result.cost) for result in self.results if result.cost]
        keys = [key for key in COST_HEADINGS if any(cost.get(key) is not None for _, cost in costs)]
        rows = [[_text(r.title), *(_cost_text(key, cost.get(key)) for key in keys)] for r, cost in costs]
        lines = ["### Cost", "", *_markdown_table(["Method", *(COST_HEADINGS[key] for key in keys)], rows)]
        lines += [
            "",
            "Memory and time are those of one pair, batch one. A training step is forward, loss and backward, its time "
            "with the optimizer's; saved for backward is the peak of what autograd keeps, without the weights. Times "
            "are medians of rounds in which all methods took turns in one run.",
        ]
        if len({cost["memory_kind"] for _, cost in costs if cost.get("memory_kind")}) > 1:
            lines += ["", "Training memory was measured in different ways: compare only rows measured the same way."]
        return lines

    def to_rows(self) -> list[dict[str, Any]]:
        """
        Returns:
            one flat row a method, numbers as in the results (not scaled to be shown), None where there is none:
            ``name``, ``title``, ``ranked``, ``failure``; for each metric ``<key>_mean``, ``_std``, ``_pairs``,
            ``_mark``, and against the reference ``_median_difference``, ``_p``, ``_p_adjusted``, ``_tested_pairs``;
            and the cost.
        """
        rows = []
        for result in self.results:
            row: dict[str, Any] = {k: getattr(result, k) for k in ("name", "title", "ranked", "failure")}
            for column in self.columns:
                key = column.key
                value = self.summary.get(result.name, {}).get(key)
                test = self.tests.get(result.name, {}).get(key)
                row |= {
                    f"{key}_mean": value and value.mean,
                    f"{key}_std": value and value.std,
                    f"{key}_pairs": value and value.pairs,
                    f"{key}_mark": self.marks[result.name].get(key),
                    f"{key}_median_difference": test and test.median_difference,
                    f"{key}_p": test and test.p_value,
                    f"{key}_p_adjusted": test and self.adjusted_p[result.name][key],
                    f"{key}_tested_pairs": test and test.pairs,
                }
            row |= {key: (result.cost or {}).get(key) for key in COST_HEADINGS}
            rows.append(_plain(row))
        return rows

    def to_csv(self) -> str:
        """
        Returns:
            :py:meth:`to_rows` as CSV, an empty cell where there is nothing.
        """
        rows = self.to_rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_json(self) -> str:
        """
        Returns:
            all of it as strict JSON, numbers as in the results (not scaled to be shown), null where there is none.
        """
        methods = []
        for result in self.results:
            name = result.name
            tests = {
                key: {**asdict(test), "adjusted_p_value": self.adjusted_p[name][key]}
                for key, test in self.tests.get(name, {}).items()
            }
            scores = {key: value._asdict() for key, value in self.summary.get(name, {}).items()}
            methods.append(
                {
                    **{k: getattr(result, k) for k in ("name", "title", "ranked", "failure")},
                    "scores": scores,
                    "marks": self.marks[name],
                    "tests": tests,
                    "cost": dict(result.cost) if result.cost else None,
                }
            )
        content = {
            **self.info,
            "num_pairs": len(self.pairs),
            "metrics": [asdict(column) for column in self.columns],
            "test": {
                "reference": self.reference,
                "name": "Wilcoxon signed-rank test, two-sided",
                "correction": "Holm, over the comparisons of each metric",
                "alpha": self.alpha,
            },
            "methods": methods,
        }
        return json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"

    def write(self, output_dir: str | Path, prefix: str = "comparison", overwrite: bool = False) -> list[Path]:
        """
        Write ``<prefix>.md``, ``<prefix>.csv`` and ``<prefix>.json``.

        Args:
            output_dir: folder of the files; it is made.
            prefix: start of the file names. Defaults to ``"comparison"``.
            overwrite: replace existing files. Defaults to ``False``.

        Returns:
            the three files.

        Raises:
            FileExistsError: When one of them exists and ``overwrite`` is not set; none is written then.
        """
        texts = {
            Path(output_dir) / f"{prefix}.{suffix}": text
            for suffix, text in (("md", self.to_markdown()), ("csv", self.to_csv()), ("json", self.to_json()))
        }
        if not as_flag(overwrite, "overwrite"):
            refuse_existing(texts, "Replace it with overwrite true, or name another output_dir or prefix.")
        for path, text in texts.items():
            with replace_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return list(texts)
