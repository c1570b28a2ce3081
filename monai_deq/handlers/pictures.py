# SPDX-License-Identifier: Apache-2.0
"""Pictures of a registration in the course of a training, and of the best and the worst pairs of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch.nn.functional import interpolate

from monai_deq.handlers.metrics import pair_means
from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.utils import gather_items, process_rank
from monai_deq.visualize import RegisteredPair, figure_png, figures_available, plot_registration

__all__ = ["TensorBoardPairHandler"]

#: scores that pairs are put in order by, and their sign where the larger one is the better
_ORDER = {"dice": 1.0, "tre": -1.0}


class TensorBoardPairHandler:
    """
    Show the first pair of a validation in TensorBoard, as :py:func:`monai_deq.visualize.plot_registration` draws it,
    in the first epoch and each ``interval`` epochs after it. Without matplotlib, or when the solver failed, nothing is
    shown and the log says so.

    Args:
        log_dir: folder of TensorBoard's files.
        interval: epochs from one picture to the next. Defaults to 10.
    """

    def __init__(self, log_dir: str, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1 epoch, got {interval}.")
        self.log_dir, self.interval = log_dir, interval

    def attach(self, engine: Engine) -> None:
        """Attach to a :py:class:`monai_deq.engines.RegistrationEvaluator`."""
        if figures_available():
            # before postprocessing brings the field to another grid
            engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the picture of the first pair."""
        output: Any = engine.state.output
        if engine.state.iteration != 1 or (engine.state.epoch - 1) % self.interval:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from torch.utils.tensorboard import SummaryWriter

        try:
            canvas = FigureCanvasAgg(plot_registration(_pair_of(output, 0)))
        except ValueError as e:  # a field that is not finite must not end the training
            logging.getLogger("monai_deq").warning(f"no picture of the first pair: {e}")
            return
        canvas.draw()
        with SummaryWriter(self.log_dir) as writer:
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            writer.add_image("registration", pixels, engine.state.epoch, dataformats="HWC")


class ExtremePairs:
    """
    Pictures of the best and of the worst pairs of an evaluation, as :py:class:`TensorBoardPairHandler` has them. A pair
    is drawn when it comes among them, and no more than these few PNGs are kept. Without matplotlib nothing is, and the
    log says so.

    Args:
        most: number of best and number of worst pairs.
        metrics: names of the metrics; the first of them that is ``dice`` or ``tre`` tells which pairs are best. Pairs
            without a score have no place.
    """

    def __init__(self, most: int, metrics: Sequence[str] | None = None) -> None:
        self.most, self.metrics = most, metrics
        self.kept: list[dict[str, Any]] = []
        #: where pairs ``(fixed, moving)`` come in the data set; those that are not here as they came
        self.places: Mapping[tuple[str, str], int] = {}
        self.batch: Mapping[str, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a :py:class:`monai_deq.engines.RegistrationEvaluator`, after its metrics."""
        if self.most and figures_available(warn=process_rank() == 0):
            engine.add_event_handler(Events.STARTED, self.kept.clear)
            # before postprocessing brings the field to another grid
            engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.forward_completed)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)

    def forward_completed(self, engine: Engine) -> None:
        """Hold the batch until it has scores."""
        self.batch = engine.state.output  # type: ignore[assignment]

    def iteration_completed(self, engine: Engine) -> None:
        """Draw the pairs of this iteration that are among the best or the worst so far."""
        batch, self.batch = self.batch, {}
        scores: Mapping[str, torch.Tensor] = getattr(engine.state, "batch_scores", {})
        names = scores if self.metrics is None else self.metrics
        name = next((name for name in names if name in _ORDER and name in scores), None)
        for index, score in enumerate(pair_means(scores[name]) if name else ()):
            if np.isfinite(score):
                pair = {key: str(batch[f"{key}_subject"][index]) for key in ("fixed", "moving")}
                self.kept.append({**pair, "order": _ORDER[str(name)] * float(score)})
                newest = self.kept[-1]
                self._sort()
                if any(entry is newest for entry in self.kept):
                    newest["png"] = _drawn(batch, index)

    def _sort(self) -> None:
        """The best first, of equals the earlier; those between the best and the worst go."""
        self.kept.sort(key=lambda e: (-e["order"], self.places.get((e["fixed"], e["moving"]), 0)))
        del self.kept[self.most : -self.most]

    def gather(self) -> dict[str, list[dict[str, Any]]]:
        """The best and the worst pairs of all processes, each the most extreme first, at most half of the pairs each;
        ``fixed``, ``moving`` and ``png``, which is ``None`` where there was nothing to draw."""
        self.kept[:] = gather_items(self.kept)
        self._sort()
        most = min(self.most, max(len(self.kept) // 2, 1))
        return {"best": self.kept[:most], "worst": self.kept[most:][::-1][:most]}


def _drawn(batch: Mapping[str, Any], index: int) -> bytes | None:
    """The picture of an item of a batch; ``None`` where it cannot be drawn, which is logged."""
    try:
        return figure_png(plot_registration(_pair_of(batch, index)))
    except Exception as e:  # must not cost the pair its scores
        names = (batch[f"{key}_subject"][index] for key in ("moving", "fixed"))
        logging.getLogger("monai_deq").warning(f"no picture of {' to '.join(map(str, names))}: {e}")
        return None


def _pair_of(output: Mapping[str, Any], index: int) -> RegisteredPair:
    """An item of a batch, its moving labels warped."""
    keys = ("fixed", "moving", "warped", "ddf", "fixed_label", "moving_label", "fixed_mask")
    item = {key: output[key][index] for key in (*keys, "fixed_subject", "moving_subject") if key in output}
    label = item.get("moving_label")
    if label is not None and label.shape[1:] == item["ddf"].shape[1:]:
        label, ddf = (torch.as_tensor(t).as_subclass(torch.Tensor)[None] for t in (label, item["ddf"]))
        item["warped_label"] = warp_by_ddf(label.to(ddf.device), ddf.float(), mode="nearest")[0]
    if "fixed_mask" in item:  # it may lie on the grid of the scan, and tells where to look
        mask = torch.as_tensor(item["fixed_mask"]).as_subclass(torch.Tensor)[None].float()
        item["fixed_mask"] = interpolate(mask, item["ddf"].shape[1:])[0]
    return RegisteredPair.from_item(item)
