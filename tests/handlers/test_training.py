# SPDX-License-Identifier: Apache-2.0
"""Handlers of a trainer: gradients clipped in single and in mixed precision, loss and pairs of every epoch."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("bad", "enabled", "max_norm"),
    [(float("nan"), None, 1.0), (float("inf"), None, None), (float("nan"), False, None), (float("inf"), False, 1.0)],
)
def test_non_finite_gradient_stops_the_training(
    monkeypatch: pytest.MonkeyPatch, max_norm: float | None, bad: float, enabled: bool | None
) -> None:
    # without a GPU a scaler does nothing, and does not skip such a step either
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(RuntimeError, match="gradient is not finite in iteration 1 of epoch 1.*--resume true"):
        train(max_norm, (1.0, bad), amp=enabled is not None)


def test_scaler_skips_a_step_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=1024.0))
    seen, trainer = train(1.0, (1.0, float("inf")), amp=True)
    assert seen == [] and trainer.network.a.item() == 0
    assert trainer.scaler.get_scale() == 512.0


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_bound_must_be_positive(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        GradientClipping(Line(), max_norm)


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


def test_nan_shows() -> None:
    engine = Engine(lambda engine, batch: {"loss": torch.tensor(batch)})
    EpochMeanLoss().attach(engine)
    assert torch.isnan(torch.tensor(engine.run([1.0, float("nan"), 2.0]).metrics["train_loss"]))


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
