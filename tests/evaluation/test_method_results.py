# SPDX-License-Identifier: Apache-2.0
"""Results of one method: reading the CSV of an evaluation, and what comes of a bad one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from monai_deq.evaluation.method_results import MethodResult, MetricColumn, common_pairs, metric_columns
from monai_deq.evaluation.method_results import read_pair_results as read

CSV = """fixed,moving,dice,hd,steps,converged,reason
a,b,0.5,3.25,16,False,step limit
b,c,0.75,nan,12,True,tolerance
c,a,,2.0,8,True,tolerance
"""
PAIRS = [("a", "b"), ("b", "c"), ("c", "a")]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "evaluation_pairs.csv"
    path.write_bytes(text.encode())
    return path


def result(name: str, pairs: list[tuple[str, str]], **kwargs: object) -> MethodResult:
    return MethodResult(name, name.upper(), {"dice": dict.fromkeys(pairs, 0.5)}, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_reads_every_column_of_numbers(tmp_path: Path, line_break: str) -> None:
    scores = read(write(tmp_path, CSV.replace("\n", line_break)))
    assert list(scores) == ["dice", "hd", "steps"]
    assert all(list(column) == PAIRS for column in scores.values())
    assert [*scores["dice"].values()] == pytest.approx([0.5, 0.75, math.nan], nan_ok=True)
    assert [*scores["hd"].values()] == pytest.approx([3.25, math.nan, 2.0], nan_ok=True)
    assert [*scores["steps"].values()] == [16.0, 12.0, 8.0]


def test_reads_the_columns_asked_for(tmp_path: Path) -> None:
    assert list(read(write(tmp_path, CSV), ["hd"])) == ["hd"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("fixed,moving,dice\n", "holds no pair"),
        (CSV.replace("moving", "movin"), "has no column 'moving'. It has fixed, movin, dice"),
        (CSV[:-8], "does not end with a line break"),  # the last word is cut
        (CSV[: CSV.index(",16")], "does not end with a line break"),
        (CSV[: CSV.index(",16")] + "\n", "line 2: expected 7 cells as in the header, got 4"),
        (CSV.replace("a,b,", "a,b,1,"), "line 2: expected 7 cells as in the header, got 8"),
        (CSV.replace("c,a,", "a,b,"), "line 4: the pair fixed 'a', moving 'b' is there twice"),
        (CSV.replace("0.75", "0.7x"), "fixed 'b', moving 'c': expected a number in 'dice', got '0.7x'"),
        (CSV.replace("tolerance", '"tol'), "is no CSV text, or is cut off"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="evaluation_pairs.csv") as error:
        read(write(tmp_path, text))
    assert message in str(error.value)


def test_absent_binary_and_missing_column(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Run the evaluation first"):
        read(tmp_path / "none.csv")
    (tmp_path / "image.csv").write_bytes(b"\x1f\x8b\xff\n")
    with pytest.raises(ValueError, match="is no CSV text"):
        read(tmp_path / "image.csv")
    with pytest.raises(ValueError, match="has no column 'tre'. It has fixed, moving, dice, hd"):
        read(write(tmp_path, CSV), ["dice", "tre"])


def test_common_pairs() -> None:
    results = [result("a", PAIRS), result("b", PAIRS[::-1]), MethodResult("c", "C", failure="no memory")]
    assert common_pairs(results) == PAIRS
    assert common_pairs(results, "b") == PAIRS[::-1]
    assert common_pairs(results[2:], "c") == []


def test_common_pairs_names_what_differs() -> None:
    results = [result("a", PAIRS), result("b", [*PAIRS[:2], ("x", "y")]), result("c", PAIRS)]
    with pytest.raises(ValueError) as error:
        common_pairs(results)
    assert "method 'b', metric 'dice': expected the 3 pairs (fixed, moving) of 'a', got 3" in str(error.value)
    assert "lacks (c, a); has besides (x, y)" in str(error.value)
    # the same difference seen from the reference
    with pytest.raises(ValueError, match=r"method 'a'.*of 'b'.*lacks \(x, y\); has besides \(c, a\)"):
        common_pairs(results, "b")
    # the metrics of one method
    scores = {"dice": dict.fromkeys(PAIRS, 0.5), "hd": dict.fromkeys(PAIRS[:2], 1.0)}
    with pytest.raises(ValueError, match=r"method 'd', metric 'hd': .*lacks \(c, a\)"):
        common_pairs([MethodResult("d", "D", scores)])


def test_common_pairs_refuses_names() -> None:
    with pytest.raises(ValueError, match="each name once"):
        common_pairs([result("a", PAIRS), result("a", PAIRS)])
    with pytest.raises(ValueError, match="one method or more"):
        common_pairs([])
    with pytest.raises(ValueError, match="reference: expected a name among a, got 'b'"):
        common_pairs([result("a", PAIRS)], "b")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"title": ""}, "expected texts"),
        ({"scores": {}}, "has no scores"),
        ({"scores": {"dice": {}}}, "has no scores"),
        ({"failure": " "}, "expected the reason"),
        ({"cost": {"memory": 3}}, "cost knows training_pairs, .*training_memory_mb.*got 'memory'"),
        ({"cost": {"training_memory_mb": 3.0}}, "how the training memory was measured"),
    ],
)
def test_bad_method_result(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MethodResult(**{"name": "a", "title": "A", "scores": {"dice": {("f", "m"): 0.5}}, **kwargs})


def test_metric_columns() -> None:
    own = MetricColumn("time", "Time", False, "s")
    dice, time = metric_columns(["dice", own])
    assert (dice.title, time.title) == ("Dice (%) ↑", "Time (s) ↓")
    assert {c.key: c.higher_is_better for c in metric_columns(["dice", "hd", "hd95", "tre", "folded_percent"])} == {
        "dice": True,
        "hd": False,
        "hd95": False,
        "tre": False,
        "folded_percent": False,
    }
    for metrics, message in (
        (["dise"], "got 'dise'"),
        ([], "one metric or more"),
        ("dice", "expected a list"),
        (["dice", "dice"], "each metric once"),
    ):
        with pytest.raises(ValueError, match=message):
            metric_columns(metrics)
