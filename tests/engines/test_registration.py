# SPDX-License-Identifier: Apache-2.0
"""Trainer and evaluator with MONAI's data loader, transforms and losses, and the handlers that they bring."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.transforms import Compose, Lambdad
from nets import IMAGE_SIZES, SHIFTS, deq_net, pair_items, rest_settings, slice_affine, tiny_update
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_deq.data import PairDataset, PooledDataset, PooledSampler, RandomPairSampler, StatePool, shard_loader
from monai_deq.engines import PreparePairBatch, PreparePooledPairBatch, RegistrationEvaluator, RegistrationTrainer
from monai_deq.handlers import MetricHandler, PairResultsSaver, StatePoolUpdater
from monai_deq.inferers import FixedPointInferer
from monai_deq.losses import KeypointSupervisedLoss, MaskedSimilarityLoss, RegistrationLoss, StatesLoss
from monai_deq.metrics import FoldedVoxelsMetric, LabelDiceMetric, LabelHausdorffMetric
from monai_deq.networks.nets import RestSettings
from monai_deq.transforms import ResampleDDFd, WarpByDDFd
from monai_deq.utils import PairsFailedError


class ShiftByBrightness(torch.nn.Module):
    """Halves the way to a shift along the first axis by ten times the largest value of the fixed image."""

    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        target = torch.zeros_like(ddf)
        target[:, 0] = 10 * fixed.flatten(1).amax(1).view(-1, *[1] * (fixed.ndim - 2))
        return self.share * (target - ddf)


def make_evaluator(ndim: int, batch_size: int = 2, max_steps: int = 6, **kwargs: Any) -> RegistrationEvaluator:
    network = deq_net(ShiftByBrightness(), num_states=0, tolerance=0.05)
    return RegistrationEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(pair_items(ndim)), batch_size=batch_size),
        network=network,
        inferer=FixedPointInferer(max_steps=max_steps),
        prepare_batch=PreparePairBatch(),
        **kwargs,
    )


def run(evaluator: RegistrationEvaluator) -> list[dict[str, Any]]:
    """What comes out, pair by pair."""
    outputs: list[dict[str, Any]] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.extend(e.state.output))
    evaluator.run()
    return outputs


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("ndim", [2, 3])
def test_flat_output_of_every_pair(ndim: int, batch_size: int) -> None:
    items = pair_items(ndim)
    outputs = run(make_evaluator(ndim, batch_size))
    solved = {"warped", "ddf", "steps", "evaluations", "residual", "relative_residual", "converged", "reason"}
    assert len(outputs) == 3
    # 0.5^k * shift <= 0.05: k = 5, 6, 6 steps; the second needs 0.5^6 * 3 = 0.047, so all converge in 6
    for i, (output, item) in enumerate(zip(outputs, items, strict=True)):
        assert set(output) == set(item) | solved
        steps = next(k for k in range(1, 9) if 0.5**k * SHIFTS[i] <= 0.05)
        assert (output["steps"], output["converged"], output["reason"]) == (steps, True, "tolerance")
        assert output["residual"] == pytest.approx(0.5**steps * SHIFTS[i], rel=1e-5)
        assert (output["fixed_subject"], output["moving_subject"]) == (f"f{i}", f"m{i}")
        for key in ("fixed", "moving", "fixed_label", "moving_label"):
            torch.testing.assert_close(output[key].as_tensor(), item[key].as_tensor())
            np.testing.assert_allclose(output[key].affine, item[key].affine)
        assert output["fixed"].meta["filename_or_obj"] == f"fixed{i}.nii.gz"
        assert not isinstance(output["ddf"], MetaTensor) and output["ddf"].shape == (ndim, *IMAGE_SIZES[ndim])
        torch.testing.assert_close(output["ddf"][0], torch.full(IMAGE_SIZES[ndim], SHIFTS[i] * (1 - 0.5**steps)))


def test_reason_belongs_to_the_pair() -> None:
    outputs = run(make_evaluator(2, 3, max_steps=5))
    assert [o["reason"] for o in outputs] == ["tolerance", "step limit", "step limit"]
    assert [o["converged"] for o in outputs] == [True, False, False]
    assert [o["steps"] for o in outputs] == [5, 5, 5]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("ndim", [2, 3])
def test_postprocessing_and_metrics(ndim: int, batch_size: int) -> None:
    """The known shift brings the labels together; the spacing of each pair's own fixed image counts."""
    evaluator = make_evaluator(
        ndim,
        batch_size,
        max_steps=20,
        postprocessing=Compose(
            [
                ResampleDDFd("fixed_label"),
                WarpByDDFd("moving_label", output_keys="warped_label", mode="nearest"),
                Lambdad("reason", str.upper),
            ]
        ),
        key_val_metric={"dice": MetricHandler(LabelDiceMetric([1]), ["warped_label", "fixed_label"])},
        additional_metrics={
            "dice_before": MetricHandler(LabelDiceMetric([1]), ["moving_label", "fixed_label"]),
            "hd_before": MetricHandler(LabelHausdorffMetric([1]), ["moving_label", "fixed_label"]),
            "folded": MetricHandler(FoldedVoxelsMetric(), "ddf"),
        },
    )
    outputs = run(evaluator)
    for i, (output, item) in enumerate(zip(outputs, pair_items(ndim), strict=True)):
        torch.testing.assert_close(output["warped_label"].as_tensor(), item["fixed_label"].as_tensor())
        torch.testing.assert_close(output["moving_label"].as_tensor(), item["moving_label"].as_tensor())
        for key in ("ddf", "warped_label"):
            np.testing.assert_allclose(output[key].affine, slice_affine(i))
        assert output["reason"] == "TOLERANCE"
    assert evaluator.state.metrics["dice"] == 1 and evaluator.state.metrics["folded"] == 0
    # slabs of two rows, one, three and two rows apart; rows of 1, 2 and 3 mm
    assert evaluator.state.metrics["dice_before"] == pytest.approx(0.5 / 3)
    assert evaluator.state.metrics["hd_before"] == pytest.approx((1 * 1 + 3 * 2 + 2 * 3) / 3)
    details = evaluator.state.metric_details["hd_before"]  # type: ignore[attr-defined]
    assert details.flatten().tolist() == pytest.approx([1, 6, 6])


