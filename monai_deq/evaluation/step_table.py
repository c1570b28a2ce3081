# SPDX-License-Identifier: Apache-2.0
"""Scores over the number of steps, summed up: curves, and trained against best steps (paper, Table 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from monai_deq.evaluation.step_scores import StepScore

__all__ = ["LIMITS", "PANELS", "StepCurve", "measured_panels", "step_curves", "step_table"]

#: scores that are drawn: title, factor, whether the axis is logarithmic
PANELS: dict[str, tuple[str, float, bool]] = {
    "dice": ("Dice (%)", 100.0, False),
    "folded_percent": ("folded voxels (%)", 1.0, False),
    "similarity": ("local cross-correlation", 1.0, False),
    "residual": ("residual (voxel)", 1.0, True),
    "start_distance": ("distance from a random start's (voxel)", 1.0, True),
}
#: what counts as standing still, and as the same solution, in voxels
LIMITS: dict[str, float] = {"residual": 0.005, "start_distance": 0.05}


@dataclass(frozen=True)
class StepCurve:
    """
    A score over the steps.

    Args:
        steps: numbers of steps, in order.
        mean: mean over the pairs after each; NaN where a pair had no score.
        std: sample standard deviation.
        median: median over the pairs after each, NaN likewise.
        within: share of the pairs at or below the score's limit in ``LIMITS``, 0 where it has none; a pair without a
            score is not.
        pairs: number of pairs.
    """

    steps: list[int]
    mean: list[float]
    std: list[float]
    median: list[float]
    within: list[float]
    pairs: int

    def at(self, step: int) -> float:
        """
        Mean after a number of steps.

        Args:
            step: one of ``steps``.
        """
        return self.mean[self.steps.index(step)]

    @property
    def best(self) -> int:
        """Number of steps with the highest mean, the fewest where several have it."""
        values = np.asarray(self.mean)
        return self.steps[int(np.nanargmax(values))] if np.isfinite(values).any() else self.steps[0]


def step_curves(scores: Sequence[StepScore]) -> dict[str, StepCurve]:
    """
    Curves of all scores of one method.

    Args:
        scores: of all pairs and steps. A pair whose displacement was not finite has no scores from there on; the mean
            is NaN wherever one is missing, and not one over the pairs that are left.

    Raises:
        ValueError: When there is none.
    """
    if not scores:
        raise ValueError("scores: expected those of at least one pair, got none.")
    pairs = list(dict.fromkeys((s.fixed, s.moving) for s in scores))
    steps = sorted({s.step for s in scores if math.isfinite(s.dice)} or {s.step for s in scores})
    out = {}
    for name in StepScore._fields[3:]:
        values = np.full((len(pairs), len(steps)), np.nan)
        for s in scores:
            if s.step in steps:
                values[pairs.index((s.fixed, s.moving)), steps.index(s.step)] = getattr(s, name)
        std = values.std(axis=0, ddof=1) if len(pairs) > 1 else np.full(len(steps), np.nan)
        within = (values <= LIMITS.get(name, -math.inf)).mean(axis=0)
        median = np.median(values, axis=0)
        out[name] = StepCurve(
            steps, values.mean(axis=0).tolist(), std.tolist(), median.tolist(), within.tolist(), len(pairs)
        )
    return out


def measured_panels(curves: Mapping[str, Mapping[str, StepCurve]]) -> list[str]:
    """
    Scores of ``PANELS`` that any method has; those from a random start only when it was asked for.

    Args:
        curves: by title of a method, by name of a score, its curve.
    """
    return [name for name in PANELS if any(np.isfinite(scores[name].mean).any() for scores in curves.values())]


def step_table(
    curves: Mapping[str, Mapping[str, StepCurve]], trained_steps: Mapping[str, int], steps: Sequence[int] = ()
) -> str:
    """
    The paper's Table 2 as Markdown, with what tells a fixed point: each method at the steps of its training, at its
    best Dice, and at the last step. Dice, folded voxels and similarity are means over the pairs, residual and start
    distance medians, with the share of the pairs within ``LIMITS``.

    Args:
        curves: by title of a method, by name of a score, its curve.
        trained_steps: by title, the steps that the method was trained with.
        steps: further steps. Defaults to none.
    """
    residual, distance = (f"<= {LIMITS[k]:g} (% of pairs)" for k in ("residual", "start_distance"))
    names = ["Dice %", "folded %", "similarity", "residual", residual, "relative residual", "start distance", distance]
    lines = [f"| method | steps | | {' | '.join(names)} |", f"| --- | ---: | --- |{' ---: |' * len(names)}"]
    for title, scores in curves.items():
        scored, best = scores["dice"].steps, scores["dice"].best
        words: dict[int, list[str]] = {trained_steps[title]: ["trained"]}
        words.setdefault(best, []).append("best Dice")
        words.setdefault(scored[-1], []).append("last")
        for step in steps:
            words.setdefault(step, [])
        for step in sorted(words):
            cells = ["-"] * len(names)
            if step in scored:
                at = scored.index(step)
                medians, shares = (
                    {k: getattr(scores[k], part)[at] for k in ("residual", "relative_residual", "start_distance")}
                    for part in ("median", "within")
                )
                cells = [
                    f"{100 * scores['dice'].mean[at]:.2f}",
                    f"{scores['folded_percent'].mean[at]:.3f}",
                    f"{scores['similarity'].mean[at]:.4f}",
                    f"{medians['residual']:.2g}",
                    f"{100 * shares['residual']:.0f}",
                    f"{medians['relative_residual']:.2g}",
                    f"{medians['start_distance']:.2g}",
                    f"{100 * shares['start_distance']:.0f}",
                ]
                if not math.isfinite(medians["start_distance"]):  # no random starts, or a pair that was lost
                    cells[-2:] = ["-", "-"]
            lines.append(f"| {title} | {step} | {', '.join(words[step])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
