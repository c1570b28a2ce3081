# SPDX-License-Identifier: Apache-2.0
"""Ignite handler for the Dice coefficient of warped labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from monai.utils import MetricReduction

from monai_deq.handlers.whole_output import WholeOutputMetricHandler
from monai_deq.metrics import LabelDiceMetric

__all__ = ["LabelDice"]


class LabelDice(WholeOutputMetricHandler):
    """
    Computes the Dice coefficient of chosen labels between warped and fixed label maps, and reduces it over an epoch.

    Args:
        labels: the labels to score, without the background 0.
        reduction: see :py:class:`monai_deq.metrics.ReducedIterationMetric`. Defaults to ``"mean"``.
        output_transform: takes ``engine.state.output`` to ``(warped_label, fixed_label)`` or to
            ``(warped_label, fixed_label, moving_label)``, a tuple whose elements are tensors ``(B, 1, *spatial)`` or
            lists of tensors ``(1, *spatial)``; with the moving labels, one that the warp made vanish scores 0. Defaults
            to identity.
        save_details: whether to keep the scores of every pair in ``engine.state.metric_details``. Defaults to True.

    See also:
        :py:func:`monai_deq.metrics.compute_label_dice`
    """

    def __init__(
        self,
        labels: Sequence[int],
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            metric_fn=LabelDiceMetric(labels=labels, reduction=reduction),
            output_transform=output_transform,
            save_details=save_details,
        )

    def update(self, output: Any) -> None:
        """
        Score warped labels.

        Args:
            output: ``(warped_label, fixed_label)`` or ``(warped_label, fixed_label, moving_label)``.

        Raises:
            ValueError: when ``output`` is not a tuple of 2 or 3 elements.
        """
        # a lone tensor of batch size 2 would come apart into two label maps and score a wrong number
        if not isinstance(output, tuple) or len(output) not in (2, 3):
            came = f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__
            raise ValueError(
                "output_transform: expected to return the tuple (warped_label, fixed_label) or "
                f"(warped_label, fixed_label, moving_label), got {came}."
            )
        warped, fixed, *moving = output
        self.metric_fn(warped, fixed, moving_label=moving[0] if moving else None)
