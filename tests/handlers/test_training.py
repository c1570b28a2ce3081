# SPDX-License-Identifier: Apache-2.0
"""Handlers of a trainer: gradients clipped in single and in mixed precision, loss and pairs of every epoch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, decollate_batch
from monai.engines import SupervisedTrainer

from monai_deq.data import PairDataset, RandomPairSampler
from monai_deq.handlers import EpochMeanLoss, GradientClipping, ListedOutput, SamplerEpochSetter

SUBJECTS, PAIRS = 6, 5


class Line(torch.nn.Module):
    """``a * x + b``"""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.0))
        self.b = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * x + self.b


class Steepness(torch.nn.Module):
    """Loss whose gradient is known: with respect to a the mean of x * y, to b the mean of y."""

    def forward(self, prediction: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (prediction * y).mean()


def train(
    max_norm: float | None, gradient: tuple[float, float], amp: bool = False
) -> tuple[list[float], SupervisedTrainer]:
    """Gradients that the optimizer gets to see when the loss's is ``gradient``."""
    network = Line()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    x, y = gradient[0] / gradient[1], gradient[1]
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend([network.a.grad.item(), network.b.grad.item()]))
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[{"image": torch.tensor([[x]]), "label": torch.tensor([[y]])}],
        network=network,
        optimizer=optimizer,
        loss_function=Steepness(),
        decollate=False,
        train_handlers=[GradientClipping(network, max_norm)],
        amp=amp,
    )
    trainer.run()
    return seen, trainer


@pytest.mark.parametrize(
    ("max_norm", "gradient", "expected"),
    [
        (1.0, (3.0, 4.0), (0.6, 0.8)),
        (2.5, (-3.0, 4.0), (-1.5, 2.0)),
        (5.1, (3.0, 4.0), (3.0, 4.0)),  # below the bound nothing changes
        (None, (300.0, 4.0), (300.0, 4.0)),
    ],
)
@pytest.mark.parametrize("amp", [False, True])
def test_gradient_of_the_step(
    monkeypatch: pytest.MonkeyPatch, amp: bool, max_norm: float | None, gradient: Any, expected: Any
) -> None:
    # the scaler multiplies the gradient; the bound is on what is left when that is undone
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=1024.0))
    seen, trainer = train(max_norm, gradient, amp)
    assert (trainer.scaler is not None) == amp
    assert seen == pytest.approx(expected, rel=1e-4)
    assert trainer.network.a.item() == pytest.approx(-expected[0], rel=1e-4)


def train_on(
    labels: list[float], accumulation_steps: int = 1, scaler: bool = False, epochs: int = 1, **settings: Any
) -> tuple[SupervisedTrainer, list[list[torch.Tensor]]]:
    """A trainer by AdamW with weight decay, whose labels are its gradients, and the weights after each iteration."""
    network = Line()
    with torch.no_grad():
        network.a.fill_(0.3)
    weights: list[list[torch.Tensor]] = [[p.detach().clone() for p in network.parameters()]]
    names = [{"fixed_subject": [f"f{i}"], "moving_subject": [f"m{i}"]} for i in range(len(labels))]
    pairs = [{"image": torch.ones(1, 1), "label": torch.full((1, 1), y)} for y in labels]
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=[{**pair, **name} for pair, name in zip(pairs, names, strict=True)],
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1),
        loss_function=Steepness(),
        decollate=False,
        accumulation_steps=accumulation_steps,
        train_handlers=[EpochMeanLoss(), GradientClipping(network, **{"max_norm": 1.0, **settings})],
        amp=scaler,
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: weights.append([p.detach().clone() for p in network.parameters()])
    )
    return trainer, weights