def test_mode_gradients_and_events() -> None:
    evaluator = make_evaluator(2)
    network = evaluator.network.train()
    seen: list[tuple[bool, bool]] = []
    network.update.register_forward_pre_hook(lambda m, _: seen.append((m.training, torch.is_grad_enabled())))
    events: list[str] = []
    for event in (IterationEvents.FORWARD_COMPLETED, IterationEvents.MODEL_COMPLETED):
        evaluator.add_event_handler(event, lambda e, name=event.name: events.append(name))
    evaluator.run()
    assert set(seen) == {(False, False)} and network.training
    assert events == ["FORWARD_COMPLETED", "MODEL_COMPLETED"] * 2


def test_mixed_precision_keeps_the_field_in_single_precision() -> None:
    update = tiny_update(2)
    seen: list[torch.dtype] = []
    update.backbone.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    evaluator = RegistrationEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(pair_items(2)), batch_size=2),
        network=deq_net(update, num_states=0),
        inferer=FixedPointInferer(max_steps=2),
        prepare_batch=PreparePairBatch(),
        amp=True,
    )
    outputs = run(evaluator)
    assert set(seen) == {torch.bfloat16}
    assert all(o["ddf"].dtype == o["warped"].dtype == torch.float32 for o in outputs)


def test_without_decollation_the_batch_stays_one() -> None:
    evaluator = make_evaluator(2, 3, decollate=False)
    batches: list[Any] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: batches.append(e.state.output))
    evaluator.run()
    assert batches[0]["ddf"].shape == (3, 2, *IMAGE_SIZES[2]) and batches[0]["steps"].tolist() == [5, 6, 6]
    assert batches[0]["fixed_subject"] == ["f0", "f1", "f2"] and batches[0]["fixed"].affine.shape == (3, 4, 4)


def test_the_batch_itself_is_not_changed() -> None:
    evaluator = make_evaluator(2, 2)
    keys: list[set[str]] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: keys.extend(set(b) for b in e.state.batch))
    evaluator.run()
    assert keys == [set(pair_items(2)[0])] * 3


