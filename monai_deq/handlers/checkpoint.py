# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training that appear whole, resume exactly, and are not overwritten unasked."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Events

from monai_deq.networks import load_checkpoint, load_weights, trained_with
from monai_deq.utils import as_flag, gather_items, process_rank, refuse_existing, replace_file

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["TrainingCheckpoint", "WeightsLoader"]

#: what checkpoints did not have at first, or do not always have
_OPTIONAL = {"averaged", "scaler", "settings", "training_pairs"}
_OWN = {"network", "trainer", "best_epoch", "best_metric", "rng_state"} | _OPTIONAL

#: where the learning rate schedules of PyTorch and MONAI keep their length
_SCHEDULE_LENGTHS = ("total_iters", "total_steps", "T_max", "t_total")


class TrainingCheckpoint:
    """
    After each epoch writes ``last.pt``, all that is needed to go on (network, optimizer and what else is named, state
    of the trainer and of its gradient scaler, best validation score, random state of the CPU), and, when the validation
    score is the best so far, ``model.pt``, the weights of the network alone, or those of its running mean.

    Unlike :py:class:`monai.handlers.CheckpointSaver` files are put into place whole, the best score survives a
    resume, and a folder that holds a checkpoint is not written to unless asked. In the middle of a learning rate
    schedule a training is not resumed with a schedule of another length. Place it after the validation handler and
    after the handler that steps the learning rate.

    Of several processes the first one writes, and all of them read: the folder must be one that they share. Networks
    are given as they are, without ``DistributedDataParallel`` around them. ``state_dict`` of the other objects is
    called in all processes, so that it may gather what each of them has, as that of
    :py:class:`monai_deq.data.StatePool` does.

    Args:
        save_dir: folder of the checkpoints.
        network: the network.
        objects: other objects with ``state_dict``/``load_state_dict``, by name (optimizer, scheduler).
        validator: engine whose key metric decides on ``model.pt``; without one the last epoch is the best.
        resume: go on from ``last.pt`` where there is one. Defaults to ``False``.
        overwrite: start anew over an existing checkpoint. Defaults to ``False``.
        weights: checkpoint whose weights the network starts from, when it does not resume. Defaults to none.
        weights_without: beginning of the names of weights that ``weights`` leave as they are, see
            :py:func:`monai_deq.networks.load_weights`. Defaults to none.
        averaged: running mean of the network, such as ``ema_model`` of :py:class:`ignite.handlers.EMAHandler`: it
            starts from the same weights, its weights are in ``last.pt`` too, and ``model.pt`` has them. The validator
            should score it. Defaults to none.
        settings: what evaluation and inference should know of the training (e.g. the image size), written beside
            ``model.pt`` as ``model.json``, see :py:func:`monai_deq.networks.trained_with`. Those that are others than
            the training began with are named in a warning when it is resumed.
        pairs_per_epoch: number of pairs in an epoch of all processes. With it ``model.json`` has ``training_pairs``:
            how many the weights in ``model.pt`` have been trained on, those behind ``weights`` included. Defaults to
            ``None``: not counted.

    Raises:
        ValueError: When both ``resume`` and ``overwrite`` are asked for, or a name in ``objects`` is one of the
            checkpoint's own.
        TypeError: When ``settings`` hold what JSON does not know.
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
        weights_without: str | None = None,
        averaged: torch.nn.Module | None = None,
        settings: Mapping[str, Any] | None = None,
        pairs_per_epoch: int | None = None,
    ) -> None:
        self.resume, self.overwrite = as_flag(resume, "resume"), as_flag(overwrite, "overwrite")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other.")
        self.last_path = Path(save_dir) / "last.pt"
        self.best_path = Path(save_dir) / "model.pt"
        self.network = network
        self.objects = dict(objects or {})
        self.validator = validator
        self.weights = weights
        self.weights_without = weights_without
        self.averaged = averaged
        self.settings = dict(settings or {})
        self.pairs_per_epoch = pairs_per_epoch
        #: what the weights that the training starts from have been trained on
        self.earlier_pairs = 0
        taken = _OWN & set(self.objects)
        if taken:
            raise ValueError(f"objects must not be called {sorted(taken)}: the checkpoint has entries of that name.")
        try:
            json.dumps(self.settings)
        except TypeError as e:
            raise TypeError(f"settings must be plain values that JSON knows, got {self.settings}.") from e
        self.logger = logging.getLogger("monai_deq")

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Resume, or make sure that nothing is overwritten unasked."""
        if len(set(gather_items([self.last_path.is_file()]))) > 1:
            raise FileNotFoundError(
                f"{self.last_path} is seen by some of the processes alone: name a --ckpt_dir that all of them share."
            )
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
        if self.weights:
            load_weights(self.network, self.weights, self.weights_without)
            if self.averaged is not None:
                self.averaged.load_state_dict(self.network.state_dict())
            self._count_earlier_pairs()
            self.logger.info(f"training starts from the weights in {self.weights}")

    def _count_earlier_pairs(self) -> None:
        if self.pairs_per_epoch is not None and self.weights and Path(self.weights).is_file():
            # of the last epoch, or as training writes it beside the best weights
            own = load_checkpoint(self.weights).get("training_pairs")
            self.earlier_pairs = int(own or trained_with(self.weights).get("training_pairs") or 0)

    def _training_pairs(self, epoch: int) -> int | None:
        return None if self.pairs_per_epoch is None else self.earlier_pairs + epoch * self.pairs_per_epoch

    def _load(self, engine: Engine) -> None:
        checkpoint = load_checkpoint(self.last_path)
        absent = (_OWN - _OPTIONAL | set(self.objects)) - set(checkpoint)
        if absent:
            raise ValueError(f"{self.last_path} cannot be resumed from: it has no {sorted(absent)}.")
        trainer = checkpoint["trainer"]
        if trainer["epoch_length"] != engine.state.epoch_length:
            raise ValueError(
                f"{self.last_path} was trained with {trainer['epoch_length']} iterations an epoch, this run has "
                f"{engine.state.epoch_length}: resume with the same pairs_per_epoch and batch_size."
            )
        epochs_left = trainer["epoch"] < (engine.state.max_epochs or 0)
        rates = [group["lr"] for name in self.objects for group in _param_groups(checkpoint[name])]
        if epochs_left and rates and not any(rates):
            raise ValueError(
                f"{self.last_path} cannot be trained on: its schedule has ended at a learning rate of 0. Start from "
                "its weights in another folder, with --weights."
            )
        if epochs_left:
            self._refuse_other_schedule(checkpoint)
        load_weights(self.network, self.last_path)
        if self.averaged is not None:
            # begun without a mean: from here on
            self.averaged.load_state_dict(checkpoint.get("averaged") or self.network.state_dict())
        for name, item in self.objects.items():
            item.load_state_dict(checkpoint[name])
        scaler = getattr(engine, "scaler", None)
        # a scaler that is not in use, or was not when the checkpoint was written, has nothing to say
        if scaler is not None and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
        if self.pairs_per_epoch is not None and checkpoint.get("training_pairs") is not None:
            self.earlier_pairs = checkpoint["training_pairs"] - trainer["epoch"] * self.pairs_per_epoch
        else:  # which checkpoints did not say at first
            self._count_earlier_pairs()
        engine.state.epoch = trainer["epoch"]
        engine.state.iteration = trainer["iteration"]
        if self.validator is not None and checkpoint["best_epoch"] >= 0:
            if self.best_path.is_file():
                state: Any = self.validator.state
                state.best_metric, state.best_metric_epoch = checkpoint["best_metric"], checkpoint["best_epoch"]
            else:
                self.logger.warning(f"{self.best_path} is gone: the best score is counted from here on anew")
        torch.set_rng_state(checkpoint["rng_state"].cpu())
        self.logger.info(f"resumed after epoch {trainer['epoch']} from {self.last_path}")
        began, now = checkpoint.get("settings", {}), json.loads(json.dumps(self.settings))
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
        groups = [group for name in self.objects for group in _param_groups(checkpoint[name])]
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

    def epoch_completed(self, engine: Engine) -> None:
        """Write the checkpoint of this epoch, and the best weights when they are this epoch's."""
        best_epoch, best_metric = engine.state.epoch, float("nan")
        if self.validator is not None:
            best_epoch = int(getattr(self.validator.state, "best_metric_epoch", -1))
            best_metric = float(getattr(self.validator.state, "best_metric", -1))
        scaler = getattr(engine, "scaler", None)
        checkpoint = {
            "network": self.network.state_dict(),
            "averaged": {} if self.averaged is None else self.averaged.state_dict(),
            **{name: item.state_dict() for name, item in self.objects.items()},
            "trainer": {
                "epoch": engine.state.epoch,
                "iteration": engine.state.iteration,
                "epoch_length": engine.state.epoch_length,
            },
            "best_epoch": best_epoch,
            "best_metric": best_metric,
            "rng_state": torch.get_rng_state(),
            "scaler": {} if scaler is None else scaler.state_dict(),
            "settings": json.loads(json.dumps(self.settings)),
            "training_pairs": self._training_pairs(engine.state.epoch),
        }
        if process_rank() > 0:
            return
        if best_epoch == engine.state.epoch:
            with replace_file(self.best_path) as path:
                torch.save(checkpoint["averaged"] or checkpoint["network"], path)
            with replace_file(self.best_path.with_suffix(".json")) as path:
                pairs = self._training_pairs(best_epoch)
                counted = {} if pairs is None else {"training_pairs": pairs}
                path.write_text(json.dumps({**self.settings, **counted, "epoch": best_epoch}, indent=2) + "\n")
            self.logger.info(f"best validation score so far: wrote {self.best_path}")
        with replace_file(self.last_path) as path:
            torch.save(checkpoint, path)

    def completed(self, engine: Engine) -> None:
        """Say so when there are no best weights."""
        if process_rank() == 0 and self.last_path.is_file() and not self.best_path.is_file():
            self.logger.warning(
                f"{self.best_path} was not written, as no epoch was validated: the weights are in {self.last_path}"
            )


def _param_groups(state: Any) -> list[Mapping[str, Any]]:
    """Those of an optimizer; none of any other object."""
    return list(state.get("param_groups", ())) if isinstance(state, Mapping) else []


class WeightsLoader:
    """
    Load the weights of a network when an engine starts; a checkpoint of another architecture is a clear error.

    Args:
        network: the network.
        path: checkpoint file.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path) -> None:
        self.network = network
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the engine that uses the network.
        """
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load the weights."""
        load_weights(self.network, self.path)
        logging.getLogger("monai_deq").info(f"loaded the weights in {self.path}")