def moved(weights: list[list[torch.Tensor]]) -> list[bool]:
    return [
        any(not torch.equal(p, q) for p, q in zip(a, b, strict=True))
        for a, b in zip(weights[:-1], weights[1:], strict=True)
    ]


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("scaler", "max_norm"), [(False, 1.0), (False, None), (True, 1.0)])
def test_step_that_is_not_finite_is_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: float, scaler: bool, max_norm: float | None
) -> None:
    # without a GPU a scaler does nothing, and does not skip such a step either
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", enabled=False))
    trainer, weights = train_on([1.0, bad, 2.0], scaler=scaler, max_norm=max_norm)
    trainer.run()
    assert moved(weights) == [True, False, True] and bool(torch.isfinite(torch.stack(weights[-1])).all())
    assert trainer.state.metrics["skipped_steps"] == 1
    # the moments of the optimizer have not seen it: as a training without it, but for the norm's rounding
    other, without = train_on([1.0, 2.0], scaler=scaler, max_norm=max_norm)
    other.run()
    torch.testing.assert_close(weights[-1], without[-1], rtol=0, atol=0)
    assert trainer.state.metrics["train_loss"] == pytest.approx(other.state.metrics["train_loss"])
    assert "skipped_steps" not in other.state.metrics
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any("iteration 2 of epoch 1 (fixed and moving: f1 and m1): this step is skipped" in line for line in said)
    assert any("mean over 2 iterations; the loss of 1 is not finite" in line for line in said)


def test_skipped_with_what_it_accumulated(caplog: pytest.LogCaptureFixture) -> None:
    # steps after iterations 2, 4 and, at the end of the epoch, 5
    trainer, weights = train_on([float("nan"), 1.0, 1.0, 2.0, float("inf")], accumulation_steps=2)
    trainer.run()
    assert moved(weights) == [False, False, False, True, False]
    assert trainer.state.metrics["skipped_steps"] == 2
    assert "(fixed and moving: f0 and m0, f1 and m1)" in caplog.text and "moving: f4 and m4)" in caplog.text
    assert "f2" not in caplog.text


@pytest.mark.parametrize("limit", [0, 3, 10])
def test_too_many_skipped_in_a_row_stop_the_training(limit: int) -> None:
    bad = float("nan")
    trainer, weights = train_on([bad] * limit + [1.0] + [bad] * (limit + 2), max_skipped=limit)
    message = (
        rf"iteration {2 * limit + 2} of epoch 1 .*{limit + 1} steps in a row.*before these.*--resume true, without"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer.run()
    now = [p.detach() for p in trainer.network.parameters()]
    assert moved([*weights, now]) == [False] * limit + [True] + [False] * (limit + 1)
    assert trainer.state.metrics["skipped_steps"] == 2 * limit + 1


def test_ten_in_a_row_are_the_default() -> None:
    trainer, _ = train_on([float("nan")] * 10)
    trainer.run()
    assert trainer.state.metrics["skipped_steps"] == 10
    trainer, _ = train_on([float("nan")] * 11)
    with pytest.raises(RuntimeError, match="11 steps in a row"):
        trainer.run()


def test_scaler_that_has_no_scale_left_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=4.0))
    trainer, weights = train_on([float("nan")] * 8, scaler=True, max_skipped=2)
    # scales 4, 2 are left to the scaler; 1, 0.5, 0.25 are too many
    with pytest.raises(RuntimeError, match="iteration 5 of epoch 1"):
        trainer.run()
    assert not any(moved(weights))


def test_scaler_skips_a_step_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=1024.0))
    seen, trainer = train(1.0, (1.0, float("inf")), amp=True)
    assert seen == [] and trainer.network.a.item() == 0
    assert trainer.scaler.get_scale() == 512.0


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_bound_must_be_positive(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        GradientClipping(Line(), max_norm)
    with pytest.raises(ValueError, match="max_skipped must be at least 0"):
        GradientClipping(Line(), 1.0, max_skipped=-1)


@pytest.mark.parametrize("amp", [False, True])
def test_the_sum_of_accumulated_gradients_is_clipped_once(monkeypatch: pytest.MonkeyPatch, amp: bool) -> None:
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=1024.0))
    network = Line()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(network.b.grad.item()))
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=[{"image": torch.zeros(1, 1), "label": torch.full((1, 1), y)} for y in (8.0, -7.0, 3.0)],
        network=network,
        optimizer=optimizer,
        loss_function=Steepness(),
        decollate=False,
        accumulation_steps=2,
        train_handlers=[GradientClipping(network, 1.0)],
        amp=amp,
    )
    trainer.run()
    # (8 - 7) / 2, and what an epoch has left over, 3 / 2
    assert seen == pytest.approx([0.5, 1.0] * 2, rel=1e-4)