@pytest.mark.parametrize("ndim", [2, 3])
def test_training_inside_a_mask_with_keypoints(ndim: int) -> None:
    """The loss of the trainer is that of its parts, computed beside it."""
    items = pair_items(ndim)
    for i, item in enumerate(items):
        item["points"] = torch.rand(5, ndim, generator=torch.Generator().manual_seed(i)) * 3
    network = deq_net(ShiftByBrightness(), max_steps=3, num_states=0, phantom_steps=1)
    registration = RegistrationLoss(ndim, 0.1, similarity=MaskedSimilarityLoss(ndim))
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(items), batch_size=len(items)),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=KeypointSupervisedLoss(
            StatesLoss(registration, mask_key="fixed_label"), 0.2, None, "points", "points"
        ),
        prepare_batch=PreparePairBatch(target_keys=("fixed_label", "points")),
        decollate=False,
    )
    trainer.run()
    batch = next(iter(DataLoader(Dataset(items), batch_size=len(items))))
    batch = {k: torch.as_tensor(batch[k]) for k in ("moving", "fixed", "fixed_label", "points")}
    warped, ddf, _ = network.train()(batch["moving"], batch["fixed"])
    expected = registration(warped, batch["fixed"], ddf, batch["fixed_label"])
    expected = expected + 0.2 * ddf[:, 0, 0].flatten(1)[:, 0].square().mean()  # the same displacement everywhere
    assert trainer.state.output["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_training_with_a_pool_goes_on_from_where_pairs_stand(ndim: int) -> None:
    images = [{key: item[key] for key in ("moving", "fixed")} for item in pair_items(ndim)]
    items = [{**item, "slot": i, "ticket": i} for i, item in enumerate(images)]
    pool = StatePool(len(items))
    starts = []

    class Shift(torch.nn.Module):
        """Moves each field by a trainable amount."""

        def __init__(self) -> None:
            super().__init__()
            self.amount = torch.nn.Parameter(torch.tensor(0.25))

        def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
            return self.amount + torch.zeros_like(ddf)

    network = deq_net(Shift(), max_steps=2, num_states=0, phantom_steps=1)
    # new pairs start as the network does by itself
    network.register_forward_pre_hook(lambda _, args: starts.append(args[2].mean().item() if len(args) > 2 else None))
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=DataLoader(Dataset(items), batch_size=len(items)),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=StatesLoss(RegistrationLoss(ndim)),
        prepare_batch=PreparePooledPairBatch(pool),
        decollate=False,
    )
    StatePoolUpdater(pool).attach(trainer)
    trainer.run()
    # two steps and a phantom step in each iteration
    assert starts == [None, pytest.approx(0.75)]
    kept = pool.get(range(len(items)), range(len(items)), torch.zeros(len(items), 1, *items[0]["fixed"].shape[1:]))
    np.testing.assert_allclose(kept, 1.5, atol=1e-6)
    with pytest.raises(KeyError, match="a pooled batch needs"):
        PreparePooledPairBatch(pool)(next(iter(DataLoader(Dataset(pair_items(ndim)), batch_size=1))))


