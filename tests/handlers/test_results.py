# SPDX-License-Identifier: Apache-2.0
"""PairResultsSaver: CSV and JSON against numbers worked out by hand. OutputGuard: refused before any work."""

from __future__ import annotations

import csv
import json
import logging
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from monai.data import decollate_batch, list_data_collate
from monai.engines.utils import IterationEvents

from monai_deq.handlers import MetricHandler, OutputGuard, PairResultsSaver
from monai_deq.metrics import FoldedVoxelsMetric, LabelDiceMetric
from monai_deq.transforms import SaveRegistrationd

LABELS = {3: "left", 8: "right"}
NAN = float("nan")


def label_map(threes: int, eights: int) -> torch.Tensor:
    """So many voxels of each label, (1, 4, 10): the threes from the start of row 0, the eights of row 2."""
    image = torch.zeros(1, 4, 10)
    image[0, 0, :threes], image[0, 2, :eights] = 3, 8
    return image


def make_item(name: str, fixed: tuple[int, int], warped: tuple[int, int], folded: bool = False) -> dict[str, Any]:
    ddf = torch.zeros(2, 4, 10)
    if folded:
        # displacement -2 x along the last axis: a Jacobian of -1 everywhere
        ddf[1] = -2.0 * torch.arange(10)
    return {
        "fixed_subject": f"f{name}",
        "moving_subject": f"m{name}",
        "fixed_label": label_map(*fixed),
        "warped_label": label_map(*warped),
        "ddf": ddf,
        "steps": torch.tensor(int(name)),
        "evaluations": torch.tensor(1.5 * int(name)),
        "residual": torch.tensor(0.5 ** int(name), dtype=torch.float64),
        "relative_residual": torch.tensor(NAN if name == "2" else 0.25),
        "converged": torch.tensor(name != "3"),
        "reason": "step limit" if name == "3" else "tolerance",
    }


# Dice 2 |a b| / (|a| + |b|): pair 1 has 1 and 2 * 2 / (2 + 6), pair 2 has 2 * 4 / (4 + 8) and no right label, pair 3
# has none
ITEMS = [
    make_item("1", (5, 6), (5, 2), folded=True),
    make_item("2", (8, 0), (4, 3)),
    make_item("3", (0, 0), (2, 2)),
]
DICE = [[1.0, 0.5], [2 / 3, NAN], [NAN, NAN]]
MEANS = [0.75, 2 / 3, NAN]
FOLDED = [100.0, 0.0, 0.0]


def evaluate(saver: PairResultsSaver, outputs: list[Any], labels: list[int] | None = None) -> Engine:
    engine = Engine(lambda engine, batch: batch)
    labels = list(LABELS) if labels is None else labels
    MetricHandler(LabelDiceMetric(labels), ["warped_label", "fixed_label"]).attach(engine, "dice")
    MetricHandler(FoldedVoxelsMetric(), "ddf").attach(engine, "folded_percent")
    saver.attach(engine)
    engine.run(outputs)
    return engine


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def read_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def number(value: float) -> Any:
    return None if value != value else pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("batching", ["decollated", "collated"])
