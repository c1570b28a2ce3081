# SPDX-License-Identifier: Apache-2.0
"""Output of a trainer in the form that MONAI's loggers look for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ignite.engine import Events

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["ListedOutput"]


class ListedOutput:
    """
    After each iteration of a trainer that does not decollate, put its output into a list of one.

    MONAI's loggers, that of ``--tracking mlflow`` above all, whose settings are MONAI's own, take the loss from the
    first item of a decollated output, ``from_engine(["loss"], first=True)``; of a dictionary they would log a tuple.
    Decollating itself would take apart what the pool of states keeps by batch. Attach it after the handlers that read
    the output as a dictionary, such as :py:class:`monai_deq.handlers.StatePoolUpdater`, and before the loggers.
    """

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Make it a list."""
        state: Any = engine.state
        if not isinstance(state.output, list):
            state.output = [state.output]
