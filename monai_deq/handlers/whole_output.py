# SPDX-License-Identifier: Apache-2.0
"""Metric handlers that get the output of an iteration in one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from monai.handlers import IgniteMetricHandler

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["WholeOutputMetricHandler"]


class WholeOutputMetricHandler(IgniteMetricHandler):
    """
    Base of the handlers that hand what ``output_transform`` returns to ``update`` as it is. Ignite's own method would
    deal out sequences before ``update`` sees them.
    """

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """
        Score the output of an iteration.

        Args:
            engine: the engine whose ``state.output`` goes through ``output_transform``.
        """
        self.update(self._output_transform(engine.state.output))