def test_files_against_hand_computed_numbers(tmp_path: Path, batching: str, capsys: pytest.CaptureFixture[str]) -> None:
    batches = [list_data_collate(ITEMS[:2]), list_data_collate(ITEMS[2:])]
    outputs = [decollate_batch(b) for b in batches] if batching == "decollated" else batches
    info = {"data_set": "made up", "spatial_size": None}
    saver = PairResultsSaver(tmp_path / "new", LABELS, "both", ["dice", "folded_percent"], prefix="test", info=info)
    engine = evaluate(saver, outputs)
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"test_pairs.csv", "test_summary.json"}

    rows = read_csv(saver.csv_path)
    assert list(rows[0]) == [
        *("fixed", "moving", "dice", "folded_percent"),
        *("steps", "evaluations", "residual", "relative_residual", "converged", "reason", "dice_3", "dice_8"),
    ]
    assert [(r["fixed"], r["moving"], r["steps"]) for r in rows] == [
        ("f1", "m1", "1"),
        ("f2", "m2", "2"),
        ("f3", "m3", "3"),
    ]
    assert [r["converged"] for r in rows] == ["True", "True", "False"]
    assert [r["reason"] for r in rows] == ["tolerance", "tolerance", "step limit"]
    for i, row in enumerate(rows):
        assert float(row["dice"]) == pytest.approx(MEANS[i], nan_ok=True)
        assert [float(row["dice_3"]), float(row["dice_8"])] == pytest.approx(DICE[i], nan_ok=True)
        assert float(row["folded_percent"]) == FOLDED[i] and float(row["residual"]) == 0.5 ** (i + 1)
    assert [r["relative_residual"] for r in rows] == ["0.25", "nan", "0.25"]

    result = read_json(saver.json_path)
    assert {k: result[k] for k in info} == info
    assert result["label_set"] == "both" and result["labels"] == {"3": "left", "8": "right"}
    assert result["num_pairs"] == 3
    residuals = [0.5, 0.25, 0.125]
    expected = {
        # over the labels of a pair, then over the pairs that have a score
        "dice": (mean(MEANS[:2]), stdev(MEANS[:2]), 2),
        "folded_percent": (100 / 3, stdev(FOLDED), 3),
        "steps": (2, 1, 3),
        "evaluations": (3, 1.5, 3),
        "residual": (mean(residuals), stdev(residuals), 3),
        "relative_residual": (0.25, 0, 2),
        "converged": (2 / 3, stdev([1, 1, 0]), 3),
    }
    assert result["summary"].keys() == expected.keys()
    for name, (average, deviation, pairs) in expected.items():
        value = {"mean": number(average), "std": number(deviation), "pairs": pairs}
        # of what the solver says also the middle and the worst
        more = {k: v for k, v in result["summary"][name].items() if k not in value}
        assert {k: v for k, v in result["summary"][name].items() if k in value} == value, name
        assert set(more) == (set() if name in ("dice", "folded_percent") else {"median", "p95"})
    assert result["summary"]["residual"]["median"] == 0.25
    assert result["summary"]["steps"]["median"] == 2
    # nine tenths of the way from the second to the first of three
    assert result["summary"]["residual"]["p95"] == number(0.25 + 0.9 * 0.25)
    assert "verdicts" not in result
    assert result["per_label"] == {
        "dice": {
            "3": {"name": "left", "mean": number(5 / 6), "std": number(stdev([1, 2 / 3])), "pairs": 2},
            "8": {"name": "right", "mean": number(0.5), "std": None, "pairs": 1},
        }
    }
    assert [p["dice"] for p in result["pairs"]] == [number(v) for v in MEANS]
    assert [p["dice_8"] for p in result["pairs"]] == [number(0.5), None, None]
    assert [p["relative_residual"] for p in result["pairs"]] == [0.25, None, 0.25]
    assert [p["converged"] for p in result["pairs"]] == [True, True, False]
    # the same mean as the engine's
    assert engine.state.metrics["dice"] == number(mean(MEANS[:2]))

    table = capsys.readouterr().out
    assert "3 pairs, label set 'both' (2 labels)" in table
    assert "0.7083" in table and "33.3333" in table and "(std 0.0589)" in table


def test_one_pair_has_no_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = PairResultsSaver(tmp_path, LABELS, "both", ["dice"])
    evaluate(saver, [[ITEMS[0]]])
    assert saver.json_path.name == "evaluation_summary.json"
    assert read_json(saver.json_path)["summary"]["dice"] == {"mean": number(0.75), "std": None, "pairs": 1}
    assert "0.7500" in capsys.readouterr().out


def test_no_score_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = PairResultsSaver(tmp_path, LABELS, "both", ["dice"])
    evaluate(saver, [[ITEMS[2]]])
    result = read_json(saver.json_path)
    assert result["summary"]["dice"] == {"mean": None, "std": None, "pairs": 0}
    assert result["pairs"][0]["dice"] is None and read_csv(saver.csv_path)[0]["dice"] == "nan"
    assert "no score" in capsys.readouterr().out


