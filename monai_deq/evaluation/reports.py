# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation over many pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from monai_deq.evaluation.figures import plot_boxes
from monai_deq.evaluation.scores import (
    METRIC_COLUMNS,
    PAIR,
    MethodResult,
    MetricColumn,
    common_pairs,
    finite_scores,
    holm_correction,
    paired_wilcoxon,
)
from monai_deq.utils import read_json
from monai_deq.visualize import HTMLPage, RegisteredPair, html_picture, html_table, plot_registration

__all__ = ["write_evaluation_report"]

_HEADINGS = {"mean": "mean", "std": "std", "median": "median", "pairs": "pairs"}
#: what an evaluation says besides how it was made
_SCORES = ("labels", "num_pairs", "failed", "summary", "verdicts", "per_label", "pairs", "pictures")
#: of best and of worst pairs
_SHOWN = 3


def write_evaluation_report(
    path: str | Path,
    summary_json: str | Path,
    reference_json: str | Path | None = None,
    pictures: Mapping[tuple[str, str], RegisteredPair | str | Path] | None = None,
    overwrite: bool = False,
) -> None:
    """
    Write an evaluation as one HTML file that needs no network: means, boxes over the pairs, verdicts, best and worst
    pairs and, with another evaluation of the same pairs, a paired test of each metric
    (:py:func:`monai_deq.evaluation.paired_wilcoxon`, Holm's correction over the metrics).

    Args:
        path: the file, ``.html``.
        summary_json: what :py:class:`monai_deq.handlers.PairResultsSaver` wrote, ``<prefix>_summary.json``.
        reference_json: the same of the evaluation to compare with. Defaults to ``None``: none.
        pictures: by names (fixed, moving) the pair, or its picture as a PNG or JPEG, in place of those that the
            evaluation wrote beside its summary; those of the best and the worst pairs are shown. Defaults to none.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: When the file is there already.
        FileNotFoundError: When there is no evaluation.
        ImportError: When matplotlib is not installed.
        ValueError: When a file is no evaluation, or the two are of different pairs.
    """
    HTMLPage.check(path, overwrite)
    content = _read(summary_json)
    result = _result(content, "evaluation")
    results = [result]
    if reference_json is not None:
        other = _read(reference_json)
        results.append(_result(other, "reference"))
        common_pairs(results)
    if len(results) == 2 and results[0].title == results[1].title:
        results = [result, replace(results[1], title=f"{results[1].title} (reference)")]
    metrics = [column for key, column in METRIC_COLUMNS.items() if any(key in r.scores for r in results)]

    page = HTMLPage(f"Evaluation of {result.title}: {content['num_pairs']} pairs")
    if failed := content.get("failed"):
        lost = [(f"{pair['fixed']}, {pair['moving']}", pair["reason"]) for pair in failed]
        page.add("Failed pairs, in no mean", html_table(("fixed, moving", "reason"), lost))
    page.add("Summary", *_summary_tables(content["summary"]))
    if metrics:
        boxes = plot_boxes(results, metrics)
        page.add("Scores over the pairs", html_picture(boxes, "Box plots of the scores", 640), kind="whole")
    if len(results) == 2:
        words = (
            "<p>Two-sided Wilcoxon signed-rank test over the pairs, p after Holm's correction over these metrics.</p>"
        )
        page.add("Against the reference", words, _test_table(results, metrics))
    counts = content.get("verdicts") or {}
    rows = [(name, count, f"{100 * count / max(content['num_pairs'], 1):.1f} %") for name, count in counts.items()]
    page.add("Verdicts", html_table(("verdict", "pairs", "share"), rows))
    # by the metric that the evaluation drew its pictures by
    first = [METRIC_COLUMNS[key] for key in content["summary"] if key in ("dice", "tre")]
    shown_pairs = {**_pictures(content, Path(summary_json).parent), **(pictures or {})}
    for heading, pairs, column in _extremes(result, [*first, *metrics]):
        parts = [html_table(("fixed, moving", column.title), [(", ".join(p), _value(s, column)) for p, s in pairs])]
        for pair, _ in pairs:
            if picture := shown_pairs.get(pair):
                shown = plot_registration(picture) if isinstance(picture, RegisteredPair) else picture
                parts.append(html_picture(shown, f"fixed {pair[0]}, moving {pair[1]}", 860))
        page.add(heading, *parts)
    page.add("Scores of each label", *_label_tables(content.get("per_label") or {}))
    page.add("Settings", html_table((), [(k, str(v)) for k, v in content.items() if k not in _SCORES]))
    page.add_versions()
    page.write(path, overwrite)


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. Run the evaluation first, it writes <prefix>_summary.json.")
    try:
        content = read_json(path)
        if not {"summary", "num_pairs", "pairs"} <= set(content) or not set(PAIR) <= set(*content["pairs"][:1]):
            raise ValueError("expected summary, num_pairs and pairs")
        _check(content)
    except (AttributeError, ValueError, TypeError) as e:
        raise ValueError(f"{path} is no summary of an evaluation ({e}). Evaluate again.") from e
    return dict(content)


