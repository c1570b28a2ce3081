# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation as a browser reads it, against numbers worked out by hand."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_pages import Page
from matplotlib.figure import Figure

from monai_deq.evaluation import write_evaluation_report
from monai_deq.visualize import RegisteredPair

DICE = [0.8, 0.6, None, 0.9, 0.7, 0.5]
VERDICTS = {"converged": 4, "step limit": 2}


def write_summary(folder: Path, dice: list[float | None], method: str = "A <b>", **changes: Any) -> Path:
    """As ``PairResultsSaver`` writes it."""
    pairs = [
        {"fixed": f"f{i} &", "moving": f"m{i}", "dice": score, "steps": 10 + i, "reason": "tolerance"}
        for i, score in enumerate(dice)
    ]
    there = [score for score in dice if score is not None]
    content: dict[str, Any] = {"method": method, "data_set": "lungs", "label_set": "all", "labels": {"3": "left"}}
    content |= {"num_pairs": len(pairs), "verdicts": VERDICTS, "pairs": pairs}
    content["summary"] = {
        "dice": {"mean": np.mean(there) if there else None, "std": None, "pairs": len(there), "p70": 0.8},
        "steps": {"mean": 12.5, "std": 1.87, "pairs": 6, "median": 12.5, "p95": 14.75},
    }
    content["per_label"] = {"dice": {"3": {"name": "left", "mean": 0.7, "std": 0.158, "pairs": 5}}}
    path = folder / f"{method[0]}_summary.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_report_of_one(tmp_path: Path) -> None:
    write_evaluation_report(tmp_path / "a.html", write_summary(tmp_path, DICE))
    page = Page(tmp_path / "a.html")
    assert page.check_alone() == 1  # the boxes
    assert "Evaluation of A <b>: 6 pairs" in page.words and "b" not in {tag for tag, _ in page.tags}
    assert page.rows[0] == ["", "mean", "std", "pairs", "70 % are below"]
    assert page.rows[1] == ["Dice (%) ↑", "70.00", "–", "5", "80.00"]
    assert page.row("steps") == ["12.50", "1.870", "6", "12.50", "14.75"]
    assert page.row("converged") == ["4", "66.7 %"] and page.row("step limit") == ["2", "33.3 %"]
    assert page.row("3 left") == ["70.00", "15.80", "5"] and page.row("data_set") == ["lungs"]
    at = page.rows.index(["fixed, moving", "Dice (%) ↑"])
    assert page.rows[at + 1 : at + 3] == [["f3 &, m3", "90.00"], ["f0 &, m0", "80.00"]]  # half of five at most
    assert page.rows[at + 4 : at + 6] == [["f5 &, m5", "50.00"], ["f1 &, m1", "60.00"]]
    assert "Against the reference" not in page.headings()


def test_pairs_that_failed_are_listed(tmp_path: Path) -> None:
    failed = [{"fixed": "f9", "moving": "m9", "reason": "OSError: <damaged>"}]
    write_evaluation_report(tmp_path / "a.html", write_summary(tmp_path, DICE, failed=failed))
    page = Page(tmp_path / "a.html")
    assert "Failed pairs, in no mean" in page.headings() and page.row("f9, m9") == ["OSError: <damaged>"]


def test_against_a_reference(tmp_path: Path) -> None:
    other = [score and round(score - 0.01 * (i + 1), 3) for i, score in enumerate(DICE)]
    files = write_summary(tmp_path, DICE), write_summary(tmp_path, other, "B")
    write_evaluation_report(tmp_path / "a.html", *files)
    page = Page(tmp_path / "a.html")
    assert page.rows[page.rows.index(["", "A <b>", "B", "median difference", "p", "pairs"]) + 1] == [
        # differences of 1, 2, 4, 5 and 6 %, all of one sign: p = 2 / 2 ** 5
        *("Dice (%) ↑", "70.00", "66.40", "+4.00", "0.062", "5")
    ]
    more = write_summary(tmp_path, [*DICE, 0.5], "C")
    with pytest.raises(ValueError, match="expected the 6 pairs"):
        write_evaluation_report(tmp_path / "b.html", files[0], more)
    # of one name, both are still told apart
    write_evaluation_report(tmp_path / "c.html", files[0], files[0])
    assert "A <b> (reference)" in Page(tmp_path / "c.html").words


