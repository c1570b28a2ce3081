# SPDX-License-Identifier: Apache-2.0
"""EpochMeanLoss: the mean over the iterations of an epoch, each epoch anew."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import decollate_batch

from monai_deq.handlers import EpochMeanLoss


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
