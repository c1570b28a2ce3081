# SPDX-License-Identifier: Apache-2.0
"""Write the states of an iteration back into the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ignite.engine import Events
from monai.utils import CommonKeys

from monai_deq.data import StatePool

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["StatePoolUpdater"]


class StatePoolUpdater:
    """
    After each iteration of a trainer keep where its pairs stand, see :py:class:`monai_deq.data.StatePool`. The trainer
    must not decollate its output.

    Args:
        pool: the pool that :py:class:`monai_deq.engines.PreparePooledPairBatch` takes the states from.
    """

    def __init__(self, pool: StatePool) -> None:
        self.pool = pool

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Keep the displacements of this iteration."""
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        self.pool.put(batch["slot"].tolist(), batch["ticket"].tolist(), output[CommonKeys.PRED][1])