def _check(content: Mapping[str, Any]) -> None:
    """``ValueError`` or ``AttributeError`` for parts of another kind."""

    def refuse(name: str, right: bool) -> None:
        if not right:
            raise ValueError(f"its {name} are none")

    def is_number(value: Any) -> bool:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))

    pairs, labels = content["pairs"], content.get("per_label") or {}
    refuse("num_pairs", isinstance(content["num_pairs"], int) and not isinstance(content["num_pairs"], bool))
    refuse("pairs", isinstance(pairs, list) and len(pairs) == content["num_pairs"])
    refuse("pairs", all(isinstance(pair[name], str) if name in pair else False for pair in pairs for name in PAIR))
    refuse("pairs", not any(isinstance(v, (dict, list)) for pair in pairs for v in pair.values()))
    known = [pair[key] for pair in pairs for key in pair if key in METRIC_COLUMNS]
    refuse("pairs", all(map(is_number, known)))
    refuse("summary", all(is_number(v) for values in content["summary"].values() for v in values.values()))
    refuse("verdicts", all(is_number(count) for count in (content.get("verdicts") or {}).values()))
    of_labels = [of for values in labels.values() for of in values.values()]
    refuse("per_label", all(is_number(v) for of in of_labels for k, v in of.items() if k != "name"))


def _result(content: Mapping[str, Any], name: str) -> MethodResult:
    """The metrics that are known here, pair by pair."""
    frame = pd.DataFrame(content["pairs"]).set_index(PAIR)
    known = [key for key in frame if key in METRIC_COLUMNS or pd.api.types.is_numeric_dtype(frame[key])]
    scores = frame[known].astype(float)
    return MethodResult(name, str(content.get("method") or name), scores)


def _pictures(content: Mapping[str, Any], folder: Path) -> dict[tuple[str, str], Path]:
    """The pictures that an evaluation wrote, as far as they are there, by pair."""
    files = {(of["fixed"], of["moving"]): folder / of["file"] for of in content.get("pictures") or ()}
    return {pair: file for pair, file in files.items() if file.is_file()}


def _column(key: str) -> MetricColumn | None:
    """How a metric that is known is shown, before the registration too."""
    before = METRIC_COLUMNS.get(key.removesuffix("_before"))
    if before is None or not key.endswith("_before"):
        return METRIC_COLUMNS.get(key)
    return replace(before, key=key, heading=f"{before.heading} before", note="")


def _value(score: Any, column: MetricColumn, sign: str = "") -> str | None:
    return None if score is None or score != score else f"{score * column.scale:{sign}.{column.decimals}f}"


def _summary_tables(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The metrics in their units, and what the solver said."""
    known = [name for key in METRIC_COLUMNS for name in (f"{key}_before", key)]
    metrics = {key: summary[key] for key in known if key in summary}
    tables = []
    for part in (metrics, {key: values for key, values in summary.items() if key not in metrics}):
        names = dict.fromkeys(name for values in part.values() for name in values)
        headings = {name: _HEADINGS.get(name, f"{name[1:]} % are below") for name in names}
        rows = []
        for key, values in part.items():
            column, shown = _column(key), dict(values)
            if column is not None:
                shown = {name: v if name == "pairs" else _value(v, column) for name, v in values.items()}
            about = (key.replace("_", " "), "") if column is None else (column.title, column.note)
            rows.append((about, *(shown.get(name) for name in headings)))
        tables.append(html_table(("", *headings.values()), rows))
    return tables


def _test_table(results: Sequence[MethodResult], metrics: Sequence[MetricColumn]) -> str:
    first, second = results
    shared = [column for column in metrics if column.key in first.scores and column.key in second.scores]
    tests = [paired_wilcoxon(first.scores[c.key], second.scores[c.key]) for c in shared]
    adjusted = holm_correction([test.p_value for test in tests])
    rows = []
    for column, test, p in zip(shared, tests, adjusted, strict=True):
        means = [_value(finite_scores(r.scores[column.key]).mean(), column) for r in results]
        shown = None if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"
        rows.append((column.title, *means, _value(test.median_difference, column, "+"), shown, test.pairs))
    return html_table(("", first.title, second.title, "median difference", "p", "pairs"), rows)


def _extremes(
    result: MethodResult, metrics: Sequence[MetricColumn]
) -> list[tuple[str, list[tuple[tuple[str, str], float]], MetricColumn]]:
    """Best and worst pairs by the first metric with a score."""
    for column in metrics:
        ordered = finite_scores(result.scores.get(column.key, pd.Series(dtype=float)))
        if len(ordered):
            ordered = ordered.sort_values(ascending=not column.higher_is_better, kind="stable")
            pairs = list(ordered.items())
            most = min(_SHOWN, max(len(pairs) // 2, 1))
            return [("Best pairs", pairs[:most], column), ("Worst pairs", pairs[most:][::-1][:most], column)]
    return []


def _label_tables(per_label: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    tables = []
    for key, labels in per_label.items():
        column = _column(key) or MetricColumn(key, key, True)
        rows = [
            (f"{number} {of.get('name', '')}", *(_value(of.get(n), column) for n in ("mean", "std")), of.get("pairs"))
            for number, of in labels.items()
        ]
        tables.append(html_table((column.title, "mean", "std", "pairs"), rows))
    return tables