@pytest.mark.parametrize("ndim", [2, 3])
def test_output_of_a_trainer(ndim: int) -> None:
    network = deq_net(tiny_update(ndim), max_steps=3, num_states=1)
    loss = StatesLoss(RegistrationLoss(ndim))
    outputs: list[dict[str, Any]] = []
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(pair_items(ndim)[:2]), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=loss,
        prepare_batch=PreparePairBatch(),
        decollate=False,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    trainer.run()
    (output,) = outputs
    items = pair_items(ndim)[:2]
    moving, fixed = (torch.stack([item[key].as_tensor() for item in items]) for key in ("moving", "fixed"))
    torch.testing.assert_close(output["image"], moving)
    torch.testing.assert_close(output["label"]["fixed"], fixed)
    warped, ddf, states = output["pred"]
    assert warped.shape == moving.shape and ddf.shape == (2, ndim, *IMAGE_SIZES[ndim]) and len(states) == 1
    # the learning rate is zero: the same network gives the same loss
    expected = loss(network.train()(moving, fixed), {"moving": moving, "fixed": fixed})
    assert output["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert any(parameter.grad.abs().max() > 0 for parameter in network.parameters())


# --- pairs that fail --------------------------------------------------------------------------------------------------


class Refusing(FixedPointInferer):
    """Fails where a fixed image has a certain brightness."""

    def __init__(self, brightness: float) -> None:
        super().__init__(max_steps=20)
        self.brightness = brightness

    def __call__(self, inputs: torch.Tensor, network: Any, fixed: torch.Tensor, *args: Any) -> dict[str, Any]:
        if (fixed.flatten(1).amax(1) - self.brightness).abs().min() < 1e-6:
            raise ArithmeticError("too\nbright")
        return super().__call__(inputs, network, fixed, *args)


class FoldsRefused(FoldedVoxelsMetric):
    """Fails for a displacement of three voxels, behind other metrics."""

    def compute_scores(self, y_pred: torch.Tensor, y: Any = None, **kwargs: Any) -> torch.Tensor:
        if y_pred.max() > 2.5:
            raise ValueError("too far")
        return super().compute_scores(y_pred)


def skipping_evaluator(batch_size: int, folder: Path, broken: int | None = None, **kwargs: Any) -> Any:
    """Three pairs, Dice before 0.5, 0 and 0; one of them may be one that cannot be loaded."""
    items = pair_items(2)
    if broken is not None:
        items[broken]["fixed"] = None
    given: dict[str, Any] = {
        "inferer": FixedPointInferer(max_steps=20),
        "postprocessing": WarpByDDFd("moving_label", output_keys="warped_label", mode="nearest"),
        "key_val_metric": {"dice": MetricHandler(LabelDiceMetric([1]), ["moving_label", "fixed_label"])},
        "val_handlers": [PairResultsSaver(folder, {1: "slab"}, "slab", ["dice"])],
        **kwargs,
    }

    def load(item: dict[str, Any]) -> dict[str, Any]:
        if item["fixed"] is None:
            raise OSError("damaged")
        return item

    return RegistrationEvaluator(
        device=torch.device("cpu"),
        val_data_loader=shard_loader(Dataset(items, load), batch_size, on_error="skip"),
        network=deq_net(ShiftByBrightness(), num_states=0, tolerance=0.05),
        on_error="skip",
        **given,
    )


def failed_of(evaluator: Any, error: type[Exception] = PairsFailedError) -> list[str]:
    with pytest.raises(error) as raised:
        evaluator.run()
    assert type(raised.value) is error
    return [str(pair) for pair in evaluator.failed]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pair_that_cannot_be_loaded_is_left_out(batch_size: int, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    evaluator = skipping_evaluator(batch_size, tmp_path, broken=1)
    assert failed_of(evaluator) == ["m1 to f1: OSError: damaged"]
    assert "1 of 3 pairs failed" in (said := capsys.readouterr().out) and "  m1 to f1: OSError: damaged" in said
    assert "pair failed: m1 to f1: OSError: damaged" in caplog.text
    # the others of its batch are not lost, and the means are over them
    assert evaluator.state.metrics["dice"] == pytest.approx((0.5 + 0) / 2)
    summary = json.loads((tmp_path / "evaluation_summary.json").read_text())
    assert summary["num_pairs"] == 2 and summary["summary"]["dice"]["mean"] == pytest.approx(0.25)
    assert summary["failed"] == [{"fixed": "f1", "moving": "m1", "reason": "OSError: damaged"}]


def test_what_is_left_may_fail_again(tmp_path: Path) -> None:
    """Which is not all: the rows that are there stay, and count."""
    for resume in (False, True):
        handlers = [PairResultsSaver(tmp_path, {1: "slab"}, "slab", ["dice"], resume=resume)]
        assert len(failed_of(skipping_evaluator(1, tmp_path, broken=1, val_handlers=handlers))) == 1
        summary = json.loads((tmp_path / "evaluation_summary.json").read_text())
        assert summary["num_pairs"] == 2 and [pair["fixed"] for pair in summary["failed"]] == ["f1"]


def test_a_pair_that_the_network_refuses_is_left_out(tmp_path: Path) -> None:
    evaluator = skipping_evaluator(1, tmp_path, inferer=Refusing(0.3))
    assert failed_of(evaluator) == ["m1 to f1: ArithmeticError: too bright"]
    assert evaluator.state.metrics["dice"] == pytest.approx(0.25)
    # with a batch all of its pairs
    evaluator = skipping_evaluator(2, tmp_path / "two", inferer=Refusing(0.3))
    more = " (in a batch of 2: --batch_size 1 tells which)"
    reasons = [f"m{i} to f{i}: ArithmeticError: too bright{more}" for i in (0, 1)]
    assert failed_of(evaluator) == reasons and evaluator.state.metrics["dice"] == 0


def test_a_pair_that_a_metric_refuses_counts_in_none(tmp_path: Path) -> None:
    evaluator = skipping_evaluator(1, tmp_path, additional_metrics={"folds": MetricHandler(FoldsRefused())})
    assert failed_of(evaluator) == ["m1 to f1: ValueError: too far"]
    assert evaluator.state.metrics == {"dice": pytest.approx(0.25), "folds": 0}
    assert len(evaluator.state.metric_details["dice"]) == len(evaluator.state.metric_details["folds"]) == 2


def test_when_all_pairs_fail_or_the_disk_is_full(tmp_path: Path) -> None:
    def full(item: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space left")

    def broken(item: Any) -> Any:
        raise KeyError("nothing there")

    assert len(failed_of(skipping_evaluator(1, tmp_path, postprocessing=broken), RuntimeError)) == 3
    with pytest.raises(RuntimeError, match="all 3 pairs failed, the first one was m0 to f0: KeyError: nothing there"):
        skipping_evaluator(1, tmp_path, postprocessing=broken).run()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="no space left"):
        skipping_evaluator(1, tmp_path, postprocessing=full).run()
    with pytest.raises(ValueError, match="on_error: expected stop or skip, got 'go on'"):
        RegistrationEvaluator(on_error="go on")


@pytest.mark.parametrize("stopped", ["failed", "killed"])
def test_an_evaluation_goes_on(tmp_path: Path, stopped: str) -> None:
    """The files of one that went on are those of one that was not stopped, bit by bit."""

    def make(folder: Path, **changes: Any) -> Any:
        given: dict[str, Any] = {"pictures": 1, **changes}
        saver = PairResultsSaver(folder, {1: "slab"}, "slab", ["dice", "folds"], **given)
        metrics = {"folds": MetricHandler(FoldedVoxelsMetric())}
        handlers: list[Any] = [saver]
        if folder.name == "parts" and not changes and stopped == "killed":
            handlers.append(Kill())
        broken = 1 if folder.name == "parts" and not changes and stopped == "failed" else None
        return skipping_evaluator(1, folder, broken, val_handlers=handlers, additional_metrics=metrics)

    class Kill:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.ITERATION_STARTED, self)

        def __call__(self, engine: Any) -> None:
            if engine.state.iteration == 3:
                raise KeyboardInterrupt

    make(tmp_path / "whole").run()
    with pytest.raises(PairsFailedError if stopped == "failed" else KeyboardInterrupt):
        make(tmp_path / "parts").run()
    assert (tmp_path / "parts" / "evaluation_unfinished_0.pt").is_file()
    assert (tmp_path / "parts" / "evaluation_summary.json").is_file() == (stopped == "failed")
    with pytest.raises(FileExistsError, match="unfinished_0.pt.* exists already.*--resume true.*--overwrite true"):
        make(tmp_path / "parts", overwrite=False).run()
    with pytest.raises(ValueError, match=r"unfinished_0.pt was made with other settings, size None \(now 3\)"):
        make(tmp_path / "parts", resume=True, info={"size": 3}).run()
    evaluator = make(tmp_path / "parts", resume=True)
    done: list[str] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: done.append(e.state.output[0]["fixed_subject"]))
    evaluator.run()
    assert done == [{"failed": "f1", "killed": "f2"}[stopped]]
    assert evaluator.state.metrics["dice"] == pytest.approx(0.5 / 3)
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {"evaluation_pairs.csv", "evaluation_summary.json"} <= names
    assert names == {p.name for p in (tmp_path / "parts").iterdir()}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    # nothing is left to do
    again = make(tmp_path / "parts", resume=True)
    again.run()
    assert again.state.iteration == 0
    with pytest.raises(ValueError, match="evaluation_summary.json was made with other settings, size None"):
        make(tmp_path / "parts", resume=True, info={"size": 3}).run()


