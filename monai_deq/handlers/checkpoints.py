# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training that appear whole, resume exactly, and are not overwritten unasked."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint

from monai_deq.networks import NetworkRecord, describe, load_checkpoint, load_weights, read_record, save_checkpoint
from monai_deq.networks.nets import IteratedNet
from monai_deq.utils import (
    check_writable,
    gather_items,
    lock_folder,
    mean_over_processes,
    process_count,
    process_rank,
    refuse_existing,
    unlock_folder,
    wait_for_all,
)

__all__ = ["TrainingCheckpoint", "WeightsLoader"]

_OWN = {"network", "averaged", "scaler", "training"}
#: where the learning rate schedules of PyTorch and MONAI keep their length
_SCHEDULE_LENGTHS = ("total_iters", "total_steps", "T_max", "t_total")


class TrainingCheckpoint:
    """
    After each epoch writes ``last.pt`` by Ignite's :py:class:`ignite.handlers.Checkpoint`, all that is needed to go on
    (network, optimizer and what else is named, state of the trainer and of its gradient scaler, best validation score,
    random state of the CPU), and, when the validation score is the best so far, ``model.pt``, the weights of the
    network or of its running mean, with their record ``model.json``, see :py:class:`monai_deq.networks.NetworkRecord`.

    Unlike with :py:class:`monai.handlers.CheckpointSaver` files are put into place whole, the best score survives a
    resume, and a folder that holds a checkpoint is not written to unless asked. In the middle of a learning rate
    schedule a training is not resumed with one of another length. Place it after the validation handler and the one
    that steps the learning rate. Of several processes the first one writes and all read: the folder must be shared.
    ``state_dict`` of the objects is called in all of them, so that it may gather what each has.

    SIGTERM and Ctrl-C end the process (``SystemExit``) behind the step under way, with a checkpoint in the middle of
    the epoch, from which a training goes on as if it had not been stopped; a second one ends it at once.

    Args:
        save_dir: folder of the checkpoints.
        network: the network, without ``DistributedDataParallel`` around it.
        objects: other objects with ``state_dict``/``load_state_dict``, by name (optimizer, scheduler).
        validator: engine whose key metric decides on ``model.pt``; without one the last epoch is the best.
        resume: go on from ``last.pt`` where there is one.
        overwrite: start anew over an existing checkpoint.
        weights: checkpoint whose weights the network starts from, when it does not resume.
        coarse_weights: checkpoint that the coarser networks have their weights from already; ``weights`` leave them.
        averaged: running mean of the network, such as ``ema_model`` of :py:class:`ignite.handlers.EMAHandler`: it
            starts from the same weights, and ``model.pt`` has its weights. The validator should score it.
        record: fields of the record but the network's own; ``TypeError`` for what JSON does not know. Those that are
            others than the training began with are named in a warning when it is resumed.

    Raises:
        ValueError: When both ``resume`` and ``overwrite`` are asked for, or a name in ``objects`` is one of the
            checkpoint's own; when a training starts with coarser networks that nothing has trained.
    """

    def __init__(
        self,
        save_dir: str | Path,
        network: torch.nn.Module,
        objects: Mapping[str, Any] | None = None,
        validator: Engine | None = None,
        resume: bool = False,
        overwrite: bool = False,
        weights: str | Path | None = None,
        coarse_weights: str | Path | None = None,
        averaged: torch.nn.Module | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other.")
        self.resume, self.overwrite = resume, overwrite
        self.last_path, self.best_path = Path(save_dir) / "last.pt", Path(save_dir) / "model.pt"
        self.network, self.averaged, self.validator = network, averaged, validator
        self.weights, self.coarse_weights = weights, coarse_weights
        self.objects = dict(objects or {})
        if taken := _OWN & set(self.objects):
            raise ValueError(f"objects must not be called {sorted(taken)}: the checkpoint has entries of that name.")
        self.logger = logging.getLogger("monai_deq")
        try:
            description = describe(network)
        except (TypeError, ValueError) as e:
            self.logger.warning(f"the record of the weights will not have their network: {e}")
            description = None
        self.record = NetworkRecord(network=description, **describe(dict(record or {})))
        #: the signal that has come
        self.stopped_by: int | None = None
        self._handlers: dict[int, Any] = {}
        self._rng_state: torch.Tensor | None = None
        #: what the weights that the training starts from have been trained on
        self.earlier_pairs = 0

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.get_batch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def _started(self, engine: Engine) -> None:
        try:
            self.started(engine)
        except Exception:  # nothing has begun: the folder is free, and Ctrl-C what it was
            self._restore_signals()
            if process_rank() == 0:
                unlock_folder(self.last_path.parent)
            raise

    def started(self, engine: Engine) -> None:
        """Resume, or make sure that nothing is overwritten unasked; and that there will be checkpoints."""
        if len(set(gather_items([self.last_path.is_file()]))) > 1:
            raise FileNotFoundError(
                f"{self.last_path} is seen by some of the processes alone: name a --ckpt_dir that all of them share."
            )
        if process_rank() == 0:  # the one that writes
            check_writable(self.last_path.parent)
            self.last_path.parent.mkdir(parents=True, exist_ok=True)
            lock_folder(self.last_path.parent, "training")
        self.stopped_by = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._signal)
        if self.resume and self.last_path.is_file():
            self._load(engine)
            return
        if not self.overwrite:
            advice = "Start over with --overwrite true, or name another --ckpt_dir."
            if self.last_path.is_file():
                advice = f"Go on with --resume true. {advice}"
            elif self.resume:
                advice = f"There is no {self.last_path.name} beside it to resume from. {advice}"
            refuse_existing([self.last_path, self.best_path], advice)
        if self.resume:
            self.logger.info(f"nothing to resume in {self.last_path.parent}: training starts from the beginning")
        coarse = self.network.coarse if isinstance(self.network, IteratedNet) else None
        if coarse is not None and not (self.weights or self.coarse_weights):
            # they are not trained with the finest one, and would stay what chance has made of them
            raise ValueError(
                "coarser_levels needs the coarser networks trained: give --coarse_weights, the model.pt of a training "
                "at half the size."
            )
        if self.weights:
            self.earlier_pairs = _pairs_behind(self.weights)
            load_weights(self.network, self.weights, without="coarse." if self.coarse_weights else None)
            if self.averaged is not None:
                self.averaged.load_state_dict(self.network.state_dict())
            self.logger.info(f"training starts from the weights in {self.weights}")
        if process_rank() == 0:
            self._finish_staged(None)
            # else a resume would go on with the earlier training, where this one is stopped in its first epoch
            self.last_path.unlink(missing_ok=True)
        wait_for_all()

    def _load(self, engine: Engine) -> None:
        checkpoint = load_checkpoint(self.last_path)
        try:
            self._go_on(engine, checkpoint)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as e:
            if str(self.last_path) in str(e):
                raise
            said = " ".join(str(e).split())
            words = "cannot be resumed from: a part of it is not what a training writes"
            raise ValueError(f"{self.last_path} {words} ({type(e).__name__}: {said}).") from e

    def _go_on(self, engine: Engine, checkpoint: Mapping[str, Any]) -> None:
        """Give everything the state it has in a checkpoint."""
        if absent := (_OWN | set(self.objects)) - set(checkpoint):
            raise ValueError(f"{self.last_path} cannot be resumed from: it has no {sorted(absent)}.")
        training = checkpoint["training"]
        if process_rank() == 0:
            self._finish_staged(training["epoch"])
        wait_for_all()
        if training["epoch_length"] != engine.state.epoch_length:
            raise ValueError(
                f"{self.last_path} was trained with {training['epoch_length']} iterations an epoch, this run has "
                f"{engine.state.epoch_length}: resume with the same pairs_per_epoch and batch_size."
            )
        epochs_left = training["epoch"] < (engine.state.max_epochs or 0)
        if epochs_left:
            self._refuse_other_schedule(checkpoint)
        load_weights(self.network, self.last_path)
        if self.averaged is not None:
            # begun without a mean: from here on
            self.averaged.load_state_dict(checkpoint["averaged"] or self.network.state_dict())
        Checkpoint.load_objects(self.objects, {name: checkpoint[name] for name in self.objects})
        scaler = getattr(engine, "scaler", None)
        # a scaler that is not in use, or was not when the checkpoint was written, has nothing to say
        if scaler is not None and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        self.earlier_pairs = training["earlier_pairs"]
        engine.state.epoch, engine.state.iteration = training["epoch"], training["iteration"]
        if self.validator is not None and training["best_epoch"] >= 0:
            if self.best_path.is_file():
                state: Any = self.validator.state
                state.best_metric, state.best_metric_epoch = training["best_metric"], training["best_epoch"]
            else:
                self.logger.warning(f"{self.best_path} is gone: the best score is counted from here on anew")
        torch.set_rng_state(training["rng_state"].cpu())
        behind = f"epoch {training['epoch']}"
        if done := training["iteration"] % training["epoch_length"]:
            behind = f"iteration {done} of epoch {training['epoch'] + 1}"
            loader: Any = engine.data_loader  # type: ignore[attr-defined]
            loader.sampler.skip = done * loader.batch_size
            self._rng_state = training["rng_state"].cpu()
        self.logger.info(f"resumed after {behind} from {self.last_path}")
        began, now = _flat(training["record"]), _flat(asdict(self.record))
        changed = [f"{k} {began[k]!r} (now {now[k]!r})" for k in now if k in began and began[k] != now[k]]
        if changed:
            self.logger.warning(
                f"the training in {self.last_path} was begun with other settings: {', '.join(changed)}. Learning rate "
                "and schedule stay what they were."
            )
        if not epochs_left:
            self.logger.warning(f"nothing left to train: max_epochs is {engine.state.max_epochs}")

    def _refuse_other_schedule(self, checkpoint: Mapping[str, Any]) -> None:
        """Of another length it would end at the wrong epoch: it is the checkpoint's that goes on."""
        parts = [part for name in self.objects if isinstance(part := checkpoint[name], Mapping)]
        groups = [group for part in parts for group in part.get("param_groups", ())]
        if groups and not any(group["lr"] for group in groups):
            raise ValueError(
                f"{self.last_path} cannot be trained on: its schedule has ended at a learning rate of 0. Start from "
                "its weights in another folder, with --weights."
            )
        if all(group["lr"] == group.get("initial_lr", group["lr"]) for group in groups):
            return
        for name, item in self.objects.items():
            began, now = checkpoint[name], item.state_dict()
            for key in _SCHEDULE_LENGTHS:
                if key in began and key in now and began[key] != now[key]:
                    raise ValueError(
                        f"{self.last_path} is in the middle of a learning rate schedule of another length: {name} has "
                        f"{key} {began[key]}, this run {now[key]}. Resume with the max_epochs that the training began "
                        "with, or start from its weights in another folder, with --weights."
                    )

    def _signal(self, number: int, frame: Any) -> None:
        if self.stopped_by is not None:  # the second time: at once
            self._restore_signals()
            raise KeyboardInterrupt
        self.stopped_by = number

    def _restore_signals(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def get_batch_started(self, engine: Any) -> None:
        """Between two steps: where a signal has come, write a checkpoint and end the process."""
        if self._rng_state is not None:  # behind the iterator of the data, which draws a number
            torch.set_rng_state(self._rng_state)
            self._rng_state = None
        stopped = float(self.stopped_by or 0)
        if process_count() > 1:
            stopped = float(mean_over_processes(torch.tensor(stopped)))
        done = engine.state.iteration % (engine.state.epoch_length or 1)
        # gradients that have been gathered are not in the checkpoint
        if not stopped or done % getattr(engine, "accumulation_steps", 1):
            return
        kept = "the last whole epoch"
        if done and hasattr(getattr(engine.data_loader, "sampler", None), "skip"):
            self._write(engine, epoch=engine.state.epoch - 1)
            kept = f"iteration {done} of epoch {engine.state.epoch}"
        self._end(kept)

    def _end(self, kept: str) -> None:
        """End the process as the signal asks for."""
        number = self.stopped_by or signal.SIGTERM
        self._restore_signals()
        if process_rank() == 0:
            unlock_folder(self.last_path.parent)
            self.logger.warning(
                f"stopped by {signal.Signals(number).name}: {self.last_path} has the training up to {kept}; go on with "
                "--resume true, without --overwrite"
            )
        raise SystemExit(128 + number)

    def epoch_completed(self, engine: Any) -> None:
        """Write the checkpoint of this epoch, and the best weights when they are this epoch's."""
        self._write(engine, engine.state.epoch)

    def _write(self, engine: Any, epoch: int) -> None:
        """Write a checkpoint behind an epoch, or in the middle of the next one."""
        best_epoch, best_metric = engine.state.epoch, float("nan")
        if self.validator is not None:
            best_epoch = int(getattr(self.validator.state, "best_metric_epoch", -1))
            best_metric = float(getattr(self.validator.state, "best_metric", -1))
        elif epoch < engine.state.epoch:
            best_epoch = epoch or -1
        training = {key: getattr(engine.state, key) for key in ("iteration", "epoch_length")}
        training |= dict(epoch=epoch, best_epoch=best_epoch, best_metric=best_metric, rng_state=torch.get_rng_state())
        # of all processes
        pairs = len(getattr(engine.data_loader, "sampler", None) or ()) * process_count() * engine.state.iteration
        pairs //= engine.state.epoch_length
        training |= dict(earlier_pairs=self.earlier_pairs, pairs=self.earlier_pairs + pairs, record=asdict(self.record))
        objects = {"network": self.network, "averaged": self.averaged or _part({}), **self.objects}
        objects |= {"training": _part(training), "scaler": getattr(engine, "scaler", None) or _part({})}
        # the best weights get their names behind last.pt, which says whose they are: a kill in between loses nothing
        json_path = self.best_path.with_suffix(".json")
        staged = {path: self._staged(path, best_epoch) for path in (json_path, self.best_path)}
        try:
            if best_epoch == epoch == engine.state.epoch:
                best = {"network": self.averaged or self.network}
                Checkpoint(best, self._save, filename_pattern=staged[self.best_path].name)(engine)
                if process_rank() == 0:
                    more = {"training_pairs": training["pairs"], "epoch": best_epoch}
                    record = replace(self.record, training={**self.record.training, **more})
                    record.write(staged[json_path])
            Checkpoint(objects, self._save, filename_pattern=self.last_path.name)(engine)
        except Exception:
            if process_rank() == 0:
                for path in staged.values():
                    path.unlink(missing_ok=True)
            raise
        if best_epoch == epoch == engine.state.epoch and process_rank() == 0:
            for path, whole in staged.items():
                os.replace(whole, path)
            self.logger.info(f"best validation score so far: wrote {self.best_path}")

    def _save(self, content: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        if process_rank() == 0:
            save_checkpoint(content, self.last_path.with_name(filename))

    def _staged(self, path: Path, epoch: int) -> Path:
        """Where the best weights of an epoch and their record are until there is its ``last.pt``."""
        return path.with_name(f".epoch-{epoch}-{path.name}")

    def _finish_staged(self, epoch: int | None) -> None:
        """Give the best weights of an epoch whose ``last.pt`` was written their names; remove those of others."""
        for path in (self.best_path.with_suffix(".json"), self.best_path):
            for whole in path.parent.glob(f".epoch-*-{path.name}"):
                if epoch is not None and whole == self._staged(path, epoch):
                    os.replace(whole, path)
                else:
                    whole.unlink(missing_ok=True)

    def completed(self, engine: Engine) -> None:
        """Say so when there are no best weights."""
        self._restore_signals()
        if process_rank() == 0:
            unlock_folder(self.last_path.parent)
        if process_rank() == 0 and self.last_path.is_file() and not self.best_path.is_file():
            self.logger.warning(
                f"{self.best_path} was not written, as no epoch was validated: the weights are in {self.last_path}"
            )


def _part(state: dict[str, Any]) -> Any:
    """A part of a checkpoint that no object keeps."""
    return SimpleNamespace(state_dict=lambda: state)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    out = {}
    for key, value in content.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return out


def _pairs_behind(weights: str | Path) -> int:
    """What weights have been trained on, so far as it is known."""
    training = load_checkpoint(weights).get("training", {})
    if "pairs" in training:
        return int(training["pairs"])
    try:
        return int(read_record(weights).training.get("training_pairs") or 0)
    except FileNotFoundError:
        return 0


class WeightsLoader:
    """
    Load the weights of a network when an engine starts, where ``path`` names some; a checkpoint of another architecture
    is a clear error.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path | None) -> None:
        self.network, self.path = network, None if path is None else Path(path)

    def attach(self, engine: Engine) -> None:
        """Attach to the engine that uses the network."""
        engine.add_event_handler(Events.STARTED, self)

    def digest(self) -> str | None:
        """Twelve digits of what is in the file."""
        return None if self.path is None else hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]

    def __call__(self, engine: Engine) -> None:
        if self.path is None:
            return
        load_weights(self.network, self.path)
        logging.getLogger("monai_deq").info(f"loaded the weights in {self.path}")
