# SPDX-License-Identifier: Apache-2.0
"""Pictures of a registration in the course of a training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch.nn.functional import interpolate

from monai_deq.networks.blocks import warp_by_ddf
from monai_deq.visualize import RegisteredPair, figures_available, plot_registration

__all__ = ["TensorBoardPairHandler"]


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
            canvas = FigureCanvasAgg(plot_registration(_first_pair(output)))
        except ValueError as e:  # a field that is not finite must not end the training
            logging.getLogger("monai_deq").warning(f"no picture of the first pair: {e}")
            return
        canvas.draw()
        with SummaryWriter(self.log_dir) as writer:
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            writer.add_image("registration", pixels, engine.state.epoch, dataformats="HWC")


def _first_pair(output: Mapping[str, Any]) -> RegisteredPair:
    """The first item of a batch, its moving labels warped."""
    keys = ("fixed", "moving", "warped", "ddf", "fixed_label", "moving_label", "fixed_mask")
    item = {key: output[key][0] for key in (*keys, "fixed_subject", "moving_subject") if key in output}
    label = item.get("moving_label")
    if label is not None and label.shape[1:] == item["ddf"].shape[1:]:
        label, ddf = (torch.as_tensor(t).as_subclass(torch.Tensor)[None] for t in (label, item["ddf"]))
        item["warped_label"] = warp_by_ddf(label.to(ddf.device), ddf.float(), mode="nearest")[0]
    if "fixed_mask" in item:  # it may lie on the grid of the scan, and tells where to look
        mask = torch.as_tensor(item["fixed_mask"]).as_subclass(torch.Tensor)[None].float()
        item["fixed_mask"] = interpolate(mask, item["ddf"].shape[1:])[0]
    return RegisteredPair.from_item(item)
