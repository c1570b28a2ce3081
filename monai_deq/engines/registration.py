# SPDX-License-Identifier: Apache-2.0
"""MONAI's trainer and evaluator for pairs of images, with the handlers that every registration has."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from ignite.engine import Events
from ignite.handlers import ProgressBar
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import StatsHandler, TensorBoardStatsHandler, from_engine

from monai_deq.data import FAILED_PAIRS, FailedPair, ShardSampler, names_of, pair_names
from monai_deq.engines.batches import PreparePairBatch, PreparePooledPairBatch
from monai_deq.handlers import (
    EpochMeanLoss,
    GradientClipping,
    ListedOutput,
    MetricHandler,
    PairResults,
    SamplerEpochSetter,
    StatePoolUpdater,
    TensorBoardPairHandler,
    WeightsLoader,
)
from monai_deq.networks import describe
from monai_deq.utils import (
    PairsFailedError,
    check_on_error,
    failure_reason,
    gather_items,
    process_count,
    process_rank,
)

__all__ = ["RegistrationEvaluator", "RegistrationTrainer"]

logger = logging.getLogger("monai_deq")


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

    Pairs that a handler of the kind :py:class:`monai_deq.handlers.PairResults` has the results of already are left out.

    Args:
        log_dir: folder of TensorBoard's files, for the validation in a training: metrics, and a picture of one pair
            (:py:class:`monai_deq.handlers.TensorBoardPairHandler`). Defaults to ``None``: a progress bar.
        val_handlers: further handlers. Defaults to none.
        on_error: where a pair fails, in the network or in what comes behind: ``"stop"``, or ``"skip"``: go on with the
            others; with a batch all of its pairs fail. The loader needs the same, see
            :py:func:`monai_deq.data.shard_loader`. Pairs that failed are in ``failed``, and in the log at once; no
            handler sees them. Defaults to ``"stop"``.
        kwargs: of MONAI's evaluator; ``prepare_batch`` defaults to :py:class:`monai_deq.engines.PreparePairBatch`.
    """

    def __init__(
        self, log_dir: str | None = None, val_handlers: Sequence[Any] = (), on_error: str = "stop", **kwargs: Any
    ) -> None:
        check_on_error(on_error)
        self.on_error = on_error
        #: the pairs of this process that failed
        self.failed: list[FailedPair] = []
        #: names of the pairs of the batch under way, none where it has failed, and the handlers that have had it
        self._underway: list[dict[str, str]] = []
        self._had: list[Any] = []
        #: number of pairs whose results are there
        self._there = 0
        self._handlers = list(val_handlers)
        self.metric_handlers: dict[str, MetricHandler] = {
            name: metric
            for kind in ("key_val_metric", "additional_metrics")
            for name, metric in (kwargs.get(kind) or {}).items()
            if isinstance(metric, MetricHandler)
        }
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
        update = _register if on_error == "stop" else _register_or_skip
        super().__init__(iteration_update=update, val_handlers=[*handlers, *val_handlers], **kwargs)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """
        Evaluate all pairs, for an epoch of the training.

        Raises:
            PairsFailedError: When pairs have failed, behind all else; RuntimeError: When all have.
        """
        self.failed = []
        total = self._begin()
        events = [Events.EPOCH_STARTED, Events.EPOCH_COMPLETED] if total != 0 else []
        if self.state.epoch_length == 0 and (process_count() > 1 or total == 0):
            self.state.max_epochs, self.state.epoch, self.state.iteration = max(global_epoch, 1), global_epoch, 0
            for event in (Events.STARTED, *events, Events.COMPLETED):
                self.fire_event(event)
        else:
            super().run(global_epoch)
        if self.on_error == "skip":
            self._report_failed(total)

    def _begin(self) -> int | None:
        """Leave out the pairs whose results are there; how many are left in all processes, ``None`` where no handler
        has results."""
        results = [handler for handler in self._handlers if isinstance(handler, PairResults)]
        if not results:
            return None
        loader: Any = self.data_loader
        names, settings = pair_names(loader.dataset), self._settings()
        found = [handler.begin(self, names, settings) for handler in results]
        # what is there with one of them may be missing with another
        mine = sorted(set().union(*found)) if process_rank() == 0 else []
        left = gather_items(mine)
        self._there = len(names) - len(left)
        if self._there:
            logger.info("%d of %d pairs are there already", self._there, len(names))
        if isinstance(loader.sampler, ShardSampler):
            loader.sampler.share(left)
            self.state.epoch_length = len(loader)
        elif self._there:
            raise ValueError("resume needs the loader of monai_deq.data.shard_loader.")
        return len(left)

    def _settings(self) -> dict[str, Any]:
        """What the results depend on, but for data and preprocessing."""
        weights = [handler.digest() for handler in self._handlers if isinstance(handler, WeightsLoader)]
        said: dict[str, Any] = {"weights": next(iter(weights), None), "amp": bool(self.amp)}
        for name, part in (("network", self.network), ("inferer", vars(self.inferer))):
            try:
                said[name] = describe(part)
            except (TypeError, ValueError):  # of somebody else's
                said[name] = type(getattr(self, name)).__name__
        if said["weights"] and isinstance(said["network"], dict):  # long, and in their record
            text = json.dumps(said["network"], sort_keys=True, default=str)
            solvers = {"solver": said["network"], "coarse_solver": said["network"].get("coarse") or {}}
            said |= {name: net["solver"] for name, net in solvers.items() if "solver" in net}
            said["network"] = hashlib.sha256(text.encode()).hexdigest()[:12]
        return said

    def _report_failed(self, total: int | None) -> None:
        """Say at the end which pairs have failed, by an error, in all processes."""
        failed = gather_items(self.failed)
        if not failed:
            return
        loader: Any = self.data_loader
        total = sum(gather_items([len(loader.sampler)])) if total is None else total  # type: ignore[list-item]
        if process_rank() == 0:
            lines = [f"{len(failed)} of {total} pairs failed; the same with --resume true does these alone:"]
            print("\n".join([*lines, *(f"  {pair}" for pair in failed)]), flush=True)
        if len(failed) == total and not self._there:
            raise RuntimeError(f"all {total} pairs failed, the first one was {failed[0]}")
        raise PairsFailedError(f"{len(failed)} of {total} pairs failed, see above; the others are done.")

    def add_event_handler(self, event_name: Any, handler: Callable, *args: Any, **kwargs: Any) -> Any:
        """As Ignite's; with ``on_error="skip"`` handlers of ``ITERATION_COMPLETED`` do not see pairs that failed, and
        those fail that they cannot treat."""
        if self.on_error == "skip" and event_name == Events.ITERATION_COMPLETED:
            handler = self._attempt(handler)
        return super().add_event_handler(event_name, handler, *args, **kwargs)

    def _attempt(self, handler: Callable) -> Callable:
        @wraps(handler)
        def attempted(*args: Any, **kwargs: Any) -> None:
            if self._underway:
                try:
                    handler(*args, **kwargs)
                except Exception as e:
                    self.fail(e)
                else:
                    self._had.append(getattr(handler, "__self__", handler))

        return attempted

    def start(self, names: Sequence[dict[str, str]], failed: Sequence[FailedPair] = ()) -> None:
        """A batch is under way, of which pairs have failed already."""
        self._underway, self._had = list(names), []
        for pair in failed:
            self._note(pair)

    def fail(self, error: Exception) -> None:
        """The pairs of the batch under way have failed."""
        reason, pairs = failure_reason(error), self._underway
        more = f" (in a batch of {len(pairs)}: --batch_size 1 tells which)" if len(pairs) > 1 else ""
        logger.debug("a batch failed", exc_info=error)
        for names in pairs:
            self._note(FailedPair(names, reason + more))
        for handler in self._had:
            if isinstance(handler, MetricHandler):
                handler.undo()
        self._underway = []

    def _note(self, pair: FailedPair) -> None:
        self.failed.append(pair)
        logger.error("pair failed: %s", pair)


def _register_or_skip(engine: Any, batchdata: dict[str, Any] | None) -> Any:
    """:py:func:`_register` for a batch whose pairs may fail; nothing where they do."""
    batch = dict(batchdata or {})
    failed = batch.pop(FAILED_PAIRS, [])
    engine.state.batch = batch
    engine.start(_names_in(batch), failed)
    try:
        return _register(engine, batch) if batch else []
    except Exception as e:
        engine.fail(e)
        return []


def _names_in(batch: Mapping[str, Any]) -> list[dict[str, str]]:
    """The names of the pairs of a batch."""
    keys = list(names_of(batch))
    rows = [dict(zip(keys, map(str, row), strict=True)) for row in zip(*(batch[k] for k in keys), strict=True)]
    return rows or ([{"name": "a batch"}] if batch else [])


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
