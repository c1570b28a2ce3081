# SPDX-License-Identifier: Apache-2.0
"""What an inference did to each pair, said at its end."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events
from monai.data import decollate_batch

from monai_deq.transforms import summary_lines
from monai_deq.utils import gather_items, process_rank

__all__ = ["SummaryPrinter"]

_KEPT = ("fixed_subject", "moving_subject", "name", "verdict", "reason", "summary", "files")


class SummaryPrinter:
    """
    When an engine ends, print what :py:class:`monai_deq.transforms.SummarizeRegistrationd` measured of its pairs and
    where :py:class:`monai_deq.transforms.SaveRegistrationd` wrote them. Of several processes the first one prints.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to the engine that registers."""
        engine.add_event_handler(Events.STARTED, self.items.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def iteration_completed(self, engine: Engine) -> None:
        """Keep what is said of this iteration's pairs."""
        output: Any = engine.state.output
        for item in output if isinstance(output, list) else decollate_batch(output):
            self.items.append({key: item[key] for key in _KEPT if key in item})

    def completed(self, engine: Engine) -> None:
        """Print the table."""
        items = gather_items(self.items)
        if items and process_rank() == 0:
            print("\n".join(summary_lines(items)), flush=True)
