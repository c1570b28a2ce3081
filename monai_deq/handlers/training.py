# SPDX-License-Identifier: Apache-2.0
"""Small handlers of a trainer: loss of an epoch, gradients, sampler, pool of states."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys

from monai_deq.utils import mean_over_processes, process_count

if TYPE_CHECKING:
    from monai_deq.data import StatePool

__all__ = ["EpochMeanLoss", "GradientClipping", "ListedOutput", "SamplerEpochSetter", "StatePoolUpdater"]

logger = logging.getLogger("monai_deq")


class EpochMeanLoss:
    """
    Put the mean loss over the iterations of an epoch into ``engine.state.metrics`` as ``name``. Attach it before the
    loggers. Of several processes, whose batches are of one size, it is the mean over all of them, and so is the loss
    that each iteration leaves in ``engine.state.output``. Losses that are not finite are left out, with a warning; it
    is NaN where no other is there.
    """

    def __init__(self, name: str = "train_loss") -> None:
        self.name, self.total, self.count, self.left_out = name, 0.0, 0, 0

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def reset(self, engine: Engine) -> None:
        """Begin an epoch."""
        self.total, self.count, self.left_out = 0.0, 0, 0

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
        value = torch.as_tensor(loss).item()
        if math.isfinite(value):
            self.total += value
            self.count += 1
        else:
            self.left_out += 1

    def epoch_completed(self, engine: Engine) -> None:
        """Set the mean."""
        if self.left_out:
            logger.warning(
                f"{self.name} of epoch {engine.state.epoch} is the mean over {self.count} iterations; the loss of "
                f"{self.left_out} is not finite."
            )
        engine.state.metrics[self.name] = self.total / self.count if self.count else math.nan


class GradientClipping:
    """
    Scale the gradient that MONAI's trainer takes a step with (the sum, where it accumulates) down to a bound: an update
    that is not yet contractive can blow a state up, and one such gradient would fill the second moments of Adam.

    A step whose gradient is not finite is skipped: weights and optimizer stay as they are, a warning names the pairs,
    and ``engine.state.metrics["skipped_steps"]`` counts. Of several processes, whose gradients are averaged, all skip.

    Args:
        network: the network.
        max_norm: bound above 0 on the L2 norm over all parameters. None is none, but that it be finite.
        max_skipped: steps in a row that may be skipped; one more raises ``RuntimeError``. Defaults to 10.
    """

    def __init__(self, network: torch.nn.Module, max_norm: float | None, max_skipped: int = 10) -> None:
        max_norm = math.inf if max_norm is None else max_norm
        if not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, got {max_norm}.")
        if max_skipped < 0:
            raise ValueError(f"max_skipped must be at least 0, got {max_skipped}.")
        self.network, self.max_norm, self.max_skipped = network, float(max_norm), max_skipped
        self.skipped, self.pairs = 0, list[str]()

    def attach(self, engine: Engine) -> None:
        """Attach to a :py:class:`monai.engines.SupervisedTrainer`."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Clip, in unscaled units also under automatic mixed precision."""
        batch = engine.state.batch
        if isinstance(batch, Mapping) and {"fixed_subject", "moving_subject"} <= set(batch):
            names = zip(batch["fixed_subject"], batch["moving_subject"], strict=True)
            self.pairs += [f"{fixed} and {moving}" for fixed, moving in names]
        # as the trainer: a step each `accumulation_steps` iterations, and at an epoch's last
        length = engine.state.epoch_length
        number = (engine.state.iteration - 1) % length + 1 if length else engine.state.iteration
        if number % engine.accumulation_steps and number != length:
            return
        pairs, self.pairs = self.pairs, []
        # without a GPU there is a scaler too, that does nothing
        scaling = engine.scaler is not None and engine.scaler.is_enabled()
        if scaling:
            engine.scaler.unscale_(engine.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
        if torch.isfinite(norm):
            self.skipped = 0
        # under mixed precision the scaler itself skips a step that its scale, down to 1, may have made infinite
        elif not scaling or engine.scaler.get_scale() <= 1:
            self._skip(engine, pairs)

    def _skip(self, engine: Any, pairs: list[str]) -> None:
        # an optimizer leaves alone what has no gradient, without weight decay or momentum
        self.network.zero_grad(set_to_none=True)
        engine.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        metrics, where = engine.state.metrics, f"iteration {engine.state.iteration} of epoch {engine.state.epoch}"
        metrics["skipped_steps"] = metrics.get("skipped_steps", 0) + 1
        of = f" (fixed and moving: {', '.join(pairs)})" if pairs else ""
        if self.skipped > self.max_skipped:
            raise RuntimeError(
                f"the gradient is not finite in {where}{of}, {self.skipped} steps in a row: the training stops with "
                "the weights as they were before these. --resume true, without --overwrite, goes on from the last "
                "epoch; a lower --learning_rate needs a start from its weights, --weights and another --bundle_root."
            )
        logger.warning(f"the gradient is not finite in {where}{of}: this step is skipped.")


class ListedOutput:
    """
    After each iteration of a trainer that does not decollate, put its output into a list of one: MONAI's loggers
    (``--tracking mlflow``) take the loss from its first item. Attach it after handlers that read a dictionary.
    """

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        if not isinstance(state.output, list):
            state.output = [state.output]


class _EpochSampler(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


class SamplerEpochSetter:
    """Call ``sampler.set_epoch(epoch)`` before each epoch; MONAI's engines do so for distributed samplers only."""

    def __init__(self, sampler: _EpochSampler) -> None:
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        # Ignite takes a new iterator of the data loader, with workers or without, only after this event
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self.sampler.set_epoch(e.state.epoch))


class StatePoolUpdater:
    """
    After each iteration of a trainer that does not decollate keep where its pairs stand, in the pool that
    :py:class:`monai_deq.engines.PreparePooledPairBatch` takes the states from.
    """

    def __init__(self, pool: StatePool) -> None:
        self.pool = pool

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        output, batch = state.output, state.batch
        self.pool.put(batch["slot"].tolist(), batch["ticket"].tolist(), output[CommonKeys.PRED][1])