def test_certificates_are_written_where_there_are_some(tmp_path: Path) -> None:
    verdicts = ["cycling", "converged", "cycling"]
    items = [
        {
            **item,
            "verdict": v,
            "spectral_radius": torch.tensor(0.25 * i),
            "answer_flip_max": 2.0 * i,
            "sensitive_to": to,
        }
        for i, (item, v, to) in enumerate(zip(ITEMS, verdicts, ("nothing", "flip", "flip"), strict=True))
    ]
    saver = PairResultsSaver(tmp_path, LABELS, "two")  # all metrics that the engine keeps
    evaluate(saver, [items[:2], items[2:]])
    assert [row["verdict"] for row in read_csv(saver.csv_path)] == verdicts
    assert list(read_csv(saver.csv_path)[0])[2:4] == ["dice", "folded_percent"]
    assert read_json(saver.json_path)["verdicts"] == {"cycling": 2, "converged": 1}
    assert "start_distance" not in read_csv(saver.csv_path)[0]
    summary = read_json(saver.json_path)["summary"]
    assert summary["spectral_radius"]["mean"] == pytest.approx(0.25) and "verdict" not in summary
    assert read_json(saver.json_path)["sensitive_to"] == {"nothing": 1, "flip": 2}
    assert summary["answer_flip_max"]["mean"] == pytest.approx(2.0) and "sensitive_to" not in summary


def test_energies_are_written_where_all_pairs_have_them(tmp_path: Path) -> None:
    measured = ("energy", "slope", "unfolded", "finish_steps", "energy_before_finish")
    values = {name: torch.tensor([-0.5, 0.25, 3.0]) * (i + 1) for i, name in enumerate(measured)}
    items = [{**item, **{k: v[i] for k, v in values.items()}, "other": 1.0} for i, item in enumerate(ITEMS)]
    saver = PairResultsSaver(tmp_path, LABELS, "two")
    evaluate(saver, [items[:2], items[2:]])
    rows, summary = read_csv(saver.csv_path), read_json(saver.json_path)["summary"]
    for name in measured:
        assert [float(row[name]) for row in rows] == values[name].tolist()
        assert summary[name]["mean"] == pytest.approx(values[name].mean().item())
    assert "other" not in rows[0]
    # where one pair has none the column is left out
    del items[1]["finish_steps"]
    saver = PairResultsSaver(tmp_path, LABELS, "two", overwrite=True)
    evaluate(saver, [items[:2], items[2:]])
    assert "finish_steps" not in read_csv(saver.csv_path)[0] and "energy" in read_csv(saver.csv_path)[0]
    evaluate(PairResultsSaver(tmp_path, LABELS, "two", overwrite=True), [ITEMS[:2], ITEMS[2:]])
    assert not set(measured) & set(read_csv(saver.csv_path)[0])


def test_one_label(tmp_path: Path) -> None:
    saver = PairResultsSaver(tmp_path, {8: "right"}, "one", ["dice", "folded_percent"])
    evaluate(saver, [ITEMS[:2], ITEMS[2:]], labels=[8])
    result = read_json(saver.json_path)
    assert result["per_label"] == {"dice": {"8": {"name": "right", "mean": 0.5, "std": None, "pairs": 1}}}
    assert [p["dice_8"] for p in result["pairs"]] == [p["dice"] for p in result["pairs"]] == [0.5, None, None]
    assert "folded_percent_8" not in read_csv(saver.csv_path)[0]


