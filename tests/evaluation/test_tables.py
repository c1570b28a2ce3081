# SPDX-License-Identifier: Apache-2.0
"""The table of methods against numbers worked out by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import pytest

from monai_deq.evaluation import ComparisonTable, MethodResult, MetricColumn

NAN = float("nan")
INFO = {"data_set": "neurite-OASIS", "split": "test", "label_set": "all"}
PAIRS = [(f"f{i}", f"m{i}") for i in range(6)]


def method(
    name: str, *, dice: list[float] | None = None, folds: list[float] | None = None, **more: Any
) -> MethodResult:
    scores = {"dice": dice, "folded_percent": folds}
    named = {k: v for k, v in scores.items() if v is not None}
    pairs = pd.MultiIndex.from_tuples(PAIRS[: len(next(iter(named.values()), []))], names=["fixed", "moving"])
    return MethodResult(name, more.pop("title", name), pd.DataFrame(named, pairs), **more)


# mean 0.75, deviations +-0.05 five times over: sample std 0.05 * sqrt(6 / 5) = 0.0548
STEADY = [0.70, 0.80, 0.70, 0.80, 0.70, 0.80]


def shifted(by: float) -> list[float]:
    return [v + by for v in STEADY]


def table_rows(markdown: str, number: int = 0) -> dict[str, list[str]]:
    """Cells of the number-th table of the text, by first cell."""
    tables: list[list[str]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    rows = [line.replace("\\|", "¦")[2:-2].split(" | ") for line in tables[number]]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows}


def test_marks_and_numbers() -> None:
    results = [
        method("start", dice=shifted(0.2), folds=[0.0] * 6, ranked=False),
        method("a", dice=STEADY, folds=[0.1, 0.3] * 3),
        method("b", dice=shifted(0.05), folds=[0.05] * 6),
        method("c", dice=shifted(-0.1), folds=[0.3] * 6),
    ]
    table = ComparisonTable(results, ["dice", "folded_percent"], None, INFO)
    text = table.to_markdown()
    rows = table_rows(text)
    assert rows["Method"] == ["Dice (%) ↑", "Folded (%) ↓"]
    assert rows["start"] == ["95.00 (5.48)", "0.000 (0.000)"]
    assert rows["a"] == ["<u>75.00 (5.48)</u>", "<u>0.200 (0.110)</u>"]
    assert rows["b"] == ["**80.00 (5.48)**", "**0.050 (0.000)**"]
    assert rows["c"] == ["65.00 (5.48)", "0.300 (0.000)"]
    assert text.startswith("## neurite-OASIS, split test: 6 pairs, label set all\n")
    assert "not counting start." in text and "sample standard deviation" in text
    assert "###" not in text
    folds = table.statistics["a", "folded_percent"]
    assert [folds[key] for key in ("mean", "std", "pairs")] == pytest.approx([0.2, stdev([0.1, 0.3] * 3), 6])
    assert "mark" not in table.statistics["start", "dice"] and table.statistics["b", "dice"]["mark"] == "best"


def test_equal_numbers_have_equal_marks() -> None:
    # the two best are apart by less than the digits shown
    results = [method("a", dice=STEADY), method("b", dice=shifted(1e-6)), method("c", dice=shifted(-0.1))]
    rows = table_rows(ComparisonTable([*results, method("d", dice=shifted(-0.2))], ["dice"], None, INFO).to_markdown())
    assert rows["a"] == rows["b"] == ["**75.00 (5.48)**"]
    assert rows["c"] == ["<u>65.00 (5.48)</u>"]
    assert rows["d"] == ["55.00 (5.48)"]


def test_tests_are_corrected_over_the_comparisons_of_each_metric() -> None:
    up = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    other = [0.01, -0.02, 0.03, 0.04, 0.05, 0.06]
    results = [
        # folds: 0.5 below in every pair but one without a score
        method("a", dice=STEADY, folds=[0.5, 1.5, 2.5, 3.5, 4.5, NAN]),
        method("deq", dice=[s + u for s, u in zip(STEADY, up, strict=True)], folds=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        method("b", dice=[s + u - o for s, u, o in zip(STEADY, up, other, strict=True)]),
        method("same", dice=[s + u for s, u in zip(STEADY, up, strict=True)], folds=[NAN] * 6),
        method("bad", failure="out of memory"),
    ]
    table = ComparisonTable(results, ["dice", "folded_percent"], "deq", INFO)
    # six of one sign: 2 / 2^6; rank 2 of six the other way: rank sums of at most 2 are {}, {1}, {2}: 2 * 3 / 2^6
    of_dice = [table.statistics[name, "dice"] for name in ("a", "b", "same")]
    assert [value["test"]["p_value"] for value in of_dice] == pytest.approx([2 / 64, 6 / 64, 1.0])
    assert [value["adjusted_p_value"] for value in of_dice] == pytest.approx([6 / 64, 12 / 64, 1.0])
    assert "test" not in table.statistics["deq", "dice"]
    # one comparison only, for b has no folds and same no score; five ties of one sign: 2 / 2^5
    assert table.statistics["a", "folded_percent"]["adjusted_p_value"] == pytest.approx(2 / 32)
    assert table.statistics["a", "folded_percent"]["test"]["left_out"] == 1
    text = table.to_markdown()
    rows = table_rows(text, 1)
    assert list(rows) == ["deq against", ":--", "a", "b", "same"]
    assert rows["a"] == ["+3.500, p = 0.094", "-0.5000, p = 0.062 \\[5]"]
    assert rows["b"] == ["+3.500, p = 0.188", "–"]
    assert rows["same"] == ["+0.000, p = 1.000", "–"]
    assert "(3 at most)" in text and "[n]: n pairs have both scores" in text and "share a subject" not in text
    assert table_rows(text)["a"][1].endswith("\\[5]") and "5 pairs" not in text


@pytest.mark.parametrize(("pairs", "star"), [(6, "\\*"), (5, "")])
def test_star_for_an_adjusted_p_below_005(pairs: int, star: str) -> None:
    # all one way: p = 2 / 2^6 = 0.03 and 2 / 2^5 = 0.06
    folds = np.arange(float(pairs))
    results = [method("deq", folds=folds.tolist()), method("a", folds=(2 * folds + 1).tolist())]
    table = ComparisonTable(results, ["folded_percent"], "deq", INFO)
    rows = table_rows(table.to_markdown())
    # 1, 3, ..., 9, and 11 of six pairs
    assert rows["a"] == [f"<u>{np.mean(2 * folds + 1):.3f} ({np.std(2 * folds + 1, ddof=1):.3f})</u>{star}"]
    assert rows["deq"] == [f"**{np.mean(folds):.3f} ({np.std(folds, ddof=1):.3f})**"]
    assert "adjusted p < 0.05" in table.to_markdown()


def test_failed_rows_and_missing_metrics_never_break_the_table() -> None:
    results = [
        method("start", dice=STEADY, ranked=False),
        method("a", title="A_b|c*", failure="RuntimeError: |x|\nat <module>"),
        method("deq", dice=shifted(0.1), folds=[NAN] * 6),
    ]
    text = ComparisonTable(results, ["dice", "folded_percent"], "a", INFO).to_markdown()
    rows = table_rows(text)
    assert rows["A\\_b¦c\\*"] == ["failed: RuntimeError: ¦x¦ at \\<module>", "–"]
    assert rows["start"] == ["75.00 (5.48)", "–"]
    assert rows["deq"] == ["85.00 (5.48)", "–"]  # one ranked method is neither best nor second
    assert "No tests: A\\_b\\|c\\* failed." in text and "**" not in text


def test_every_method_failed() -> None:
    table = ComparisonTable([method("a", failure="no data")], ["dice", "hd"], "a", {})
    assert table.to_markdown().startswith("## unknown, split unknown: 0 pairs")
    assert table_rows(table.to_markdown())["a"] == ["failed: no data", "–"]
    assert table.pairs == [] and table.to_json()["num_pairs"] == 0
    assert table.to_frame()["failure"].to_list() == ["no data"]


def test_one_method_one_pair() -> None:
    table = ComparisonTable([method("deq", dice=[0.75])], ["dice"], "deq", INFO)
    text = table.to_markdown()
    assert "1 pair," in text and table_rows(text)["deq"] == ["75.00 (–)"]
    assert "No tests: no other method than deq." in text
    two = ComparisonTable([method("deq", dice=[0.75]), method("a", dice=[0.5])], ["dice"], "deq", INFO)
    assert table_rows(two.to_markdown(), 1)["a"] == ["+25.000, p = 1.000"]


def test_shared_subjects_are_told() -> None:
    scores = pd.DataFrame({"dice": [0.5, 0.6]}, pd.MultiIndex.from_tuples([("a", "b"), ("b", "c")]))
    results = [MethodResult(n, n, scores) for n in ("x", "y")]
    assert "Some pairs share a subject" in ComparisonTable(results, ["dice"], "x", INFO).to_markdown()


def test_cost() -> None:
    first = {
        "parameters": 328627,
        "training_memory_mb": 1234.4,
        "memory_kind": "bytes saved for backward, CPU",
        "training_seconds": 1.0949,
        "inference_seconds": 0.2,
        "steps": 48.0,
    }
    results = [
        method("a", dice=STEADY, cost=first),
        method("b", dice=STEADY),
        method("c", failure="no memory", cost={"training_memory_mb": 99.96, "memory_kind": "peak, GPU"}),
        method(
            "d", dice=STEADY, cost={"training_seconds": "not trained", "inference_seconds": 35.449, "steps": 12.4375}
        ),
    ]
    text = ComparisonTable(results, ["dice"], None, INFO).to_markdown()
    rows = table_rows(text, 1)
    assert rows["Method"] == [
        "Parameters",
        "Training memory (MB)",
        "Training memory is",
        "Training (s/pair)",
        "Inference (s/pair)",
        "Steps (finest level)",
    ]
    assert rows["a"] == ["328,627", "1,234", "bytes saved for backward, CPU", "1.09", "0.200", "48"]
    assert rows["c"] == ["–", "100", "peak, GPU", "–", "–", "–"]
    assert rows["d"] == ["–", "–", "–", "not trained", "35.4", "12.4"]
    assert "b" not in rows and "compare only rows measured the same way" in text
    assert "compare only rows" not in ComparisonTable(results[:2], ["dice"], None, INFO).to_markdown()


def test_settings_are_listed_and_the_sign_of_zero_is_dropped() -> None:
    own = MetricColumn("dice", "Change", True, decimals=1)
    results = [method("a", dice=[-0.04, 0.02]), method("b", dice=[0.0, -0.02])]
    text = ComparisonTable(results, [own], "b", {**INFO, "spatial_size": [8, 9], "checkpoint": None}).to_markdown()
    assert table_rows(text)["a"][0].startswith("**0.0 (0.0)**")
    assert "- spatial\\_size: \\[8, 9]" in text and "checkpoint" not in text


def test_rows_csv_and_json_agree(tmp_path: Path) -> None:
    results = [
        method("deq", dice=STEADY, cost={"steps": np.float32(48), "inference_seconds": NAN}),
        method("a", dice=[*shifted(-0.01)[:5], NAN], folds=[NAN] * 6, ranked=False),
        method("b", failure='says "no", twice'),
    ]
    table = ComparisonTable(results, ["dice", "folded_percent"], "deq", {**INFO, "seed": 3})
    paths = table.write(tmp_path / "new")
    assert [p.name for p in paths] == ["comparison.md", "comparison.csv", "comparison.json"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in paths)
    assert paths[0].read_text(encoding="utf-8") == table.to_markdown()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(paths[2].read_text(), parse_constant=refuse)
    assert content["data_set"] == "neurite-OASIS" and content["seed"] == 3 and content["num_pairs"] == 6
    assert content["test"]["reference"] == "deq"
    deq, a, b = content["methods"]
    assert deq["scores"] == {"dice": {"mean": pytest.approx(0.75), "std": pytest.approx(stdev(STEADY)), "pairs": 6}}
    assert deq["cost"] == {"steps": 48.0, "inference_seconds": None}
    assert a["scores"]["folded_percent"] == {"mean": None, "std": None, "pairs": 0}
    assert a["tests"]["dice"]["pairs"] == 5 and a["tests"]["dice"]["left_out"] == 1
    assert a["tests"]["dice"]["median_difference"] == pytest.approx(0.01)
    assert b["failure"] == 'says "no", twice' and b["scores"] == {} and b["tests"] == {}

    with paths[1].open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [row["name"] for row in rows] == ["deq", "a", "b"]
    assert float(rows[1]["dice_mean"]) == pytest.approx(mean(shifted(-0.01)[:5]))
    assert rows[1]["dice_tested_pairs"] == "5" and rows[1]["folded_percent_mean"] == ""
    assert float(rows[1]["dice_p"]) == pytest.approx(a["tests"]["dice"]["p_value"])
    assert rows[2]["failure"] == 'says "no", twice' and rows[2]["dice_mean"] == ""
    assert rows[0]["steps"] == "48.0" and rows[0]["inference_seconds"] == ""


def test_an_existing_table_is_kept(tmp_path: Path) -> None:
    table = ComparisonTable([method("a", dice=STEADY)], ["dice"], None, INFO)
    (tmp_path / "comparison.json").write_text("mine")
    with pytest.raises(FileExistsError, match="comparison.json exists already"):
        table.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["comparison.json"]
    table.write(tmp_path, overwrite=True)
    assert json.loads((tmp_path / "comparison.json").read_text())["num_pairs"] == 6


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"info": {"data_set": "x", "split": "test"}}, ValueError, r"no \['label_set'\] came"),
        ({"info": {**INFO, "size": np.ones(2)}}, TypeError, "plain values that JSON knows"),
        ({"info": {**INFO, "x": NAN}}, TypeError, "plain values that JSON knows"),
        ({"metrics": ["dice", "tre"]}, ValueError, "no method has 'tre'. They have dice"),
        ({"reference": "riir"}, ValueError, "reference: expected a name among a, b, got 'riir'"),
        ({"results": [method("a", dice=STEADY), method("b", dice=STEADY[:5])]}, ValueError, r"lacks \(f5, m5\)"),
    ],
)
def test_bad_input(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "results": [method("a", dice=STEADY), method("b", dice=STEADY)],
        "metrics": ["dice"],
        "reference": None,
        "info": INFO,
    }
    with pytest.raises(error, match=message):
        ComparisonTable(**{**good, **kwargs})  # type: ignore[arg-type]
