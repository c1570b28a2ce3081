# SPDX-License-Identifier: Apache-2.0
"""Tell a sampler which epoch begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ignite.engine import Events

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["SamplerEpochSetter"]


class SamplerEpochSetter:
    """
    Call ``sampler.set_epoch(epoch)`` before each epoch; MONAI's engines do so for distributed samplers only.

    Args:
        sampler: object with ``set_epoch``.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        # a data loader with workers draws its first indices when it is made, which may be before the epoch's own event
        engine.add_event_handler(Events.STARTED, lambda e: self.sampler.set_epoch(e.state.epoch + 1))
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self.sampler.set_epoch(e.state.epoch))
