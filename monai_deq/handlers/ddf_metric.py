# SPDX-License-Identifier: Apache-2.0
"""Ignite side of the metrics that score a displacement field alone, with or without a mask."""

from __future__ import annotations

from typing import Any

import torch

from monai_deq.handlers.whole_output import WholeOutputMetricHandler

__all__ = ["DDFMetricHandler"]


class DDFMetricHandler(WholeOutputMetricHandler):
    """
    Base of the handlers whose metric needs no ground truth.

    ``monai.handlers.IgniteMetricHandler`` takes whatever it is given apart into (prediction, target), so that one field
    tensor of batch size 2 becomes a field and its "target", and a wrong number is reported. Here the type of what
    ``output_transform`` returns decides, with nothing left to the batch size:

    - a tensor is a batch of fields, shape ``(B, ndim, *spatial)``;
    - a list is a batch of fields, each of shape (ndim, *spatial), as after ``decollate_batch``;
    - a tuple is the pair (fields, masks), each a tensor or a list as above, masks of shape ``(B, 1, *spatial)`` or
      ``(1, *spatial)``; masks may be None.

    ``monai.handlers.from_engine("ddf")`` and ``from_engine(["ddf", "mask"])`` return just that.
    """

    def update(self, output: Any) -> None:
        """
        Score fields, and masks if any.

        Args:
            output: fields as a tensor or list, or the tuple (fields, masks).

        Raises:
            TypeError: when ``output`` is none of these.
            ValueError: when a tuple does not hold two elements.
        """
        if isinstance(output, tuple):
            if len(output) != 2:
                raise ValueError(f"output_transform: expected a tuple (ddf, mask), got a tuple of {len(output)}.")
            ddf, mask = output
        elif isinstance(output, (torch.Tensor, list)):
            ddf, mask = output, None
        else:
            raise TypeError(
                "output_transform: expected to return a ddf tensor, a list of ddf tensors or a tuple (ddf, mask), got "
                f"{type(output).__name__}. For a dictionary, use monai.handlers.from_engine('ddf')."
            )
        super().update((ddf, mask))