# --- RegistrationTrainer ----------------------------------------------------------------------------------------------


class EpochSampler(PooledSampler):
    """Notes the epochs it is told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)
        super().set_epoch(epoch)


def make_trainer(
    rest: RestSettings | None = None, lr: float = 0.0, **kwargs: Any
) -> tuple[RegistrationTrainer, EpochSampler, StatePool]:
    """Two epochs of three batches of two pairs in four slots."""
    images = torch.rand((4, 1, 8, 6), generator=torch.Generator().manual_seed(5))
    subjects = [{"subject": str(i), "image": image} for i, image in enumerate(images)]
    sampler = EpochSampler(RandomPairSampler(len(subjects), 6, seed=3), 4, renewal=0.5)
    network, pool = deq_net(tiny_update(2), max_steps=2, num_states=1), StatePool(4)
    loader = DataLoader(PooledDataset(PairDataset(subjects, label_key=None)), sampler=sampler, batch_size=2)
    trainer = RegistrationTrainer(
        PreparePooledPairBatch(pool, network, rest),
        device="cpu",
        max_epochs=2,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=lr),
        loss_function=StatesLoss(RegistrationLoss(2)),
        **kwargs,
    )
    return trainer, sampler, pool


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if this were the second of two processes."""
    for name, value in (("process_rank", 1), ("process_count", 2)):
        monkeypatch.setattr(f"monai_deq.engines.registration.{name}", lambda value=value: value)
    yield


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_trainer_with_its_handlers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    losses: list[float] = []
    means: list[float] = []
    extra: list[int] = []

    class Extra:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: extra.append(e.state.epoch))

    trainer, sampler, pool = make_trainer(
        RestSettings(random_start_share=0.0), log_dir=str(tmp_path), train_handlers=[None, Extra()]
    )
    # a list of one, for MONAI's loggers
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"].item()))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: means.append(e.state.metrics["train_loss"]))
    trainer.run()
    assert len(losses) == 6 and means == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert sampler.epochs == [1, 2] and extra == [1, 2]
    logged = scalars(tmp_path)
    # MONAI's own tags: of iterations and of epochs
    assert sorted(value for tag in logged.values() for _, value in tag) == pytest.approx(sorted([*losses, *means]))
    assert "Epoch [2/2]: [2/3]" in capsys.readouterr().err
    # pairs go on from where they stand
    visits = [item for batch in trainer.data_loader for item in zip(batch["slot"], batch["ticket"], strict=True)]
    assert any(pool.holds(int(slot), int(ticket)) for slot, ticket in visits)


