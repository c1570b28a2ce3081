# SPDX-License-Identifier: Apache-2.0
"""Pictures in TensorBoard and of the best and worst pairs: of which pair, when, and never in the way."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor, list_data_collate
from monai.engines.utils import IterationEvents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_deq.handlers import MetricHandler, TensorBoardPairHandler, pictures
from monai_deq.handlers.pictures import ExtremePairs
from monai_deq.metrics import TargetRegistrationErrorMetric
from monai_deq.visualize import RegisteredPair

pytest.importorskip("matplotlib")

NAN = float("nan")
SIZE = (20, 24)
AFFINE = torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64))


def make_batch(brightness: float) -> dict[str, Any]:
    """Two pairs, the first fixed image of one brightness; the labels are 3 voxels apart along the first axis."""
    items = []
    for fixed, moving in (("a", "c"), ("b", "d")):
        item = {key: MetaTensor(torch.rand(1, *SIZE), affine=AFFINE) for key in ("fixed", "moving", "warped")}
        item |= {"fixed_label": torch.zeros(1, *SIZE), "moving_label": torch.zeros(1, *SIZE)}
        item["fixed_label"][:, 5:9, 5:9] = item["moving_label"][:, 8:12, 5:9] = 4
        item["ddf"] = torch.tensor([3.0, 0.0])[:, None, None].expand(2, *SIZE).clone()
        items.append({**item, "fixed_subject": fixed, "moving_subject": moving})
    items[0]["fixed"][:] = brightness
    return dict(list_data_collate(items))


def evaluator_with(handler: TensorBoardPairHandler | ExtremePairs) -> Engine:
    def step(engine: Engine, batch: dict[str, Any]) -> dict[str, Any]:
        engine.state.output = batch
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        return {"ddf": "what postprocessing made of it"}

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    handler.attach(engine)
    return engine


def run(engine: Engine, batches: list[dict[str, Any]], epochs: int) -> None:
    """As MONAI's evaluator is run, one epoch at a time."""
    for epoch in range(1, epochs + 1):
        engine.state.epoch, engine.state.max_epochs, engine.state.iteration = epoch - 1, epoch, 0
        engine.run(batches, max_epochs=epoch)


def test_the_first_pair_each_so_many_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[RegisteredPair] = []
    plot = pictures.plot_registration
    monkeypatch.setattr(pictures, "plot_registration", lambda pair: pairs.append(pair) or plot(pair))
    batches = [make_batch(0.25), make_batch(0.5)]
    run(evaluator_with(TensorBoardPairHandler(str(tmp_path), interval=3)), batches, 5)
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = events.Images("registration")
    assert [image.step for image in shown] == [1, 4] and len(pairs) == 2
    from PIL import Image

    with Image.open(io.BytesIO(shown[0].encoded_image_string)) as image:
        assert image.width > 1000 and image.height > 150
        assert np.asarray(image).std() > 5  # something is drawn
    pair = pairs[0]
    assert (pair.fixed == 0.25).all() and pair.names == ("c", "a") and pair.spacing == pytest.approx((1, 2))
    np.testing.assert_array_equal(pair.warped_label, pair.fixed_label)


def test_a_failed_solve_does_not_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batch = make_batch(0.5)
    batch["ddf"][0] = float("nan")
    with caplog.at_level(logging.WARNING, "monai_deq"):
        run(evaluator_with(TensorBoardPairHandler(str(tmp_path))), [batch], 1)
    assert caplog.messages == ["no picture of the first pair: ddf: expected finite numbers, got NaN or infinity."]
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    batch = make_batch(0.5)
    with caplog.at_level(logging.WARNING, "monai_deq"):
        run(evaluator_with(TensorBoardPairHandler(str(tmp_path), 1)), [batch], 3)
    assert len(caplog.messages) == 1 and "pip install" in caplog.messages[0]
    assert not list(tmp_path.iterdir())


def test_labels_of_another_grid_are_left_out_and_a_mask_is_brought_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[RegisteredPair] = []
    plot = pictures.plot_registration
    monkeypatch.setattr(pictures, "plot_registration", lambda pair: pairs.append(pair) or plot(pair))
    batch = make_batch(0.5)
    batch["fixed_label"] = batch["moving_label"] = torch.zeros(2, 1, 40, 48)
    batch["fixed_mask"] = torch.zeros(2, 1, 40, 48, dtype=torch.uint8)
    batch["fixed_mask"][:, :, 10:20, 24:] = 1
    run(evaluator_with(TensorBoardPairHandler(str(tmp_path))), [batch], 1)
    assert pairs[0].fixed_label is None and pairs[0].warped_label is None
    expected = np.zeros(SIZE)
    expected[5:10, 12:] = 1  # half the size
    np.testing.assert_array_equal(pairs[0].mask, expected)


def test_interval() -> None:
    with pytest.raises(ValueError, match="interval must be at least 1"):
        TensorBoardPairHandler("", 0)


class GivenScores(TargetRegistrationErrorMetric):
    """Scores that the batch brings along."""

    def compute_scores(self, y_pred: torch.Tensor, y: Any = None) -> torch.Tensor:  # type: ignore[override]
        return y_pred


