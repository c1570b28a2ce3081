# SPDX-License-Identifier: Apache-2.0
"""Refuse to overwrite results before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ignite.engine import Events

from monai_deq.utils import process_rank, wait_for_all

if TYPE_CHECKING:
    from ignite.engine import Engine

    from monai_deq.transforms import SaveLearn2RegDDFd, SaveRegistrationd

__all__ = ["OutputGuard"]


class OutputGuard:
    """
    When an engine starts, let the writer of its results refuse every item whose files are there already. Of several
    processes the first one sees to the items of all, before any of them writes.

    Args:
        saver: the transform that will write the results.
        data: items with the names that the files are called after.
    """

    def __init__(self, saver: SaveRegistrationd | SaveLearn2RegDDFd, data: Sequence[Mapping[Any, Any]]) -> None:
        self.saver = saver
        self.data = data

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the engine that produces the results.
        """
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Check every item."""
        if process_rank() == 0:
            for item in self.data:
                self.saver.refuse_existing(item)
        wait_for_all()