def test_trainer_without_a_pool_keeps_no_states() -> None:
    trainer, _, pool = make_trainer(rest_settings(pool_renewal=1.0))
    trainer.run()
    assert not any(pool.holds(slot, ticket) for slot in range(4) for ticket in range(20))


@pytest.mark.parametrize(("clip_norm", "clipped"), [(1e-3, True), (None, False), (1.0, False)])
def test_trainer_clips_the_gradient(clip_norm: float | None, clipped: bool) -> None:
    norms: list[float] = []
    trainer, *_ = make_trainer(clip_norm=clip_norm)

    def note(engine: Any) -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in engine.network.parameters()]).norm()))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run()
    assert all((norm <= 1e-3 * 1.001) == clipped and norm > 0 for norm in norms)


@pytest.mark.usefixtures("second_of_two")
def test_the_second_process_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer, *_ = make_trainer(log_dir=str(tmp_path / "log"))
    trainer.run()
    evaluator = make_evaluator(2, log_dir=str(tmp_path / "log"))
    evaluator.run()
    assert capsys.readouterr().err == "" and not (tmp_path / "log").exists()


def test_a_process_without_pairs_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def make() -> RegistrationEvaluator:
        evaluator = RegistrationEvaluator(
            device="cpu",
            val_data_loader=DataLoader(Dataset([]), batch_size=1),
            network=deq_net(ShiftByBrightness(), num_states=0),
            inferer=FixedPointInferer(),
        )
        for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
            evaluator.add_event_handler(event, lambda e, name=event.name: seen.append((name, e.state.epoch)))
        return evaluator

    make().run(3)  # MONAI's way, alone
    assert seen == []
    monkeypatch.setattr("monai_deq.engines.registration.process_count", lambda: 2)
    make().run(3)
    assert seen == [(name, 3) for name in ("STARTED", "EPOCH_STARTED", "EPOCH_COMPLETED", "COMPLETED")]


def test_scores_of_a_validation_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scores = {"dice": MetricHandler(LabelDiceMetric([1]), ["moving_label", "fixed_label"])}
    make_evaluator(2, log_dir=str(tmp_path), key_val_metric=scores).run(3)
    assert scalars(tmp_path) == {"dice": [(3, pytest.approx(0.5 / 3))]}
    assert "Iteration:" not in capsys.readouterr().err
    # of an evaluation there is a progress bar
    make_evaluator(2).run()
    assert "Iteration: [1/2]" in capsys.readouterr().err


def test_further_handlers_of_an_evaluator() -> None:
    seen: list[int] = []

    class Extra:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(e.state.epoch))

    make_evaluator(2, val_handlers=[Extra()]).run(2)
    assert seen == [2]


def test_no_batch_is_refused() -> None:
    evaluator = make_evaluator(2)
    with pytest.raises(ValueError, match="Must provide batch data for current iteration"):
        evaluator._process_function(evaluator, None)


@pytest.mark.parametrize("error", [SystemExit(143), ValueError("a pair")])
def test_an_end_on_a_signal_shows_no_trace(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    def end(engine: Any) -> None:
        raise error

    trainer, _, _ = make_trainer()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), end)
    with pytest.raises(type(error)):
        trainer.run()
    traces = [record for record in caplog.records if record.exc_info]
    assert bool(traces) == isinstance(error, ValueError)
