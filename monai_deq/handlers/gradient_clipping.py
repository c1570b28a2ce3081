# SPDX-License-Identifier: Apache-2.0
"""Bound the norm of the gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from monai.engines.utils import IterationEvents

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["GradientClipping"]


class GradientClipping:
    """
    Scale the gradient down where its norm is above a bound, after the backward pass and before the optimizer's step;
    where the trainer accumulates gradients, the sum that the step takes.

    An iterated update that is not yet contractive can blow a state up within one iteration; one such gradient would
    fill the second moments of Adam, and training would stand still for hundreds of iterations.

    Args:
        network: the network.
        max_norm: bound on the L2 norm over all parameters; ``None`` is none: a gradient that is not finite is still an
            error.

    Raises:
        ValueError: When ``max_norm`` is not above 0.
    """

    def __init__(self, network: torch.nn.Module, max_norm: float | None) -> None:
        max_norm = math.inf if max_norm is None else max_norm
        if not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, got {max_norm}.")
        self.network = network
        self.max_norm = float(max_norm)

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Clip, in unscaled units also under automatic mixed precision."""
        if not _steps_now(engine):
            return
        scaler: Any = getattr(engine, "scaler", None)
        # without a GPU there is a scaler too, that does nothing
        scaling = scaler is not None and scaler.is_enabled()
        if scaling:
            scaler.unscale_(engine.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
        # under mixed precision the scaler itself skips a step with infinite gradients
        if not scaling and not bool(torch.isfinite(norm)):
            raise RuntimeError(
                f"the gradient is not finite in iteration {engine.state.iteration} of epoch {engine.state.epoch}: "
                "lower the learning rate; --resume true goes on from the last epoch."
            )


def _steps_now(engine: Any) -> bool:
    """Whether MONAI's trainer takes a step in this iteration: each ``accumulation_steps`` one, and an epoch's last."""
    every, length = getattr(engine, "accumulation_steps", 1), engine.state.epoch_length
    number = (engine.state.iteration - 1) % length + 1 if length else engine.state.iteration
    return number % every == 0 or number == length
