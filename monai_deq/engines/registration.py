# SPDX-License-Identifier: Apache-2.0
"""MONAI's trainer and evaluator for pairs of images, with the handlers that every registration has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Events
from ignite.handlers import ProgressBar
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import StatsHandler, TensorBoardStatsHandler, from_engine

from monai_deq.engines.batches import PreparePairBatch, PreparePooledPairBatch
from monai_deq.handlers import (
    EpochMeanLoss,
    GradientClipping,
    ListedOutput,
    SamplerEpochSetter,
    StatePoolUpdater,
    TensorBoardPairHandler,
)
from monai_deq.utils import process_count, process_rank

__all__ = ["RegistrationEvaluator", "RegistrationTrainer"]


class _Statistics(StatsHandler):
    """MONAI's, that takes the end on a signal for no error: what was said of it stays in sight, without a trace."""

    def exception_raised(self, _engine: Any, e: BaseException) -> None:  # type: ignore[override]
        if isinstance(e, SystemExit):
            raise e
        super().exception_raised(_engine, e)  # type: ignore[arg-type]


class RegistrationTrainer(SupervisedTrainer):
    """:py:class:`monai.engines.SupervisedTrainer` for pairs that may stay in a pool, with the mean loss of each epoch,
    gradient clipping, progress and log: what the first of several processes shows.

    Args:
        prepare_batch: makes a batch the network's arguments; its pool is kept up to date.
        clip_norm: see :py:class:`monai_deq.handlers.GradientClipping`. Defaults to 1.
        log_dir: folder of TensorBoard's files. Defaults to ``None``: none.
        train_handlers: further handlers; ``None`` among them is passed over. Defaults to none.
        kwargs: of MONAI's trainer; the network may have ``DistributedDataParallel`` around it.
    """

    def __init__(
        self,
        prepare_batch: PreparePooledPairBatch,
        clip_norm: float | None = 1.0,
        log_dir: str | None = None,
        train_handlers: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        handlers = [
            SamplerEpochSetter(kwargs["train_data_loader"].sampler),
            EpochMeanLoss(),
            *([StatePoolUpdater(prepare_batch.pool)] if prepare_batch.rest.pool_renewal < 1 else []),
            ListedOutput(),
            GradientClipping(kwargs["network"], clip_norm),
        ]
        if process_rank() == 0:
            handlers += [ProgressBar(ncols=100), _Statistics(iteration_log=False, tag_name="train_loss")]
            if log_dir is not None:
                loss = from_engine(["loss"], first=True)
                handlers.append(TensorBoardStatsHandler(log_dir=log_dir, tag_name="train_loss", output_transform=loss))
        handlers += [handler for handler in train_handlers if handler is not None]
        super().__init__(prepare_batch=prepare_batch, train_handlers=handlers, decollate=False, **kwargs)


class RegistrationEvaluator(SupervisedEvaluator):
    """:py:class:`monai.engines.SupervisedEvaluator` for pairs. The output of an iteration is one flat dictionary: the
    items of the batch (images, label maps, names) with what the inferer returned beside them, so that postprocessing
    transforms and metrics find ``ddf``, ``warped``, ``fixed_label``, ... by key. Of several processes one that has no
    pair takes part in what its handlers do before and after the pairs; MONAI's own leaves it out, and the others wait
    for it.

    Args:
        log_dir: folder of TensorBoard's files, for the validation in a training: metrics, and a picture of one pair
            (:py:class:`monai_deq.handlers.TensorBoardPairHandler`). Defaults to ``None``: a progress bar.
        val_handlers: further handlers. Defaults to none.
        kwargs: of MONAI's evaluator; ``prepare_batch`` defaults to :py:class:`monai_deq.engines.PreparePairBatch`.
    """

    def __init__(self, log_dir: str | None = None, val_handlers: Sequence[Any] = (), **kwargs: Any) -> None:
        handlers: list[Any] = []
        if process_rank() == 0 and log_dir is not None:
            handlers += [
                StatsHandler(iteration_log=False),
                TensorBoardStatsHandler(log_dir=log_dir, iteration_log=False),
                TensorBoardPairHandler(log_dir),
            ]
        elif process_rank() == 0:
            handlers.append(ProgressBar(ncols=100))
        kwargs.setdefault("prepare_batch", PreparePairBatch())
        super().__init__(iteration_update=_register, val_handlers=[*handlers, *val_handlers], **kwargs)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Evaluate all pairs, for an epoch of the training."""
        if self.state.epoch_length == 0 and process_count() > 1:
            self.state.max_epochs, self.state.epoch, self.state.iteration = max(global_epoch, 1), global_epoch, 0
            for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
                self.fire_event(event)
        else:
            super().run(global_epoch)


def _register(engine: Any, batchdata: dict[str, Any] | None) -> dict[str, Any]:
    if batchdata is None:
        raise ValueError("Must provide batch data for current iteration.")
    moving, _, args, kwargs = engine.prepare_batch(
        batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs
    )
    output: dict[str, Any] = dict(batchdata)
    engine.state.output = output
    with engine.mode(engine.network), torch.autocast(moving.device.type, enabled=engine.amp, **engine.amp_kwargs):
        output.update(engine.inferer(moving, engine.network, *args, **kwargs))
    engine.fire_event(IterationEvents.FORWARD_COMPLETED)
    engine.fire_event(IterationEvents.MODEL_COMPLETED)
    return engine.state.output  # type: ignore[no-any-return]  # what postprocessing made of it