@pytest.mark.parametrize("name", ["train_loss", "loss_of_the_epoch"])
def test_mean_of_each_epoch(name: str) -> None:
    losses = iter([1.0, 2.0, 6.0, -1.0, 0.25, 3.0])
    engine = Engine(lambda engine, batch: {"loss": torch.tensor(next(losses), requires_grad=True), "pred": None})
    EpochMeanLoss(**({} if name == "train_loss" else {"name": name})).attach(engine)
    means: list[float] = []
    # a logger that is attached later finds the mean of the epoch that ends
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: means.append(e.state.metrics[name]))
    engine.run([0] * 3, max_epochs=2)
    assert means == pytest.approx([3.0, 0.75])


@pytest.mark.parametrize("bad", BAD)
def test_mean_over_what_is_finite(bad: float) -> None:
    engine = Engine(lambda engine, batch: {"loss": torch.tensor(batch)})
    EpochMeanLoss().attach(engine)
    assert engine.run([1.0, bad, 2.0]).metrics["train_loss"] == 1.5
    assert math.isnan(engine.run([bad, bad]).metrics["train_loss"])


def test_decollated_output_of_a_trainer() -> None:
    engine = Engine(lambda engine, batch: decollate_batch({"image": torch.zeros(2, 1, 4), "loss": torch.tensor(batch)}))
    EpochMeanLoss().attach(engine)
    assert engine.run([1.0, 4.0]).metrics["train_loss"] == 2.5


def test_listed_output() -> None:
    engine = Engine(lambda engine, batch: batch)
    ListedOutput().attach(engine)
    assert engine.run([{"loss": 1.0}]).output == [{"loss": 1.0}]
    assert engine.run([[{"loss": 1.0}]]).output == [{"loss": 1.0}]


def expected(epoch: int) -> list[tuple[str, str]]:
    sampler = RandomPairSampler(SUBJECTS, PAIRS, seed=11)
    sampler.set_epoch(epoch)
    return [(str(f), str(m)) for f, m in sampler]


@pytest.mark.parametrize(
    ("workers", "first"),
    [({}, 1), ({"num_workers": 1}, 3), ({"num_workers": 1, "persistent_workers": True}, 1)],
)
def test_pairs_of_every_epoch(workers: dict[str, Any], first: int) -> None:
    subjects = [{"subject": str(i), "image": torch.zeros(1, 2, 2)} for i in range(SUBJECTS)]
    sampler = RandomPairSampler(SUBJECTS, PAIRS, seed=11)
    loader = DataLoader(PairDataset(subjects), sampler=sampler, batch_size=2, **workers)
    drawn: dict[int, list[tuple[str, str]]] = {}

    def iteration(engine: Engine, batch: dict[str, Any]) -> None:
        drawn.setdefault(engine.state.epoch, []).extend(
            zip(batch["fixed_subject"], batch["moving_subject"], strict=True)
        )

    engine = Engine(iteration)
    SamplerEpochSetter(sampler).attach(engine)

    @engine.on(Events.STARTED)
    def resume(engine: Engine) -> None:
        # as a checkpoint does
        engine.state.epoch, engine.state.iteration = first - 1, (first - 1) * len(loader)

    engine.run(loader, max_epochs=4)
    assert drawn == {epoch: expected(epoch) for epoch in range(first, 5)}
    assert expected(1) != expected(2) != expected(3) != expected(4)