def draw_extremes(
    extremes: ExtremePairs, scores: dict[str, list[list[float]]], monkeypatch: pytest.MonkeyPatch, batch_size: int = 2
) -> list[str]:
    """Run over pairs with these scores, a row each, two epochs; the names of the fixed scans drawn in the last."""
    drawn: list[str] = []
    monkeypatch.setattr(pictures, "plot_registration", lambda pair: drawn.append(pair.names[1]) or pair.names[1])
    monkeypatch.setattr(pictures, "figure_png", str.encode)
    image, total = torch.rand(1, *SIZE), len(next(iter(scores.values())))
    items = []
    for i in range(total):
        item = {**dict.fromkeys(("fixed", "moving", "warped"), image), "ddf": torch.zeros(2, *SIZE)}
        item |= {"fixed_subject": f"f{i}", "moving_subject": f"m{i}"}
        items.append({**item, **{name: torch.tensor(rows[i]) for name, rows in scores.items()}})

    def step(engine: Engine, batch: dict[str, Any]) -> list[dict[str, Any]]:
        engine.state.output = batch
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        # the field is on another grid by now
        return [{name: batch[name][i] for name in scores} for i in range(len(batch["fixed"]))]

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    for name in scores:
        MetricHandler(GivenScores(), name).attach(engine, name)
    extremes.attach(engine)
    batches = [list_data_collate(items[i : i + batch_size]) for i in range(0, total, batch_size)]
    for _ in range(2):
        drawn.clear()
        engine.run(batches, max_epochs=1)
        assert len(extremes.kept) <= 2 * extremes.most and not extremes.batch
    return drawn


@pytest.mark.parametrize("name", ["dice", "tre"])
@pytest.mark.parametrize("total", [1, 2, 3, 5, 40])
def test_the_best_and_the_worst_of_all(name: str, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(total)
    rows = rng.integers(0, 9, (total, 2)) / 8  # many are equal
    rows[rng.random((total, 2)) < 0.2] = NAN
    rows[total // 4] = NAN if total > 1 else 0.5
    extremes = ExtremePairs(2)
    drawn = draw_extremes(extremes, {"hd": rows.tolist(), name: rows.tolist()}, monkeypatch)
    means = {f"f{i}": float(np.nanmean(row)) for i, row in enumerate(rows) if not np.isnan(row).all()}
    order = sorted(means, key=lambda pair: -means[pair] if name == "dice" else means[pair])
    most = min(2, max(len(order) // 2, 1))
    found = extremes.gather()
    assert [entry["fixed"] for entry in found["best"]] == order[:most]
    assert [entry["fixed"] for entry in found["worst"]] == (order[::-1][:most] if len(order) > 1 else [])
    for entry in (*found["best"], *found["worst"]):
        assert entry["png"] == entry["fixed"].encode() and entry["moving"] == "m" + entry["fixed"][1:]
    # a pair that comes among none of them is not drawn
    assert len(drawn) <= 25 and {entry["fixed"] for part in found.values() for entry in part} <= set(drawn)


def test_the_first_metric_tells_and_none_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"dice": [[0.1], [0.9]], "tre": [[0.1], [0.9]]}
    for metrics, best in ((["hd", "tre_before", "tre", "dice"], "f0"), (["dice", "tre"], "f1"), (None, "f1")):
        extremes = ExtremePairs(1, metrics)
        draw_extremes(extremes, scores, monkeypatch)
        assert [entry["fixed"] for entry in extremes.gather()["best"]] == [best]
    for unknown in (ExtremePairs(1, ["hd"]), ExtremePairs(0)):
        assert draw_extremes(unknown, scores, monkeypatch) == []
        assert unknown.gather() == {"best": [], "worst": []}


def test_the_best_and_the_worst_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    # in the order of the processes, the third of which has no pair; the scores tell the pairs apart
    scores = [[0.5, 0.25, 0.5, 0.75, 0.125], [0.875, 0.375, 0.0625]]
    parts = [ExtremePairs(2) for _ in range(3)]
    for part, own in zip(parts, scores, strict=False):
        draw_extremes(part, {"dice": [[score] for score in own]}, monkeypatch)
    kept = [dict(entry) for part in parts for entry in part.kept]
    monkeypatch.setattr(pictures, "gather_items", lambda items: kept)
    for part in parts:
        found = {kind: [entry["order"] for entry in entries] for kind, entries in part.gather().items()}
        assert found == {"best": [0.875, 0.75], "worst": [0.0625, 0.125]}


def test_a_pair_that_cannot_be_drawn_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    batch = {**make_batch(0.5), "dice": torch.tensor([[0.1], [0.2]])}
    batch["ddf"][1] = NAN
    extremes = ExtremePairs(1)
    engine = evaluator_with(extremes)
    engine.state.batch_scores = {"dice": batch["dice"]}  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "monai_deq"):
        run(engine, [batch], 1)
    assert caplog.messages == ["no picture of d to b: ddf: expected finite numbers, got NaN or infinity."]
    found = extremes.gather()
    assert found["best"][0]["png"] is None and found["worst"][0]["png"].startswith(b"\x89PNG")
