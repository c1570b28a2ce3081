# SPDX-License-Identifier: Apache-2.0
"""Metrics over the output of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric

from monai_deq.metrics import FoldedVoxelsMetric, NonDiffeomorphicVolumeMetric, StdLogJacobianMetric

__all__ = ["MetricHandler", "regularity_metrics"]


class MetricHandler(IgniteMetricHandler):
    """
    Score the output of every iteration by a metric, and put the reduced score into ``engine.state.metrics``.

    The metric gets each value whole, a batch-first tensor or a list with one tensor an item, which may differ in size:
    :py:class:`monai.handlers.IgniteMetricHandler` takes one tensor with two items for a prediction and its target.
    The scores of the items of the iteration are in ``engine.state.batch_scores``, by the metric's name.

    Args:
        metric: e.g. one of :py:mod:`monai_deq.metrics`.
        keys: keys of ``engine.state.output``, a dictionary or a list of them (decollated), in the order of the metric's
            arguments; None passes None.
        save_details: whether to keep the scores of every item in ``engine.state.metric_details``.
    """

    def __init__(
        self, metric: CumulativeIterationMetric, keys: str | Sequence[str | None] = "ddf", save_details: bool = True
    ) -> None:
        if not isinstance(metric, CumulativeIterationMetric):
            raise TypeError(f"metric: expected a CumulativeIterationMetric of MONAI, got {type(metric).__name__}.")
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        if all(key is None for key in self.keys) or not all(key is None or isinstance(key, str) for key in self.keys):
            raise TypeError(f"keys: expected one key or more of the output, or None for no value, got {keys!r}.")
        #: scores to begin with, of pairs that an earlier run has measured
        self.earlier: torch.Tensor | None = None
        self.scored: list[torch.Tensor] = []
        super().__init__(metric_fn=metric, save_details=save_details)

    def attach(self, engine: Engine, name: str) -> None:  # type: ignore[override]
        """Attach to the engine, under the name that the metric has there."""
        super().attach(engine, name)
        self.name = name
        if not hasattr(engine.state, "batch_scores"):
            engine.state.batch_scores = {}  # type: ignore[attr-defined]

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Score the output of an iteration, ``TypeError`` for one of another kind, ``KeyError`` when it lacks a key."""
        self.update(engine.state.output)
        engine.state.batch_scores[self.name] = self.latest  # type: ignore[attr-defined]

    def update(self, output: Any) -> None:
        """Score an output, see :py:meth:`iteration_completed`."""
        items = output if isinstance(output, list) else [output]
        if not items or not all(isinstance(item, Mapping) for item in items):
            kind = f"a list of {type(items[0]).__name__}" if isinstance(output, list) and items else repr(type(output))
            raise TypeError(f"engine.state.output: expected a dictionary or a list of them, got {kind}.")
        for key in self.keys:
            if key is not None and not all(key in item for item in items):
                raise KeyError(f"keys: the output has no {key!r}, it has {sorted(map(str, items[0]))}.")
        values: list[Any] = [None if key is None else [item[key] for item in items] for key in self.keys]
        if not isinstance(output, list):
            values = [None if value is None else value[0] for value in values]
        self.latest = cast(torch.Tensor, self.metric_fn(*values))
        self.scored.append(self.latest)

    def reset(self) -> None:
        """Forget all scores but the earlier ones."""
        super().reset()
        self.scored = [] if self.earlier is None else [self.earlier]
        self._give()

    def undo(self) -> None:
        """Forget the scores of the latest iteration, whose pairs failed behind."""
        self.scored.pop()
        self.metric_fn.reset()
        self._give()

    def _give(self) -> None:
        if self.scored:
            self.metric_fn.extend(torch.cat(self.scored))

    def compute(self) -> Any:
        """The reduced score; NaN where all pairs failed."""
        return super().compute() if self.metric_fn.get_buffer() is not None else float("nan")


def pair_means(scores: torch.Tensor) -> np.ndarray:
    """The mean of each row of scores (B, C) over those that are there, NaN where there is none."""
    values = np.asarray(scores.cpu(), dtype=float)
    with np.errstate(invalid="ignore"):  # 0 / 0: no label has a score
        means: np.ndarray = np.nansum(values, axis=1) / (~np.isnan(values)).sum(axis=1)
    return means


def regularity_metrics(
    keys: str | Sequence[str] = "ddf", suffix: str = "", ndv: bool = True
) -> dict[str, MetricHandler]:
    """
    The metrics of a displacement's regularity by the names they have in tables with ``suffix`` behind:
    ``folded_percent``, ``std_log_jacobian`` (the paper's form), ``sdlogj_learn2reg`` and, with ``ndv``,
    ``ndv_percent``. ``keys``: displacement, and mask of the fixed image if any, in the output of the engine.
    """
    metrics: dict[str, CumulativeIterationMetric] = {
        "folded_percent": FoldedVoxelsMetric(),
        "std_log_jacobian": StdLogJacobianMetric(form="paper"),
        "sdlogj_learn2reg": StdLogJacobianMetric(form="learn2reg"),
    }
    if ndv:
        metrics["ndv_percent"] = NonDiffeomorphicVolumeMetric()
    return {name + suffix: MetricHandler(metric, keys) for name, metric in metrics.items()}
