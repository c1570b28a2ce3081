# SPDX-License-Identifier: Apache-2.0
"""Results of one method: reading the CSV of an evaluation, and what comes of a bad one; Holm's correction by hand,
Wilcoxon's test against all assignments of signs."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from statistics import mean, median

import numpy as np
import pandas as pd
import pytest

from monai_deq.evaluation import MethodResult, MetricColumn, holm_correction, paired_wilcoxon
from monai_deq.evaluation import read_pair_results as read
from monai_deq.evaluation.scores import common_pairs, metric_columns

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
    return MethodResult(name, name.upper(), scores_of(pairs), **kwargs)  # type: ignore[arg-type]


def scores_of(pairs: list[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame({"dice": 0.5}, pd.MultiIndex.from_tuples(pairs, names=["fixed", "moving"]))


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_reads_every_column_of_numbers(tmp_path: Path, line_break: str) -> None:
    scores = read(write(tmp_path, CSV.replace("\n", line_break)))
    assert list(scores) == ["dice", "hd", "steps"] and scores.index.to_list() == PAIRS
    assert scores["dice"].to_list() == pytest.approx([0.5, 0.75, math.nan], nan_ok=True)
    assert scores["hd"].to_list() == pytest.approx([3.25, math.nan, 2.0], nan_ok=True)
    assert scores["steps"].to_list() == [16.0, 12.0, 8.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("fixed,moving,dice\n", "holds no pair"),
        (CSV.replace("moving", "movin"), "has no column 'moving'. It has fixed, movin, dice"),
        (CSV[:-8], "does not end with a line break"),  # the last word is cut
        (CSV[: CSV.index(",16")], "does not end with a line break"),
        (CSV[: CSV.index(",16")] + "\n", "row a,b,0.5,3.25: expected 7 cells as in the header, got 4"),
        (CSV.replace("a,b,", "a,b,1,"), "limit: expected 7 cells as in the header, got 8"),
        (CSV.replace("c,a,", "a,b,"), ": the pair fixed 'a', moving 'b' is there twice"),
        (CSV.replace("0.75", "0.7x"), "fixed 'b', moving 'c': expected a number in 'dice', got '0.7x'"),
        (CSV.replace("tolerance", '"tol'), "is no CSV text, or is cut off"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="evaluation_pairs.csv") as error:
        read(write(tmp_path, text))
    assert message in str(error.value)


def test_absent_and_binary(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Run the evaluation first"):
        read(tmp_path / "none.csv")
    (tmp_path / "image.csv").write_bytes(b"\x1f\x8b\xff\n")
    with pytest.raises(ValueError, match="is no CSV text"):
        read(tmp_path / "image.csv")


def test_common_pairs() -> None:
    results = [result("a", PAIRS), result("b", PAIRS[::-1]), MethodResult("c", "C", failure="no memory")]
    assert common_pairs(results) == PAIRS
    assert common_pairs(results, "b") == PAIRS[::-1]
    assert common_pairs(results[2:], "c") == []


def test_common_pairs_names_what_differs() -> None:
    results = [result("a", PAIRS), result("b", [*PAIRS[:2], ("x", "y")]), result("c", PAIRS)]
    with pytest.raises(ValueError) as error:
        common_pairs(results)
    assert "method 'b': expected the 3 pairs (fixed, moving) of 'a', got 3" in str(error.value)
    assert "lacks (c, a); has besides (x, y)" in str(error.value)
    # the same difference seen from the reference
    with pytest.raises(ValueError, match=r"method 'a'.*of 'b'.*lacks \(x, y\); has besides \(c, a\)"):
        common_pairs(results, "b")


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
        ({"scores": pd.DataFrame()}, "has no scores"),
        ({"failure": " "}, "expected the reason"),
        ({"cost": {"memory": 3}}, "cost knows training_pairs, .*training_memory_mb.*got 'memory'"),
        ({"cost": {"training_memory_mb": 3.0}}, "how the training memory was measured"),
    ],
)
def test_bad_method_result(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MethodResult(**{"name": "a", "title": "A", "scores": scores_of([("f", "m")]), **kwargs})


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


NAN, INF = float("nan"), float("inf")


def signed_rank_p(differences: list[float]) -> float:
    """Two-sided p-value: twice the smaller share of the 2^n sign assignments with a rank sum as far out."""
    sizes = sorted(abs(d) for d in differences)
    # rank of a tied value: the mean of the places that the ties take
    rank = [mean(i for i, s in enumerate(sizes, start=1) if s == abs(d)) for d in differences]
    observed = sum(r for r, d in zip(rank, differences, strict=True) if d > 0)
    sums = np.array(list(product((0, 1), repeat=len(rank)))) @ np.array(rank, dtype=float)
    return min(1.0, 2 * min((sums <= observed).mean(), (sums >= observed).mean()))


def scores(values: list[float]) -> dict[tuple[str, str], float]:
    return {(f"f{i}", f"m{i}"): v for i, v in enumerate(values)}


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        # sorted 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1 raised to the one before
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        # 0.02 * 3, 0.02 * 2 raised to it, 0.5
        ([0.02, 0.5, 0.02], [0.06, 0.5, 0.06]),
        # 0.4 * 2 = 0.8, 0.9; 0.6 * 2 is cut at 1 and carried on
        ([0.9, 0.4], [0.9, 0.8]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.04], [0.04]),
        ([], []),
        # a test that could not be made is no member of the family
        ([NAN, 0.03, 0.01], [NAN, 0.03, 0.02]),
        ([NAN], [NAN]),
    ],
)
def test_holm_by_hand(p_values: list[float], expected: list[float]) -> None:
    assert holm_correction(p_values) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("wrong", [-0.1, 1.2])
def test_holm_refuses_what_is_no_probability(wrong: float) -> None:
    with pytest.raises(ValueError, match="expected numbers in"):
        holm_correction([0.5, wrong])


@pytest.mark.parametrize(
    "differences",
    [
        [0.5],
        [1.0, 2.0, 3.0, 4.0, 5.0],  # all one way: 2 / 2^5
        [1.0, -2.0, 3.5, 4.0, -0.5, 6.0, 7.25],
        [1.0, -1.0, 2.0, 2.0, 2.0, -3.0, 5.0, 5.0],  # ties
        [0.25, -0.5, 1.0, 1.75, 3.0, 3.5, -4.0, 4.25, 5.0, 6.5, 7.0, 8.0, -9.0, 10.0, 11.0],
    ],
)
@pytest.mark.parametrize("zeros", [0, 3])
def test_wilcoxon_against_all_signs(differences: list[float], zeros: int) -> None:
    other = [10.0 + i for i in range(len(differences) + zeros)]
    reference = [o + d for o, d in zip(other, [*differences, *[0.0] * zeros], strict=True)]
    test = paired_wilcoxon(scores(reference), scores(other))
    assert test.p_value == pytest.approx(signed_rank_p(differences), rel=1e-12)
    assert test.median_difference == median([*differences, *[0.0] * zeros])
    assert (test.pairs, test.left_out) == (len(differences) + zeros, 0)


def test_wilcoxon_many_pairs_is_near_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0.2, 1.0, 60)
    test = paired_wilcoxon(scores(differences.tolist()), scores([0.0] * 60))
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    z = (ranks[differences > 0].sum() - 60 * 61 / 4) / math.sqrt(60 * 61 * 121 / 24)
    assert test.p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=1e-9)


def test_wilcoxon_matches_pairs_by_name_and_leaves_out_missing_scores() -> None:
    reference = scores([5.0, NAN, 7.0, 1.0, INF, 9.0])
    other = dict(reversed(scores([4.0, 3.0, 5.0, NAN, INF, 12.0]).items()))
    test = paired_wilcoxon(reference, other)
    assert test.p_value == pytest.approx(signed_rank_p([1.0, 2.0, -3.0]))
    assert (test.median_difference, test.pairs, test.left_out) == (1.0, 3, 3)


def test_wilcoxon_without_a_difference_and_without_a_pair() -> None:
    same = paired_wilcoxon(scores([1.0, 2.0, NAN]), scores([1.0, 2.0, 3.0]))
    assert (same.p_value, same.median_difference, same.pairs, same.left_out) == (1.0, 0.0, 2, 1)
    none = paired_wilcoxon(scores([NAN, 2.0]), scores([1.0, NAN]))
    assert math.isnan(none.p_value) and math.isnan(none.median_difference)
    assert (none.pairs, none.left_out) == (0, 2)


def test_wilcoxon_names_the_pairs_that_differ() -> None:
    other = scores([1.0, 2.0, 3.0, 4.0, 5.0]) | {("x", "y"): 3.0}
    for i in range(5):
        del other[(f"f{i}", f"m{i}")]
    with pytest.raises(ValueError, match=r"lacks \(f0, m0\), \(f1, m1\), \(f2, m2\) and 2 more; has besides \(x, y\)"):
        paired_wilcoxon(scores([1.0, 2.0, 3.0, 4.0, 5.0]), other)