def test_refuses_to_overwrite_before_any_work(tmp_path: Path) -> None:
    for name in ("evaluation_pairs.csv", "evaluation_summary.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("precious")
        worked: list[Any] = []
        engine = Engine(lambda engine, batch, worked=worked: worked.append(batch))
        PairResultsSaver(folder, {}, "", []).attach(engine)
        with pytest.raises(FileExistsError, match=rf"{name} exists already.*--overwrite true"):
            engine.run([0])
        assert not worked and [p.name for p in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "precious"
        evaluate(PairResultsSaver(folder, LABELS, "both", ["dice"], overwrite=True), [ITEMS])
        assert len(read_csv(folder / "evaluation_pairs.csv")) == 3
        assert read_json(folder / "evaluation_summary.json")["num_pairs"] == 3


def test_second_run_starts_from_nothing(tmp_path: Path) -> None:
    saver = PairResultsSaver(tmp_path, LABELS, "both", ["dice"], overwrite=True)
    for _ in range(2):
        evaluate(saver, [ITEMS])
    assert read_json(saver.json_path)["num_pairs"] == 3


def test_nothing_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(frame: Any, path: Path, **kwargs: Any) -> None:
        path.write_text("fixed,moving")
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="no space left"):
        evaluate(PairResultsSaver(tmp_path, LABELS, "both", ["dice"]), [ITEMS])
    assert list(tmp_path.iterdir()) == []


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no scores of a metric 'hd'.*\['dice', 'folded_percent'\]"):
        evaluate(PairResultsSaver(tmp_path, LABELS, "both", ["hd"]), [ITEMS])
    with pytest.raises(RuntimeError, match=r"'dice' has 2 scores a pair for 3 labels"):
        evaluate(PairResultsSaver(tmp_path, {**LABELS, 9: "third"}, "three", ["dice"]), [ITEMS])
    with pytest.raises(KeyError, match="steps"):
        evaluate(
            PairResultsSaver(tmp_path, LABELS, "both", ["dice"]),
            [[{k: v for k, v in ITEMS[0].items() if k != "steps"}]],
        )
    for info in ({"size": torch.tensor(3)}, {"residual": NAN}):
        with pytest.raises(TypeError, match="info"):
            PairResultsSaver(tmp_path, LABELS, "both", ["dice"], info=info)
    for overwrite in (1, "false"):
        with pytest.raises(ValueError, match="overwrite: expected True or False, got"):
            PairResultsSaver(tmp_path, LABELS, "both", ["dice"], overwrite=overwrite)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_percentile_over_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    percentiles = {"folded_percent": 70, "dice": 25.0}
    saver = PairResultsSaver(tmp_path, LABELS, "both", ["dice", "folded_percent"], percentiles=percentiles)
    evaluate(saver, [ITEMS])
    summary = read_json(saver.json_path)["summary"]
    # four tenths of the way from the second to the third of three; a quarter between the two scores that are there
    assert summary["folded_percent"]["p70"] == number(40.0)
    assert summary["dice"]["p25"] == number(2 / 3 + 0.25 * (0.75 - 2 / 3))
    assert "p70 40.0000)" in capsys.readouterr().out
    for wrong in ({"hd": 70}, {"dice": 101}):
        with pytest.raises(ValueError, match="percentiles must be from 0 to 100"):
            PairResultsSaver(tmp_path, LABELS, "both", ["dice"], percentiles=wrong)
    with pytest.raises(RuntimeError, match="no scores of a metric 'hd'"):
        evaluate(PairResultsSaver(tmp_path / "all", LABELS, "both", percentiles={"hd": 70}), [ITEMS])


def evaluate_drawn(saver: PairResultsSaver, items: list[dict[str, Any]]) -> None:
    """As ``evaluate``, one item a batch, with images and the event that pictures are made at."""

    def step(engine: Engine, item: dict[str, Any]) -> list[dict[str, Any]]:
        images = {name: torch.rand(1, 4, 10) for name in ("fixed", "moving", "warped")}
        engine.state.output = dict(list_data_collate([{**item, **images}]))
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        return [item]

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    MetricHandler(LabelDiceMetric(list(LABELS)), ["warped_label", "fixed_label"]).attach(engine, "dice")
    saver.attach(engine)
    engine.run(items)


def test_pictures_of_the_best_and_the_worst(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    # another evaluation beside it, and an image of somebody else's
    others = [tmp_path / name for name in ("a[1]_b_best_1.png", "a_best_1.png", "a[1]_best_10.png")]
    for path in others:
        path.write_text("precious")
    settings: dict[str, Any] = {"prefix": "a[1]", "pictures": 2}
    saver = PairResultsSaver(tmp_path, LABELS, "both", ["dice"], **settings)
    named = {**make_item("4", (4, 4), (4, 4)), "fixed_subject": "f4/ü &", "moving_subject": "m4/ü &"}
    evaluate_drawn(saver, [*ITEMS, named])
    names = [("best", 1, "4/ü &"), ("worst", 1, "2")]  # of three that have a score, the other one is in the middle
    files = [f"a[1]_{kind}_{number}.png" for kind, number, _ in names]
    assert read_json(saver.json_path)["pictures"] == [
        {"fixed": f"f{pair}", "moving": f"m{pair}", "file": file} for (*_, pair), file in zip(names, files, strict=True)
    ]
    for file in files:
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    written = {p.name for p in tmp_path.iterdir()}
    assert written == {*files, "a[1]_pairs.csv", "a[1]_summary.json", *(p.name for p in others)}
    # one of them alone is in the way
    for name in ("a[1]_pairs.csv", "a[1]_summary.json", files[0]):
        (tmp_path / name).unlink()
    with pytest.raises(FileExistsError, match=r"a\[1\]_worst_1.png exists already.*--overwrite true"):
        evaluate_drawn(PairResultsSaver(tmp_path, LABELS, "both", ["dice"], **settings), [ITEMS[0]])
    # and is not left beside other scores: of one pair there is no worst
    evaluate_drawn(PairResultsSaver(tmp_path, LABELS, "both", ["dice"], overwrite=True, **settings), [ITEMS[0]])
    assert (tmp_path / files[0]).is_file() and not (tmp_path / files[1]).exists()
    assert all(path.read_text() == "precious" for path in others)
    # what cannot be drawn is not spoken of
    failed = {**ITEMS[0], "ddf": torch.full((2, 4, 10), NAN)}
    evaluate_drawn(PairResultsSaver(tmp_path, LABELS, "both", ["dice"], overwrite=True, **settings), [failed])
    assert "pictures" not in read_json(saver.json_path) and not (tmp_path / files[0]).exists()


def test_without_matplotlib_the_scores_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(PairResultsSaver(tmp_path / "none", LABELS, "both", ["dice"]), [ITEMS[:2]])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, "monai_deq"):
        evaluate_drawn(PairResultsSaver(tmp_path / "asked", LABELS, "both", ["dice"], pictures=2), ITEMS[:2])
    assert len(caplog.messages) == 1 and "pip install" in caplog.messages[0]
    assert {p.name for p in (tmp_path / "asked").iterdir()} == {"evaluation_pairs.csv", "evaluation_summary.json"}
    for name in ("evaluation_pairs.csv", "evaluation_summary.json"):
        assert (tmp_path / "asked" / name).read_text() == (tmp_path / "none" / name).read_text()
    for wrong in (-1, 10, "two"):
        with pytest.raises(ValueError, match="pictures: expected a whole number from 0 to 9"):
            PairResultsSaver(tmp_path, LABELS, "both", ["dice"], pictures=wrong)  # type: ignore[arg-type]


NAMES = [{"moving_subject": m, "fixed_subject": f} for m, f in ("ab", "bc", "ca")]
SAID = {
    "steps": 1,
    "evaluations": 1,
    "residual": 0.1,
    "relative_residual": 0.1,
    "converged": True,
    "reason": "tolerance",
}


def register(saver: SaveRegistrationd) -> list[Any]:
    def iteration(engine: Engine, item: dict[str, Any]) -> Any:
        done.append(item["moving_subject"])
        return saver({**item, "warped": torch.zeros(1, 2, 2), "ddf": torch.zeros(2, 2, 2), **SAID})

    done: list[Any] = []
    engine = Engine(iteration)
    OutputGuard([saver], NAMES).attach(engine)
    try:
        engine.run(NAMES)
    except OSError:
        assert done == []  # not one pair registered in vain
        raise
    return done


def test_refuses_before_any_work(tmp_path: Path) -> None:
    assert register(SaveRegistrationd(tmp_path)) == ["a", "b", "c"]
    assert len(list(tmp_path.iterdir())) == 3 * 4
    for path in tmp_path.glob("[ab]_*"):
        path.unlink()
    # only results of the last pair are left
    with pytest.raises(FileExistsError, match=r"c_to_a_.* and 3 more exists already.*--overwrite true"):
        register(SaveRegistrationd(tmp_path))
    assert len(list(tmp_path.iterdir())) == 4
    assert register(SaveRegistrationd(tmp_path / "other")) == ["a", "b", "c"]
    assert register(SaveRegistrationd(tmp_path, overwrite=True)) == ["a", "b", "c"]
    assert len(list(tmp_path.glob("*.*"))) == 3 * 4


@pytest.mark.parametrize("overwrite", [False, True])
def test_refuses_a_folder_that_cannot_be_written_to(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("precious")
    folder, began = tmp_path / "out" / "first", list[Any]()
    message = f"cannot write to the folder {folder}: {tmp_path / 'out'} is there and is no folder"
    with pytest.raises(NotADirectoryError, match=message):
        register(SaveRegistrationd(folder, overwrite))
    engine = Engine(lambda engine, item: began.append(item))
    PairResultsSaver(folder, LABELS, "two", overwrite=overwrite).attach(engine)
    with pytest.raises(NotADirectoryError, match=message):
        engine.run(NAMES)
    assert began == [] and (tmp_path / "out").read_text() == "precious"