def test_pictures_of_the_best_and_the_worst(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((20, 22), dtype=np.float32)
    pair = RegisteredPair(image, image, image, np.zeros((2, 20, 22), dtype=np.float32), np.eye(4))
    figure = Figure(figsize=(1, 1))
    figure.savefig(tmp_path / "p.png")
    middle = ("f4 &", "m4")
    pictures = {("f3 &", "m3"): pair, ("f5 &", "m5"): tmp_path / "p.png", middle: tmp_path / "never read"}
    write_evaluation_report(tmp_path / "a.html", write_summary(tmp_path, DICE), None, pictures)
    page = Page(tmp_path / "a.html")
    assert page.check_alone() == 3
    words = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert words[1:] == ["fixed f3 &, moving m3", "fixed f5 &, moving m5"]
    (tmp_path / "p.png").write_text("no picture")
    with pytest.raises(ValueError, match="expected a PNG or a JPEG"):
        write_evaluation_report(tmp_path / "b.html", write_summary(tmp_path, DICE), None, pictures)
    assert not (tmp_path / "b.html").exists()


def test_pictures_that_the_evaluation_wrote(tmp_path: Path) -> None:
    for i, name in enumerate(("a_best_1.png", "a_worst_1.png", "other.png")):
        Figure(figsize=(1 + i, 1)).savefig(tmp_path / name)
    said = [("f3 &", "m3", "a_best_1.png"), ("f5 &", "m5", "a_worst_1.png"), ("f1 &", "m1", "gone.png")]
    said.append(("f4 &", "m4", "other.png"))  # neither among the best nor among the worst
    pictures = [dict(zip(("fixed", "moving", "file"), entry, strict=True)) for entry in said]
    path = write_summary(tmp_path, DICE, pictures=pictures)
    (tmp_path / "reports").mkdir()
    for name, given, expected in (
        ("a", None, "a_best_1.png"),
        ("b", {("f3 &", "m3"): tmp_path / "other.png"}, "other"),
    ):
        write_evaluation_report(tmp_path / "reports" / f"{name}.html", path, None, given)
        page = Page(tmp_path / "reports" / f"{name}.html")
        assert page.check_alone() == 3 and "a_best_1.png" not in page.words
        images = [attributes for tag, attributes in page.tags if tag == "img"]
        assert [image["alt"] for image in images[1:]] == ["fixed f3 &, moving m3", "fixed f5 &, moving m5"]
        data = base64.b64encode((tmp_path / expected).with_suffix(".png").read_bytes()).decode()
        assert (images[1]["src"] or "").endswith(data)


def test_the_metric_that_the_evaluation_names_first(tmp_path: Path) -> None:
    path = write_summary(tmp_path, DICE)
    content = json.loads(path.read_text())
    for i, pair in enumerate(content["pairs"]):
        pair["tre"] = 1.0 + i
    numbers = {"mean": 3.5, "std": 1.87, "pairs": 6}
    content["summary"] = {"tre_before": {**numbers, "mean": 9.25}, "tre": numbers, **content["summary"]}
    content["per_label"]["dice_before"] = {"3": {"name": "left", "mean": 0.4, "std": None, "pairs": 5}}
    path.write_text(json.dumps(content))
    write_evaluation_report(tmp_path / "a.html", path)
    page = Page(tmp_path / "a.html")
    at = page.rows.index(["fixed, moving", "TRE (mm) ↓"])
    assert page.rows[at + 1] == ["f0 &, m0", "1.00"] and page.rows[at + 5] == ["f5 &, m5", "6.00"]
    assert page.row("TRE before (mm) ↓")[:3] == ["9.25", "1.87", "6"]
    assert page.rows[page.rows.index(["Dice before (%) ↑", "mean", "std", "pairs"]) + 1][1] == "40.00"


def test_one_pair(tmp_path: Path) -> None:
    Figure(figsize=(1, 1)).savefig(tmp_path / "p.png")
    pictures = [{"fixed": "f1 &", "moving": "m1", "file": "p.png"}]
    write_evaluation_report(tmp_path / "a.html", write_summary(tmp_path, [None, 0.5], pictures=pictures))
    page = Page(tmp_path / "a.html")
    assert "Best pairs" in page.headings() and "Worst pairs" not in page.headings()
    assert page.row("f1 &, m1") == ["50.00"] and page.check_alone() == 2


def test_without_verdicts_scores_or_labels(tmp_path: Path) -> None:
    summary = {"dice": {"mean": None, "std": None, "pairs": 0}}
    path = write_summary(tmp_path, [None], verdicts={}, per_label={}, summary=summary)
    write_evaluation_report(tmp_path / "a.html", path)
    page = Page(tmp_path / "a.html")
    assert page.headings() == ["Summary", "Scores over the pairs", "Settings", "Versions"]
    assert page.row("Dice (%) ↑") == ["–", "–", "0"]


def test_what_is_no_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="Run the evaluation first"):
        write_evaluation_report(tmp_path / "a.html", tmp_path / "no.json")
    for text in ("{", "[]", "{}", '{"summary": {}, "num_pairs": 0, "pairs": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json is no summary of an evaluation"):
            write_evaluation_report(tmp_path / "a.html", tmp_path / "bad.json")
    path = write_summary(tmp_path, DICE)
    (tmp_path / "a.html").write_text("mine")
    with pytest.raises(FileExistsError, match=r"a\.html exists already"):
        write_evaluation_report(tmp_path / "a.html", path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "monai_deq\[figures\]"'):
        write_evaluation_report(tmp_path / "a.html", path, overwrite=True)
    assert (tmp_path / "a.html").read_text() == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_pairs": "six"},
        {"num_pairs": 5},
        {"pairs": [{"fixed": "a", "moving": ["b"]}] * 6},
        {"pairs": [{"fixed": "a", "moving": "b", "dice": "good"}] * 6},
        {"pairs": [{"fixed": "a", "moving": "b"}, "banana"] * 3},
        {"summary": {"dice": {"mean": {}}}},
        {"summary": {"dice": 3}},
        {"verdicts": {"converged": "all"}},
        {"per_label": {"dice": "none"}},
    ],
)
def test_a_summary_of_other_parts_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_summary(tmp_path, DICE, **changes)
    with pytest.raises(ValueError, match=r"A_summary.json is no summary of an evaluation \(.*\). Evaluate again."):
        write_evaluation_report(tmp_path / "a.html", path)
    assert not (tmp_path / "a.html").exists()
