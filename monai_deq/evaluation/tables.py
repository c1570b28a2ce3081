# SPDX-License-Identifier: Apache-2.0
"""The table that compares registration methods on one data set, after Table 1 of the DEQReg paper (MICCAI 2025)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from monai_deq.evaluation.scores import (
    COST_HEADINGS,
    MethodResult,
    MetricColumn,
    common_pairs,
    finite_scores,
    holm_correction,
    metric_columns,
    paired_wilcoxon,
)
from monai_deq.utils import json_ready, refuse_existing, replace_file, write_json

__all__ = ["ComparisonTable", "cell_text", "markdown_table"]

_DASH = "–"
#: a method is starred whose adjusted p-value is below
_ALPHA = 0.05
_TITLE_INFO = ("data_set", "split", "label_set")
_METHOD = ("name", "title", "ranked", "failure")


def cell_text(text: str) -> str:
    """Text of others made safe for a cell of a Markdown table."""
    for special in "\\|*_`<[":
        text = text.replace(special, "\\" + special)
    return " ".join(text.split())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table without a line break at its end; columns in ``left`` are aligned to the left."""
    align = [":--" if i in left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


def _cost_text(key: str, value: float | str | None) -> str:
    if isinstance(value, str):
        return cell_text(value) or _DASH
    if value is None or not math.isfinite(value):
        return _DASH
    if key in ("steps", "smoothness_weight"):
        return f"{value:.1f}".removesuffix(".0")
    # three digits; counts, and all from 100 on, before the point
    whole = key in ("parameters", "training_pairs") or value >= 99.95 or value == 0
    return f"{value:,.0f}" if whole else f"{value:#.3g}"


def _shown(value: float, column: MetricColumn, sign: str = "", extra: int = 0) -> str:
    """The number as shown; adding 0.0 turns a rounded -0.0 into 0.0."""
    decimals = column.decimals + extra
    return f"{round(value * column.scale, decimals) + 0.0:{sign}.{decimals}f}"


class ComparisonTable:
    """
    Methods against metrics: mean and sample standard deviation over the pairs, best and second best by the means as
    shown (of two ranked methods or more), the two-sided Wilcoxon signed-rank test of one method against every other
    with Holm's correction over the comparisons of each metric, and costs. A method that failed is a row with its
    reason. A pair without a score is left out, and the cell says over how many pairs it is.

    Args:
        results: the methods in the order of the rows.
        metrics: keys of :py:data:`monai_deq.evaluation.METRIC_COLUMNS` or columns of your own, in their order.
        reference: name of the method tested against every other, or None for no tests.
        info: what the table states, as JSON knows it; ``data_set``, ``split`` and ``label_set`` are needed unless every
            method failed.

    Attributes:
        pairs: names (fixed, moving) of the pairs that all methods were scored on.
        statistics: by ``(name, key)`` of a method and a metric ``mean``, ``std`` and ``pairs`` in the unit of the
            results, and where there are any ``mark`` (``"best"`` or ``"second"``), ``test`` (the entries of
            :py:class:`monai_deq.evaluation.PairedTest`) and ``adjusted_p_value``.
    """

    def __init__(
        self,
        results: Sequence[MethodResult],
        metrics: Sequence[str | MetricColumn],
        reference: str | None,
        info: Mapping[str, Any],
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

        self.statistics: dict[tuple[str, str], dict[str, Any]] = {}
        for column in self.columns:
            scores = {r.name: r.scores[column.key] for r in scored if column.key in r.scores}
            if scored and not scores:
                there = sorted({key for result in scored for key in result.scores})
                raise ValueError(f"metrics: no method has {column.key!r}. They have {', '.join(there)}.")
            for name, of_pairs in scores.items():
                finite = finite_scores(of_pairs)
                statistics = {"mean": finite.mean(), "std": finite.std(), "pairs": len(finite)}
                self.statistics[name, column.key] = statistics
            self._mark(column, [r.name for r in scored if r.ranked and r.name in scores])
            self._test(column.key, scores)

    def _mark(self, column: MetricColumn, ranked: Sequence[str]) -> None:
        means = pd.Series({name: self.statistics[name, column.key]["mean"] for name in ranked}, dtype=float).dropna()
        if len(means) < 2:
            return
        shown = means.map(lambda mean: float(_shown(mean, column)))
        for name, rank in shown.rank(method="dense", ascending=not column.higher_is_better).items():
            if rank <= 2:
                self.statistics[str(name), column.key]["mark"] = "best" if rank == 1 else "second"

    def _test(self, key: str, scores: dict[str, pd.Series]) -> None:
        if self.reference not in scores:
            return
        reference = scores[self.reference]
        tests = {name: paired_wilcoxon(reference, other) for name, other in scores.items() if name != self.reference}
        adjusted = holm_correction([test.p_value for test in tests.values()])
        for (name, test), p_value in zip(tests.items(), adjusted, strict=True):
            self.statistics[name, key] |= {"test": asdict(test), "adjusted_p_value": p_value}

    def _at(self, result: MethodResult, column: MetricColumn) -> dict[str, Any]:
        return self.statistics.get((result.name, column.key), {})

    def _count(self, count: int) -> str:
        return "" if count == len(self.pairs) else f" \\[{count}]"

    def _score_cell(self, result: MethodResult, column: MetricColumn) -> str:
        value = self._at(result, column)
        if not value.get("pairs"):
            return _DASH
        std = _DASH if math.isnan(value["std"]) else _shown(value["std"], column)
        cell = f"{_shown(value['mean'], column)} ({std})"
        cell = {"best": f"**{cell}**", "second": f"<u>{cell}</u>"}.get(value.get("mark", ""), cell)
        star = "\\*" if value.get("adjusted_p_value", math.nan) < _ALPHA else ""
        return cell + star + self._count(value["pairs"])

    def _test_cell(self, result: MethodResult, column: MetricColumn) -> str:
        value = self._at(result, column)
        test = value.get("test")
        if test is None or not test["pairs"]:
            return _DASH
        p_value = value["adjusted_p_value"]
        p_text = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
        return f"{_shown(test['median_difference'], column, '+', 1)}, {p_text}{self._count(test['pairs'])}"

    def _title_of(self, name: str | None) -> str:
        return cell_text(next(result.title for result in self.results if result.name == name))

    @property
    def _tests(self) -> list[dict[str, Any]]:
        return [value["test"] for value in self.statistics.values() if "test" in value]

    def to_markdown(self) -> str:
        """The table with its heading, the table of tests, the costs, and notes that say what the numbers are."""
        data_set, split, label_set = (cell_text(str(self.info.get(key) or "unknown")) for key in _TITLE_INFO)
        pairs = f"{len(self.pairs)} pair{'' if len(self.pairs) == 1 else 's'}"
        lines = [f"## {data_set}, split {split}: {pairs}, label set {label_set}", "", *self._score_lines()]
        if self.reference is not None:
            lines += ["", *self._test_lines()]
        if any(result.cost for result in self.results):
            lines += ["", *self._cost_lines()]
        more = {k: v for k, v in self.info.items() if k not in _TITLE_INFO and v is not None}
        if more:
            lines += ["", "### Settings", "", *(f"- {cell_text(str(k))}: {cell_text(str(v))}" for k, v in more.items())]
        return "\n".join(lines) + "\n"

    def _score_lines(self) -> list[str]:
        rows = []
        for result in self.results:
            cells = [self._score_cell(result, column) for column in self.columns]
            if result.failure is not None:
                cells[0] = f"failed: {cell_text(result.failure)}"
            rows.append([cell_text(result.title), *cells])
        note = "Mean (sample standard deviation) over the pairs; ↑ higher is better, ↓ lower is better."
        if any("mark" in value for value in self.statistics.values()):
            note += " Best in **bold**, second best <u>underlined</u>, by the means as shown"
            unranked = [cell_text(r.title) for r in self.results if not r.ranked and r.failure is None]
            note += f", not counting {', '.join(unranked)}." if unranked else "."
        if self._tests:
            note += f" \\* differs from {self._title_of(self.reference)}, adjusted p < {_ALPHA:g} (see the tests)."
        if any(value["pairs"] != len(self.pairs) for value in self.statistics.values()):
            note += " \\[n]: over n pairs alone, the others have no score."
        notes = (f"- {cell_text(c.heading)}: {cell_text(c.note)}." for c in self.columns if c.note)
        return [markdown_table(self._header("Method"), rows), "", note, "", *notes]

    def _header(self, first: str) -> list[str]:
        return [first, *(cell_text(column.title) for column in self.columns)]

    def _test_lines(self) -> list[str]:
        reference = self._title_of(self.reference)
        failed = any(r.name == self.reference and r.failure is not None for r in self.results)
        others = [r for r in self.results if r.failure is None and r.name != self.reference]
        if failed or not others:
            return [f"No tests: {reference} failed." if failed else f"No tests: no other method than {reference}."]
        rows = [[cell_text(r.title), *(self._test_cell(r, column) for column in self.columns)] for r in others]
        made = [sum(self._at(r, c).get("test", {}).get("pairs", 0) > 0 for r in others) for c in self.columns]
        note = (
            f"Median over the pairs of {reference} minus the other method, and the p-value of the two-sided Wilcoxon "
            "signed-rank test on the same pairs, adjusted by Holm's method for the comparisons of each metric "
            f"({max(made)} at most)."
        )
        subjects = [name for pair in self.pairs for name in set(pair)]
        if len(set(subjects)) < len(subjects):
            note += " Some pairs share a subject; the test takes the pairs as independent."
        if any(test["left_out"] for test in self._tests):
            note += " \\[n]: n pairs have both scores, the others are left out."
        table = markdown_table(self._header(f"{reference} against"), rows)
        return [f"### {reference} against the other methods", "", table, "", note]

    def _cost_lines(self) -> list[str]:
        costs = [(result.title, result.cost) for result in self.results if result.cost]
        keys = [key for key in COST_HEADINGS if any(cost.get(key) is not None for _, cost in costs)]
        rows = [[cell_text(title), *(_cost_text(key, cost.get(key)) for key in keys)] for title, cost in costs]
        note = (
            "Memory and time are those of one pair, batch one. A training step is forward, loss and backward, its time "
            "with the optimizer's; saved for backward is the peak of what autograd keeps, without the weights. Times "
            "are medians of rounds in which all methods took turns in one run."
        )
        lines = ["### Cost", "", markdown_table(["Method", *(COST_HEADINGS[key] for key in keys)], rows), "", note]
        if len({cost["memory_kind"] for _, cost in costs if cost.get("memory_kind")}) > 1:
            lines += ["", "Training memory was measured in different ways: compare only rows measured the same way."]
        return lines

    def to_frame(self) -> pd.DataFrame:
        """
        One row a method, numbers as in the results, None where there is none: ``name``, ``title``, ``ranked``,
        ``failure``; for each metric ``<key>_mean``, ``_std``, ``_pairs``, ``_mark``, and against the reference
        ``_median_difference``, ``_p``, ``_p_adjusted``, ``_tested_pairs``; and the cost.
        """
        rows = []
        for result in self.results:
            row: dict[str, Any] = {key: getattr(result, key) for key in _METHOD}
            for column in self.columns:
                value = self._at(result, column)
                test = value.get("test", {})
                entries = {entry: value.get(entry) for entry in ("mean", "std", "pairs", "mark")}
                entries |= {"median_difference": test.get("median_difference"), "p": test.get("p_value")}
                entries |= {"p_adjusted": value.get("adjusted_p_value"), "tested_pairs": test.get("pairs")}
                row |= {f"{column.key}_{entry}": number for entry, number in entries.items()}
            rows.append(json_ready({**row, **{key: (result.cost or {}).get(key) for key in COST_HEADINGS}}))
        # as objects: a whole number stays one in a column where another is missing
        return pd.DataFrame(rows, dtype=object)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, numbers as in the results, None where there is none."""
        methods = []
        for result in self.results:
            own = {c.key: self._at(result, c) for c in self.columns if self._at(result, c)}
            tested = {
                k: {**v["test"], "adjusted_p_value": v["adjusted_p_value"]} for k, v in own.items() if "test" in v
            }
            methods.append(
                {
                    **{key: getattr(result, key) for key in _METHOD},
                    "scores": {k: {e: value[e] for e in ("mean", "std", "pairs")} for k, value in own.items()},
                    "marks": {key: value["mark"] for key, value in own.items() if "mark" in value},
                    "tests": tested,
                    "cost": dict(result.cost) if result.cost else None,
                }
            )
        test = {
            "name": "Wilcoxon signed-rank test, two-sided",
            "correction": "Holm, over the comparisons of each metric",
        }
        content = {
            **self.info,
            "num_pairs": len(self.pairs),
            "metrics": [asdict(column) for column in self.columns],
            "test": {"reference": self.reference, **test, "alpha": _ALPHA},
            "methods": methods,
        }
        return json_ready(content)

    def write(self, output_dir: str | Path, overwrite: bool = False) -> list[Path]:
        """Write ``comparison.md``, ``.csv`` and ``.json``, all or, where one is there (``FileExistsError``), none."""
        paths = [Path(output_dir) / f"comparison.{suffix}" for suffix in ("md", "csv", "json")]
        if not overwrite:
            refuse_existing(paths, "Replace it with overwrite, or name another output_dir.")
        texts = (self.to_markdown(), self.to_frame().to_csv(index=False, lineterminator="\n"))
        for path, text in zip(paths, texts, strict=False):
            with replace_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        write_json(paths[2], self.to_json())
        return paths
