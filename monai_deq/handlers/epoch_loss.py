# SPDX-License-Identifier: Apache-2.0
"""Mean training loss of each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ignite.engine import Events
from monai.utils import CommonKeys

from monai_deq.utils import mean_over_processes, process_count

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["EpochMeanLoss"]


class EpochMeanLoss:
    """
    Put the mean loss over the iterations of an epoch into ``engine.state.metrics``, where the loggers find it. Attach
    it before them.

    Of several processes, whose batches are of one size, it is the mean over all of them, and so is the loss that each
    iteration leaves in ``engine.state.output``.

    Args:
        name: name of the metric. Defaults to ``"train_loss"``.
    """

    def __init__(self, name: str = "train_loss") -> None:
        self.name = name
        self.total = 0.0
        self.count = 0

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def reset(self, engine: Engine) -> None:
        """Begin an epoch."""
        self.total, self.count = 0.0, 0

    def iteration_completed(self, engine: Engine) -> None:
        """Add the loss of an iteration."""
        # one dictionary, or with MONAI's decollate=True one for each item, all of them with the loss of the batch
        output: Any = engine.state.output
        items = output if isinstance(output, list) else [output]
        loss = items[0][CommonKeys.LOSS]
        if process_count() > 1:
            loss = mean_over_processes(loss)
            for item in items:
                item[CommonKeys.LOSS] = loss
        self.total += loss.item() if hasattr(loss, "item") else float(loss)
        self.count += 1

    def epoch_completed(self, engine: Engine) -> None:
        """Set the mean."""
        engine.state.metrics[self.name] = self.total / max(self.count, 1)
