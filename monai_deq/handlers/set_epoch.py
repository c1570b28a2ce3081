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
        # Ignite takes a new iterator of the data loader, with workers or without, only after this event
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self.sampler.set_epoch(e.state.epoch))
